"""The figures of `make bench`: ours beside a peer's, in one run, in interleaved pairs.

A file `benchmarks/FAMILY.py` is a family by existing. It defines

    def figures(quick: bool) -> Iterator[Figure]:
        yield figure("gemv", lambda: race(theirs, ours, seconds=20), against="a peer", goal=1.5)

and `out/bench/FAMILY.json` is written anew after each figure: whatever interrupts the run, what was measured stays.
Files `_FAMILY_*.py` beside it add figures to the same family.
A peer that pins other versions runs in an environment and a process of its own (`PeerWorker`).
"""

import argparse
import contextvars
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from hasten.bench import machine
from hasten.bench.peers import PeerWorker, peer_python, sampler
from hasten.bench.sequential import Race, Sequential
from hasten.bench.stats import Interval, lossless_test, ratio_interval
from hasten.bench.timing import Sample, warm_up
from hasten.core.errors import HastenError, UsageError, nearest

__all__ = ["Figure", "PeerWorker", "Reading", "figure", "main", "peer_python", "race", "served", "spread"]

QUICK_SECONDS = 540.0  # for all figures of a file; one that has begun is finished
LOSSLESS_REQUESTS = 4

_ends: contextvars.ContextVar[float] = contextvars.ContextVar("_ends", default=math.inf)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was measured: a value with its 95% interval (None where there is none), and facts for the JSON."""

    value: float
    low: float | None = None
    high: float | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, interval: Interval, **facts: Any) -> Self:
        return cls(interval.estimate, interval.low, interval.high, facts)

    def inverse(self) -> "Reading":
        """Plan over baseline instead of baseline over plan."""
        low, high = (1 / end if end else math.inf for end in (self.high, self.low))
        return Reading(1 / self.value, low, high, self.facts)

    def but(self, **facts: Any) -> "Reading":
        """The same with more facts."""
        return dataclasses.replace(self, facts={**self.facts, **facts})


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        reading: None where it could not be measured; `why` then says why not.
        unit: `x` for a ratio of speeds (above 1: ours is faster).
        against: what ours is compared with. goal: None where none is stated; `better` says on which side to be.
        seconds: that measuring took.
    """

    name: str
    reading: Reading | None
    unit: str = "x"
    against: str = ""
    goal: float | None = None
    better: str = "higher"
    why: str = ""
    seconds: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the value is on the goal's side; None without a goal or a value."""
        if self.goal is None or self.reading is None:
            return None
        return self._reaches(self.reading.value)

    @property
    def clear(self) -> bool | None:
        """Whether both ends of the interval say the same as the value."""
        if self.met is None or self.reading is None:
            return None
        ends = [end for end in (self.reading.low, self.reading.high) if end is not None]
        return all(self._reaches(end) == self.met for end in ends)

    def _reaches(self, value: float) -> bool:
        assert self.goal is not None
        return value <= self.goal if self.better == "lower" else value >= self.goal

    def to_json(self) -> dict[str, Any]:
        about = machine.fingerprint()
        commit, dirty = about.pop("commit"), about.pop("dirty")
        found = self.reading
        content = {
            "figure": self.name,
            "value": found and found.value, "low": found and found.low, "high": found and found.high,
            "unit": self.unit, "against": self.against,
            "goal": self.goal, "better": self.better, "met": self.met, "clear": self.clear,
            **({"why": self.why} if self.why else {}),
            **(found.facts if found else {}),
            "seconds_taken": round(self.seconds, 1), "machine": about, "commit": commit, "dirty": dirty,
        }  # fmt: skip
        return {key: _plain(value) for key, value in content.items()}


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(
    name: str,
    measure: Callable[[], Reading],
    *,
    unit: str = "x",
    against: str = "",
    goal: float | None = None,
    better: str = "higher",
) -> Figure:
    """Measures one figure. A failure (a peer that is missing, say) is a figure without a value, and says why."""
    about = Figure(name, None, unit, against, goal, better)
    if time.monotonic() > _ends.get():
        return dataclasses.replace(about, why="the quick mode's time was spent: run with ARGS=--full")
    say(f"  {name} ...")
    began = time.monotonic()
    try:
        found, why = measure(), ""
    except HastenError as error:
        found, why = None, str(error)
    except Exception as error:
        found, why = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return dataclasses.replace(about, reading=found, why=why, seconds=time.monotonic() - began)


def race(
    base: Callable[[], Any],
    plan: Callable[[], Any],
    *,
    seconds: float,
    precision: float = 0.02,
    after: Callable[[], Any] = lambda: None,
) -> Reading:
    """How many times as fast the plan is: interleaved pairs after a warm-up, until settled or the time is spent.

    Args:
        base, plan: the arms; a call of a `PeerWorker` (`peer.arm(...)`) is timed in its own process.
        after: called untimed after each pair (to take the next request).
    """
    seconds = min(seconds, max(5.0, _ends.get() - time.monotonic()))
    arms = {"baseline": base, "plan": plan}
    warm = warm_up(arms, seconds=seconds / 5, sampler=sampler)
    contest = Race(
        arms,
        rng=np.random.default_rng(0),
        rounds=100_000,
        seconds=seconds,
        repeats=warm.repeats,
        make=lambda clocks: Sequential(precision=precision, clocks=clocks),
        sampler=sampler,
    )
    times: dict[str, list[Sample]] = {name: [] for name in arms}
    for timed in contest:
        for name, one in timed.items():
            times[name].append(one)
        after()
    result = contest.results["plan"]
    medians = {name: statistics.median(one.clocks[result.clock] for one in times[name]) for name in arms}
    found = Reading.of(result.finish(), clock=result.clock, pairs=len(result))
    return found.but(seconds=medians["plan"], seconds_base=medians["baseline"])


def spread(seconds: Sequence[float]) -> Reading:
    """Repeated timings of one thing: their trimmed geometric mean, with its interval."""
    return Reading.of(ratio_interval(np.log(seconds)), samples=len(seconds))


def served(
    workload: Any, plan: str, *, seconds: float, base: str = "", precision: float = 0.02, quality: bool = False
) -> Reading:
    """A plan's speed against another's (or the plain model's) on a workload's requests.

    Args:
        quality: also measure the relative change of the workload's metric, as the fact `quality_change`.

    Raises:
        HastenError: the plan gives no real speed here, or it promises the same outputs and breaks the promise.
    """
    from hasten.bench.serving import prepare
    from hasten.core.plans import Plan
    from hasten.workloads.find import workload as find

    work = find(workload)
    one, other = prepare(work, Plan.of(base)), prepare(work, Plan.of(plan))
    if other.handle.simulated:
        raise HastenError(f"simulated: {other.handle.simulated}")
    requests, turn = work.requests(0), 0
    facts: dict[str, Any] = {"plan": plan, "setup_seconds": round(other.setup_seconds, 2)}
    if other.plan.methods and all(method.card.lossless for method in other.plan.methods):
        some = requests[:LOSSLESS_REQUESTS]
        test = lossless_test([work.same(work.serve(one.handle, each), work.serve(other.handle, each)) for each in some])
        facts["identical"] = f"{test.identical} of {test.outputs}"
        if test.verdict == "lost":
            raise HastenError(f"only {test.identical} of {test.outputs} outputs are identical to the baseline's")
    if quality:
        before, after = (float(work.metric.aggregate(np.asarray(work.quality(arm.handle)))) for arm in (one, other))
        facts |= {"quality": after, "quality_base": before, "quality_change": (after - before) / abs(before)}
        facts["quality_metric"] = f"{work.metric.name}, {work.metric.better} is better"

    def next_request() -> None:
        nonlocal turn
        turn = (turn + 1) % len(requests)

    found = race(
        lambda: work.serve(one.handle, requests[turn]), lambda: work.serve(other.handle, requests[turn]),
        seconds=seconds, precision=precision, after=next_request,
    )  # fmt: skip
    return found.but(**facts)


class Record:
    """`FAMILY.json`: a list of figures. Those of an earlier run stay until they are measured again."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.done = path, set[str]()
        try:
            self.rows: list[dict[str, Any]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self.rows = []

    def add(self, one: Figure) -> None:
        rows = {row["figure"]: row for row in self.rows} | {one.name: one.to_json()}
        self.rows = list(rows.values())
        self.done.add(one.name)
        self._write()

    def finish(self) -> None:
        """Figures that the family no longer has go."""
        self.rows = [row for row in self.rows if row["figure"] in self.done]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n")
        os.replace(part, self.path)


def families(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Family to file, for each file of the folder."""
    return {file.stem: file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_")}


def load(file: pathlib.Path) -> Callable[[bool], Iterator[Figure]]:
    """The `figures` of a family's file."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{file.stem}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.figures


def run(folder: pathlib.Path, names: Sequence[str], out: pathlib.Path, *, quick: bool = True) -> int:
    """Measures families (all by default), writes a file for each, prints the table; returns the exit code.

    Raises:
        UsageError: an unknown family.
    """
    known = families(folder)
    for name in names:
        if name not in known:
            hint = nearest(name, known) or ";"
            raise UsageError(f"there are no figures of a family {name!r}{hint} there are: {', '.join(known)}")
    code, shown = 0, []
    try:
        for name in names or known:
            say(name)
            record = Record(out / f"{name}.json")
            parts, whole = [known[name], *sorted(folder.glob(f"_{name}_*.py"))], True
            for part in parts:
                token = _ends.set(time.monotonic() + QUICK_SECONDS if quick else math.inf)
                try:
                    for one in load(part)(quick):
                        record.add(one)
                        shown.append((name, one))
                        say(f"    {spell(one)} ({one.seconds:.0f} s)")
                except Exception as error:
                    say(f"  {part.stem} stopped: {type(error).__name__}: {error}")
                    code, whole = 1, False
                finally:
                    _ends.reset(token)
            if whole:
                record.finish()
    except KeyboardInterrupt:
        say(f"interrupted; what is finished is in {out}")
        code = 130
    if shown:
        show(shown)
    return code


def spell(one: Figure) -> str:
    """`2.312 x (2.204 to 2.411)`, or why there is none."""
    found = one.reading
    if found is None:
        return f"not measured: {one.why}"
    ends = "" if found.low is None or found.high is None else f" ({found.low:.4g} to {found.high:.4g})"
    return f"{found.value:.4g} {one.unit}{ends}"


def show(figures: Sequence[tuple[str, Figure]]) -> None:
    """The table on stdout; `?` marks a verdict that the interval does not settle."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="figures, with 95% intervals", header_style="bold")
    for column in ("family", "figure", "value", "against", "goal", "met?"):
        table.add_column(column, overflow="fold")
    for family, one in figures:
        goal = "-" if one.goal is None else f"{'at most' if one.better == 'lower' else 'at least'} {one.goal:g}"
        met = "-" if one.met is None else ("yes" if one.met else "no") + ("" if one.clear else "?")
        cells = [family, one.name, spell(one), one.against, goal, met]
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(folder: pathlib.Path, arguments: Sequence[str] | None = None) -> int:
    """The command line of `scripts/bench.py`."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures figures and writes OUT/FAMILY.json.")
    parser.add_argument("family", nargs="*", help=f"all by default: {', '.join(families(folder))}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument("--full", action="store_true", help="longer, for narrower intervals")
    given = parser.parse_args(arguments)
    try:
        return run(folder, given.family, given.out, quick=not given.full)
    except HastenError as error:
        say(f"hasten: {error}")
        return 2
