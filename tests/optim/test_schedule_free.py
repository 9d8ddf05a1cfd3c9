import sys

import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.core.errors import MissingDependencyError, PlanError
from hasten.optim.schedule_free import ScheduleFree, naive_schedule_free, schedule_free


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, step, warmup, r in (
        ((7, 3), torch.float32, 1, 0, 0.0),
        ((5,), torch.bfloat16, 4, 10, 0.75),
        ((2, 1, 2), torch.float64, 300, 20, 2.0),
    ):
        y, g, z = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        v, before = torch.rand(shape, generator=generator).to(dtype), 0.0 if step == 1 else 0.01
        more = {"weight_decay": 0.1, "betas": (0.8, 0.97), "warmup": warmup, "r": r}
        yield {"args": (y, g, z, v, before, step, 0.01), "kwargs": more, "tolerance": 5e-6}


def test_the_librarys_optimizer_follows_the_equation():
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(start.clone())
    optimizer = ScheduleFree(lr=0.02, warmup=3, betas=(0.7, 0.9), r=0.5, weight_decay=0.3).make([{"params": [weight]}])
    optimizer.train()
    y, z, v, total = start.double(), start.double(), torch.zeros(3, 2), 0.0
    for step in range(1, 7):
        gradient = torch.sin(step * start)
        weight.grad = gradient.clone()
        optimizer.step()
        y, z, v, total = naive_schedule_free(
            y, gradient, z, v, total, step, 0.02, (0.7, 0.9), weight_decay=0.3, warmup=3, r=0.5
        )
        torch.testing.assert_close(weight.detach(), y.float(), rtol=1e-5, atol=1e-6)
    optimizer.eval()
    torch.testing.assert_close(weight.detach(), ((y - 0.3 * z) / 0.7).float(), rtol=1e-5, atol=1e-6)


def test_x_is_the_mean_of_the_fast_iterates():
    y = z = torch.tensor([1.0, -1.0], dtype=torch.float64)
    v, total, seen = torch.zeros(2), 0.0, []
    for step in range(1, 9):
        y, z, v, total = schedule_free(y, torch.cos(3 * y), z, v, total, step, 0.1, (0.9, 0.99))
        seen.append(z)
    torch.testing.assert_close((y - 0.1 * z) / 0.9, torch.stack(seen).mean(0))


def test_evaluation_and_the_end_see_the_average_and_training_goes_on_undisturbed():
    plain, watched = run_of("optim/schedule_free"), run_of("optim/schedule_free")
    for _ in range(4):
        plain.train_step(language_loss)
        watched.train_step(language_loss)
        before = watched.model.lm_head.weight.detach().clone()
        with watched.evaluation() as model:
            average = model.lm_head.weight.detach().clone()
        torch.testing.assert_close(watched.model.lm_head.weight.detach(), before)
    assert not torch.allclose(average, before)
    for one in (plain, watched):
        one.finish()
    torch.testing.assert_close(plain.model.lm_head.weight, watched.model.lm_head.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(watched.model.lm_head.weight.detach(), average)


def test_the_persons_schedule_is_left_out():
    run = run_of("optim/schedule_free(warmup=0)", steps=3, schedule=lambda step, steps: 0.1)
    finish(run)
    assert run.rates.used == [0.0025]
    with pytest.raises(PlanError, match="lr"):
        run_of("optim/schedule_free + optim/linear_decay")


def test_resume_is_exact(tmp_path):
    run, half = run_of("optim/schedule_free"), run_of("optim/schedule_free")
    losses = finish(run)
    half.slice(language_loss, steps=3)
    half.save(tmp_path / "half")
    resumed = run_of("optim/schedule_free", model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MissingDependencyError, match=r"hasten\[train\]"):
        ScheduleFree().make([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
