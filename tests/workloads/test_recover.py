"""stdlib-recover: every arm trains the same zeros, and a plan that asks for a teacher gets the dense model."""

import pytest
import torch

import hasten
from hasten.bench.training import make_run
from hasten.core.errors import PlanError
from hasten.core.plans import Plan

SMALL = "stdlib-recover(rows=2, length=32, steps=10)"


def zeros(model):
    return {
        name: p == 0 for name, p in model.named_parameters() if p.dim() == 2 and float((p == 0).float().mean()) > 0.5
    }


def test_the_models():
    workload = hasten.workload(SMALL)
    model, dense = workload.build(0), workload.teacher()
    found = zeros(model)
    assert len(found) == 2 * 7 and not zeros(dense)
    for name, zero in found.items():
        assert float(zero.float().mean()) == pytest.approx(0.8, abs=1e-3)
        assert torch.equal(model.get_parameter(name)[~zero], dense.get_parameter(name)[~zero])
    assert workload.evaluate(dense).mean() < 2.0 < 3.0 < workload.evaluate(model).mean()


@pytest.mark.parametrize("plan", ["", "prune/squarehead"])
def test_zeros_hold_in_every_arm(plan):
    workload = hasten.workload(SMALL)
    run = make_run(workload, Plan.parse(plan), seed=1)
    before = zeros(run.model)
    run.slice(workload.loss, steps=3)
    after = zeros(run.model)
    assert len(before) == 14 and all(torch.equal(after[name], zero) for name, zero in before.items())


def test_one_seed_is_one_run():
    workload = hasten.workload(SMALL)
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    assert torch.equal(*first)


def test_options():
    with pytest.raises(PlanError, match="sparsity"):
        hasten.workload("stdlib-recover(sparsity=1.0)")
    with pytest.raises(PlanError, match="at most 4096"):
        hasten.workload("stdlib-recover(length=5000)")
