"""How much of round-to-nearest's loss GPTQ avoids, and `python benchmarks/_quant_quality.py`: a table of all methods.

The table is out/bench/quant_table.{json,md}: each method of the family at 4, 3 and 2 bits, as far as it has them.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.api import apply
from hasten.bench.figures import Figure, Reading, figure
from hasten.core.errors import HastenError
from hasten.workloads.find import workload as find

GROUP, RESAMPLES = 128, 4000
LIBRARY = "stdlib-lm(task=perplexity, examples={examples})"
STORIES = "llama2c(model=stories260k, task=perplexity, examples={examples})"


def losses(workload: str, plans: list[str]) -> tuple[np.ndarray, str]:
    """The loss of each plan on each example, [plans, examples], and the loss's unit."""
    work: Any = find(workload)
    batches = work.calibration()
    found = [work.quality(apply(work.trained(), plan, calibration=batches)) for plan in plans]
    return np.stack(found), work.metric.name


def closed(dense: np.ndarray, base: np.ndarray, better: np.ndarray, seed: int = 0) -> Reading:
    """The share of the gap between `dense` and `base` that `better` closes: (base - better) / (base - dense) of the
    means, with a paired percentile bootstrap over examples.

    Raises:
        HastenError: the gap is not clearly above 0, so that a share of it says nothing.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(dense), (RESAMPLES, len(dense)))
    gaps, gains = (base - dense)[picks].mean(1), (base - better)[picks].mean(1)
    if np.quantile(gaps, 0.025) <= 0:
        raise HastenError("round-to-nearest loses nothing measurable here: there is no gap to close")
    low, high = np.quantile(gains / gaps, [0.025, 0.975])
    share = float((base - better).mean() / (base - dense).mean())
    return Reading(share, float(low), float(high))


def gap(workload: str, bits: int) -> Reading:
    options = f"(bits={bits}, group={GROUP}, activations=32)"
    best = f"quant/gptq{options[:-1]}, act_order=true, mse=true)"
    found, unit = losses(workload, ["", f"quant/round_to_nearest{options}", best])
    means = dict(zip(("dense", "round_to_nearest", "gptq"), found.mean(1).tolist(), strict=True))
    return closed(*found).but(**means, metric=unit, examples=found.shape[1], workload=workload)


def figures(quick: bool) -> Iterator[Figure]:
    examples = 96 if quick else 384
    for bits in (4, 3):
        for suffix, workload in (("", LIBRARY), ("_stories", STORIES)):
            name = workload.format(examples=examples)
            yield figure(
                f"gptq_gap_{bits}bit{suffix}",
                lambda name=name, bits=bits: gap(name, bits),  # type: ignore[misc]
                unit="share",
                against=f"round-to-nearest's loss, {bits} bits, groups of {GROUP}, on {name}; GPTQ: act_order, mse",
                goal=0.5,
            )


def main() -> None:
    from hasten.bench.method_table import plans, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="*", help="all methods by default")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a plan")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    given = parser.parse_args()
    chosen = given.plan or plans("quant", {"bits": (4, 3, 2)})
    table("quant", chosen, quality=LIBRARY.format(examples=96), speed="stdlib-lm(task=generate)", out=given.out,
          seconds=given.seconds)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
