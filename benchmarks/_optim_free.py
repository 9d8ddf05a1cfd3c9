"""Optimizers without a learning rate, at their defaults, beside AdamW at one shared default and beside a tuned one.

Nothing is set for a workload but the number of steps, which the tuned baseline's schedule has: every arm but the tuned
one has 5% of warm-up and a linear decay.
"""

import functools
import math
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from hasten.bench.compare import TRIALS, compare
from hasten.bench.figures import Figure, Reading, figure, say
from hasten.bench.sequential import steadier_clock
from hasten.bench.session import Silent
from hasten.bench.stats import log_ratios, ratio_interval
from hasten.bench.trials import Trial, TrialFile
from hasten.core.errors import HastenError
from hasten.core.plans import Plan

WORKLOADS = ("stdlib-lm(task=train)", "digits-vit(task=train)", "tabular-mlp")
TUNED = ""
SHARED = "optim/adamw(lr=0.001) + optim/linear_decay(warmup=0.05)"
CALIBRATED = {  # one setting for all workloads; NadamW has a learning rate, the others have none
    name: f"optim/{name} + optim/linear_decay(warmup=0.05)" for name in ("prodigy", "d_adaptation", "dog", "nadamw")
}


class Told(Silent):
    """Says which seed is under way."""

    def __init__(self) -> None:
        self.last = ""

    def stage(self, text: str) -> None:
        seed = text.rpartition(",")[0]
        if text.startswith("training") and seed != self.last:
            self.last = seed
            say(f"    {seed}")


def spelled(plan: str) -> str:
    """A plan as trials name it."""
    return str(Plan.of(plan))


def runs(workload: str, seeds: int, budget: float) -> dict[str, dict[int, Trial]]:
    """The finished runs of every arm on a workload: plan to seed to trial.

    Raises:
        HastenError: the budget was spent before a seed was finished.
    """
    plans = [spelled(plan) for plan in (SHARED, *CALIBRATED.values())]
    with tempfile.TemporaryDirectory() as folder:
        say(f"    {workload}")
        found = compare(
            workload, plans, seeds=seeds, budget=budget, out=folder, memory=False, gated=False, progress=Told()
        )
        if found.interrupted:
            raise KeyboardInterrupt
        trials = [one for one in TrialFile(pathlib.Path(folder) / TRIALS).read() if one.what == "run"]
    arms: dict[str, dict[int, Trial]] = {plan: {} for plan in (spelled(TUNED), *plans)}
    for trial in trials:
        arms[trial.plan][trial.seed] = trial
    whole = [seed for seed in range(seeds) if all(seed in arm for arm in arms.values())]
    if not whole:
        raise HastenError(f"the budget was spent before a seed of {workload} was finished by every arm")
    return {plan: {seed: arm[seed] for seed in whole} for plan, arm in arms.items()}


def against(all_runs: dict[str, dict[str, dict[int, Trial]]], plan: str, base: str) -> Reading:
    """The geometric mean over workloads of the time to the target of `base` over that of `plan`, paired by seed.

    A miss counts at the time it was given; a plan's leaves no lower end of the interval, a baseline's no upper end.
    """
    seeds = sorted(set.intersection(*(set(arms[plan]) for arms in all_runs.values())))
    if not seeds:
        raise HastenError("no seed was finished on every workload")
    pairs = [[(arms[base][seed], arms[plan][seed]) for arms in all_runs.values()] for seed in seeds]
    clocks = [[{"wall": one.wall[0], "cpu": one.cpu[0]} for each in pairs for one in [pair[arm] for pair in each]]
              for arm in (0, 1)]  # fmt: skip
    clock = steadier_clock(*clocks)
    ratios = np.array([
        [float(log_ratios([getattr(b, clock)[0]], [getattr(p, clock)[0]])[0]) for b, p in each] for each in pairs
    ])  # [seeds, workloads]  # fmt: skip
    missed = {
        arm: {
            name: sum(arms[text][seed].facts["state"] == "missed" for seed in seeds) for name, arms in all_runs.items()
        }
        for arm, text in (("plan", plan), ("base", base))
    }
    found = ratio_interval(ratios.mean(1))
    return Reading(
        found.estimate,
        0.0 if any(missed["plan"].values()) else found.low,
        math.inf if any(missed["base"].values()) else found.high,
        {
            "plan": plan, "base": base, "seeds": len(seeds), "clock": clock,
            "misses": missed["plan"], "misses_base": missed["base"],
            "by_workload": dict(zip(all_runs, np.exp(ratios.mean(0)).round(3).tolist(), strict=True)),
            "steps": {
                name: [round(arms[plan][seed].facts["steps"], 1) for seed in seeds] for name, arms in all_runs.items()
            },
        },
    )  # fmt: skip


def figures(quick: bool) -> Iterator[Figure]:
    seeds, budget = (2, 160.0) if quick else (5, 1800.0)
    measured = functools.cache(lambda: {workload: runs(workload, seeds, budget) for workload in WORKLOADS})
    arms = {"shared": (SHARED, f"AdamW at lr 0.001, on {len(WORKLOADS)} workloads"), "tuned": (TUNED, "tuned AdamW")}
    for name, plan in CALIBRATED.items():
        kind = "calibrated" if name == "nadamw" else "free"
        for arm, (base, what) in arms.items():

            def measure(plan: str = plan, base: str = base) -> Reading:
                return against(measured(), spelled(plan), spelled(base))

            yield figure(
                f"learning_rate_{kind}_{name}_over_{arm}",
                measure,
                against=f"{what}: time to the target, geometric mean over workloads",
            )
