"""images: digits of every machine, files of a folder, and quality under an attack that the judge makes itself."""

import gzip

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.optim.adversarial_finetuning import Prepared
from hasten.workloads import images as module
from hasten.workloads.images import attacked


def test_pixels_are_in_0_to_1_and_the_parts_differ():
    workload = hasten.workload("images(train=100, examples=50)")
    (x, y), (held, _) = workload.part(False), workload.part(True)
    assert x.shape == (100, 1, 16, 16) and held.shape == (50, 1, 16, 16) and y.dtype == torch.int64
    assert x.min() >= 0 and x.max() <= 1 and x.max() > 0.9
    assert len(hasten.workload("images").part(True)[0]) == 359
    with pytest.raises(UsageError, match="1438 training images"):
        hasten.workload("images(train=5000)").part(False)


@pytest.mark.parametrize("options", ["", "optim=sgd, lr=0.1", "attack=0.05, train_on=adversarial, iterations=2"])
def test_one_seed_is_one_run_and_the_loss_falls(options):
    workload = hasten.workload(f"images({options})") if options else hasten.workload("images")

    def losses():
        torch.manual_seed(0)
        model, found = workload.build(3), []
        optimizer = workload.optimizer(model)
        for step, batch in zip(range(12), workload.batches(3), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = workload.lr * workload.schedule(step, 40)
            loss = workload.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first == losses() and first[-1] < first[0] - 0.1


def test_the_attack_stays_in_its_ball_and_hurts():
    workload = hasten.workload("images(attack=0.1, examples=64)")
    model = workload.build(0)
    x, y = workload.part(True)
    moved = attacked(model, x, y, 0.1, 3, x)
    assert (moved - x).abs().max() <= 0.1 + 1e-6 and moved.min() >= 0 and moved.max() <= 1 and model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        clean = hasten.workload("images(examples=64)").evaluate(model)
        under = workload.evaluate(model)
    assert under.shape == (64,) and under.mean() > clean.mean() + 0.01
    assert np.array_equal(under, workload.evaluate(model))


def test_the_loop_attacks_its_own_batches_but_not_prepared_ones():
    workload = hasten.workload("images(attack=0.1, train_on=adversarial, iterations=2)")
    model, batch = workload.build(0), next(iter(workload.batches(0)))
    plain = hasten.workload("images").loss(workload.build(0), batch)
    assert torch.equal(workload.loss(workload.build(0), Prepared(batch)), plain)
    assert workload.loss(model, batch) > plain + 0.01


def test_mnist_is_read_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    pixels, labels = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8), np.array([7, 2, 1], np.uint8)
    for name, head, content in (
        ("images-idx3", [3, 28, 28], pixels),
        ("labels-idx1", [3], labels),
    ):
        start = bytes([0, 0, 8, len(head)]) + np.array(head, ">i4").tobytes()
        (tmp_path / f"mnist/t10k-{name}-ubyte.gz").write_bytes(gzip.compress(start + content.tobytes()))
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    module._read.cache_clear()
    x, y = hasten.workload("images(data=mnist)").part(True)
    assert x.shape == (3, 1, 28, 28) and y.tolist() == [7, 2, 1]
    assert torch.equal((x * 255).round().flatten().to(torch.uint8), torch.from_numpy(pixels))
    module._read.cache_clear()
    (tmp_path / "mnist/t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no labels"))
    with pytest.raises(UsageError, match="IDX"):
        hasten.workload("images(data=mnist)").part(True)
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="HASTEN_DATA"):
        hasten.workload("images(data=cifar10)").part(True)
    module._read.cache_clear()


def test_options():
    with pytest.raises(PlanError, match="attack=0"):
        hasten.workload("images(train_on=adversarial)")
    assert hasten.workload("images(attack=0.1)").metric.name == "cross-entropy under attack"
