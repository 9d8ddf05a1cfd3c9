"""two-domains: both domains in every batch, dense models that are good at their own, and a seed that is a run."""

import torch

import hasten
from hasten.bench.training import make_run
from hasten.core.plans import Plan
from hasten.workloads import two_domains

SMALL = "two-domains(length=16, rows=4, seed_steps=2, dense_steps=12)"


def test_domains_are_apart_and_parts_too():
    assert bytes(two_domains.prose(False)[:1]) == b"\0"
    train, held_out = (bytes(two_domains.prose(part)) for part in (False, True))
    assert len(train) > 200_000 and 20_000 < len(held_out) < len(train) / 6
    assert train.count(b"\0") >= held_out.count(b"\0") > 30
    assert not any(topic and topic in train for topic in held_out.split(b"\0"))


def test_every_batch_is_half_of_either_domain():
    workload = hasten.workload(SMALL)
    source, prose = two_domains._windows(16)
    assert len(source) == len(prose)
    batch = next(iter(workload.batches(0)))
    assert batch.shape == (4, 16) and batch.dtype == torch.long
    for row, part in zip(batch, (source, prose, source, prose), strict=True):
        assert (part == row).all(1).any()


def test_each_dense_model_has_learnt_its_domain():
    workload = hasten.workload(SMALL)
    models = [workload.build(0), *workload.teacher()]
    seed, one, other = (workload.evaluate(model).reshape(2, 32).mean(1) for model in models)  # [source, prose]
    assert one[0] < seed[0] - 0.2 and other[1] < seed[1] - 0.2
    assert one[0] - other[0] < one[1] - other[1]  # each is the better one, or less bad, at its own
    again = workload.teacher()
    assert again[0] is not models[1]
    assert all(torch.equal(p, q) for p, q in zip(again[0].parameters(), models[1].parameters(), strict=True))


def test_a_plan_that_needs_dense_models_gets_them():
    workload = hasten.workload(SMALL)
    run = make_run(workload, Plan.parse("grow/bam"), 0)
    assert len(run.model.model.layers[0].mlp.experts) == 3
    run.slice(workload.loss, steps=1)
    with run.evaluation() as model:
        assert workload.evaluate(model).shape == (64,)


def test_one_seed_is_one_run():
    workload = hasten.workload(SMALL)
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    other = workload.loss(workload.build(3), next(iter(workload.batches(4))))
    assert torch.equal(*first) and not torch.equal(first[0], other)
    losses = workload.losses(workload.build(3), next(iter(workload.batches(3))))
    assert losses.shape == (4,) and torch.equal(losses.mean(), first[0])
