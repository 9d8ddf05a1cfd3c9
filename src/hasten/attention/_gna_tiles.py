"""Windows over a grid as lists of tiles: the order of the tokens, the tiles that see each other, masks for the rest."""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.attention._gna_simulator import Sizes, axis
from hasten.math.blocks import Blocks
from hasten.math.shapes import Int


def tile_tokens(device: torch.device) -> int:
    """Tokens of a tile: few where a product of small matrices costs no more, many where tensor cores want them."""
    return 16 if device.type == "cpu" else 64


def tile_order(grid: Sizes, dilation: Sizes, tile: Sizes, prefix: int = 0) -> Int[Tensor, "n"]:
    """The tokens tile by tile inside each dilation group: whole tiles, then what they leave over, then the prefix."""
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, len(grid))  # [prod(grid), dims]
    length, gap, side = (torch.tensor(one) for one in (grid, dilation, tile))
    group, x = places % gap, places // gap
    whole = ((x // side + 1) * side <= (length - group + gap - 1) // gap).all(-1)
    key = ~whole * 1
    for part, sizes in ((group, gap), (x // side, -(-length // side)), (x % side, side)):
        for column, size in zip(part.T, sizes, strict=True):
            key = key * size + column
    return torch.cat([prefix + key.argsort(), torch.arange(prefix)])


@functools.lru_cache(maxsize=16)
def tiled(
    grid: Sizes,
    window: Sizes,
    stride: Sizes,
    dilation: Sizes,
    causal: tuple[bool, ...],
    prefix: int,
    tile_q: Sizes,
    tile_k: Sizes,
) -> Blocks:
    """The pattern as lists of tiles, each with a mask where not all of it is visible."""
    sees = [axis(*side) for side in zip(grid, window, stride, dilation, causal, strict=True)]
    q_order, k_order = (tile_order(grid, dilation, tile, prefix) for tile in (tile_q, tile_k))
    columns = _places(k_order, grid, prefix)
    (bq, bk), total = (math.prod(tile_q), math.prod(tile_k)), len(k_order)
    some, which = [], []
    found: dict[bytes, tuple[int, Tensor]] = {}
    for rows in q_order.split(bq):
        at = _places(rows, grid, prefix)
        visible = (rows < prefix)[:, None] | (k_order < prefix)
        visible = visible | torch.stack([one[a][:, b] for one, a, b in zip(sees, at, columns, strict=True)]).all(0)
        padding = -total % bk
        parts = F.pad(visible, (0, padding)).unflatten(1, (-1, bk)).transpose(0, 1)  # [Tk, rows, bk]
        any_of = parts.flatten(1).any(1)
        full = F.pad(visible, (0, padding), value=True).unflatten(1, (-1, bk)).all(2).all(0)
        numbers = torch.full((len(parts),), -1, dtype=torch.int32)
        for j in (any_of & ~full).nonzero().flatten().tolist():
            mask = F.pad(parts[j], (0, 0, 0, bq - len(rows))).contiguous()
            numbers[j] = found.setdefault(mask.numpy().tobytes(), (len(found), mask))[0]
        some.append(any_of)
        which.append(numbers)
    more: dict[str, Any] = {"q_order": q_order[None, None], "k_order": k_order[None, None]}
    if found:
        more |= {"masks": torch.stack([mask for _, mask in found.values()]), "mask_of": torch.stack(which)[None, None]}
    return Blocks.of(torch.stack(some)[None, None], bq, bk, **more)


def _places(tokens: Tensor, grid: Sizes, prefix: int) -> tuple[Tensor, ...]:
    """Coordinates of tokens; without meaning for the prefix."""
    return torch.unravel_index((tokens - prefix).clamp(min=0), grid)
