"""Which weights stay, given a score for each: single weights, n of m, or blocks."""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.math.shapes import Float

UNSTRUCTURED = "unstructured"


def problems(pattern: str, sparsity: float) -> list[str]:
    """What is wrong with the options `pattern` and `sparsity`; for a method's `problems`."""
    some = of(pattern)
    if some is not None:
        n, m = some
        if not 0 < n < m <= 64:
            return [f"pattern {pattern} must keep at least one and fewer than all of at most 64, as 2:4 does"]
        if sparsity and abs(sparsity - (1 - n / m)) > 1e-6:
            return [f"pattern {pattern} means sparsity={1 - n / m:g}: give that or leave the pattern out"]
        return []
    if pattern == UNSTRUCTURED:
        return []
    size = block(pattern)
    if size is None or not (1 <= size[0] <= 64 and 1 <= size[1] <= 64):
        return [
            f"pattern must be {UNSTRUCTURED}, n:m such as 2:4, or blocks such as 16x1 (rows x columns), not {pattern}"
        ]
    return []


def of(pattern: str) -> tuple[int, int] | None:
    """(n, m) of a pattern that keeps n of each m."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def block(pattern: str) -> tuple[int, int] | None:
    """(rows, columns) of a pattern of blocks."""
    found = re.fullmatch(r"(\d+)x(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def keep(scores: Float[Tensor, "rows columns"], sparsity: float, pattern: str, by_row: bool = True) -> Tensor:
    """The weights that stay, bool [rows, columns]; of equal scores the earlier one stays.

    Args:
        by_row: single weights compete within their row, else within the matrix. Blocks always compete in the matrix, by
            the mean of their scores, so that those that its edge cuts off are not at a disadvantage.
    """
    some, size = of(pattern), block(pattern)
    if some is not None:
        return _keep_some(scores, *some)
    if size is not None:
        kept = _keep_blocks(scores.float(), sparsity, *size)
        whole = kept.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        return whole[: scores.shape[0], : scores.shape[1]]
    return _largest(scores if by_row else scores.flatten()[None], sparsity).view_as(scores)


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """Of each row all but a fraction of the least."""
    gone = int(scores.shape[1] * sparsity)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : scores.shape[1] - gone]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _keep_some(scores: Tensor, n: int, m: int) -> Tensor:
    rows, columns = scores.shape
    groups = F.pad(scores.float(), (0, -columns % m), value=-torch.inf).view(rows, -1, m)
    order = groups.argsort(dim=2, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).view(rows, -1)[:, :columns]


def _keep_blocks(scores: Tensor, sparsity: float, high: int, wide: int) -> Tensor:
    """All blocks, [bands, blocks], but those of least mean that together hold at most a fraction of the weights."""
    counts = _block_sums(torch.ones_like(scores), high, wide)
    means = _block_sums(scores, high, wide) / counts
    order = means.flatten().argsort(descending=True, stable=True).flip(0)
    gone = counts.flatten()[order].double().cumsum(0) <= scores.numel() * sparsity
    return torch.ones_like(gone).scatter_(0, order, ~gone).view_as(means)


def _block_sums(scores: Tensor, high: int, wide: int) -> Tensor:
    rows, columns = scores.shape
    padded = F.pad(scores, (0, -columns % wide, 0, -rows % high))
    return padded.view(padded.shape[0] // high, high, -1, wide).sum((1, 3))
