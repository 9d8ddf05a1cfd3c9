"""Ranges of uniform codes: scale and zero point of a group of weights."""

import torch
from torch import Tensor

from hasten.math.shapes import Float, Int

GRID, SHRINK, NORM = 100, 0.8, 2.4  # of the search for ranges, as in GPTQ's official code
Triple = tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]


def half(scale: Tensor) -> Tensor:
    """Scales as the next fp16 numbers, in fp32, so that layers hold two bytes of each.

    None becomes smaller, so that codes still reach as far; left alone where fp16 is too coarse.
    """
    near = scale.half()
    rounded = torch.where(near.float() < scale, torch.nextafter(near, torch.full_like(near, torch.inf)), near).float()
    sound = (rounded >= torch.finfo(torch.float16).tiny) & rounded.isfinite()
    return torch.where(sound, rounded, scale)


def grid(w: Tensor, bits: int, symmetric: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """Scale (an fp16 number) and zero point [rows] of codes that reach from the least to the largest of w, and zero.

    Args:
        w: [rows, columns].
        symmetric: the zero point is the middle code. mse: the range is searched for the least error (norm 2.4).
    """
    maximum = 2**bits - 1
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    middle = torch.full_like(low, (maximum + 1) / 2)
    best_scale = half((high - low) / maximum)
    best_zero = middle if symmetric else torch.round(-low / best_scale)
    if not mse:
        return best_scale, best_zero
    least = torch.full_like(low, torch.inf)
    for step in range(int(SHRINK * GRID)):
        scale = half((high - low) * (1 - step / GRID) / maximum)
        zero = middle if symmetric else torch.round(-low * (1 - step / GRID) / scale)
        code = torch.clamp(torch.round(w / scale[:, None]) + zero[:, None], 0, maximum)
        error = (scale[:, None] * (code - zero[:, None]) - w).abs().pow(NORM).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def rounded(w: Tensor, bits: int, group: int, symmetric: bool = False, mse: bool = False) -> Triple:
    """Round to nearest: codes uint8 [rows, columns], scales and zeros fp32 [rows, groups]."""
    parts = []
    for part in w.float().split(group, dim=1):
        scale, zero = grid(part, bits, symmetric, mse)
        codes = torch.clamp(torch.round(part / scale[:, None]) + zero[:, None], 0, 2**bits - 1).to(torch.uint8)
        parts.append((codes, scale, zero))
    all_codes, scales, zeros = zip(*parts, strict=True)
    return torch.cat(all_codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)
