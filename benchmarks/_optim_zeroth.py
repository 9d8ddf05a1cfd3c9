"""Fine-tuning by forward passes: the passes of Sparse MeZO beside MeZO's, and the memory that both do without."""

import functools
import math
from collections.abc import Iterator

import numpy as np

from hasten.bench import memory
from hasten.bench.figures import Figure, Reading, figure, say
from hasten.bench.stats import ratio_interval
from hasten.bench.training import make_run
from hasten.core.errors import HastenError
from hasten.core.plans import Plan
from hasten.train import NotFiniteError
from hasten.workloads.find import workload

WORKLOAD = "stdlib-tune"
LARGER = "stdlib-tune(model=target, rows=8, length=256)"  # what memory is measured on
RATES = {"optim/mezo": (5e-5, 1e-4, 2e-4), "optim/sparse_mezo": (3e-4, 6e-4, 1.2e-3)}  # the same effort for both


@functools.cache
def passes(plan: str, seed: int, steps: int) -> float:
    """Forward passes of a run until the target, between evaluations by a straight line; infinite where it is missed."""
    found = workload(WORKLOAD)
    run, before = make_run(found, Plan.parse(plan), seed), math.inf
    while run.step < steps and not run.done:
        try:
            run.slice(found.loss, steps=10)
        except NotFiniteError:
            return math.inf
        with run.evaluation() as model:
            quality = float(np.mean(found.evaluate(model)))
        if quality <= found.target:
            share = (before - found.target) / (before - quality) if math.isfinite(before) else 1.0
            return 2 * (run.step - 10 * (1 - share))
        before = quality
    return math.inf


def best(method: str, seeds: int, steps: int) -> tuple[str, list[float]]:
    """The plan of the rate with the fewest passes, a miss counting as twice the steps that were given."""
    say(f"    {method}")
    plans = [f"{method}(lr={rate})" for rate in RATES[method]]
    found = {plan: [passes(plan, seed, steps) for seed in range(seeds)] for plan in plans}
    return min(found.items(), key=lambda one: sum(min(count, 4.0 * steps) for count in one[1]))


def sparse_steps(quick: bool) -> Reading:
    seeds, steps = (2, 200) if quick else (6, 500)
    (plan, mine), (base, theirs) = (best(method, seeds, steps) for method in ("optim/sparse_mezo", "optim/mezo"))
    if not all(map(math.isfinite, theirs)):
        raise HastenError(f"MeZO missed the target in {steps} steps: {theirs}")
    capped = [min(count, 2.0 * steps) for count in mine]
    misses = sum(not math.isfinite(count) for count in mine)
    found = ratio_interval(np.log(np.array(theirs) / np.array(capped)))
    facts = {"plan": plan, "base": base, "passes": capped, "passes_base": theirs, "misses": misses}
    return Reading(found.estimate, 0.0 if misses else found.low, found.high, facts)


def peak(plan: str) -> float:
    """Peak bytes of three steps in a fresh process, above the state before the model was built."""
    arguments = {"workload": LARGER, "plan": plan, "mode": "train"}
    return memory.probe("hasten.bench.serving:memory_of", arguments).phases["run"].peak


def less_memory(plan: str) -> Reading:
    first, ours = peak(""), peak(plan)
    return Reading(first / ours, facts={"bytes": ours, "bytes_base": first})


def figures(quick: bool) -> Iterator[Figure]:
    yield figure(
        "sparse_mezo_steps",
        lambda: sparse_steps(quick),
        against="MeZO's forward passes to the target, each at the best of three rates",
    )
    for method in ("mezo", "sparse_mezo"):
        yield figure(
            f"{method}_memory",
            lambda method=method: less_memory(f"optim/{method}"),  # type: ignore[misc]
            against="AdamW's peak memory, 4.9 million weights, 8 rows of 256 bytes",
        )
