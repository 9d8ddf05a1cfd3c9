"""What one comparison carries around: the workload, its settings, the file of trials, the clock and the progress."""

import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from typing import Any, Protocol

from hasten.bench.trials import Trial, TrialFile, make_key
from hasten.core.names import PACKAGE
from hasten.core.plans import Plan
from hasten.workloads.base import Workload


class Progress(Protocol):
    """What the command line shows while a comparison runs; every call may be ignored."""

    def stage(self, text: str) -> None: ...

    def rows(self, rows: list[Any]) -> None: ...


class Silent:
    def stage(self, text: str) -> None:
        pass

    def rows(self, rows: list[Any]) -> None:
        pass


@functools.cache
def source_digest() -> str:
    """A digest of Hasten's own source: trials of different code are never used together."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass
class Session:
    """One comparison under way.

    Attributes:
        workload: what is done; `given` is its text as the person wrote it, or None for an object.
        plans: the arms beside the baseline.
        seeds: how many sets of requests, or training runs.
        margin: how much worse, relative to the baseline, quality may be.
        precision: half-width on the log scale at which timing stops.
        ends: `time.monotonic()` at which the budget is spent.
        memory: whether each arm's peak is measured in a process of its own.
        tuned: the workload with each plan's own tuned options, by the plan's text; others have `workload` itself.
        charged: seconds (wall, CPU) that each arm is charged before it starts, by the plan's text.
    """

    workload: Workload
    given: str | None
    plans: list[Plan]
    seeds: int
    margin: float
    precision: float
    ends: float
    file: TrialFile
    progress: Progress
    fingerprint: dict[str, Any]
    memory: bool = True
    mode: str = "serve"
    gates: dict[str, str] = dataclasses.field(default_factory=dict)
    tuned: dict[str, Workload] = dataclasses.field(default_factory=dict)
    charged: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def workload_of(self, plan: Plan) -> Workload:
        return self.tuned.get(str(plan), self.workload)

    def key(self, plan: Plan) -> str:
        return make_key(
            str(self.workload_of(plan)),
            str(plan),
            self.mode,
            *([self.charged[str(plan)]] if str(plan) in self.charged else []),
            self.fingerprint["id"],
            self.fingerprint["versions"],
            source_digest(),
        )

    def trial(self, plan: Plan, what: str, **values: Any) -> Trial:
        about = self.fingerprint
        return Trial(
            key=self.key(plan),
            what=what,
            workload=str(self.workload),
            plan=str(plan),
            machine=about["id"],
            versions=about["versions"],
            commit=about["commit"],
            dirty=about["dirty"],
            **values,
        )

    def kept(self, plan: Plan, what: str) -> list[Trial]:
        """Trials of an earlier, interrupted run of the same comparison."""
        return [trial for trial in self.file.read([self.key(plan)]) if trial.what == what]

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return max(0.0, self.ends - time.monotonic()) if math.isfinite(self.ends) else math.inf


def default_out(groups: list[tuple[Workload, list[Plan], str]]) -> pathlib.Path:
    """Where a comparison keeps its trials when no folder is named: the same line, the same folder."""
    texts = [[str(workload), [str(plan) for plan in plans]] for workload, plans, _ in groups]
    name = "".join(c if c.isalnum() else "-" for c in str(groups[0][0])).strip("-")[:60]
    return pathlib.Path("out/compare") / f"{name}-{make_key(texts)[:6]}"
