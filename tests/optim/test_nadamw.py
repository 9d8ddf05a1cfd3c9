import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.nadamw import NadamW, naive_nadamw


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, step, product in (
        ((7, 3), torch.float32, 1, 1.0),
        ((5,), torch.float16, 9, 1e-3),
        ((1, 2, 1), torch.float64, 400, 0.0),
    ):
        x, g, m = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        v = torch.rand(shape, generator=generator).to(dtype)
        more = {"weight_decay": 0.1, "betas": (0.8, 0.97), "momentum_decay": 0.02}
        yield {"args": (x, g, m, v, product, step, 0.01), "kwargs": more, "tolerance": 2e-6}


def test_torchs_optimizer_follows_the_equation():
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(start.clone())
    method = NadamW(lr=0.02, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.3)
    optimizer = method.make([{"params": [weight]}])
    x, m, v, product = start.double(), torch.zeros(3, 2), torch.zeros(3, 2), 1.0
    for step in range(1, 6):
        weight.grad = torch.sin(step * start)
        optimizer.step()
        x, m, v, product = naive_nadamw(x, weight.grad, m, v, product, step, 0.02, (0.7, 0.9), 1e-3, 0.3)
        torch.testing.assert_close(weight.detach(), x.float(), rtol=1e-5, atol=1e-6)


def test_constant_gradients_are_looked_ahead_along():
    # With constant gradients both averages are exact, so the step is lr times the sign, as Adam's, at any mu.
    zeros = torch.zeros(2)
    x, _, _, _ = naive_nadamw(zeros, torch.tensor([2.0, -3.0]), zeros, zeros, 1.0, 1, 0.1, (0.9, 0.99), 0.0)
    now, following = 0.9 * (1 - 0.5 * 0.96**0.004), 0.9 * (1 - 0.5 * 0.96**0.008)
    size = 0.1 * (1 + following * 0.1 / (1 - now * following))  # m is (1 - beta1) g after one step
    torch.testing.assert_close(x, torch.tensor([-size, size], dtype=torch.float64))


def test_resume_is_exact(tmp_path):
    run, half = run_of("optim/nadamw"), run_of("optim/nadamw")
    losses = finish(run)
    half.slice(language_loss, steps=3)
    half.save(tmp_path / "half")
    resumed = run_of("optim/nadamw", model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_betas_are_two():
    with pytest.raises(PlanError, match="two numbers"):
        NadamW(betas=(0.9, 0.9, 0.9))
