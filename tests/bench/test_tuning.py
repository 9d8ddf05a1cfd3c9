"""Tuning is fair and loses nothing; comparisons use it, charge it and say what each method gives."""

import dataclasses
import json

import pytest
import torch

import hasten
import small_workload
from hasten.bench import tuning
from hasten.bench.compare import compare
from hasten.bench.tuning import knobs, tune, with_values
from hasten.cli.app import run as cli
from hasten.core.errors import HastenError, PlanError, UsageError
from hasten.core.plans import Plan

QUICK = {"memory": False, "gated": False, "budget": "100s", "seeds": 2}
PLAN = "optim/linear_decay(warmup=0.2)"


@dataclasses.dataclass(frozen=True)
class Tunable(small_workload.Small):
    task: str = hasten.option("train", "what is done", choices=("serve", "train"))
    lr: float = hasten.option(1e-4, "learning rate, far too low", above=0)
    rows: int = hasten.option(32, "examples of a batch", least=1)
    steps: int = hasten.option(60, "steps of training", least=1)

    tunable = {"lr": (1e-4, 1e-1), "rows": (16, 64)}

    @classmethod
    def title(cls):
        return f"{__file__}:Tunable"

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


NAME = Tunable.title()


@pytest.fixture
def searched(monkeypatch):
    """Gives linear_decay a range to search."""
    from hasten.optim import linear_decay

    card = dataclasses.replace(linear_decay.CARD, tune={"warmup": (0.05, 0.5)})
    monkeypatch.setattr(linear_decay, "CARD", card)


def test_every_arm_gets_the_same_trials_and_a_better_setting_is_found(tmp_path, searched):
    base, arm = tune(Tunable(), [PLAN], trials=7, out=tmp_path)
    assert base.trials == arm.trials == 7 and base.plan == Plan() and str(arm.plan) == PLAN
    assert base.reached and base.score < base.given and base.values["lr"] > 1e-3
    assert set(arm.values) == {"lr", "rows", "optim/linear_decay.warmup"} and isinstance(arm.values["rows"], int)
    assert arm.best.methods[0].warmup == arm.values["optim/linear_decay.warmup"]
    assert arm.workload.lr == arm.values["lr"] and arm.cpu > 0
    kept = json.loads((tmp_path / "tuned.json").read_text())
    assert [one["values"] for one in kept["arms"]] == [base.values, arm.values]


def test_finished_trials_are_not_run_again(tmp_path, monkeypatch):
    first = tune(Tunable(), [PLAN], trials=3, out=tmp_path)
    runs = []
    start = tuning.training.start
    monkeypatch.setattr(tuning.training, "start", lambda *given: runs.append(given) or start(*given))
    assert tune(Tunable(), [PLAN], trials=3, out=tmp_path) == first and not runs
    more = tune(Tunable(), [PLAN], trials=4, out=tmp_path)
    assert len(runs) == 2 and all(one.trials == 4 for one in more)


def test_an_interrupted_round_is_kept_and_arms_stay_even(tmp_path, monkeypatch):
    start, runs = tuning.training.start, []

    def stopping(*given):
        runs.append(given)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return start(*given)

    monkeypatch.setattr(tuning.training, "start", stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(Tunable(), [PLAN], trials=3, out=tmp_path)
    assert (tmp_path / "trials.jsonl").read_text().count('"tune"') == 3
    monkeypatch.setattr(tuning.training, "start", start)
    found = tune(Tunable(), [PLAN], trials=3, budget=0.001, out=tmp_path)
    assert {one.trials for one in found} == {1}, "a round is made whole or not at all"


def test_a_value_that_does_not_fit_is_a_trial_that_found_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Tunable, "tunable", {"lr": (1e-4, 1e-1), "rows": (1e6, 1e7)})
    monkeypatch.setattr(Tunable, "problems", lambda self: ["too many"] if self.rows > 1000 else [])
    (base,) = tune(Tunable(lr=0.01), [PLAN], trials=3, out=tmp_path)[:1]
    assert base.reached and base.values == {} and base.score == base.given
    assert "too many" in (tmp_path / "trials.jsonl").read_text()


def test_knobs_and_values():
    found = knobs(Tunable(), Plan())
    assert [(knob.name, knob.whole, knob.given) for knob in found] == [("lr", False, 1e-4), ("rows", True, 32)]
    workload, plan = with_values(Tunable(), Plan(), found, {"lr": 0.1})
    assert workload == Tunable(lr=0.1) and plan == Plan()
    with pytest.raises(PlanError):
        with_values(Tunable(), Plan(), found, {"lr": -1.0})


@pytest.mark.parametrize(
    ("workload", "plans", "options", "message"),
    [
        (NAME, [PLAN], {"trials": 0}, "trials must be a whole number of at least 1"),
        (NAME + "(task=serve)", ["quant/gptq(bits=8)"], {}, "only plans that act on training"),
        (NAME, [], {}, "name at least one plan"),
    ],
)
def test_what_tuning_refuses(workload, plans, options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        tune(workload, plans, out=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuned": -1}, "tuned must be a whole number"),
        ({"charge_tuning": True}, "no tuning to charge"),
        ({"leave_one_out": True}, "a plan of two methods or more"),
    ],
)
def test_what_comparing_refuses(options, message, tmp_path):
    with pytest.raises(HastenError, match=message):
        compare(NAME, [PLAN], out=tmp_path, **QUICK, **options)
    with pytest.raises(UsageError, match="only plans that act on training are tuned"):
        compare(NAME + "(task=serve)", ["quant/gptq(bits=8)"], out=tmp_path, tuned=2, **QUICK)


def test_both_arms_are_compared_as_tuned_and_charged(tmp_path):
    free = compare(NAME, [PLAN], tuned=5, out=tmp_path, **QUICK)
    row, base = free.plans[0], free.groups[0].baseline
    assert base["tuned"]["lr"] > 1e-4 and row.facts["tuned"]["lr"] > 1e-4 and row.pairs == 2
    charged = compare(NAME, [PLAN], tuned=5, charge_tuning=True, out=tmp_path, **QUICK)
    assert charged.plans[0].setup_seconds > 0.3 * sum(
        json.loads(line)["wall"][0]
        for line in (tmp_path / "trials.jsonl").read_text().splitlines()
        if json.loads(line)["what"] == "tune" and json.loads(line)["plan"] == PLAN
    )
    assert charged.groups[0].baseline["seconds"] > base["seconds"]
    page = (tmp_path / "report.html").read_text()
    assert "baseline: tuned in 5 trials" in page


def test_what_each_method_gives(tmp_path):
    plan = "data/multigrid(time=[1.0], space=[1.0], short=[]) + optim/linear_decay(warmup=0.2)"
    with pytest.raises(HastenError):
        compare("stdlib", [plan], leave_one_out=True, out=tmp_path, **QUICK)
    result = compare(Images(), [plan], leave_one_out=True, out=tmp_path, **QUICK)
    assert [row.plan.count("/") for row in result.plans] == [2, 1, 1]
    gives = result.plans[0].facts["gives"]
    assert set(gives) == {"data/multigrid", "optim/linear_decay"}
    full, alone = (
        {t.seed: t for t in hasten.bench.trials.TrialFile(tmp_path / "trials.jsonl").read() if t.plan == text}
        for text in (result.plans[0].plan, result.plans[1].plan)
    )
    ratios = [torch.tensor(alone[s].wall[0] / full[s].wall[0]).log() for s in full]
    clocks = torch.stack(ratios).mean().exp().item()
    assert gives["data/multigrid"]["low"] < clocks < gives["data/multigrid"]["high"]
    page = (tmp_path / "report.html").read_text()
    assert "data/multigrid gives" in page and "plan 1 without data/multigrid" in page
    assert ">multigrid + linear_decay<" in page and json.loads(json.dumps(result.to_json()))


@dataclasses.dataclass(frozen=True)
class Images(small_workload.Small):
    """The small network on batches that have a shape."""

    task: str = hasten.option("train", "what is done", choices=("serve", "train"))

    @classmethod
    def title(cls):
        return f"{__file__}:Images"

    def build(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
            )

    def data(self, seed, count):
        x, y = super().data(seed, count)
        return x.view(-1, 1, 4, 4), y


def test_the_command_line(tmp_path, capsys):
    assert cli(["tune", NAME, PLAN, "--trials", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "as many trials" in shown and "baseline" in shown and "linear_decay" in shown
    assert cli(["tune", NAME, PLAN, "--trials", "2", "--out", str(tmp_path), "--json"]) == 0
    assert [one["trials"] for one in json.loads(capsys.readouterr().out)] == [2, 2]
    assert cli(["tune", NAME, "--trials", "2"]) == 2
