"""Selection of data: the time that a choice takes.

Figures of other methods that choose data stand in files `_data_*.py` beside this one.
"""

import itertools
import math
import statistics
import time
from collections.abc import Iterator

import torch

from hasten.bench.figures import Figure, Reading, figure, say
from hasten.bench.stats import ratio_interval
from hasten.data.datamask import learn, objective, picks

BALANCE, DIVERSITY, CHECKS = 0.1, "facility", 16


def points(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors [count, 32] about a fiftieth as many centres, some far larger than others, and qualities [count].

    Examples about one centre are of about one quality, so that the best examples are much alike.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, count // 50), 32, generator=generator)
    kind = (torch.rand(count, generator=generator) ** 2 * len(centres)).long()
    found = centres[kind] + 0.3 * torch.randn(count, 32, generator=generator)
    quality = torch.rand(len(centres), generator=generator)[kind] + 0.2 * torch.rand(count, generator=generator)
    return found / found.norm(dim=1, keepdim=True), quality / 1.2


def greedy_until(e: torch.Tensor, q: torch.Tensor, count: int, goal: float, lazy: bool) -> tuple[float, float]:
    """CPU seconds of a greedy search until its subset, filled up with the best of the rest, is worth `goal`.

    Whether it is met is looked at off the clock, at each sixteenth of the search and at its end.

    Returns:
        Seconds, and the worth then.
    """
    found: list[int] = []
    spent, worth = 0.0, -1.0
    search = picks(e, q, count, balance=BALANCE, diversity=DIVERSITY, lazy=lazy)
    while len(found) < count and worth < goal:
        start = time.process_time()
        found.extend(itertools.islice(search, min(max(1, count // CHECKS), count - len(found))))
        spent += time.process_time() - start
        rest = q.clone()
        rest[found] = -1
        filled = torch.cat([torch.tensor(found), rest.topk(count - len(found)).indices])
        worth = objective(e, q, filled, BALANCE, DIVERSITY)
    return spent, worth


def datamask_time(count: int, seeds: int) -> Reading:
    """Plain greedy search to the worth that learnt masks reach, over learning; one pair a seed, CPU time."""
    kept, ratios, facts = count // 10, [], []
    for seed in range(seeds):
        e, q = points(count, seed)
        generator = torch.Generator().manual_seed(seed)
        start = time.process_time()
        chosen = learn(
            e, q, kept, balance=BALANCE, diversity=DIVERSITY, steps=300, groups=64, eta=2.0, part=0.1,
            generator=generator,
        )  # fmt: skip
        ours = time.process_time() - start
        goal = objective(e, q, chosen, BALANCE, DIVERSITY)
        theirs, _ = greedy_until(e, q, kept, goal, lazy=False)
        lazy, _ = greedy_until(e, q, kept, goal, lazy=True)
        whole, worth = greedy_until(e, q, kept, 2.0, lazy=True)
        say(f"    {count} points: ours {ours:.2f} s, worth {goal:.4f}; greedy {theirs:.2f} s, at its end {worth:.4f}")
        ratios.append(math.log(theirs / ours))
        best = objective(e, q, q.topk(kept).indices, BALANCE, DIVERSITY)
        facts.append(
            {
                "seconds": ours, "seconds_lazy_greedy": lazy, "seconds_lazy_greedy_to_its_end": whole, "worth": goal,
                "worth_of_greedy_at_its_end": worth, "worth_of_best_quality": best,
            }
        )  # fmt: skip
    means = {name: statistics.mean(one[name] for one in facts) for name in facts[0]}
    return Reading.of(ratio_interval(ratios), points=count, **means)


def figures(quick: bool) -> Iterator[Figure]:
    yield figure(
        "datamask_time",
        lambda: datamask_time(3000 if quick else 8000, 3 if quick else 5),
        against="plain greedy facility location, to the same worth of quality and variety",
    )
