"""The figures of optimizers without a learning rate: ratios are averaged over workloads and misses are censored."""

import importlib.util
import math
import pathlib

import pytest

from hasten.bench.trials import Trial
from hasten.core.errors import HastenError
from hasten.core.plans import Plan


@pytest.fixture(scope="module")
def figures():
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "_optim_free.py"
    spec = importlib.util.spec_from_file_location("benchmarks_optim_free", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(seconds, state="reached"):
    return Trial("key", "run", "w", "p", wall=[seconds], cpu=[seconds], facts={"state": state, "steps": 10.0})


def arms(plan, base, states=("reached", "reached")):
    return {
        "plan": {seed: run(one, states[0]) for seed, one in enumerate(plan)},
        "base": {seed: run(one, states[1]) for seed, one in enumerate(base)},
    }


def test_geometric_mean_over_workloads(figures):
    both = {"a": arms([1.0, 1.0, 1.0], [4.0, 4.02, 3.98]), "b": arms([2.0, 2.0], [2.0, 2.0])}
    found = figures.against(both, "plan", "base")
    assert found.value == pytest.approx(2, rel=0.01) and 1.9 < found.low <= found.value <= found.high < 2.1
    assert found.facts["seeds"] == 2  # the third was not finished on the second workload
    assert found.facts["by_workload"] == {"a": pytest.approx(4.05, rel=0.01), "b": 1.0}


def test_misses_bound_one_side_only(figures):
    missed = figures.against({"a": arms([1.0, 1.0], [2.0, 2.1], ("missed", "reached"))}, "plan", "base")
    assert missed.low == 0.0 and missed.high < math.inf and missed.facts["misses"] == {"a": 2}
    missed = figures.against({"a": arms([1.0, 1.0], [2.0, 2.1], ("reached", "missed"))}, "plan", "base")
    assert missed.low > 1 and missed.high == math.inf and missed.facts["misses_base"] == {"a": 2}


def test_every_arm_but_the_tuned_one_brings_its_schedule(figures):
    assert figures.spelled(figures.TUNED) == "baseline"
    for plan in (figures.SHARED, *figures.CALIBRATED.values()):
        optimizer, schedule = Plan.parse(plan).methods
        assert "optim.update" in optimizer.card.seams and schedule.name == "optim/linear_decay"
    assert [work.partition("(")[0] for work in figures.WORKLOADS] == ["stdlib-lm", "digits-vit", "tabular-mlp"]


def test_no_seed_is_an_error(figures):
    with pytest.raises(HastenError, match="no seed"):
        figures.against({"a": arms([1.0], [1.0]), "b": arms([], [])}, "plan", "base")
