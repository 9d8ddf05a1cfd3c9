import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, outcome, run_of
from hasten.core.errors import UsageError
from hasten.optim.momentum_reset import reset

BETAS = (0.9, 0.999)


def cases():
    generator = torch.Generator().manual_seed(0)
    moments = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 3, 2))]
    yield {"args": (moments, 200, 200)}
    yield {"args": (moments, 199, 200)}
    yield {"args": ([one.bfloat16() for one in moments], 6, 3)}
    yield {"args": ([], 1, 1)}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": {"every": 3}}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def rmsprop(model):
    return torch.optim.RMSprop(model.parameters(), momentum=0.9)


def nadam(model):
    return torch.optim.NAdam(model.parameters())


def test_the_moments_are_those_of_an_optimizer_that_began_at_the_reset():
    run = run_of("optim/momentum_reset(every=3)", steps=8)
    twin = llama(0)
    old = torch.optim.AdamW(twin.parameters(), lr=3e-3)
    loader = iter(lines(0))
    for step in range(8):
        if step in (3, 6):
            old = torch.optim.AdamW(twin.parameters(), lr=3e-3)
        loss = language_loss(twin, next(loader))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        old.step()
        old.zero_grad()
    finish(run)
    pairs = list(zip(run.model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in pairs)
    for p, q in pairs:
        assert all(torch.equal(run.optimizer.state[p][name], old.state[q][name]) for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("make", [sgd, rmsprop, nadam])
def test_other_optimizers_forget_as_well(make):
    model = llama()
    optimizer = make(model)
    first = [p.detach().clone() for p in model.parameters()]

    def step():
        language_loss(model, next(iter(lines(0)))).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    once = [p.detach().clone() for p in model.parameters()]
    reset(optimizer)
    with torch.no_grad():
        for p, q in zip(model.parameters(), first, strict=True):
            p.copy_(q)
    step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), once, strict=True))


def test_without_the_count_the_first_step_after_a_reset_is_longer():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([p], lr=1.0, betas=BETAS, eps=0.0)
    steps = []
    for counts in (True, False):
        optimizer.state.clear()
        p.grad = torch.ones(1)
        optimizer.step()
        optimizer.state[p]["step"].fill_(1e6)
        reset(optimizer, counts)
        before = float(p.detach())
        optimizer.step()
        steps.append(before - float(p.detach()))
    assert steps == pytest.approx([1.0, (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5], rel=1e-4)


def test_the_rate_rises_again_after_a_reset():
    run = run_of("optim/momentum_reset(every=4, warmup=3)", steps=10)
    rates = []
    while not run.done:
        run.slice(language_loss, steps=1)
        rates.append(run.rates.used[0] / 3e-3)
    assert rates == pytest.approx([1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5])


def test_an_optimizer_without_moments_is_named():
    run = run_of("optim/momentum_reset", optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="SGD keeps no moments"):
        run.slice(language_loss, steps=1)
    run = run_of("optim/momentum_reset", optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="keeps step, sum"):
        run.slice(language_loss, steps=1)


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    plan = "optim/momentum_reset(every=3, warmup=1)"
    run = run_of(plan, steps=9)
    losses = finish(run)
    half = run_of(plan, steps=9)
    half.slice(language_loss, steps=4)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=9, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[4:]
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
