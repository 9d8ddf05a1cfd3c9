"""Adversarial fine-tuning: train on clean examples first, then for a short while on PGD's, with a rate of its own.

Madry's min-max problem, min_theta E max_{|delta| <= epsilon} L(f_theta(x + delta), y), is begun from a model that clean
training has made. The inner maximum is PGD: from a random start in the ball, `iterations` times

    x <- project(x + step_size sign(dL/dx)),    project: into |x - x_0| <= epsilon and low <= x <= high

(norm=linf; for l2 the gradient of each example is divided by its norm, and so is the distance where it is too large).
The rate starts slowly, so that what was learned is not lost, and decays fast, so that the attack is not overfitted.
With the part of fine-tuning that is done, p in 0..1, the factor is `peak` times

    start + (1 - start) p / rise   for p < rise;     end^((p - rise) / (1 - rise))   after it

`clean` is the fraction of the run that is clean training before the switch: the paper starts from a checkpoint (0, and
the model handed over is that); with `clean` above 0 one run holds both. In that part the rate rises over a fifth of it
and falls in a straight line to peak x start. x: [batch, ...], of any shape.

Departures: slow start and fast decay are the paper's; that the rise is linear and the decay exponential, and the
figures of both, are choices made here. PGD's passes see the model in eval mode, and so leave batch norm's averages
alone. l2 and the clean part are additions.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="A Simple Fine-tuning Is All You Need: Towards Robust Deep Learning Via Adversarial Fine-tuning",
    paper="2012.13628",
    seams=("step.passes", "lr"),
    effects=("time", "quality"),
    lossless=False,
    claim="8-10x less computation than PGD adversarial training, at better accuracy and robustness, on CIFAR-10",
    claimed=8.0,
    identity="it sets the learning rate of every step, so no option leaves the run as it was",
    experiment=(
        "images(attack=0.05, train_on=adversarial, steps=100, target=0.5)",
        "optim/adversarial_finetuning(epsilon=0.05, clean=0.5)",
    ),
    needs=("steps",),
    tune={"clean": (0.2, 0.8), "peak": (0.1, 2.0), "rise": (0.05, 0.5)},
    when="A model must withstand small worst-case changes of its inputs, and a clean one is there or cheap to train.",
    when_not="Robustness does not matter: each step of fine-tuning costs `iterations` more passes.",
)

_SMALL = 1e-12


class Prepared(tuple):
    """A batch (images, ...) whose examples are to be used as they are: a loop that perturbs its batches leaves it."""


def naive_adversarial_finetuning(
    x: Tensor, original: Tensor, gradient: Tensor, step_size: float, epsilon: float, norm: str, low: float, high: float
) -> Tensor:
    """One step of PGD with loops, in fp64.

    Args:
        x, original, gradient: [batch, ...]: the perturbed inputs, the clean ones, dL/dx.
        norm: linf or l2.
        low, high: range of an input's value.

    Returns:
        The next x, in x's type.
    """
    out = []
    for now, clean, slope in zip(x.double(), original.double(), gradient.double(), strict=True):
        now, clean, slope = (one.flatten().tolist() for one in (now, clean, slope))
        if norm == "linf":
            moved = [a + step_size * ((g > 0) - (g < 0)) for a, g in zip(now, slope, strict=True)]
            delta = [min(epsilon, max(-epsilon, m - c)) for m, c in zip(moved, clean, strict=True)]
        else:
            length = max(_SMALL, sum(g * g for g in slope) ** 0.5)
            delta = [a + step_size * g / length - c for a, g, c in zip(now, slope, clean, strict=True)]
            away = max(_SMALL, sum(d * d for d in delta) ** 0.5)
            delta = [d * min(1.0, epsilon / away) for d in delta]
        out.append([min(high, max(low, c + d)) for c, d in zip(clean, delta, strict=True)])
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape).to(x.dtype)


def adversarial_finetuning(
    x: Tensor, original: Tensor, gradient: Tensor, step_size: float, epsilon: float, norm: str, low: float, high: float
) -> Tensor:
    """As `naive_adversarial_finetuning`, all examples at once."""
    if norm == "linf":
        delta = (x + step_size * gradient.sign() - original).clamp(-epsilon, epsilon)
    else:
        delta = x + step_size * gradient / _lengths(gradient) - original
        delta = delta * (epsilon / _lengths(delta)).clamp_max(1.0)
    return (original + delta).clamp(low, high).to(x.dtype)


def _lengths(x: Tensor) -> Tensor:
    """The l2 norm of each example, [batch, 1, ...]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide).clamp_min(_SMALL).view(-1, *[1] * (x.dim() - 1))


def slow_start_fast_decay(steps: int, start: float, rise: float, end: float) -> Tensor:
    """Factors [steps] on the peak rate, float64: linear from `start` to 1, then exponential to `end` at the last."""
    p = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    falling = end ** ((p - rise) / (1 - rise))
    return torch.where(p < rise, start + (1 - start) * p / max(rise, _SMALL), falling)


@dataclass(frozen=True)
class AdversarialFinetuning(Method):
    """PGD adversarial training under the slow-start fast-decay schedule, after clean training of `clean` of the run."""

    epsilon: float = option(8 / 255, "radius of the ball around an input, in units of its values", above=0)
    iterations: int = option(7, "steps of PGD for each batch", least=1, most=1000)
    step_size: float | None = option(None, "length of a step of PGD; none: epsilon / 4, the paper's 2/255", above=0)
    norm: str = option("linf", "norm that epsilon is in", choices=("linf", "l2"))
    low: float = option(0.0, "smallest value of an input")
    high: float = option(1.0, "largest value of an input")
    random_start: bool = option(True, "PGD starts at a random place of the ball (a cube, cut to the ball for l2)")
    clean: float = option(0.0, "fraction of the run that is clean training, before the switch", least=0, below=1)
    peak: float = option(1.0, "the schedule's largest factor on the base learning rate", above=0)
    start: float = option(0.1, "fraction of the peak that fine-tuning starts at", above=0, most=1)
    rise: float = option(0.3, "fraction of fine-tuning in which the rate rises", least=0, below=1)
    end: float = option(0.05, "fraction of the peak that it ends at", above=0, most=1)

    def problems(self) -> list[str]:
        return [] if self.low < self.high else [f"low={self.low:g} must be below high={self.high:g}"]

    def schedule(self, steps: int) -> Tensor:
        """Factors [steps], float64: the clean part's, then the slow start and fast decay."""
        first = self.first(steps)
        t, warm = torch.arange(first, dtype=torch.float64), max(1, first // 5)
        falling = 1 - (1 - self.start) * (t - warm + 1) / max(1, first - warm)
        clean = torch.where(t < warm, (t + 1) / warm, falling)
        fine = slow_start_fast_decay(steps - first, self.start, self.rise, self.end)
        return self.peak * torch.cat([clean, fine])

    def first(self, steps: int) -> int:
        """The first step on adversarial examples."""
        return min(steps - 1, round(self.clean * steps))

    def attach(self, run: Any) -> None:
        """Makes the passes of each step and sets the rate; raises nothing that the plan's check does not."""
        factors, first = self.schedule(run.steps).tolist(), self.first(run.steps)
        run.scale_lr(lambda run: factors[min(run.step, len(factors) - 1)])
        run.in_passes(lambda run, batch: self._passes(run, batch, clean=run.step < first))

    def _passes(self, run: Any, batch: Any, clean: bool) -> Generator[Any, Tensor, Tensor]:
        original = images_of(batch)
        if clean:
            return (yield with_images(batch, original))
        ball = (self.epsilon, self.norm, self.low, self.high)
        x = original.detach()
        if self.random_start:
            draws = torch.rand(x.shape, generator=run.generator(self.name)).to(x)
            x = adversarial_finetuning(x + self.epsilon * (2 * draws - 1), x, torch.zeros_like(x), 0.0, *ball)
        step_size = self.epsilon / 4 if self.step_size is None else self.step_size
        modes = [(module, module.training) for module in run.host.model.modules()]
        try:
            for _ in range(self.iterations):
                run.host.model.eval()
                loss = yield with_images(batch, x.requires_grad_())
                slope = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
                if slope is None:
                    raise UsageError(f"{self.name}: the loss does not depend on the batch's images: don't copy them")
                x = adversarial_finetuning(x.detach(), original, slope, step_size, *ball)
        finally:
            for module, mode in modes:
                module.training = mode
        return (yield with_images(batch, x))


def images_of(batch: Any) -> Tensor:
    """The inputs to perturb: `pixel_values` of a mapping, else its first floating tensor; a sequence's first entry.

    Raises:
        UsageError: the batch holds no floating-point inputs; tokens can't be perturbed.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = batch[_key(batch)] if _key(batch) is not None else None
    elif isinstance(batch, tuple | list):
        found = batch[0] if batch else None
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise UsageError("adversarial examples need a batch (images, labels) or a mapping with floating-point inputs")
    return found


def with_images(batch: Any, images: Tensor) -> Any:
    """The batch with other inputs: a tuple or list becomes `Prepared`, a mapping a dict."""
    if isinstance(batch, Mapping):
        return {**batch, _key(batch): images}
    return images if isinstance(batch, Tensor) else Prepared((images, *batch[1:]))


def _key(batch: Mapping[str, Any]) -> str | None:
    floating = [k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()]
    return "pixel_values" if "pixel_values" in floating else (floating[0] if floating else None)


METHOD = AdversarialFinetuning
