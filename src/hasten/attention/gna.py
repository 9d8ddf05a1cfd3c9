"""GNA: each token sees the window of tokens around it, in 1, 2 or 3 dimensions (arXiv 2504.16922).

Section 2. Along a dimension of length L, window w, stride s, dilation d, the query at i (of the tokens that leave the
same remainder by d) follows the leader of its stride group and sees the keys [a, a + w):

    leader = min(floor(i / s) s + floor(s / 2), L - 1),   a = clamp(leader - floor(w / 2), 0, L - w)

so that windows move inwards at borders; causal: leader = min(floor(i / s) s + s - 1, L - 1), keys [leader - w + 1, i].
A key is seen where it is so in every dimension. s = 1 slides, s = w makes blocks. q, k, v [B, H, N, d], the grid's
tokens in row order.

Tokens are put in the order of multi-dimensional tiles, so that a window touches few of them (section 3); the simulator
chooses their shapes. Departures: a window longer than the grid takes all of it (the original refuses it); prefix tokens
(class, registers) see all and are seen by all; no padding: what whole tiles leave over is packed behind them.
"""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from hasten.attention._gna_simulator import Simulation, Sizes, best_tiles, simulate
from hasten.attention._gna_tiles import tile_tokens, tiled
from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.kernels.block_attention import attention
from hasten.math.blocks import Blocks
from hasten.math.shapes import Float

CARD = Card(
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    paper="2504.16922",
    seams=("attention.mask",),
    effects=("time", "quality"),
    lossless=False,
    claim="28% to 46% end to end on a B200 (Cosmos-7B, HunyuanVideo, FLUX) without fine-tuning",
    claimed=1.46,
    identity={"window": 1000000},
    experiment=("digits-vit(task=classify)", "attention/gna(window=8, stride=8, blocks=[3, 4, 5, 6, 7])"),
    when="Images and video of thousands of tokens: stride equal to the tile's side, in blocks that look at neighbours.",
    when_not="Grids of a few hundred tokens, or windows near the grid's size: the simulator's bound shows it first.",
    hosts=("vit", "denoiser"),
)


def naive_gna(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    grid: Sizes,
    window: Sizes,
    stride: Sizes,
    dilation: Sizes,
    causal: tuple[bool, ...],
    prefix: int = 0,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention query by query, each over its window.

    Args:
        grid: tokens of each dimension; the first `prefix` of the N = prefix + prod(grid) tokens stand outside of it.
        window, stride, dilation, causal: one entry per dimension.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    places = list(itertools.product(*(range(length) for length in grid)))
    numbers = {place: prefix + i for i, place in enumerate(places)}
    rows = []
    for i in range(prefix + len(places)):
        keys = list(range(prefix + len(places)))
        if i >= prefix:
            sides = []
            for at, length, w, s, d, one_way in zip(
                places[i - prefix], grid, window, stride, dilation, causal, strict=True
            ):
                group, x = at % d, at // d
                last = (length - 1 - group) // d  # of the dilation group
                if one_way:
                    leader = min(x // s * s + s - 1, last)
                    inner = range(max(leader - w + 1, 0), x + 1)
                else:
                    w = min(w, last + 1)
                    leader = min(x // s * s + s // 2, last)
                    start = min(max(leader - w // 2, 0), last + 1 - w)
                    inner = range(start, start + w)
                sides.append([y * d + group for y in inner])
            keys = [*range(prefix), *(numbers[place] for place in itertools.product(*sides))]
        weights = (q[:, :, i : i + 1].float() @ k[:, :, keys].float().mT * scaling).softmax(-1)
        rows.append(weights @ v[:, :, keys].float())
    return torch.cat(rows, dim=2).to(q.dtype)


def gna(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    grid: Sizes,
    window: Sizes,
    stride: Sizes,
    dilation: Sizes,
    causal: tuple[bool, ...],
    prefix: int = 0,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """As `naive_gna`, over tiles; differentiable."""
    tokens = tile_tokens(q.device)
    found = best_tiles(grid, window, stride, dilation, causal, tokens, tokens)
    blocks = tiled(grid, window, stride, dilation, causal, prefix, found.tile_q, found.tile_k).to(q.device)
    return attention(q, k, v, blocks, scaling=scaling, causal=False)


@dataclasses.dataclass(frozen=True)
class GNA(SparseAttention):
    """Windows around each token. One number stands for all dimensions, several are (frames,) rows, columns."""

    window: int | tuple[int, ...] = option(7, "tokens of the window along each dimension", least=1)
    stride: int | tuple[int, ...] = option(1, "queries side by side that share a window", least=1)
    dilation: int | tuple[int, ...] = option(1, "distance of the tokens that a window takes", least=1)
    causal: bool | tuple[bool, ...] = option(False, "along which dimensions nothing later is seen")
    blocks: tuple[int, ...] | None = option(None, "the blocks whose attention is local; none is all", least=0)
    tokens: int | None = option(
        None,
        "tokens of a tile, whose shape the simulator chooses; none is 16 on a CPU and 64 on a GPU",
        least=1,
        most=1024,
    )
    tile_q: tuple[int, ...] = option((), "shape of the queries' tiles, instead of the simulator's", least=1)
    tile_k: tuple[int, ...] = option((), "shape of the keys' tiles, likewise", least=1)

    def problems(self) -> list[str]:
        found = []
        given = {"window": self.window, "stride": self.stride, "dilation": self.dilation, "causal": self.causal}
        given |= {"tile_q": self.tile_q or 0, "tile_k": self.tile_k or 0}
        lengths = {name: len(one) for name, one in given.items() if isinstance(one, tuple)}
        if len(set(lengths.values())) > 1 or any(not 1 <= n <= 3 for n in lengths.values()):
            found.append(f"{', '.join(lengths)} have one entry per dimension, the same number of 1 to 3 each")
        elif any(s > w for s, w in zip(*(_each(one, 3) for one in (self.stride, self.window)), strict=False)):
            found.append("stride is at most window, or some tokens would be seen by nobody")
        if bool(self.tile_q) != bool(self.tile_k):
            found.append("tile_q and tile_k are given together or not at all")
        return found

    def layers(self, depth: int) -> list[int]:
        return list(range(depth)) if self.blocks is None else sorted(set(self.blocks))

    def pattern(self, dims: int) -> tuple[Sizes, Sizes, Sizes, tuple[bool, ...]]:
        """Window, stride, dilation and causality of each dimension.

        Raises:
            UsageError: options for another number of dimensions.
        """
        given = tuple(_each(one, dims) for one in (self.window, self.stride, self.dilation, self.causal))
        if any(len(one) != dims for one in given) or len(self.tile_q) not in (0, dims):
            raise UsageError(f"{self.name}: this model's tokens have {dims} dimensions, the options another number")
        return given  # type: ignore[return-value]

    def simulation(self, grid: Sizes, device: torch.device) -> Simulation:
        """The tiles on such a grid, and the bound of the speed-up."""
        tokens = tile_tokens(device) if self.tokens is None else self.tokens
        pattern = self.pattern(len(grid))
        if self.tile_q:
            return simulate(grid, *pattern, self.tile_q, self.tile_k)
        return best_tiles(grid, *pattern, tokens, tokens)

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        if call.grid is None or call.causal:
            return None
        grid, prefix, device = call.grid, call.prefix, call.query.device
        pattern = self.pattern(len(grid))
        everything = all(w >= n for w, n in zip(pattern[0], grid, strict=True))
        if everything and not any(pattern[3]) and max(pattern[2]) == 1:
            return None

        def make() -> Blocks:
            found = self.simulation(grid, device)
            return tiled(grid, *pattern, prefix, found.tile_q, found.tile_k).to(device)

        return kept.once((grid, prefix, device), make)

    def facts(self, call: Call, kept: Kept) -> dict[str, Any]:
        assert call.grid is not None
        grid, device = call.grid, call.query.device
        return {"tiles": kept.once(("tiles", grid), lambda: self.simulation(grid, device).as_dict())}


def _each(one: Any, dims: int) -> tuple[Any, ...]:
    return one if isinstance(one, tuple) else (one,) * dims


METHOD = GNA
