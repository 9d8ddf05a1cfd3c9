"""modular-sums: every pair is in one part, whatever the seed, and the sums are right."""

import pytest
import torch

import hasten
from hasten.core.errors import PlanError

SMALL = "modular-sums(p=11, rows=16, width=32)"


def test_the_pairs():
    workload = hasten.workload(SMALL)
    (x, y), (held, sums) = workload.part(False), workload.part(True)
    assert len(x) == int(workload.keep * 121) and len(x) + len(held) == 121
    everything = torch.cat([x, held])
    assert len(everything.unique(dim=0)) == 121 and bool((everything.sum(1) == 2).all())
    a, b = everything[:, :11].argmax(1), everything[:, 11:].argmax(1)
    assert torch.equal(torch.cat([y, sums]), (a + b) % 11)


def test_one_seed_is_one_run():
    workload = hasten.workload(SMALL)
    batch, again = (next(iter(workload.batches(3))) for _ in range(2))
    assert torch.equal(batch[0], again[0])
    losses = workload.losses(workload.build(3), batch)
    assert losses.shape == (16,) and torch.equal(losses, workload.losses(workload.build(3), batch))
    assert torch.equal(losses.mean(), workload.loss(workload.build(3), batch))
    assert not torch.equal(losses, workload.losses(workload.build(4), batch))


def test_quality_is_the_share_that_is_right():
    workload = hasten.workload(SMALL)

    class Right(torch.nn.Module):
        def forward(self, x):
            a, b = x[:, :11].argmax(1), x[:, 11:].argmax(1)
            return torch.nn.functional.one_hot((a + b) % 11, 11).float()

    assert workload.evaluate(Right()).mean() == 1.0 > workload.evaluate(workload.build(0)).mean()
    double = hasten.workload("modular-sums(p=11, rows=16, width=32, scale=2.0)")
    pairs = zip(double.build(0).parameters(), workload.build(0).parameters(), strict=True)
    assert all(torch.equal(p, 2 * q) for p, q in pairs)


def test_options():
    with pytest.raises(PlanError, match="fill a batch"):
        hasten.workload("modular-sums(p=5, rows=64)")
