"""The best stack of training methods beside tuned AdamW, and what each of its methods gives."""

import functools
from collections.abc import Iterator

from hasten.bench.figures import Figure, figure
from hasten.bench.result import Group
from hasten.bench.to_target import gain_reading, raced, reading
from hasten.core.plans import Plan

WORKLOAD = "stdlib-lm(task=train)"
STACK = " + ".join(
    [
        "grow/g_stack(factor=2, at=0.35, warmup=0.0, carry=true)",
        "data/multigrid(time=[0.5], space=[1.0], short=[], final=0.0, horizon=0.25, batch_power=0.0, lr_power=0.0)",
        "optim/muon(lr=0.02, rest_lr=0.01)",
        "optim/linear_decay(warmup=0.15, horizon=0.55, floor=0.02)",
    ]
)


def figures(quick: bool) -> Iterator[Figure]:
    seeds, budget, trials = (3, "8m", 6) if quick else (5, "2h", 16)

    @functools.cache
    def found() -> Group:
        return raced(WORKLOAD, [STACK], seeds=seeds, budget=budget, tuned=trials, leave_one_out=True)

    against = f"AdamW on {WORKLOAD}, both tuned in {trials} trials"
    yield figure("best_stack", lambda: reading(found().rows[0], seeds), against=against, goal=2.0)
    for method in Plan.parse(STACK).methods:
        name = f"leave_one_out_{method.name.rpartition('/')[2]}"
        against = "the same stack without it"
        yield figure(name, lambda method=method: gain_reading(found().rows[0], method.name), against=against)
