"""Growth: time to the target of the full-size model trained from scratch."""

from collections.abc import Iterator

from hasten.bench.figures import Figure, Reading, figure
from hasten.bench.to_target import raced, reading
from hasten.core.names import card

METHODS = ("g_stack", "multilevel", "com_pt", "cgar", "lcsc", "weight_inheritance", "bam")


def figures(quick: bool) -> Iterator[Figure]:
    seeds, budget = (3, "3m") if quick else (5, "30m")
    for name in METHODS:
        workload, plan = card(f"grow/{name}").experiment

        def measure(workload: str = workload, plan: str = plan) -> Reading:
            return reading(raced(workload, [plan], seeds=seeds, budget=budget).rows[0], seeds)

        yield figure(name, measure, against=f"the baseline of {workload}")
