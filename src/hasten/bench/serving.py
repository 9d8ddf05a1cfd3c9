"""Comparing plans that serve: quality and losslessness once, then time in interleaved rounds until it is settled."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hasten.api import Handle, apply
from hasten.bench import operations, stats
from hasten.bench.result import Row
from hasten.bench.sequential import Race, Sequential
from hasten.bench.session import Session
from hasten.bench.timing import Sample, warm_up
from hasten.bench.trials import Trial
from hasten.core.plans import Plan
from hasten.workloads.base import Workload

BLOCK_SECONDS = 2.0
LOSSLESS_REQUESTS = 8
DRAFTED_REQUESTS = 4


@dataclasses.dataclass
class Arm:
    """One plan, applied and ready."""

    plan: Plan
    handle: Handle
    setup_seconds: float
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.plan)


def prepare(workload: Workload, plan: Plan, seed: int = 0) -> Arm:
    """Loads the trained model anew and applies the plan; what applying takes is the set-up that is charged."""
    handed = workload.handed(plan.methods)
    model = workload.trained()
    began = time.perf_counter()
    handle = apply(model, plan, **handed, seed=seed)
    handle.bake()
    seconds = time.perf_counter() - began if plan.methods else 0.0
    return Arm(plan, handle, seconds, {"simulated": handle.simulated, "report": handle.report})


def compare_serving(session: Session, rows: list[Row], baseline: dict[str, Any]) -> None:
    """Fills the rows of all plans and the baseline's own figures; what is measured goes to the session's file."""
    workload = session.workload
    session.progress.stage("loading the baseline")
    arms = [prepare(workload, Plan())]
    for plan in session.plans:
        session.progress.stage(f"applying {plan}")
        arms.append(prepare(workload, plan))
    for row, arm in zip(rows, arms[1:], strict=True):
        row.setup_seconds, row.simulated, row.facts = arm.setup_seconds, arm.facts["simulated"], arm.facts["report"]
    requests = [request for seed in range(session.seeds) for request in workload.requests(seed)]
    _quality(session, arms, rows, baseline)
    _lossless(session, arms, rows, requests)
    _bytes_and_operations(arms, rows, baseline, workload, requests[0])
    _drafting(arms, rows, workload, requests[:DRAFTED_REQUESTS])
    if session.memory:
        _memory(session, arms, rows, baseline)
    _time(session, arms, rows, baseline, requests)


def _quality(session: Session, arms: list[Arm], rows: list[Row], baseline: dict[str, Any]) -> None:
    found = []
    for arm in arms:
        kept = session.kept(arm.plan, "quality")
        if kept:
            found.append(np.asarray(kept[-1].facts["rows"], dtype=float))
            continue
        session.progress.stage(f"quality of {arm.name}")
        values = np.asarray(session.workload.quality(arm.handle), dtype=float)
        session.file.append([session.trial(arm.plan, "quality", facts={"rows": np.round(values, 7).tolist()})])
        found.append(values)
    metric = session.workload.metric
    baseline["quality"] = float(metric.aggregate(found[0]))
    for row, values in zip(rows, found[1:], strict=True):
        test = stats.non_inferiority(found[0], values, metric, session.margin)
        row.quality, row.quality_base, row.quality_change = test.plan, test.base, test.change
        row.quality_low, row.quality_high, row.quality_verdict = test.low, test.high, test.verdict


def _lossless(session: Session, arms: list[Arm], rows: list[Row], requests: list[Any]) -> None:
    """Holds methods that promise the same output to it, on real requests."""
    promising = [n for n, arm in enumerate(arms) if n and all(method.card.lossless for method in arm.plan.methods)]
    if not promising:
        return
    session.progress.stage("comparing outputs of lossless plans")
    some = requests[:: max(1, len(requests) // LOSSLESS_REQUESTS)][:LOSSLESS_REQUESTS]
    wanted = [session.workload.serve(arms[0].handle, request) for request in some]
    for n in promising:
        same = [
            session.workload.same(a, session.workload.serve(arms[n].handle, r))
            for a, r in zip(wanted, some, strict=True)
        ]
        test = stats.lossless_test(same)
        rows[n - 1].lossless = f"{test.identical} of {test.outputs} outputs identical"
        rows[n - 1].quality_verdict = "identical" if test.verdict == "held" else "lost"


def _bytes_and_operations(
    arms: list[Arm], rows: list[Row], baseline: dict[str, Any], workload: Workload, request: Any
) -> None:
    held = [operations.held_bytes(arm.handle.model) for arm in arms]
    counted = [operations.count(lambda arm=arm: workload.serve(arm.handle, request)).total for arm in arms]  # type: ignore[misc]
    baseline.update(held_bytes=held[0], operations=counted[0])
    for row, bytes_held, operations_done in zip(rows, held[1:], counted[1:], strict=True):
        row.held_bytes, row.held_base = bytes_held, held[0]
        row.operations, row.operations_base = operations_done, counted[0]


def _drafting(arms: list[Arm], rows: list[Row], workload: Workload, requests: list[Any]) -> None:
    """How much of what was drafted was accepted, for the plans that draft."""
    from hasten.decode.base import speculation

    for row, arm in zip(rows, arms[1:], strict=True):
        spec = speculation(arm.handle.host)
        if spec is None:
            continue
        drafted = accepted = tokens = passes = 0
        for request in requests:
            workload.serve(arm.handle, request)
            found = spec.counters
            drafted, accepted = drafted + found.drafted, accepted + found.accepted
            tokens, passes = tokens + found.tokens, passes + found.target_passes
        share = f"{accepted / drafted:.0%} of drafted tokens accepted, " if drafted else ""
        row.drafting = f"{share}{tokens / max(1, passes):.2f} tokens a pass of the target"


def memory_of(workload: str, plan: str, mode: str) -> Iterator[str]:
    """One arm's work, phase by phase, in a fresh process whose peak memory is watched (`bench.memory.probe`)."""
    from hasten.bench.training import few_steps
    from hasten.workloads.find import workload as find

    found, parsed = find(workload), Plan.parse(plan)
    if mode == "train":
        yield "libraries"
        few_steps(found, parsed)
        return
    requests = found.requests(0)[:2]
    apply(found.trained(), Plan())  # imports what building a model imports, before anything counts
    yield "libraries"
    arm = prepare(found, parsed)
    yield "set-up"
    for request in requests:
        found.serve(arm.handle, request)
    yield "serving"


def _memory(session: Session, arms: list[Arm], rows: list[Row], baseline: dict[str, Any]) -> None:
    peaks = [peak_of(session, arm.plan) for arm in arms]
    baseline["peak_bytes"] = peaks[0]
    for row, peak in zip(rows, peaks[1:], strict=True):
        row.peak_bytes, row.peak_base = peak, peaks[0]


def peak_of(session: Session, plan: Plan) -> int | None:
    """Peak bytes of one arm, kept or measured; None where the workload can't be named to another process."""
    from hasten.bench import memory

    if session.given is None:
        return None
    kept = session.kept(plan, "memory")
    if kept:
        return kept[-1].facts["peak_bytes"]
    session.progress.stage(f"memory of {plan}")
    arguments = {"workload": session.given, "plan": str(plan), "mode": session.mode}
    found = memory.probe("hasten.bench.serving:memory_of", arguments, device=session.workload.device().type)
    peak = found.phases["serving" if session.mode == "serve" else "run"].peak
    session.file.append([session.trial(plan, "memory", facts={"peak_bytes": peak, **dataclasses.asdict(found)})])
    return peak


def _time(session: Session, arms: list[Arm], rows: list[Row], baseline: dict[str, Any], requests: list[Any]) -> None:
    workload, names = session.workload, ["baseline", *(arm.name for arm in arms[1:])]
    turn = {"n": 0}

    def server(arm: Arm) -> Any:
        return lambda: workload.serve(arm.handle, requests[turn["n"] % len(requests)])

    calls = {name: server(arm) for name, arm in zip(names, arms, strict=True)}
    device = workload.device().type
    session.progress.stage("warming up")
    warm = warm_up(calls, device=device, seconds=max(2.0, session.left / 6))
    race = Race(
        calls,
        rng=np.random.default_rng([session.seeds, len(arms)]),
        rounds=100_000,
        seconds=session.left,
        repeats=warm.repeats,
        device=device,
        make=lambda clocks: Sequential(precision=session.precision, clocks=clocks),
    )
    _replay(session, arms, race)
    block: list[dict[str, Sample]] = []
    began = time.monotonic()

    def flush() -> None:
        nonlocal block, began
        if block:
            session.file.append(_trials(session, arms, names, block, round=turn["n"] - len(block)))
            _fill(rows, race)
            session.progress.rows(rows)
        block, began = [], time.monotonic()

    try:
        if not race.settled:
            session.progress.stage("timing")
            for timed in race:
                block.append(timed)
                turn["n"] += 1
                if time.monotonic() - began > BLOCK_SECONDS:
                    flush()
    finally:
        flush()
        race.finish()
        _fill(rows, race)
        times = [t for trial in session.kept(Plan(), "time") for t in trial.wall]
        if times:
            baseline["seconds"] = float(np.median(times))
            baseline["repeats"] = len(times)
        for row in rows:
            conclude(row, race.results[row.plan], session, baseline.get("seconds"))


def _replay(session: Session, arms: list[Arm], race: Race) -> None:
    """Feeds the pairs of an earlier run of the same comparison."""
    base = {trial.id: trial for trial in session.kept(Plan(), "time")}
    for arm in arms[1:]:
        for trial in session.kept(arm.plan, "time"):
            of = base.get(trial.baseline or "")
            if of:
                for one, other in zip(_samples(of), _samples(trial), strict=True):
                    race.results[arm.name].add(one.clocks, other.clocks)


def _samples(trial: Trial) -> list[Sample]:
    device: Sequence[float | None] = trial.device or [None] * len(trial.wall)
    return [Sample(w, c, d) for w, c, d in zip(trial.wall, trial.cpu, device, strict=True)]


def _trials(
    session: Session, arms: list[Arm], names: list[str], block: list[dict[str, Sample]], round: int
) -> list[Trial]:
    made: list[Trial] = []
    for name, arm in zip(names, arms, strict=True):
        timed = [samples[name] for samples in block]
        made.append(
            session.trial(
                arm.plan,
                "time",
                round=round,
                baseline=made[0].id if made else None,
                wall=[s.wall for s in timed],
                cpu=[s.cpu for s in timed],
                device=[s.device for s in timed if s.device is not None],
                facts={"order": [list(samples).index(name) for samples in block]},
            )
        )
    return made


def _fill(rows: list[Row], race: Race) -> None:
    for row in rows:
        result = race.results[row.plan]
        row.pairs, row.clock = len(result), result.clock
        if result.intervals:
            interval = result.interval
            row.speedup, row.low, row.high = interval.estimate, interval.low, interval.high


def conclude(row: Row, result: Sequential, session: Session, base_seconds: float | None) -> None:
    """Sets the row's verdict; one that the budget left open stays undecided."""
    row.gate = session.gates.get(row.plan, "not checked")
    if not len(result):
        row.why = "the budget was spent before anything was timed"
        return
    if base_seconds and row.speedup:
        row.break_even = stats.break_even(row.setup_seconds, base_seconds, base_seconds / row.speedup)
    quality = "held" if row.quality_verdict == "identical" else row.quality_verdict
    row.verdict, row.why = stats.judge(result.interval, quality, row.simulated, row.gate)
    if row.verdict == "no measurable gain" and not result.settled and result.interval.holds(1.0):
        reach = result.interval.half_width
        row.verdict = "undecided"
        row.why = "the budget was spent while the interval was still " + (
            f"{math.expm1(reach):.1%} wide to each side" if math.isfinite(reach) else "open"
        )
