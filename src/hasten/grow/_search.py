"""Evolutionary search for the coefficients of a linear combination: they sum to 1 and may be negative.

A coefficient belongs to an age: the last one to the newest point, so that what was found for a window of points is a
start for the same window a little later.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Fitness = Callable[[Tensor], float]


def averages(count: int, rates: tuple[float, ...]) -> Tensor:
    """The coefficients of exponential moving averages, [rates, count] fp64: proportional to rate^age, summing to 1."""
    ages = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    powers = torch.tensor(rates, dtype=torch.float64)[:, None] ** ages
    return powers / powers.sum(1, keepdim=True)


def aged(population: Tensor, count: int) -> Tensor:
    """A population [m, any] for `count` points: coefficients by age, 0 for ages that were not there."""
    have = population.shape[1]
    if have >= count:
        kept = population[:, have - count :].clone()
        kept[:, -1] += 1 - kept.sum(1)
        return kept
    return torch.cat([population.new_zeros(len(population), count - have), population], 1)


def child(one: Tensor, other: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """A child of two parents [K]: mixed by one random share or coordinate by coordinate, then shifted at random.

    Args:
        spread: standard deviation of the normal shift of each coefficient but the newest, which makes the sum 1.
    """
    if torch.rand((), generator=generator) < 0.5:
        share = torch.rand((), generator=generator, dtype=one.dtype)
        made = share * one + (1 - share) * other
    else:
        made = torch.where(torch.rand(len(one), generator=generator) < 0.5, one, other)
    made = made + spread * torch.randn(len(one), generator=generator, dtype=one.dtype)
    made[-1] = 1 - made[:-1].sum()
    return made


def evolve(
    fitness: Fitness, population: Tensor, children: int, spread: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The population [m, K] after `children` births, best first, and its fitness [m], lower being better.

    Parents are two of the better half; a child takes the place of the worst where it is better.
    """
    scores = torch.tensor([fitness(one) for one in population], dtype=torch.float64)
    for _ in range(children):
        order = scores.argsort(stable=True)
        better = order[: max(2, len(order) // 2)]
        pair = better[torch.randperm(len(better), generator=generator)[:2]]
        made = child(population[pair[0]], population[pair[-1]], spread, generator)
        score = fitness(made)
        if score < scores[order[-1]]:
            population[order[-1]], scores[order[-1]] = made, score
    order = scores.argsort(stable=True)
    return population[order], scores[order]
