"""Small shapes first: images by the paper's cycles, and text whose first batches are of half length."""

from collections.abc import Iterator

from hasten.bench.figures import Figure, Reading, figure
from hasten.bench.to_target import raced, reading
from hasten.core.names import card

IMAGES = ("digits-vit(task=train)", "data/multigrid")


def figures(quick: bool) -> Iterator[Figure]:
    seeds, budget = (3, "4m") if quick else (5, "30m")
    for name, (workload, plan) in {"multigrid": card("data/multigrid").experiment, "multigrid_images": IMAGES}.items():

        def measure(workload: str = workload, plan: str = plan) -> Reading:
            return reading(raced(workload, [plan], seeds=seeds, budget=budget).rows[0], seeds)

        yield figure(name, measure, against=f"the baseline of {workload}")
