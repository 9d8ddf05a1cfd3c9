"""redundant, transfer and augmented-digits: their data are as they say, and one seed is one run."""

import pytest
import torch

import hasten
from hasten.bench.training import make_run
from hasten.core.errors import PlanError
from hasten.core.plans import Plan
from hasten.workloads.augmented_digits import Warped
from hasten.workloads.digits import digits
from hasten.workloads.redundant import redundant_digits
from hasten.workloads.transfer import CLASSES, WAYS, glyphs, task

NAMES = ("redundant(copies=2, rows=4)", "transfer(width=4, rows=4)", "augmented-digits(width=4, rows=4, finer=2)")


def test_copies_are_near_their_source_and_of_common_kinds():
    images, labels, source = redundant_digits(18, 5)
    plain, kinds = digits(False)
    times = torch.bincount(source, minlength=len(plain))
    assert set(times.tolist()) == {1, 5} and torch.equal(labels, kinds[source])
    copied = times > 1
    assert int(copied.sum()) == -(-int((kinds < 3).sum()) // 18) and int(kinds[copied].max()) == 2
    error = (images - plain[source]).square().mean()
    apart = (plain[source] - plain[source].roll(40, 0)).square().mean()
    assert 0 < float(error) < 0.1 * float(apart)


def test_source_and_task_share_no_image():
    images, labels = glyphs()
    assert images.shape == (8632, 1, 8, 8) and labels.bincount().shape == (WAYS * CLASSES,)
    upright = images[labels < CLASSES]
    asked, kinds, held, _ = task()
    assert len(upright) * WAYS == len(images) and len(asked) == len(kinds) == 359 and len(held) == 359
    assert torch.equal(images[labels == 10 + 3], -images[labels == 3])
    assert torch.equal(images[labels == 20 + 3], torch.rot90(images[labels == 3], 1, (2, 3)))
    nearest = torch.cdist(asked.flatten(1), upright.flatten(1)).argmin(1)
    same = (upright[nearest] - asked).flatten(1).square().mean(1)
    assert float(same.min()) > 0.05


def test_every_reading_warps_anew_and_plain_does_not():
    data = Warped(2)
    torch.manual_seed(0)
    first, second = data[3][0], data[3][0]
    assert not torch.equal(first, second) and torch.equal(data.plain(3)[0], data.plain(3)[0])
    assert float((first - data.plain(3)[0]).square().mean()) < float(
        (data.plain(3)[0] - data.plain(4)[0]).square().mean()
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_is_one_run_and_all_is_there_that_methods_ask_for(name):
    workload = hasten.workload(name)
    weights = []
    for _ in range(2):
        run = make_run(workload, Plan(), seed=3)
        run.slice(workload.loss, steps=2)
        weights.append([p.detach().clone() for p in run.model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    with run.evaluation() as model:
        values = workload.evaluate(model)
    assert values.shape == (359,) and values.mean() > workload.target
    batch = next(iter(workload.batches(0)))
    assert workload.losses(run.model, batch).shape == (4,)
    proxy = workload.proxy(0)
    if proxy is not None:
        assert workload.losses(proxy, batch).shape == (4,)
        ours, its = (sum(p.numel() for p in model.parameters()) for model in (workload.build(0), proxy))
        assert its < ours or name.startswith("transfer")
    if workload.downstream() is not None:
        assert sum(len(labels) for _, labels in workload.downstream()) == 359


def test_options():
    with pytest.raises(PlanError, match="spacing"):
        hasten.workload("redundant(spacing=1)")
    with pytest.raises(PlanError, match="width"):
        hasten.workload("transfer(width=2)")
