"""Weighted k-means of numbers on a line, for many rows at once.

    least over c_1 <= ... <= c_k of  sum_i w_i min_j (x_i - c_j)^2              (rows do not see each other)

On a line a cluster is a run of the sorted numbers. So the global minimum is found by dynamic programming over where
runs end (X. Wu, Optimal quantization by matrix searching, 1991), and a step of Lloyd's algorithm (S. Lloyd, Least
squares quantization in PCM, 1982) needs k - 1 boundaries and differences of running sums, not every distance. `kmeans`
cuts a row into 64 pieces, finds the best runs of whole pieces, and then takes Lloyd's steps: the global minimum for at
most 64 numbers, within about a percent of it for more. `exact` is the global minimum for any number of numbers.
"""

import torch
from torch import Tensor

from hasten.math.shapes import Float, Int

STEPS = 20
PIECES = 64
ROWS = 64  # at a time


def kmeans(
    values: Float[Tensor, "rows n"], weights: Float[Tensor, "rows n"] | None, count: int, steps: int = STEPS
) -> Float[Tensor, "rows count"]:
    """Centroids, ascending in each row, fp32.

    Args:
        weights: none below zero; a row without a positive one counts all its numbers alike. None: all rows do.
        count: centroids; where a row has fewer different numbers of positive weight, some have nothing to stand for.
        steps: of Lloyd's algorithm, at most.
    """
    found = []
    for start in range(0, len(values), ROWS):
        part = slice(start, start + ROWS)
        x, at = values[part].double().sort(1)
        mass = torch.ones_like(x) if weights is None else weights[part].double().gather(1, at)
        mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
        mass = mass / mass.sum(1, keepdim=True)
        sums = torch.stack([_running(one) for one in (mass, mass * x, mass * x.square())], 1)
        found.append(_lloyd(x, sums, _first(x, mass, sums, count), steps).float())
    return torch.cat(found) if found else values.new_zeros(0, count, dtype=torch.float32)


def nearest(values: Float[Tensor, "rows n"], centroids: Float[Tensor, "rows count"]) -> Int[Tensor, "rows n"]:
    """uint8: the index of the nearest of a row's ascending centroids; of two equally near ones, the lower."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.to(centroids.dtype).contiguous()).to(torch.uint8)


def exact(values: Float[Tensor, "n"], weights: Float[Tensor, "n"] | None, count: int) -> tuple[Tensor, float]:
    """Centroids [count] of the global minimum and that minimum, in fp64; n^2 * count operations.

    Without a positive weight all numbers count alike. Where fewer than `count` clusters are needed, the last centroids
    repeat.
    """
    x, at = values.double().sort()
    mass = torch.ones_like(x) if weights is None or not weights.any() else weights.double()[at]
    sums = torch.stack([_running(part[None])[0] for part in (mass, mass * x, mass * x.square())])[None]
    ends, least = _cut(sums, count)
    parts = sums[0].gather(1, ends.expand(3, -1)).diff(dim=1)
    found = (parts[1] / parts[0])[parts[0] > 0]
    return torch.cat([found, found[-1:].expand(count - len(found))]), float(least)


def _cut(sums: Tensor, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The best clusters as runs of whole pieces, by dynamic programming over their number.

    Args:
        sums: running mass, first and second moment of the pieces, [rows, 3, pieces + 1].

    Returns:
        Where each cluster begins and the last one ends [rows, count + 1], and the least error [rows].
    """
    mass, moment, second = (sums[:, i, :, None] - sums[:, i, None, :] for i in range(3))  # [rows, behind last, first]
    cost = (second - torch.where(mass > 0, moment.square() / mass, 0.0)).clamp_(min=0)
    cost = cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).triu(1), torch.inf).to(dtype)
    least = [cost[:, :, 0]]
    for _ in range(count - 1):
        least.append((least[-1][:, None, :] + cost).amin(2))
    end = torch.full_like(least[0][:, :1], sums.shape[2] - 1, dtype=torch.int64)
    ends = [end]
    for before in reversed(least[:-1]):
        row = cost.gather(1, end[:, :, None].expand(-1, -1, cost.shape[2]))[:, 0]
        end = (before + row).argmin(1, keepdim=True)
        ends.append(end)
    return torch.cat([torch.zeros_like(end), *ends[::-1]], 1), least[-1][:, -1]


def _first(x: Tensor, mass: Tensor, sums: Tensor, count: int) -> Tensor:
    """First centroids [rows, count]: the best clusters of pieces, runs of the sorted numbers.

    Pieces are as wide as many fine levels are best apart, the inverse cube root of the density (P. Panter and W. Dite,
    Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951).
    """
    n = x.shape[1]
    if n <= PIECES:
        ends = torch.arange(n + 1, device=x.device).expand(len(x), -1)
    else:
        climb = ((mass[:, 1:] + mass[:, :-1]).pow(1 / 3) * x.diff(dim=1).pow(2 / 3)).cumsum(1)
        shares = torch.linspace(0, 1, PIECES + 1, dtype=torch.float64, device=x.device)[1:-1] * climb[:, -1:]
        cuts = torch.searchsorted(climb, shares.contiguous()) + 1
        ends = torch.cat([cuts.new_zeros(len(x), 1), cuts, cuts.new_full((len(x), 1), n)], 1)
    chosen = sums.gather(2, ends[:, None].expand(-1, 3, -1))
    cuts, _ = _cut(chosen, count, torch.float64 if n <= PIECES else torch.float32)
    found = _means(x, sums, ends.gather(1, cuts)).sort(1).values
    return torch.where(found.isnan(), found.nan_to_num(-torch.inf).amax(1, keepdim=True), found)


def _running(parts: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., n entries of each row."""
    return torch.cat([parts.new_zeros(len(parts), 1), parts.cumsum(1)], 1)


def _ends(x: Tensor, centroids: Tensor) -> Tensor:
    """Where each centroid's cluster begins and the last one ends, [rows, count + 1]."""
    middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
    cuts = torch.searchsorted(x, middles.contiguous(), right=True)  # an equally near number is the lower cluster's
    return torch.cat([cuts.new_zeros(len(x), 1), cuts, cuts.new_full((len(x), 1), x.shape[1])], 1)


def _means(x: Tensor, sums: Tensor, ends: Tensor) -> Tensor:
    """The mean of each cluster [rows, count], NaN where nothing has a weight.

    A cluster's mass may be rounding of the running sums, so its mean is kept between its least and largest number.
    """
    mass, moment = (sums[:, i].gather(1, ends).diff(dim=1) for i in (0, 1))
    low, high = x.gather(1, ends[:, :-1].clamp(max=x.shape[1] - 1)), x.gather(1, (ends[:, 1:] - 1).clamp(min=0))
    return torch.where(mass > 0, torch.minimum(torch.maximum(moment / mass, low), high), torch.nan)


def _lloyd(x: Tensor, sums: Tensor, centroids: Tensor, steps: int) -> Tensor:
    centroids = centroids.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        before = centroids[rows]
        after = _means(x, sums, _ends(x, before))
        after = torch.where(after.isnan(), before, after)
        centroids[rows] = after
        active = (after != before).any(1)
        if int(active.sum()) < len(rows) // 2:
            rows, x, sums = rows[active], x[active], sums[active]
        if not active.any():
            break
    return centroids
