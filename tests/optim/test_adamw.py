import dataclasses

import pytest
import torch

from conformance.optim import finish, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.adamw import AdamW, adamw


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, step, decay in (
        ((7, 3), torch.float32, 1, 0.0),
        ((5,), torch.bfloat16, 9, 0.1),
        ((), torch.float64, 400, 1.0),
    ):
        x, g, m = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        v = torch.rand(shape, generator=generator).to(dtype)
        more = {"weight_decay": decay, "betas": (0.8, 0.97)}
        yield {"args": (x, g, m, v, step, 0.01), "kwargs": more, "tolerance": 2e-6}


def test_torchs_optimizer_follows_the_equation():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(start.clone())
    optimizer = AdamW(lr=0.02, betas=(0.7, 0.9), eps=1e-3).make([{"params": [weight], "weight_decay": 0.3}])
    x, m, v = start.double(), torch.zeros(4, 3), torch.zeros(4, 3)
    for step in range(1, 6):
        weight.grad = torch.sin(step * start)
        optimizer.step()
        x, m, v = adamw(x, weight.grad, m, v, step, 0.02, (0.7, 0.9), 1e-3, 0.3)
        torch.testing.assert_close(weight.detach(), x.float(), rtol=1e-5, atol=1e-6)


def test_the_persons_decay_holds_unless_another_is_given():
    def groups(plan):
        return run_of(plan, optimizer=lambda model: torch.optim.SGD(
            [{"params": [model.lm_head.weight], "weight_decay": 0.0},
             {"params": [p for p in model.parameters() if p is not model.lm_head.weight], "lr": 0.2}],
            lr=0.1, weight_decay=0.5)).optimizer.param_groups  # fmt: skip

    assert [group["weight_decay"] for group in groups("optim/adamw")] == [0.0, 0.5]
    assert [group["lr_factor"] for group in groups("optim/adamw") if "lr_factor" in group] == [2.0]
    assert [group["weight_decay"] for group in groups("optim/adamw(weight_decay=0.1)")] == [0.1, 0.1]


def test_schedules_scale_its_rate():
    run = run_of("optim/adamw(lr=0.01)", steps=2, schedule=lambda step, steps: 0.5)
    finish(run)
    assert run.rates.used == [0.005]
    composed = run_of("optim/adamw(lr=0.01) + optim/linear_decay(warmup=0.5)", steps=4)
    composed.train_step(lambda model, batch: model(input_ids=batch, labels=batch).loss)
    assert composed.rates.used == [0.005]


def test_resume_is_exact(tmp_path):
    run, half = run_of("optim/adamw"), run_of("optim/adamw")
    losses = finish(run)
    for _ in range(3):
        half.train_step(lambda model, batch: torch.nn.functional.cross_entropy(
            model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()))  # fmt: skip
    half.save(tmp_path / "half")
    resumed = run_of("optim/adamw", model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_betas_are_two():
    with pytest.raises(PlanError, match="two numbers"):
        dataclasses.replace(AdamW(), betas=(0.9,))
