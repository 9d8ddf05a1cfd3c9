"""Comparing training: time to the workload's target, paired by seed, all arms in one process in turns of a few steps.

Turns are interleaved in random order, so the machine's slow minutes hit every arm alike. Evaluation is untimed; what
the plan does before the first step is charged to it. A run that does not reach the target within its limit is a miss
and counts at the time it was given.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from hasten.api import training
from hasten.bench import stats
from hasten.bench.result import Row
from hasten.bench.sequential import steadier_clock
from hasten.bench.serving import peak_of
from hasten.bench.session import Session
from hasten.bench.timing import Clock
from hasten.bench.trials import Trial
from hasten.core.plans import Plan
from hasten.train import NotFiniteError
from hasten.workloads.base import Workload


@dataclasses.dataclass
class Racer:
    """One training run of one arm.

    Attributes:
        curve: [step, wall seconds, cpu seconds, quality] at each evaluation.
        state: running, reached or missed.
    """

    plan: Plan
    workload: Workload
    run: Any
    clock: Clock
    setup: tuple[float, float]
    curve: list[list[float]] = dataclasses.field(default_factory=list)
    state: str = "running"
    at: tuple[float, float] = (math.nan, math.nan)
    steps: float = math.nan
    rows: Any = None

    @property
    def spent(self) -> tuple[float, float]:
        return self.clock.wall + self.setup[0], self.clock.cpu + self.setup[1]

    def charge(self, wall: float, cpu: float) -> None:
        """Adds seconds that were spent before the run, on tuning say."""
        self.setup = self.setup[0] + wall, self.setup[1] + cpu


def make_run(workload: Workload, plan: Plan, seed: int) -> Any:
    """The training run of one arm: the workload's model, tuned optimizer, data and schedule, and the plan."""
    model = workload.build(seed)
    schedule = lambda step, steps: workload.schedule(step, steps or workload.steps)  # noqa: E731
    return training(
        model,
        workload.optimizer(model),
        workload.batches(seed),
        plan,
        steps=workload.steps,
        clip=workload.clip,
        schedule=schedule,
        seed=seed,
        **workload.lent(plan.methods, seed),
    )


def few_steps(workload: Workload, plan: Plan, steps: int = 3) -> None:
    """A short run that is thrown away: it warms up the process's kernels, and it is what peak memory is measured on."""
    make_run(workload, plan, seed=0).slice(workload.loss, steps=steps)


def start(workload: Workload, plan: Plan, seed: int) -> Racer:
    clock = Clock(workload.device().type)
    with clock:
        run = make_run(workload, plan, seed)
    return Racer(plan, workload, run, Clock(workload.device().type), (clock.wall, clock.cpu))


def compare_training(session: Session, rows: list[Row], baseline: dict[str, Any]) -> None:
    """Fills the rows; each finished run goes to the session's file at once."""
    plans = [Plan(), *session.plans]
    for plan in plans:
        session.progress.stage(f"warming up {plan}")
        few_steps(session.workload_of(plan), plan)
    if session.memory:
        peaks = [peak_of(session, plan) for plan in plans]
        baseline["peak_bytes"] = peaks[0]
        for row, peak in zip(rows, peaks[1:], strict=True):
            row.peak_bytes, row.peak_base = peak, peaks[0]
    try:
        for seed in range(session.seeds):
            missing = [plan for plan in session.plans if not _pairs(session, plan, seed)]
            if missing and session.left > 0:
                _race(session, [Plan(), *missing], seed, rows)
            _fill(session, rows, baseline)
    finally:
        _fill(session, rows, baseline)
        for row in rows:
            conclude(row, session)


def gain(session: Session, plan: Plan, without: Plan) -> stats.Interval | None:
    """How many times sooner a plan reaches the target than without one of its methods, paired by seed."""
    mine, others = ({base.id: trial for base, trial in _pairs(session, one)} for one in (plan, without))
    both = [(others[race], mine[race]) for race in mine if race in others]
    if not both:
        return None
    clock = steadier_clock(*([_clocks(trial) for trial in arm] for arm in zip(*both, strict=True)))
    return _interval(both, clock).interval


def _race(session: Session, plans: list[Plan], seed: int, rows: list[Row]) -> None:
    """Trains all arms of one seed in turns until each has reached the target or missed it."""
    workload, rng = session.workload, np.random.default_rng([seed, 97])
    racers = [start(session.workload_of(plan), plan, seed) for plan in plans]
    for racer in racers:
        racer.charge(*session.charged.get(str(racer.plan), (0.0, 0.0)))
    base_id: str | None = None
    waiting: list[Racer] = []
    while any(racer.state == "running" for racer in racers):
        running = [racer for racer in racers if racer.state == "running"]
        for n in rng.permutation(len(running)):
            turn(running[n], racers[0])
            if running[n].state != "running":
                waiting.append(running[n])
        done = max(len(racer.curve) for racer in racers)
        session.progress.stage(f"training, seed {seed + 1} of {session.seeds}, {done * workload.evaluate_every} steps")
        if base_id is None and racers[0].state != "running":
            trial = _trial(session, racers[0], seed, None)
            base_id = trial.id
            waiting = [racer for racer in waiting if racer is not racers[0]]
            session.file.append([trial])
        if base_id is not None and waiting:
            session.file.append([_trial(session, racer, seed, base_id) for racer in waiting])
            waiting = []
        if session.left <= 0:
            return
        session.progress.rows(rows)


def turn(racer: Racer, base: Racer) -> None:
    """A few timed steps, then an untimed evaluation."""
    workload = racer.workload
    try:
        with racer.clock:
            racer.run.slice(workload.loss, steps=workload.evaluate_every)
    except NotFiniteError:
        racer.curve.append([racer.run.step, *racer.spent, math.inf])
        racer.state, racer.steps, racer.at = "missed", racer.run.step, racer.spent
        return
    with racer.run.evaluation() as model:
        values = np.asarray(workload.evaluate(model), dtype=float)
    quality = workload.metric.aggregate(values)
    racer.rows = values
    racer.curve.append([racer.run.step, *racer.spent, float(quality)])
    sign = 1 if workload.metric.better == "lower" else -1
    if sign * (quality - workload.target) <= 0:
        racer.state = "reached"
        racer.steps, *at = _crossing(racer.curve, workload.target, racer.setup)
        racer.at = (at[0], at[1])
    elif racer.run.done or not math.isfinite(quality) or _too_long(workload, racer, base):
        racer.state = "missed"
        racer.steps, racer.at = racer.run.step, racer.spent


def _too_long(workload: Workload, racer: Racer, base: Racer) -> bool:
    """Whether an arm has used `limit` times what the baseline needed (or was given)."""
    if racer is base or base.state == "running":
        return False
    return racer.spent[1] > workload.limit * base.at[1]


def _crossing(curve: list[list[float]], target: float, setup: tuple[float, float]) -> list[float]:
    """[steps, wall, cpu] at which the line between the last two evaluations meets the target."""
    step, wall, cpu, quality = curve[-1]
    before = curve[-2] if len(curve) > 1 else None
    if before is None or before[3] == quality:
        return [step, wall, cpu]
    share = (target - before[3]) / (quality - before[3])
    return [a + share * (b - a) for a, b in zip(before[:3], (step, wall, cpu), strict=True)]


def _trial(session: Session, racer: Racer, seed: int, baseline: str | None) -> Trial:
    facts = {
        "state": racer.state,
        "steps": racer.steps,
        "curve": [[round(x, 5) for x in point] for point in racer.curve if math.isfinite(point[3])],
        "quality": next((p[3] for p in reversed(racer.curve) if math.isfinite(p[3])), math.nan),
        "setup_seconds": racer.setup[0],
    }
    return session.trial(
        racer.plan, "run", seed=seed, baseline=baseline, wall=[racer.at[0]], cpu=[racer.at[1]], facts=facts
    )


def _pairs(session: Session, plan: Plan, seed: int | None = None) -> list[tuple[Trial, Trial]]:
    """(baseline, plan) runs of the same race, the latest for each seed."""
    base = {trial.id: trial for trial in session.kept(Plan(), "run")}
    found: dict[int, tuple[Trial, Trial]] = {}
    for trial in session.kept(plan, "run"):
        if trial.baseline in base and (seed is None or trial.seed == seed) and trial.seed < session.seeds:
            found[trial.seed] = (base[trial.baseline], trial)
    return [found[one] for one in sorted(found)]


def _fill(session: Session, rows: list[Row], baseline: dict[str, Any]) -> None:
    for row, plan in zip(rows, session.plans, strict=True):
        pairs = _pairs(session, plan)
        row.pairs = len(pairs)
        if not pairs:
            continue
        row.clock = steadier_clock(*([_clocks(trial) for trial in arm] for arm in zip(*pairs, strict=True)))
        best = _interval(pairs, row.clock)
        row.speedup, row.low, row.high = best.interval.estimate, best.interval.low, best.interval.high
        row.at_least, row.misses, row.misses_base = best.at_least, best.plan_misses, best.base_misses
        row.setup_seconds = float(np.mean([trial.facts["setup_seconds"] for _, trial in pairs]))
        row.quality_base = float(np.mean([base.facts["quality"] for base, _ in pairs]))
        row.quality = float(np.mean([trial.facts["quality"] for _, trial in pairs]))
        row.quality_change = (row.quality - row.quality_base) / (abs(row.quality_base) or 1.0)
        row.quality_verdict = "lost" if row.misses > row.misses_base else "held"
        row.facts["steps"] = float(np.mean([t.facts["steps"] for _, t in pairs]))
        row.facts["steps_base"] = float(np.mean([b.facts["steps"] for b, _ in pairs]))
        baseline.update(
            target=session.workload.target,
            quality=row.quality_base,
            seconds=float(np.mean([b.wall[0] for b, _ in pairs])),
        )
    session.progress.rows(rows)


def _clocks(trial: Trial) -> dict[str, float]:
    return {"wall": trial.wall[0], "cpu": trial.cpu[0]}


def _interval(pairs: list[tuple[Trial, Trial]], clock: str) -> stats.TargetTime:
    base, plan = zip(*pairs, strict=True)
    times = [[getattr(trial, clock)[0] for trial in arm] for arm in (base, plan)]
    missed = [[trial.facts["state"] == "missed" for trial in arm] for arm in (base, plan)]
    return stats.time_to_target(times[0], times[1], missed[0], missed[1])


def conclude(row: Row, session: Session) -> None:
    """Sets the row's verdict once every seed has its pair."""
    row.gate = session.gates.get(row.plan, "not checked")
    if row.low is None or row.high is None or row.speedup is None:
        row.why = "the budget was spent before a seed was finished"
        return
    interval = stats.Interval(row.speedup, row.low, row.high, 0.95)
    row.verdict, row.why = stats.judge(interval, row.quality_verdict, row.simulated, row.gate)
    if row.misses > row.misses_base:
        row.why = f"{row.misses} of {row.pairs} seeds missed the target (baseline: {row.misses_base})"
    elif row.pairs < session.seeds and row.verdict != "faster":
        row.verdict, row.why = "undecided", f"the budget was spent after {row.pairs} of {session.seeds} seeds"
