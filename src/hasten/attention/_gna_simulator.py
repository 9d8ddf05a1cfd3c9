"""How fast neighborhood attention can be, from counting tiles: the simulator of GNA's section 3 (arXiv 2504.16922).

A kernel computes whole tiles of T_Q queries by T_KV keys, so what a pattern saves is the tiles that it never visits,
not the pairs that it masks. A box of queries and a box of keys see each other where their sides do in every dimension,
so visited tiles are counted per dimension and multiplied.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.math.shapes import Bool

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What a pattern costs in tiles.

    Attributes:
        tile_q, tile_k: shapes of the tiles.
        visited: tiles with at least one visible pair; `masked`: those of them that need a mask.
        dense: tiles of dense attention over the tokens in their own order.
        flops: pairs of dense attention over visible pairs: the speed-up if nothing was computed in vain.
    """

    tile_q: Sizes
    tile_k: Sizes
    visited: int
    masked: int
    dense: int
    flops: float

    @property
    def speedup(self) -> float:
        """Upper bound: dense tiles over visited ones."""
        return self.dense / self.visited

    @property
    def perfect(self) -> bool:
        """Perfectly block-sparse: no tile needs a mask."""
        return self.masked == 0

    def as_dict(self) -> dict[str, float | int | list[int]]:
        shapes = {"tile_q": list(self.tile_q), "tile_k": list(self.tile_k)}
        counts = {"visited": self.visited, "masked": self.masked, "dense": self.dense}
        return {**shapes, **counts, "speedup_bound": self.speedup, "flop_ratio": self.flops}


def axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> Bool[Tensor, "q k"]:
    """Which positions of one dimension see which, [length, length]; a window that is too long takes all."""
    place = torch.arange(length)
    x, group = place // dilation, place % dilation
    sizes = (length - group + dilation - 1) // dilation  # of each one's dilation group
    width = sizes.clamp(max=window)
    if causal:
        leader = torch.minimum(x // stride * stride + stride - 1, sizes - 1)
        start, end = (leader - window + 1).clamp(min=0), x + 1
    else:
        leader = torch.minimum(x // stride * stride + stride // 2, sizes - 1)
        start = torch.minimum((leader - width // 2).clamp(min=0), sizes - width)
        end = start + width
    return (group[:, None] == group) & (start[:, None] <= x) & (x < end[:, None])


def simulate(
    grid: Sizes, window: Sizes, stride: Sizes, dilation: Sizes, causal: tuple[bool, ...], tile_q: Sizes, tile_k: Sizes
) -> Simulation:
    """Counts tiles of one head over a grid of tokens.

    Args:
        grid: tokens per dimension; window, stride, dilation, causal: the pattern, per dimension.
        tile_q, tile_k: tile shapes; at borders and at the ends of dilation groups tiles are padded.
    """
    visited = whole = pairs = 1
    for side in zip(grid, window, stride, dilation, causal, tile_q, tile_k, strict=True):
        some, every, visible = _side(*side)
        visited, whole, pairs = visited * some, whole * every, pairs * visible
    tokens = math.prod(grid)
    dense = -(-tokens // math.prod(tile_q)) * -(-tokens // math.prod(tile_k))
    return Simulation(tile_q, tile_k, visited, visited - whole, dense, tokens**2 / pairs)


@functools.lru_cache(maxsize=4096)
def _side(
    length: int, window: int, stride: int, dilation: int, causal: bool, size_q: int, size_k: int
) -> tuple[int, int, int]:
    """Of one dimension: pairs of tile sides that see each other at all, those that do throughout, visible pairs."""
    sees = axis(length, window, stride, dilation, causal)
    some = every = 0
    for group in range(min(dilation, length)):
        inside = sees[group::dilation, group::dilation]
        padding = (0, -len(inside) % size_k, 0, -len(inside) % size_q)
        for value in (False, True):
            tiles = F.pad(inside, padding, value=value)
            tiles = tiles.unflatten(1, (-1, size_k)).unflatten(0, (-1, size_q))  # [T, size_q, U, size_k]
            found = int((tiles.all(3).all(1) if value else tiles.any(3).any(1)).sum())
            some, every = (some, every + found) if value else (some + found, every)
    return some, every, int(sees.sum())


@functools.lru_cache(maxsize=64)
def best_tiles(
    grid: Sizes,
    window: Sizes,
    stride: Sizes,
    dilation: Sizes,
    causal: tuple[bool, ...],
    tokens_q: int,
    tokens_k: int,
) -> Simulation:
    """The best tile shapes of so many tokens, of all factorisations of `tokens_q` and `tokens_k`.

    The best visit the fewest tiles, those with a mask counted twice: they take about twice the time.
    """
    sides = [-(-length // gap) for length, gap in zip(grid, dilation, strict=True)]
    tried = [
        simulate(grid, window, stride, dilation, causal, one, other)
        for one in shapes(tokens_q, sides)
        for other in shapes(tokens_k, sides)
    ]
    return min(tried, key=lambda one: (one.visited + one.masked, one.visited, one.tile_q, one.tile_k))


def shapes(tokens: int, sides: list[int]) -> list[Sizes]:
    """All tile shapes of so many tokens whose sides are at most the next power of two of the grid's; never none."""
    limits = [1 << (side - 1).bit_length() for side in sides]
    found = [shape for shape in _factors(tokens, len(sides)) if all(a <= b for a, b in zip(shape, limits, strict=True))]
    return found or [tuple([1] * (len(sides) - 1) + [tokens])]


def _factors(number: int, parts: int) -> list[Sizes]:
    if parts == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in _factors(number // d, parts - 1)]
