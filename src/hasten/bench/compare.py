"""The main job: baseline and plans side by side on a workload, and one verdict a plan."""

import dataclasses
import importlib
import math
import pathlib
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from typing import Any

from hasten.bench import gate, leave_out, machine
from hasten.bench.result import Comparison, Group, Row
from hasten.bench.session import Progress, Session, Silent, default_out
from hasten.bench.trials import TrialFile
from hasten.core.errors import PlanError, UsageError
from hasten.core.options import Method
from hasten.core.plans import Plan
from hasten.workloads.base import Workload
from hasten.workloads.find import workload as find_workload

TRIALS = "trials.jsonl"
RESULT = "result.json"
REPORT = "report.html"


def compare(
    workload: "Workload | str",
    plans: "Iterable[Any] | str | Plan",
    *,
    seeds: int = 3,
    budget: "float | str" = "5m",
    margin: "float | str" = 0.01,
    precision: "float | str" = 0.02,
    out: "str | pathlib.Path | None" = None,
    memory: bool = True,
    gated: bool = True,
    tuned: int = 0,
    charge_tuning: bool = False,
    leave_one_out: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """Measures plans against the baseline and writes `trials.jsonl` and `report.html`.

    Plans that act on training are compared by the time to the workload's target (its training task), others by the time
    per request of the task that was named; one call can hold both.
    Ctrl-C keeps what is finished; the same call again goes on from there.

    Args:
        workload: text as on the command line, or a `hasten.Workload`.
        plans: one or more plans.
        seeds: training runs, or sets of requests.
        budget: seconds, or text like `90s`, `5m`, `1h`; for everything but loading.
        margin: how much worse quality may be, relative to the baseline: 0.01 or `1%`.
        precision: half-width of the interval at which timing stops.
        out: folder for the trials and the report; by default one under `out/compare` that follows from the arguments.
        memory: measure each arm's peak memory in a process of its own.
        gated: first run the tests of the plans' methods (once for a source tree) where they are there.
        tuned: trials of tuning that every arm of training, the baseline too, gets first, in at most half of the
            budget; 0: settings stay as given. See `hasten.bench.tuning`.
        charge_tuning: add what an arm's tuning took to the time of each of its runs.
        leave_one_out: measure each plan also without each of its methods, and say what each gives.

    Raises:
        UsageError: anything wrong with the arguments, before anything is loaded.
    """
    given = [plans] if isinstance(plans, str | Plan | Method) else list(plans)
    return compare_all(
        [(workload, given)],
        seeds=seeds,
        budget=budget,
        margin=margin,
        precision=precision,
        out=out,
        memory=memory,
        gated=gated,
        tuned=tuned,
        charge_tuning=charge_tuning,
        leave_one_out=leave_one_out,
        progress=progress,
        command=command,
    )


def compare_all(
    jobs: "Sequence[tuple[Workload | str, Sequence[Any]]]",
    *,
    seeds: int = 3,
    budget: "float | str" = "5m",
    margin: "float | str" = 0.01,
    precision: "float | str" = 0.02,
    out: "str | pathlib.Path | None" = None,
    memory: bool = True,
    gated: bool = True,
    tuned: int = 0,
    charge_tuning: bool = False,
    leave_one_out: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """`compare` for several workloads, each with plans of its own, in one table and one report.

    Every group of plans (a workload's training plans, its inference plans) gets an equal part of the budget that is
    left.
    """
    began = time.monotonic()
    found = [one for workload, plans in jobs for one in check(workload, plans, seeds)]
    seconds, allowed, wanted = parse_seconds(budget), parse_share(margin, "margin"), parse_share(precision, "precision")
    if wanted == 0:
        raise UsageError("precision must be above 0")
    check_tuning(found, tuned, charge_tuning)
    if leave_one_out:
        leave_out.without_one([plan for _, plans, _ in found for plan in plans])
    folder = pathlib.Path(out) if out is not None else default_out(found)
    file = TrialFile(folder / TRIALS)
    shown = progress or Silent()
    groups = [_group(workload, plans, mode) for workload, plans, mode in found]
    interrupted = False
    about = machine.fingerprint()
    result = Comparison(groups, about, allowed, command or _command(jobs, seeds, budget, margin), 0.0)
    try:
        gates = _gates([plan for _, plans, _ in found for plan in plans], shown) if gated else {}
        for n, (workload, plans, mode) in enumerate(found):
            left = max(0.0, began + seconds - time.monotonic()) / (len(found) - n)
            named = all(isinstance(one, str) for one, _ in jobs)
            session = Session(
                workload=workload,
                given=str(workload) if named else None,
                plans=plans,
                seeds=seeds,
                margin=allowed,
                precision=wanted,
                ends=time.monotonic() + left,
                file=file,
                progress=shown,
                fingerprint=about,
                memory=memory,
                mode=mode,
                gates=gates,
            )
            settings = _tune(session, tuned, charge_tuning) if tuned and mode == "train" else {}
            without: leave_out.Without = {}
            given = session.plans
            if leave_one_out and any(len(plan) > 1 for plan in given):
                session.plans, without = leave_out.without_one(given)
                _share_settings(session, without)
            groups[n] = _group(workload, session.plans, mode)
            leave_out.name_rows(groups[n].rows, given, without)
            session.gates |= _gates_of(session.plans, gates)
            for row in groups[n].rows:
                row.facts |= settings.get(row.plan, {})
            groups[n].baseline |= settings.get(str(Plan()), {})
            module = importlib.import_module("hasten.bench.training" if mode == "train" else "hasten.bench.serving")
            run = module.compare_training if mode == "train" else module.compare_serving
            try:
                run(session, groups[n].rows, groups[n].baseline)
            finally:
                leave_out.note_gains(session, groups[n].rows, without)
    except KeyboardInterrupt:
        interrupted = True
    from hasten.bench import report

    result.seconds, result.interrupted, result.out = time.monotonic() - began, interrupted, str(folder)
    result.commit, result.dirty = about["commit"], about["dirty"]
    report.write(folder / REPORT, result, file.read())
    return result


def _group(workload: Workload, plans: list[Plan], mode: str) -> Group:
    metric = workload.metric
    rows = [Row(str(plan), str(workload)) for plan in plans]
    return Group(str(workload), mode, {"name": metric.name, "better": metric.better, "unit": metric.unit}, rows)


def check(workload: "Workload | str", plans: Sequence[Any], seeds: int) -> list[tuple[Workload, list[Plan], str]]:
    """Groups of (workload with its task, plans, `train` or `serve`), or every problem at once.

    Raises:
        UsageError: something is wrong with the arguments.
    """
    problems: list[str] = []
    found: Workload | None = None
    try:
        found = find_workload(workload)
    except PlanError as error:
        problems += error.problems
    except UsageError as error:
        problems.append(str(error))
    parsed = []
    for one in plans:
        try:
            parsed.append(Plan.of(one))
        except PlanError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(str(error))
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        problems.append(f"seeds must be a whole number of at least 1, not {seeds!r}")
    if not problems and not parsed:
        problems.append("name at least one plan: hasten compare WORKLOAD PLAN...; 'hasten list' shows the methods")
    if any(not plan.methods for plan in parsed):
        problems.append("the baseline is always measured: name at least one method in each plan")
    texts = [str(plan) for plan in parsed]
    problems += [f"the plan {text!r} is given twice" for text in sorted({t for t in texts if texts.count(t) > 1})]
    if problems or found is None:
        raise PlanError(problems)
    return _split(found, parsed)


def _split(found: Workload, parsed: list[Plan]) -> list[tuple[Workload, list[Plan], str]]:
    """Plans that act on training go to the workload's training task, the others to the task that was named."""
    named = getattr(found, "task", None)
    if named == "train" or found.tasks() == ("train",):
        groups = [(found, parsed, "train")]
    else:
        training = [plan for plan in parsed if any(trains_only(method) for method in plan.methods)]
        serving = [plan for plan in parsed if plan not in training]
        if training and "train" not in found.tasks():
            raise UsageError(
                f"{training[0]} acts on training, and {found} has no training task; it has: {', '.join(found.tasks())}"
            )
        groups = []
        if serving:
            groups.append((found, serving, "serve"))
        if training:
            groups.append((dataclasses.replace(found, task="train"), training, "train"))  # type: ignore[call-arg]
    problems = []
    for workload, plans, mode in groups:
        given = ("calibration", "draft", "teacher", "proxy", "downstream", "losses")
        have = {name for name in given if _overrides(workload, name)}
        have |= {"steps"} if mode == "train" else set()
        have |= {"cuda"} if workload.device().type == "cuda" else set()
        for plan in plans:
            try:
                plan.check(have=have)
            except PlanError as error:
                problems += [f"{problem} (the workload {workload.title()} has none)" for problem in error.problems]
    if problems:
        raise PlanError(problems)
    return groups


def trains_only(method: Any) -> bool:
    """Whether a method hooks training and can't change a finished model."""
    if getattr(method, "training_only", False):
        return True
    return (hasattr(method, "attach") or _can(method, "attach")) and not _can(method, "install")


def _can(method: Any, *verbs: str) -> bool:
    base = importlib.import_module(f"hasten.{method.family}.base")
    return any(hasattr(base, verb) for verb in verbs)


def _overrides(found: Workload, name: str) -> bool:
    return getattr(type(found), name) is not getattr(Workload, name)


def check_tuning(found: list[tuple[Workload, list[Plan], str]], trials: int, charge: bool) -> None:
    """Raises `UsageError` where tuning is asked for and can't be done."""
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 0:
        raise UsageError(f"tuned must be a whole number of trials, 0 for none, not {trials!r}")
    if charge and not trials:
        raise UsageError("there is no tuning to charge: give tuned, the number of trials, too")
    if trials and not any(mode == "train" for _, _, mode in found):
        raise UsageError("only plans that act on training are tuned: leave tuned out for these")
    if trials:
        importlib.import_module("hasten.bench.tuning").check_installed()


def _tune(session: Session, trials: int, charge: bool) -> dict[str, dict[str, Any]]:
    """Tunes the session's arms and puts the best plans in their place; what is said of each, by its plan's text."""
    from hasten.bench.tuning import tune_arms

    ends = time.monotonic() + session.left / 2
    results = tune_arms(session.workload, session.plans, trials, ends, 0, session.file, session.progress)
    session.plans = [one.best for one in results[1:]]
    for one in results:
        session.tuned[str(one.best)] = one.workload
        if charge:
            session.charged[str(one.best)] = one.wall, one.cpu
    return {str(one.best): {"tuned": one.values, "tuning_trials": one.trials, "tuning_cpu": one.cpu} for one in results}


def _share_settings(session: Session, without: leave_out.Without) -> None:
    """A plan that lacks a method has the tuned settings, and is charged the tuning, of the plan that it is made of."""
    for text, others in without.items():
        for other in others.values():
            if text in session.tuned:
                session.tuned.setdefault(str(other), session.tuned[text])
            if text in session.charged:
                session.charged.setdefault(str(other), session.charged[text])


def _gates_of(plans: Sequence[Plan], known: dict[str, str]) -> dict[str, str]:
    """The state of the tests of plans with other settings, or fewer methods, than those that were checked."""
    if not known:
        return {}
    states = {method.name: gate.gate(method.name).state for plan in plans for method in plan.methods}
    return {str(plan): _state({states[method.name] for method in plan.methods}) for plan in plans}


def _state(mine: set[str]) -> str:
    return "red" if "red" in mine else "green" if mine == {"green"} else "not checked"


def _gates(plans: list[Plan], progress: Progress) -> dict[str, str]:
    """The state of each plan's tests: red if any method's is, green if all are."""
    states: dict[str, str] = {}
    for name in sorted({method.name for plan in plans for method in plan.methods}):
        progress.stage(f"tests of {name}")
        states[name] = gate.gate(name).state
    found = {}
    for plan in plans:
        found[str(plan)] = _state({states[method.name] for method in plan.methods})
    return found


def parse_seconds(given: "float | str") -> float:
    """Seconds from a number or from text such as `90`, `90s`, `5m`, `1.5h`.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|sec|m|min|h)?\s*", given)
        if not match:
            raise UsageError(f"budget must be a time such as 90s, 5m or 1h, not {given!r}")
        given = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[(match[2] or "s")[0]]
    if isinstance(given, bool) or not given > 0:
        raise UsageError(f"budget must be above 0, not {given}")
    return float(given)


def parse_share(given: "float | str", name: str) -> float:
    """A share from 0.01 or `1%`.

    Raises:
        UsageError: it is neither, or not from 0 to below 1.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(%?)\s*", given)
        if not match:
            raise UsageError(f"{name} must be a share such as 1% or 0.01, not {given!r}")
        given = float(match[1]) / (100 if match[2] else 1)
    if not (0 <= given < 1) or math.isnan(given):
        raise UsageError(f"{name} must be at least 0 and below 1 (100%), not {given}")
    return float(given)


def _command(jobs: Any, seeds: int, budget: Any, margin: Any) -> str:
    lines = []
    for workload, plans in jobs:
        words = ["hasten", "compare", str(workload), *(str(plan) for plan in plans)]
        lines.append(shlex.join([*words, "--seeds", str(seeds), "--budget", str(budget), "--margin", str(margin)]))
    return "\n".join(lines)
