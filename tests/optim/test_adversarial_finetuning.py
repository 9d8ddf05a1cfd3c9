import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conformance.optim import adamw, lines, run_of
from hasten.core.errors import PlanError, UsageError
from hasten.optim.adversarial_finetuning import (
    AdversarialFinetuning,
    Prepared,
    adversarial_finetuning,
    slow_start_fast_decay,
)
from hasten.workloads.digits import digits


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, norm, dtype, tolerance in (
        ((3, 1, 5, 4), "linf", torch.float32, 1e-6),
        ((2, 7), "l2", torch.float32, 1e-5),
        ((1, 3), "linf", torch.float64, 1e-12),
        ((4, 2, 3), "l2", torch.float64, 1e-9),
        ((3, 6), "linf", torch.float16, 2e-3),
        ((3, 6), "l2", torch.bfloat16, 3e-2),
    ):
        original, gradient = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
        gradient.view(-1)[0] = 0.0
        x = (original + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        arguments = (x, original.to(dtype), gradient.to(dtype), 0.05, 0.12, norm, 0.0, 1.0)
        yield {"args": arguments, "kwargs": {}, "grad": False, "tolerance": tolerance}
    flat = torch.zeros(2, 4)
    yield {"args": (flat, flat, flat, 0.1, 0.2, "l2", -1.0, 1.0), "kwargs": {}, "grad": False}


class ConvNet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, 10))

    def forward(self, images):
        return self.head(self.body(images))


def pictures(seed=0):
    """Digits in 0..1."""
    images, labels = digits(False)
    data = torch.utils.data.TensorDataset((images + 1) / 2, labels)
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True, generator=generator)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def started(method, seed=0, steps=8, **more):
    return run_of(
        method, seed, steps=steps, model=more.pop("model", None) or ConvNet(seed), loader=pictures(seed), **more
    )


def outcome(method, seed):
    run = started(method, seed)
    losses = []
    while not run.done:
        run.slice(loss, steps=1)
        losses.append(run.loss())
    return [torch.tensor(losses), *(p.detach() for p in run.model.parameters())]


def subject(method_class):
    return {"train": outcome, "options": {"epsilon": 0.1, "iterations": 2, "clean": 0.5}}


def test_a_step_of_pgd():
    original, slope = torch.tensor([[0.5, 0.5, 0.95, 0.5]]), torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    once = adversarial_finetuning(original, original, slope, 0.08, 0.1, "linf", 0.0, 1.0)
    torch.testing.assert_close(once, torch.tensor([[0.58, 0.42, 1.0, 0.5]]))
    twice = adversarial_finetuning(once, original, slope, 0.08, 0.1, "linf", 0.0, 1.0)
    torch.testing.assert_close(twice, torch.tensor([[0.6, 0.4, 1.0, 0.5]]))
    far = adversarial_finetuning(original, original, torch.tensor([[3.0, 0, 0, 4.0]]), 1.0, 0.5, "l2", -9.0, 9.0)
    torch.testing.assert_close(far - original, torch.tensor([[0.3, 0, 0, 0.4]]))


def test_slow_start_and_fast_decay():
    factors = slow_start_fast_decay(11, 0.2, 0.4, 0.01)
    torch.testing.assert_close(factors[:5], torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
    ratios = factors[5:] / factors[4:-1]
    torch.testing.assert_close(ratios, torch.full((6,), 0.01 ** (1 / 6), dtype=torch.float64))
    assert len(slow_start_fast_decay(1, 0.2, 0.4, 0.01)) == 1


def test_the_whole_schedule():
    factors = AdversarialFinetuning(clean=0.5, peak=0.5, start=0.1, rise=0.5, end=0.1).schedule(40)
    assert len(factors) == 40 and factors.max() == 0.5 == factors[3]
    assert factors[19] == pytest.approx(0.05) == pytest.approx(factors[20].item())  # it meets the slow start
    assert factors[-1] == pytest.approx(0.05)
    assert len(AdversarialFinetuning(clean=0.0).schedule(5)) == 5


def test_passes_see_examples_in_the_ball_in_eval_mode_and_the_last_one_trains():
    run = started(AdversarialFinetuning(epsilon=0.1, iterations=3, clean=0.5), steps=4)
    clean, seen = {}, []
    run.on("batch_chosen", lambda run, batch: clean.update(x=batch[0]) or batch)

    def watched(model, batch):
        value = loss(model, batch)
        away = (batch[0] - clean["x"]).abs().max().item()
        seen.append((model.training, away, value.item(), isinstance(batch, Prepared)))
        assert bool(((batch[0] >= 0) & (batch[0] <= 1)).all())
        return value

    counts = []
    run.on("step", lambda run: counts.append(int(run.model.body[1].num_batches_tracked)))
    while not run.done:
        run.slice(watched, steps=1)
    assert [one[0] for one in seen] == [True] * 2 + [False, False, False, True] * 2
    assert [one[1] for one in seen[:2]] == [0, 0] and all(0 < one[1] <= 0.1 + 1e-6 for one in seen[2:])
    assert seen[4][2] > seen[2][2] and seen[8][2] > seen[6][2]  # the attack raises the loss
    assert counts == [1, 2, 3, 4] and all(one[3] for one in seen)


def test_it_makes_a_clean_model_robust():
    def robust(model):
        images, labels = digits(True)
        images, model = (images + 1) / 2, model.eval()
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        return F.cross_entropy(model((images + 0.15 * slope.sign()).clamp(0, 1)), labels).item()

    model = ConvNet()
    started("", model=model, steps=60, optimizer=lambda model: adamw(model, 1e-2)).slice(loss, steps=60)
    before = robust(model)
    plan = "optim/adversarial_finetuning(epsilon=0.15, iterations=3)"
    tuned = started(plan, model=model.train(), steps=60, optimizer=lambda model: adamw(model, 1e-2))
    tuned.slice(loss, steps=60)
    assert robust(model) < 0.7 * before


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    method = AdversarialFinetuning(epsilon=0.1, iterations=2, clean=0.3)
    wanted = outcome(method, 0)
    half = started(method)
    half.slice(loss, steps=5)
    half.save(tmp_path / "half")
    resumed = started(method, model=ConvNet(5), resume=tmp_path / "half")
    resumed.slice(loss, steps=3)
    assert all(torch.equal(p, q) for p, q in zip(wanted[1:], resumed.model.parameters(), strict=True))


def test_mappings_and_bare_images():
    run = started("optim/adversarial_finetuning(iterations=1)", steps=1)
    run.on("batch_shaped", lambda run, batch: {"labels": batch[1], "pixel_values": batch[0], "weight": torch.ones(32)})
    run.slice(lambda model, batch: loss(model, (batch["pixel_values"], batch["labels"])), steps=1)
    run = started("optim/adversarial_finetuning(iterations=1)", steps=1)
    run.on("batch_shaped", lambda run, batch: batch[0])
    run.slice(lambda model, batch: model(batch).square().mean(), steps=1)
    assert run.done


def test_what_cannot_be_attacked_is_an_error():
    with pytest.raises(UsageError, match="floating-point"):
        run_of("optim/adversarial_finetuning", loader=lines()).slice(
            lambda model, batch: model(batch).logits.sum(), steps=1
        )
    with pytest.raises(UsageError, match="does not depend"):
        run = started("optim/adversarial_finetuning")
        run.slice(lambda model, batch: loss(model, (batch[0].detach(), batch[1])), steps=1)
    assert run.model.training  # left as it was
    with pytest.raises(PlanError, match="must be below"):
        AdversarialFinetuning(low=1.0, high=0.0)
    with pytest.raises(PlanError, match="steps=N"):
        started("optim/adversarial_finetuning", steps=None)
