"""Magnitude pruning: what goes, and that what was zero is found again."""

import pytest
import torch

import hasten
from hasten.prune.magnitude import Magnitude, magnitude
from hosts.tiny import llama


def matrix(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (5, 33, {}),
            (4, 17, {"sparsity": 0.7, "by_row": True}),
            (3, 22, {"pattern": "2:4"}),
            (3, 21, {"pattern": "5:8", "sparsity": 0.375}),
            (21, 10, {"pattern": "8x1", "sparsity": 0.6}),
            (9, 35, {"pattern": "4x16", "sparsity": 0.3}),
            (1, 1, {"sparsity": 0.9}),
        ]
    ):
        yield {"args": (matrix(rows, columns, seed),), "kwargs": options, "tolerance": 0, "grad": False}
    yield {"args": (matrix(6, 40, 9, torch.bfloat16),), "kwargs": {}, "tolerance": 0, "grad": False}
    yield {"args": (matrix(6, 40, 9, torch.float16),), "kwargs": {"by_row": True}, "tolerance": 0, "grad": False}


def test_golden_value():
    weight = torch.tensor([[4.0, -3.0, 0.1, 5.0], [0.2, -0.3, 0.5, 6.0]])
    assert magnitude(weight).tolist() == [[4, -3, 0, 5], [0, 0, 0, 6]]
    assert torch.allclose(magnitude(weight, by_row=True), torch.tensor([[4, 0, 0, 5], [0, 0, 0.5, 6]]))


def test_no_other_choice_of_as_many_weights_is_nearer():
    weight = matrix(20, 30)
    found = magnitude(weight, sparsity=0.4)
    assert int((found == 0).sum()) == 240
    make = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = weight * (torch.randperm(600, generator=make).view(20, 30) >= 240)
        assert (weight - found).norm() < (weight - other).norm()


@pytest.mark.parametrize("options", [{}, {"by_row": True}, {"pattern": "2:4"}, {"pattern": "8x1", "sparsity": 0.75}])
def test_pruning_twice_is_pruning_once(options):
    """So the zeros of a pruned model that was trained are what a second time finds."""
    once = magnitude(matrix(24, 36), **options)
    moved = once * (1 + 0.5 * torch.rand(once.shape, generator=torch.Generator().manual_seed(3)))
    again = magnitude(moved, **options)
    assert torch.equal(again, moved) and torch.equal(again == 0, once == 0)


def test_needs_no_calibration():
    model = llama()
    handle = hasten.apply(model, Magnitude(layout="dense"))
    assert handle.report["prune/magnitude"]["sparsity"] == 0.5 and not handle.report["prune/magnitude"]["left_dense"]
    for path, weight in handle.host.weights().items():
        assert float((weight.matrix == 0).float().mean()) == pytest.approx(0.5, abs=0.01), path
