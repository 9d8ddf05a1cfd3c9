"""What each method of a plan gives: the plan beside itself without that method, measured in the same comparison."""

from collections.abc import Sequence
from typing import Any

from hasten.bench.result import Row
from hasten.bench.session import Session
from hasten.bench.stats import Interval
from hasten.core.errors import PlanError
from hasten.core.plans import Plan

Without = dict[str, dict[str, Plan]]


def without_one(plans: Sequence[Plan]) -> tuple[list[Plan], Without]:
    """The plans and, of each with two methods or more, the plans that lack one of them.

    Returns:
        All plans, each once, those given first; and by a plan's text and a method's name the plan without it.

    Raises:
        PlanError: no plan has two methods.
    """
    every, found = {str(plan): plan for plan in plans}, Without()
    for plan in plans:
        if len(plan) < 2:
            continue
        for place, method in enumerate(plan.methods):
            other = Plan(plan.methods[:place] + plan.methods[place + 1 :])
            found.setdefault(str(plan), {})[method.name] = every.setdefault(str(other), other)
    if not found:
        raise PlanError(["leaving one out needs a plan of two methods or more"])
    return list(every.values()), found


def name_rows(rows: Sequence[Row], given: Sequence[Plan], found: Without) -> None:
    """Names the rows of plans that were not given but follow from one: `plan 1 without optim/muon`."""
    places, own = {row.plan: place for place, row in enumerate(rows, 1)}, {str(plan) for plan in given}
    for text, others in found.items():
        for method, other in others.items():
            if str(other) not in own:
                rows[places[str(other)] - 1].facts.setdefault("shown", f"plan {places[text]} without {method}")


def note_gains(session: Session, rows: Sequence[Row], found: Without) -> None:
    """Writes into each plan's row what its methods give: `facts["gives"][method]` with gain, low and high."""
    by_plan = {row.plan: row for row in rows}
    for text, others in found.items():
        gives: dict[str, Any] = {}
        for method, other in others.items():
            interval = _gain(session, by_plan[text], by_plan[str(other)], other)
            if interval is not None:
                gives[method] = {"gain": interval.estimate, "low": interval.low, "high": interval.high}
        by_plan[text].facts["gives"] = gives


def _gain(session: Session, row: Row, without: Row, other: Plan) -> Interval | None:
    """The plan's speed over its speed without the method; paired where both trained from the same seeds."""
    if session.mode == "train":
        from hasten.bench.training import gain

        return gain(session, Plan.parse(row.plan), other)
    ends = (row.low, row.high, without.low, without.high)
    if row.speedup is None or without.speedup is None or any(end is None or end <= 0 for end in ends):
        return None
    assert row.low and row.high and without.low and without.high
    return Interval(row.speedup / without.speedup, row.low / without.high, row.high / without.low, 0.9)
