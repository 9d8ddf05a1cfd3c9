"""The main job: what it finds, that nothing finished is lost, and what it says of wrong arguments."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import hasten
import small_workload
from hasten.bench import gate, memory, serving, training
from hasten.bench.compare import compare, compare_all, parse_seconds, parse_share
from hasten.bench.trials import Trial, TrialFile
from hasten.core.errors import HastenError, PlanError, UsageError

NAME = f"{small_workload.__file__}:Small"
PLAN = "quant/gptq(bits=8)"
QUICK = {"memory": False, "gated": False, "budget": "20s", "precision": 0.2}


def test_serving(tmp_path):
    result = compare(NAME, [PLAN], out=tmp_path, **QUICK)
    row = result.plans[0]
    assert (
        row.pairs >= 6
        and row.low < row.speedup < row.high
        and row.verdict in ("slower", "no measurable gain", "faster")
    )
    assert row.quality_verdict in ("held", "lost", "not shown") and row.quality is not None
    assert row.held_bytes < row.held_base
    content = json.loads(json.dumps(result.to_json()))
    wanted = "plan speedup low high clock quality quality_change quality_verdict peak_bytes setup_seconds pairs verdict"
    assert {"workload", "machine", "plans"} <= set(content) and set(wanted.split()) <= set(content["plans"][0])
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    kinds = {trial.what for trial in TrialFile(tmp_path / "trials.jsonl").read()}
    assert kinds == {"quality", "time"}


def test_training(tmp_path):
    result = compare(NAME, ["optim/linear_decay"], seeds=2, out=tmp_path, **{**QUICK, "budget": "60s"})
    row = result.plans[0]
    assert result.groups[0].mode == "train" and row.pairs == 2 and row.misses == row.misses_base == 0
    assert row.facts["steps"] > 0 and result.exit_code == 0
    runs = [trial for trial in TrialFile(tmp_path / "trials.jsonl").read() if trial.what == "run"]
    assert len(runs) == 4 and all(trial.facts["state"] == "reached" and trial.facts["curve"] for trial in runs)
    again = compare(NAME, ["optim/linear_decay"], seeds=2, out=tmp_path, **QUICK)
    assert again.plans[0].speedup == row.speedup, "what is finished is not run again"


def test_training_and_inference_in_one_call(tmp_path):
    result = compare(NAME, ["optim/linear_decay", PLAN], seeds=1, out=tmp_path, **{**QUICK, "budget": "40s"})
    assert [group.mode for group in result.groups] == ["serve", "train"]
    assert {row.workload for row in result.plans} == {group.workload for group in result.groups}
    assert len(json.loads(json.dumps(result.to_json()))["plans"]) == 2


def test_a_missed_target_is_never_faster(tmp_path):
    slow = small_workload.Small(task="train", steps=10, target=1e-4)
    row = compare(slow, ["optim/linear_decay"], seeds=1, out=tmp_path, **{**QUICK, "budget": "30s"}).plans[0]
    assert row.misses == row.misses_base == 1 and row.verdict != "faster" and row.low == 0


def test_interrupted_and_continued(tmp_path, monkeypatch):
    class Stop(hasten.bench.session.Silent):
        def rows(self, rows):
            raise KeyboardInterrupt

    monkeypatch.setattr(serving, "BLOCK_SECONDS", 0.0)
    first = compare(NAME, [PLAN], out=tmp_path, progress=Stop(), **QUICK)
    assert first.interrupted and first.exit_code == 130
    kept = TrialFile(tmp_path / "trials.jsonl").read()
    assert any(trial.what == "time" for trial in kept)
    calls = []
    monkeypatch.setattr(
        small_workload.Small, "quality", lambda self, handle: calls.append(1) or self.evaluate(handle.model)
    )
    second = compare(NAME, [PLAN], out=tmp_path, **QUICK)
    assert not calls and second.plans[0].pairs > first.plans[0].pairs
    assert TrialFile(tmp_path / "trials.jsonl").read()[: len(kept)] == kept, "the file only grows"


def test_killed_at_any_moment(tmp_path):
    code = (
        "import sys; from hasten.bench import serving; serving.BLOCK_SECONDS = 0.05; "
        "from hasten.bench.compare import compare; "
        f"compare({NAME!r}, [{PLAN!r}], out=sys.argv[1], memory=False, gated=False, budget='60s', precision=1e-6)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    file = tmp_path / "trials.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (file.exists() and file.read_text().count('"what": "time"') > 6):
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    kept = [trial for trial in TrialFile(file).read() if trial.what == "time"]
    assert len(kept) >= 6 and all(len(trial.wall) == len(trial.cpu) > 0 for trial in kept)
    pairs = sum(len(trial.wall) for trial in kept if trial.baseline)
    row = compare(NAME, [PLAN], out=tmp_path, **QUICK).plans[0]
    assert row.pairs >= pairs


def test_budget_spent_before_a_verdict(tmp_path):
    result = compare(NAME, [PLAN], out=tmp_path, memory=False, gated=False, budget=0.01, precision=1e-9)
    assert result.plans[0].verdict in ("undecided", "slower")
    if result.plans[0].verdict == "undecided":
        assert result.exit_code == 3 and result.plans[0].why


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    file = TrialFile(tmp_path / "trials.jsonl")
    file.append([Trial("k", "time", "w", "p", wall=[1.0], cpu=[1.0])])
    with file.path.open("a") as stream:
        stream.write('{"key": "k", "what": "time", "pl')
    again = TrialFile(file.path)
    again.append([Trial("k", "time", "w", "p", wall=[2.0], cpu=[2.0])])
    assert [trial.wall for trial in again.read(["k"])] == [[1.0], [2.0]] and again.read(["other"]) == []


def test_red_tests_show_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "gate", lambda name: gate.Gate("red", "1 failed"))
    monkeypatch.setattr(serving, "prepare", _made_fast(serving.prepare))
    row = compare(NAME, [PLAN], out=tmp_path, **{**QUICK, "gated": True, "budget": "8s"}).plans[0]
    assert row.gate == "red" and row.low > 1 and row.verdict == "no measurable gain"


def _made_fast(prepare):
    """The baseline computes for 2 ms more in every call, so any plan is faster, by the wall's and the CPU's clock."""

    def compute(*_):
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass

    def prepared(workload, plan, seed=0):
        arm = prepare(workload, plan, seed)
        if not plan.methods:
            arm.handle.model.register_forward_pre_hook(compute)
        return arm

    return prepared


def test_a_faster_plan_is_found_and_a_simulated_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "prepare", _made_fast(serving.prepare))
    row = compare(NAME, [PLAN], out=tmp_path / "a", margin=0.5, **{**QUICK, "budget": "8s"}).plans[0]
    assert row.verdict == "faster" and row.low > 1.2 and row.break_even is not None, row
    real = serving.prepare

    def simulated(workload, plan, seed=0):
        arm = real(workload, plan, seed)
        arm.facts["simulated"] = "the codes are turned back into a dense weight" if plan.methods else None
        return arm

    monkeypatch.setattr(serving, "prepare", simulated)
    row = compare(NAME, [PLAN], out=tmp_path / "b", margin=0.5, **{**QUICK, "budget": "8s"}).plans[0]
    assert row.verdict == "no measurable gain" and "simulated" in row.why


@pytest.mark.slow
def test_memory_of_an_arm_in_its_own_process():
    peaks = memory.probe("hasten.bench.serving:memory_of", {"workload": NAME, "plan": PLAN, "mode": "serve"})
    assert peaks.phases["serving"].peak >= 0 and "set-up" in peaks.phases


@pytest.mark.parametrize(
    ("workload", "plans", "message"),
    [
        ("stdlib", ["kv/cake"], "did you mean 'stdlib-lm'"),
        (NAME, [], "name at least one plan"),
        (NAME, ["baseline"], "the baseline is always measured"),
        (NAME, [PLAN, PLAN], "given twice"),
        (NAME, ["kv/cack", "quant/gptq(bits=5)"], "2 problems"),
        (NAME, ["decode/speculative"], "needs a draft model"),
        (NAME + "x", [PLAN], "has no 'Smallx'; did you mean 'Small'?"),
        (f"{NAME}(width=1)", [PLAN], "width must be at least 4"),
        ("hf:", [PLAN], "hf: needs a model"),
        ("hf:./nowhere", [PLAN], "can't be loaded"),
    ],
)
def test_wrong_arguments(workload, plans, message, tmp_path):
    with pytest.raises(UsageError, match=None) as found:
        compare(workload, plans, out=tmp_path / "out", **QUICK)
    assert message in str(found.value)
    assert not (tmp_path / "out").exists(), "nothing is written before the arguments are right"


def test_wrong_figures(tmp_path):
    for key, value in (("budget", "soon"), ("budget", "-1s"), ("margin", "150%"), ("margin", "a"), ("precision", 0)):
        with pytest.raises(UsageError, match=key):
            compare(NAME, [PLAN], out=tmp_path, **{**QUICK, key: value})
    with pytest.raises(PlanError, match="seeds"):
        compare(NAME, [PLAN], seeds=0, out=tmp_path, **QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(HastenError, match="give another --out"):
        compare(NAME, [PLAN], out=tmp_path / "file", **QUICK)
    assert parse_seconds("1.5m") == 90 and parse_seconds(3) == 3 and parse_share("1%", "margin") == 0.01


def test_several_workloads(tmp_path):
    result = compare_all([(NAME, [PLAN]), (f"{NAME}(width=32)", [PLAN])], out=tmp_path, **QUICK)
    assert len(result.groups) == 2 and len({row.workload for row in result.plans}) == 2
    assert pathlib.Path(result.out, "report.html").exists()


def test_crossing_is_between_two_evaluations():
    curve = [[10, 1.0, 2.0, 3.0], [20, 2.0, 4.0, 1.0]]
    assert training._crossing(curve, 2.0, (0.0, 0.0)) == [15, 1.5, 3.0]
    assert training._crossing(curve[:1], 4.0, (0.0, 0.0)) == [10, 1.0, 2.0]
