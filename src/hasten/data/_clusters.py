"""Lloyd's algorithm for vectors (S. Lloyd, Least squares quantization in PCM, 1982)."""

import torch
from torch import Tensor

ROWS = 1 << 16  # whose distances are held at once


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each of [n, d], [n] int64; of equally near ones the first."""
    parts = [torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist") for part in x.split(ROWS)]
    return torch.cat([part.argmin(1) for part in parts])


def spread(x: Tensor, draws: Tensor) -> Tensor:
    """Examples of [n, d] to begin at, far from each other: k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        draws: [k] random numbers in 0..1; the first falls on any example, each further one on an example in proportion
            to the square of its distance from the nearest of those before.

    Returns:
        [k] int64; where all examples are taken already, the first one again.
    """
    starts = [min(len(x) - 1, int(float(draws[0]) * len(x)))]
    least = (x - x[starts[0]]).square().sum(1)
    for draw in draws[1:].tolist():
        sums = least.cumsum(0)
        at = int(torch.searchsorted(sums, draw * sums[-1], right=True))
        starts.append(at if at < len(x) else 0)
        least = torch.minimum(least, (x - x[starts[-1]]).square().sum(1))
    return torch.tensor(starts, device=x.device)


def lloyd(x: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """The cluster of each of [n, d] after some iterations from the given centres [k, d]; empty clusters stay put."""
    for _ in range(iterations):
        mine = nearest(x, centres)
        sizes = torch.bincount(mine, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, mine, x)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return nearest(x, centres)
