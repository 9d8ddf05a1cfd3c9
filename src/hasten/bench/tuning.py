"""`hasten tune`: a fair search of settings. Every arm, the baseline too, gets the same number of trials.

What is searched stands beside the options: a method's card names ranges of its own (`tune`), a workload those of the
baseline's optimizer and schedule (`tunable`); a plan's arm searches both. Values are drawn evenly in the logarithm at
first and then by optuna's TPE. The first trial of each arm has the settings as they were given, so that the settings
found are at least as good on its run. A trial is one training run on a seed that no comparison uses; its cost is kept.

A trial's score is the CPU time to the target. One that misses it, or that has taken a quarter longer than the arm's
best so far, ends and scores what it has spent times 1 + 10 (its relative distance from the target).
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.bench import machine, training
from hasten.bench.session import Progress, Silent, source_digest
from hasten.bench.trials import Trial, TrialFile, make_key
from hasten.core.errors import HastenError, MissingDependencyError, UsageError
from hasten.core.plans import Plan
from hasten.workloads.base import Workload

RESULT = "tuned.json"
SEED = 1_000_000  # of the runs; those of comparisons count from 0
PATIENCE = 1.25
DISTANCE = 10.0


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option that is searched.

    Attributes:
        name: `lr` of the workload, or `optim/sinkgd.lr` of a method.
        method: the method's place in the plan; None for the workload.
    """

    name: str
    option: str
    method: int | None
    low: float
    high: float
    whole: bool
    given: Any


@dataclasses.dataclass
class Arm:
    """One plan with its workload, and its finished trials."""

    workload: Workload
    plan: Plan
    knobs: list[Knob]
    trials: list[Trial] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        return min(self.trials, key=lambda trial: trial.facts["score"], default=None)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning found for one arm.

    Attributes:
        plan: as it was given. best: the plan with the best settings, for `workload` with the best options.
        values: knob to value; empty where the settings given were best.
        score, given: CPU seconds to the target (or more, for a miss) with the best settings and with those given.
        reached: whether the best trial reached the target.
        trials: of this arm, as many as of every other. wall, cpu: seconds that they took.
    """

    plan: Plan
    best: Plan
    workload: Workload
    values: dict[str, float]
    score: float
    given: float
    reached: bool
    trials: int
    wall: float
    cpu: float

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "plan": str(self.plan),
            "best": str(self.best),
            "workload": str(self.workload),
        }


def knobs(workload: Workload, plan: Plan) -> list[Knob]:
    """What is searched for a plan."""
    found = [_knob(name, name, None, limits, workload) for name, limits in workload.tunable.items()]
    for place, method in enumerate(plan.methods):
        for name, limits in method.card.tune.items():
            found.append(_knob(f"{method.name}.{name}", name, place, limits, method))
    return found


def _knob(name: str, option: str, place: int | None, limits: tuple[float, float], owner: Any) -> Knob:
    kinds = {field.name: field.type for field in dataclasses.fields(owner)}
    return Knob(name, option, place, *limits, "int" in str(kinds[option]), getattr(owner, option))


def with_values(
    workload: Workload, plan: Plan, found: Sequence[Knob], values: dict[str, float]
) -> tuple[Workload, Plan]:
    """The workload and the plan with knobs at the given values.

    Raises:
        PlanError: a value that the option does not take.
    """
    methods, options = list(plan.methods), {}
    for knob in found:
        if knob.name in values:
            if knob.method is None:
                options[knob.option] = values[knob.name]
            else:
                methods[knob.method] = dataclasses.replace(methods[knob.method], **{knob.option: values[knob.name]})
    return dataclasses.replace(workload, **options), Plan(tuple(methods))  # type: ignore[arg-type]


def tune(
    workload: "Workload | str",
    plans: "Sequence[Any]",
    *,
    trials: int = 12,
    budget: "float | str" = "10m",
    seed: int = 0,
    out: "str | pathlib.Path | None" = None,
    progress: Progress | None = None,
) -> list[Tuned]:
    """Tunes the baseline and each plan with the same number of trials; the baseline's result comes first.

    Rounds of one trial an arm are made until `trials` or the budget is reached. Ctrl-C keeps what is finished; the same
    call again goes on.

    Args:
        workload: one that has a training task.
        plans: plans that act on training.
        seed: of what is tried.
        out: folder for `trials.jsonl` and `tuned.json`.

    Raises:
        UsageError: anything wrong with the arguments, before anything is trained.
    """
    from hasten.bench.compare import TRIALS, check, parse_seconds

    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise UsageError(f"trials must be a whole number of at least 1, not {trials!r}")
    groups = check(workload, plans, 1)
    if any(mode != "train" for _, _, mode in groups):
        raise UsageError("only plans that act on training are tuned: give a workload with task=train, and such plans")
    found, parsed, _ = groups[0]
    seconds = parse_seconds(budget)
    check_installed()
    digest = make_key(str(found), [str(plan) for plan in parsed], seed)
    folder = pathlib.Path(out) if out is not None else pathlib.Path("out/tune") / f"{found.title()}-{digest[:6]}"
    file = TrialFile(folder / TRIALS)
    results = tune_arms(found, parsed, trials, time.monotonic() + seconds, seed, file, progress or Silent())
    content = {"workload": str(found), "arms": [one.to_json() for one in results], "machine": machine.fingerprint()}
    (folder / RESULT).write_text(json.dumps(content, indent=1, default=str) + "\n")
    return results


def tune_arms(
    workload: Workload,
    plans: Sequence[Plan],
    trials: int,
    ends: float,
    seed: int,
    file: TrialFile,
    progress: Progress,
) -> list[Tuned]:
    """As `tune`, checked and with a file to keep the trials in; `ends` is when, by `time.monotonic()`."""
    arms = [Arm(workload, plan, knobs(workload, plan)) for plan in (Plan(), *plans)]
    about = machine.fingerprint()
    keys = [_key(arm, seed, about) for arm in arms]
    for arm, key in zip(arms, keys, strict=True):
        kept = {trial.round: trial for trial in file.read([key]) if trial.what == "tune"}
        arm.trials = [kept[n] for n in range(len(kept)) if n in kept]
    rng, longest = np.random.default_rng([seed, 53]), 0.0
    for arm in arms:
        if len(arm.trials) < trials:
            training.few_steps(arm.workload, arm.plan)
    for n in range(trials):
        began, order = time.monotonic(), rng.permutation(len(arms))
        if n and ends - began < longest:
            break
        for place in order:
            arm = arms[place]
            if len(arm.trials) > n:
                continue
            progress.stage(f"tuning, trial {n + 1} of {trials}: {arm.plan}")
            trial = _trial(arm, n, seed, keys[place], about)
            arm.trials.append(trial)
            file.append([trial])
        longest = max(longest, time.monotonic() - began)
    fewest = min(len(arm.trials) for arm in arms)
    for arm in arms:
        arm.trials = arm.trials[:fewest]
    return [_tuned(arm) for arm in arms]


def _key(arm: Arm, seed: int, about: dict[str, Any]) -> str:
    searched = [[knob.name, knob.low, knob.high] for knob in arm.knobs]
    return make_key(
        "tune", str(arm.workload), str(arm.plan), searched, seed, about["id"], about["versions"], source_digest()
    )


def _trial(arm: Arm, n: int, seed: int, key: str, about: dict[str, Any]) -> Trial:
    values = _suggest(arm, n, seed) if n else {}
    began, best = time.perf_counter(), arm.best
    racer, problem = None, ""
    try:
        workload, plan = with_values(arm.workload, arm.plan, arm.knobs, values)
        racer = training.start(workload, plan, SEED + seed)
        cap = PATIENCE * best.facts["score"] if best and best.facts["state"] == "reached" else math.inf
        while racer.state == "running" and racer.spent[1] <= cap:
            training.turn(racer, racer)
    except HastenError as error:  # a value that does not fit is a trial that found nothing
        problem = str(error)
    state = racer.state if racer else "missed"
    quality = next((p[3] for p in reversed(racer.curve) if math.isfinite(p[3])), math.inf) if racer else math.inf
    spent = racer.spent if racer else (0.0, 0.0)
    score = racer.at[1] if racer and state == "reached" else _missed(arm.workload, quality, spent[1], best)
    return Trial(
        key=key,
        what="tune",
        workload=str(arm.workload),
        plan=str(arm.plan),
        seed=SEED + seed,
        round=n,
        wall=[time.perf_counter() - began],
        cpu=[spent[1]],
        facts={
            "values": values,
            "state": state,
            "quality": quality if math.isfinite(quality) else None,
            "score": score,
            "steps": racer.run.step if racer else 0,
            **({"problem": problem} if problem else {}),
        },
        machine=about["id"],
        versions=about["versions"],
        commit=about["commit"],
        dirty=about["dirty"],
    )


def _missed(workload: Workload, quality: float, spent: float, best: Trial | None) -> float:
    """The score of a trial without the target: above that of the best that reached it, the more so the farther off."""
    sign = 1 if workload.metric.better == "lower" else -1
    gap = max(0.0, sign * (quality - workload.target)) / (abs(workload.target) or 1.0)
    least = best.facts["score"] if best is not None and best.facts["state"] == "reached" else 0.0
    return max(spent, least, 1e-6) * (1 + DISTANCE * min(gap, 100.0))


def _suggest(arm: Arm, n: int, seed: int) -> dict[str, float]:
    """The values of the next trial, from what the arm's finished trials gave."""
    if not arm.knobs:
        return {}
    import optuna

    study = optuna.create_study(sampler=_sampler(seed + n))
    ranges: dict[str, Any] = {
        knob.name: optuna.distributions.IntDistribution(round(knob.low), round(knob.high), log=True)
        if knob.whole
        else optuna.distributions.FloatDistribution(knob.low, knob.high, log=True)
        for knob in arm.knobs
    }
    for trial in arm.trials:
        values = trial.facts["values"] or {knob.name: knob.given for knob in arm.knobs}
        inside = all(
            isinstance(v, int | float) and ranges[name].low <= v <= ranges[name].high for name, v in values.items()
        )
        if inside:
            score = math.log(trial.facts["score"])
            study.add_trial(optuna.trial.create_trial(params=values, distributions=ranges, value=score))
    return dict(study.ask(ranges).params)


def check_installed() -> None:
    """Raises `MissingDependencyError` where optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise MissingDependencyError("optuna", "train")


def _sampler(seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)


def _tuned(arm: Arm) -> Tuned:
    best = arm.best
    assert best is not None, "the first round is always made"
    values = best.facts["values"]
    workload, plan = with_values(arm.workload, arm.plan, arm.knobs, values)
    return Tuned(
        plan=arm.plan,
        best=plan,
        workload=workload,
        values=values,
        score=best.facts["score"],
        given=arm.trials[0].facts["score"],
        reached=best.facts["state"] == "reached",
        trials=len(arm.trials),
        wall=sum(trial.wall[0] for trial in arm.trials),
        cpu=sum(trial.cpu[0] for trial in arm.trials),
    )
