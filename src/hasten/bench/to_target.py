"""Figures of training: time to a workload's target, over seeds, with nothing kept from an earlier comparison."""

import tempfile
from collections.abc import Sequence
from typing import Any

from hasten.bench.compare import compare
from hasten.bench.figures import Reading, say
from hasten.bench.result import Group, Row
from hasten.bench.session import Silent
from hasten.core.errors import HastenError


class Told(Silent):
    """Says which seed, or which trial of tuning, is under way."""

    def __init__(self) -> None:
        self._last = ""

    def stage(self, text: str) -> None:
        short = text.rpartition(",")[0] if text.startswith("training") else text
        if short != self._last:
            self._last = short
            say(f"    {short}")


def raced(workload: str, plans: Sequence[str], *, seeds: int, budget: "str | float", **options: Any) -> Group:
    """The plans beside the workload's baseline; options as for `hasten.compare`."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            workload, plans, seeds=seeds, budget=budget, out=folder,
            **{"memory": False, "gated": False, "progress": Told(), **options},
        )  # fmt: skip
    if found.interrupted:
        raise KeyboardInterrupt
    return found.groups[0]


def reading(row: Row, seeds: int, **facts: Any) -> Reading:
    """The ratio of times to the target, with misses, steps and settings.

    Raises:
        HastenError: no seed was finished.
    """
    if row.speedup is None:
        raise HastenError(row.why)
    return Reading(
        row.speedup, row.low, row.high,
        {
            "plan": row.plan, "seeds": row.pairs, "seeds_wanted": seeds, "clock": row.clock, "misses": row.misses,
            "misses_base": row.misses_base, "at_least": row.at_least, "verdict": row.verdict,
            "steps": row.facts.get("steps"), "steps_base": row.facts.get("steps_base"), **facts,
        },
    )  # fmt: skip


def gain_reading(row: Row, method: str) -> Reading:
    """What a method gives to the plan of a row, from a comparison with `leave_one_out`.

    Raises:
        HastenError: no seed was finished with and without it.
    """
    found = row.facts.get("gives", {}).get(method)
    if not found:
        raise HastenError(f"no seed was finished with and without {method}")
    return Reading(found["gain"], found["low"], found["high"], {"plan": row.plan, "method": method})
