"""Batches by length: time to the target against random batches, and what share of either is padding."""

import tempfile
from collections.abc import Iterator

from hasten.bench.compare import compare
from hasten.bench.figures import Figure, Reading, figure, say
from hasten.core.errors import HastenError

WORKLOAD, PLAN = "spoken-digits", "data/bucketing(buckets=8)"


class Progress:
    """Tells `say` what is going on."""

    def stage(self, text: str) -> None:
        if not text.startswith("training"):
            say(f"    {text}")

    def rows(self, rows: object) -> None:
        pass


def to_target(seeds: int, budget: str) -> Reading:
    """Time to the workload's target, baseline over plan.

    Raises:
        HastenError: no seed was finished within the budget.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            WORKLOAD, PLAN, seeds=seeds, budget=budget, out=folder, memory=False, gated=False, progress=Progress()
        )
    if found.interrupted:
        raise KeyboardInterrupt
    row = found.plans[0]
    if row.speedup is None:
        raise HastenError(row.why)
    facts = {"seeds": row.pairs, "seeds_wanted": seeds, "clock": row.clock, "misses": row.misses,
             "misses_base": row.misses_base, "steps": row.facts.get("steps"), "steps_base": row.facts.get("steps_base"),
             "verdict": row.verdict}  # fmt: skip
    return Reading(row.speedup, row.low, row.high, facts)


def shares() -> Reading:
    """The share of a pass's frames that is padding, with the plan's batches."""
    import torch

    from hasten.bench.training import make_run
    from hasten.core.plans import Plan
    from hasten.data.bucketing import padding
    from hasten.workloads.find import workload as find

    work = find(WORKLOAD)
    loader = work.batches(0)
    lengths, rows = loader.dataset.lengths, loader.batch_size  # type: ignore[attr-defined]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    at_random = padding(lengths, [part.tolist() for part in order.split(rows)])
    noted = make_run(work, Plan.of(PLAN), 0).context.report[Plan.of(PLAN).methods[0].name]
    frames, letters = noted["padding"]
    return Reading(
        frames,
        facts={
            "frames_base": float(at_random[0]),
            "letters": letters,
            "letters_base": float(at_random[1]),
            "examples_a_batch": noted["examples_a_batch"],
            "examples_a_batch_base": rows,
        },
    )


def figures(quick: bool) -> Iterator[Figure]:
    seeds, budget = (2, "3m") if quick else (5, "20m")
    yield figure(
        "bucketing",
        lambda: to_target(seeds, budget),
        against=f"random batches on {WORKLOAD}, whose worst batch takes as much",
    )
    yield figure(
        "bucketing_padding", shares, unit="share of frames", against=f"random batches on {WORKLOAD}", better="lower"
    )
