"""The native kernel against the path in PyTorch: matrices for one thread, for all threads, and steps in place."""

import pytest
import torch

from hasten.kernels import sinkhorn as module
from hasten.kernels.sinkhorn import sinkhorn, sinkhorn_step_

native = pytest.mark.skipif(module.kernel() is None, reason="no C++ compiler")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@native
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 7, 20), (2, 3, 4, 4), (130, 66), (1100, 2000)])
def test_native_agrees_with_torch(shape):
    torch.testing.assert_close(sinkhorn(random(*shape), 3), module._in_torch(random(*shape), 3), rtol=2e-5, atol=2e-5)


@native
def test_large_matrices_do_not_depend_on_the_number_of_threads(threads):
    gradient = random(1100, 2000, seed=1)
    threads(1)
    one = sinkhorn(gradient, 2)
    threads(3)
    assert torch.equal(sinkhorn(gradient, 2), one)


@native
def test_slices_and_transposes():
    gradient = random(6, 8, 10)
    torch.testing.assert_close(sinkhorn(gradient[:, 2:5, ::2], 2), sinkhorn(gradient[:, 2:5, ::2].contiguous(), 2))
    torch.testing.assert_close(sinkhorn(gradient.mT, 2), sinkhorn(gradient.mT.contiguous(), 2))


@native
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_in_place(momentum):
    shapes = ((6, 9), (9, 6), (130, 66), (1, 5))
    weights, gradients = ([random(*shape, seed=seed) for shape in shapes] for seed in (2, 3))
    averages = [random(*shape, seed=4) for shape in shapes]
    wanted, moved = [], []
    rates, decay = [0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.5, 1.0]
    for w, g, a, lr, d in zip(weights, gradients, averages, rates, decay, strict=True):
        moved.append(a + (1 - momentum) * (g - a) if momentum else a.clone())
        x = moved[-1] + (1 - momentum) * (g - moved[-1]) if momentum else g
        wanted.append((1 - lr * d) * w - lr * module._in_torch(x, 4))
    kept = [g.clone() for g in gradients]
    given = averages if momentum else None
    assert sinkhorn_step_(weights, gradients, given, iterations=4, momentum=momentum, lr=rates, decay=decay)
    for found, right in zip((*weights, *averages, *gradients), (*wanted, *moved, *kept), strict=True):
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-6)


def test_what_the_kernel_can_not_take_is_left_alone():
    for weight in (random(4, 6).bfloat16(), random(6, 4).mT, random(4, 6).double()):
        before = weight.clone()
        assert not sinkhorn_step_(
            [weight], [torch.ones_like(weight)], None, iterations=1, momentum=0.0, lr=[0.1], decay=[0.0]
        )
        assert torch.equal(weight, before)


def test_without_a_compiler(monkeypatch):
    wanted = sinkhorn(random(3, 5, 7), 3)
    monkeypatch.setattr(module, "kernel", lambda: None)
    torch.testing.assert_close(sinkhorn(random(3, 5, 7), 3), wanted, rtol=2e-5, atol=2e-5)
    weight = random(5, 7)
    assert not sinkhorn_step_([weight], [weight], None, iterations=3, momentum=0.0, lr=[0.1], decay=[0.0])


def test_a_gradient_that_is_not_finite_is_not_hidden():
    gradient = random(4, 6)
    for bad in (float("nan"), float("inf")):
        gradient[1, 2] = bad
        assert not sinkhorn(gradient, 2).isfinite().all()
