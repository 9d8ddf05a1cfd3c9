"""Several passes a step, and the forwards that the loop makes: what methods see of them and may change."""

import pytest
import torch

from hasten.core.errors import UsageError
from hasten.train import NotFiniteError, Run
from train import tiny


def run_of(make=None, **options):
    model = tiny.model(dropout=0.0)
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), tiny.loader(), steps=4, **options)
    if make:
        run.in_passes(make)
    return run


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]


def test_one_pass_is_the_plain_step():
    def once(run, batch):
        return (yield batch)

    plain, passed = run_of(accumulate=2), run_of(once, accumulate=2)
    for run in (plain, passed):
        run.slice(tiny.loss)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(passed), strict=True))
    assert passed.loss() == plain.loss() and passed.stream.taken == plain.stream.taken


def test_inputs_are_changed_between_passes():
    seen = []

    def attack(run, batch):
        x = batch[0].clone().requires_grad_()
        loss = yield x, batch[1]
        (gradient,) = torch.autograd.grad(loss, x)
        harder = yield (x + 0.1 * gradient.sign()).detach(), batch[1]
        seen.append((loss.item(), harder.item()))
        return harder

    run = run_of(attack)
    batches = 0
    for batch in run:
        run.backward(tiny.loss(run.model, batch))
        batches += 1
    assert batches == 8 and run.step == 4 and len(seen) == 4
    assert all(harder > loss for loss, harder in seen) and run.loss() == pytest.approx(seen[-1][1])


def test_steps_without_gradients():
    def plain(run, batch):
        one = yield batch
        other = yield batch
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(0.5)
        assert one == other
        return None

    run = run_of(plain, clip=1.0)
    before = weights(run)
    for p in run.model.parameters():
        p.requires_grad_(False)
    run.slice(tiny.loss)
    assert run.step == 4 and all(torch.equal(a, b / 16) for a, b in zip(weights(run), before, strict=True))


def test_a_loop_that_is_left_closes_the_passes(tmp_path):
    closed = []

    def two(run, batch):
        try:
            yield batch
            return (yield batch)
        finally:
            closed.append(run.step)

    run = run_of(two)
    for batch in run:
        run.backward(tiny.loss(run.model, batch))
        with pytest.raises(UsageError, match="after run.backward"):
            run.save(tmp_path)
        break
    for _ in run:
        break
    assert closed == [0, 0]
    run.slice(tiny.loss)
    assert run.done and len(closed) == 6


def test_what_passes_refuse():
    def nothing(run, batch):
        return
        yield

    def constant(run, batch):
        yield batch
        return torch.ones(())

    with pytest.raises(UsageError, match="at least one batch"):
        run_of(nothing).slice(tiny.loss)
    with pytest.raises(UsageError, match="depends on the weights"):
        run_of(constant).slice(tiny.loss)
    run = run_of(constant)
    with pytest.raises(UsageError, match="two methods make several passes"):
        run.in_passes(constant)

    def broken(run, batch):
        loss = yield batch
        return loss * float("nan")

    with pytest.raises(NotFiniteError, match="step 1"):
        run_of(broken).slice(tiny.loss)


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(6, 3)

    def forward(self, x, scale=1.0, **more):
        return (self.inner(x) * scale * more.get("extra", 1.0), "aside")


@pytest.mark.parametrize(
    "call", [lambda m, x: m(x, 2.0, extra=3.0), lambda m, x: m(x=x, scale=2.0, extra=3.0)], ids=["places", "names"]
)
def test_calls_are_seen_by_name(call):
    model = Named()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), tiny.loader(), steps=2)
    calls, found = run.watch_calls(), []
    run.on("loss", lambda run, loss: (found.append(calls.of("one")[:]), loss)[1])
    call(model, torch.zeros(1, 6))  # outside of a batch: not a call of it
    for x, _ in run:
        run.backward(call(model, x)[0].square().mean())
    assert [len(one) for one in found] == [1, 1]
    first = found[0][0]
    assert set(first.inputs) == {"x", "scale", "extra"} and first.inputs["scale"] == 2.0
    assert first.logits.shape == (4, 3)
    run.finish()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_inputs_may_be_changed_on_the_way_in():
    model = Named()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), tiny.loader(), steps=1)
    calls = run.watch_calls(lambda inputs: {**inputs, "x": inputs["x"].clone().requires_grad_(), "scale": 0.5})
    for x, _ in run:
        loss = model(x, extra=2.0)[0].square().sum() + model(x, 4.0)[0].square().sum()
        first, second = (call.logits for call in calls.of("two"))
        torch.testing.assert_close(first, 2 * second)
        torch.testing.assert_close(second, 0.5 * model.inner(x))
        (gradient,) = torch.autograd.grad(loss, calls.of("two")[1].inputs["x"], retain_graph=True)
        assert gradient.shape == x.shape and not x.requires_grad
        run.backward(loss)


def test_a_loss_without_a_forward_is_an_error():
    model = Named()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), tiny.loader(), steps=1)
    calls = run.watch_calls()
    for _ in run:
        with pytest.raises(UsageError, match="call run.model"):
            calls.of("a/method")
        break
