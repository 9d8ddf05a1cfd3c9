"""stdlib-continue: a trained model meets text of another kind."""

import pathlib

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads import stdlib_continue, text
from hasten.workloads.stdlib_continue import headers

SMALL = "stdlib-continue(rows=2, length=32, steps=10)"


def test_the_text():
    held, rest = headers(True), headers(False)
    assert len(held) > 300_000 and 0.03 < len(held) / (len(held) + len(rest)) < 0.2
    assert held[0] == text.DOCUMENT and b"#include" in held[:100_000].tobytes()
    assert held[:2000].tobytes() not in rest.tobytes()


def test_the_model_knows_the_old_text_and_not_the_new():
    workload = hasten.workload("stdlib-continue")
    model = workload.build(0)
    assert workload.old_loss(model) < 2.0 < 3.0 < workload.evaluate(model).mean()
    assert model.training


def test_the_seed_changes_the_batches_only():
    workload = hasten.workload(SMALL)
    one, other = workload.build(0), workload.build(1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    batches = [next(iter(workload.batches(seed))) for seed in (3, 3, 4)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert {workload.schedule(step, 10) for step in range(10)} == {0.1}


def test_a_torch_without_headers_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_continue.torch, "__file__", str(tmp_path / "__init__.py"))
    headers.cache_clear()
    with pytest.raises(UsageError, match="wheel"):
        headers(True)
    monkeypatch.undo()
    assert isinstance(headers(True), np.ndarray) and pathlib.Path(torch.__file__).exists()


def test_options():
    with pytest.raises(PlanError, match="at most 4096"):
        hasten.workload("stdlib-continue(length=5000)")
