"""SparseGPT: the update of what stays, against Wanda and against the best that any update can do."""

import pytest
import torch

from hasten.prune.magnitude import magnitude
from hasten.prune.sparsegpt import sparsegpt
from hasten.prune.wanda import wanda


def problem(rows, columns, seed=0, tokens=400):
    """A weight and the Hessian of inputs that are strongly correlated, as activations are."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=make) / columns**0.5
    x = torch.randn(tokens, columns, generator=make) @ (mix @ mix + 0.1 * torch.eye(columns))
    return torch.randn(rows, columns, generator=make) / columns**0.5, 2 / tokens * x.t() @ x


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"block": 16}),
            (5, 37, {"sparsity": 0.7}),
            (2, 30, {"pattern": "2:4"}),
            (3, 30, {"pattern": "5:8", "sparsity": 0.375, "block": 20}),
            (9, 33, {"pattern": "4x1", "sparsity": 0.6, "block": 8}),
            (9, 33, {"pattern": "2x4", "sparsity": 0.6, "block": 10, "damp": 0.1}),
        ]
    ):
        yield {"args": problem(rows, columns, seed), "kwargs": options, "grad": False, "tolerance": 1e-4}
    weight, hessian = problem(3, 40, 9)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    yield {"args": (weight.bfloat16(), hessian), "kwargs": {"block": 32}, "grad": False, "tolerance": 1e-4}


def error(weight, found, hessian):
    return float(torch.trace((weight - found) @ hessian @ (weight - found).t()))


@pytest.mark.parametrize(
    "options", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "16x1"}, {"pattern": "8x4", "sparsity": 0.6}]
)
def test_output_error_is_below_that_of_wanda_and_magnitude(options):
    weight, hessian = problem(64, 256)
    found = sparsegpt(weight, hessian, **options)
    others = wanda(weight, hessian.diagonal().sqrt(), **options), magnitude(weight, **options)
    assert abs(int((found == 0).sum()) - int((others[0] == 0).sum())) <= 256
    assert all(error(weight, found, hessian) < 0.75 * error(weight, other, hessian) for other in others)


def test_sparsity_and_patterns_hold():
    weight, hessian = problem(32, 256)
    assert float((sparsegpt(weight, hessian, sparsity=0.7) == 0).float().mean()) == pytest.approx(0.7, abs=1e-3)
    groups = sparsegpt(weight, hessian, pattern="2:4").view(32, 64, 4)
    assert bool(((groups != 0).sum(2) == 2).all())
    blocks = sparsegpt(weight, hessian, pattern="16x1", sparsity=0.75).view(2, 16, 256) != 0
    assert bool((blocks.all(1) == blocks.any(1)).all()) and float(blocks.float().mean()) == 0.25


def test_near_the_best_update_for_its_mask():
    """Solving each row exactly for the mask that was found (eq. 2) is not much better, and never worse."""
    weight, hessian = problem(8, 64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    found = sparsegpt(weight, hessian)
    best = torch.zeros_like(weight)
    for row, kept in enumerate(found != 0):
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight[row])
    bare = torch.where(found != 0, weight, 0)
    assert error(weight, best, damped) <= error(weight, found, damped) < 0.5 * error(weight, bare, damped)


def test_uncorrelated_inputs_make_it_magnitude_in_blocks_of_columns():
    weight, _ = problem(8, 64)
    found = sparsegpt(weight, torch.eye(64), block=32)
    assert torch.equal(found, torch.cat([magnitude(part) for part in weight.split(32, dim=1)], dim=1))


def test_singular_and_zero_hessians():
    weight, _ = problem(4, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert sparsegpt(weight, x.t() @ x).isfinite().all()
    assert torch.equal(sparsegpt(weight, torch.zeros(64, 64)), magnitude(weight))


def test_inputs_that_are_always_zero_go_first_and_the_rest_stays():
    weight, hessian = problem(6, 40)
    dead = torch.arange(40) < 30
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = sparsegpt(weight, hessian)
    assert torch.equal(found[:, ~dead], weight[:, ~dead])
    assert torch.equal(found[:, dead], magnitude(weight[:, dead], sparsity=2 / 3))
