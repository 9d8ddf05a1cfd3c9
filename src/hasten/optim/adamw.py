"""AdamW with a rate of its own, in PyTorch's fused kernel: the baseline that other optimizers are compared with.

Averages of gradients and of their squares make the step; weight decay acts on the weight itself (algorithm 2):

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    x <- x - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay x)

x, g, m, v: any shape; t counts steps from 1; `lr` is the schedule's factor times the option `lr`.

Departure: decay is multiplied by the learning rate, as PyTorch does, not by the schedule's factor alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="Decoupled Weight Decay Regularization",
    paper="1711.05101",
    seams=("optim.update",),
    effects=("steps", "quality"),
    lossless=False,
    claim="generalises as SGD with momentum does, where Adam with l2 regularisation falls behind; no speed is claimed",
    claimed=None,
    identity="it replaces the optimizer of all parameters; with the person's own options its fused kernel rounds apart",
    experiment=("tabular-mlp", "optim/adamw(lr=0.003)"),
    tune={"lr": (1e-4, 1e-1)},
    when="To try another rate, betas or weight decay on a run whose own optimizer stays as it is, or to tune them.",
    when_not="A run whose own AdamW is tuned already.",
)


def naive_adamw(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equation, entry by entry in fp64.

    Args:
        weight, gradient, average, square: one shape.
        step: t, from 1.

    Returns:
        The new weight, average and square.
    """
    beta1, beta2 = betas
    found: list[list[float]] = [[], [], []]
    for x, g, m, v in zip(*(one.flatten().tolist() for one in (weight, gradient, average, square)), strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        change = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + eps)
        for kept, value in zip(found, (x - lr * (change + weight_decay * x), m, v), strict=True):
            kept.append(value)
    x, m, v = (torch.tensor(one, dtype=torch.float64).view(weight.shape) for one in found)
    return x, m, v


def adamw(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive_adamw`, with tensors; in fp32, or in the weight's type where that is finer."""
    beta1, beta2 = betas
    dtype = torch.promote_types(weight.dtype, torch.float32)
    x, g = weight.to(dtype), gradient.to(dtype)
    m = average.to(dtype).lerp(g, 1 - beta1)
    v = (square.to(dtype) * beta2).addcmul(g, g, value=1 - beta2)
    change = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
    return x - lr * (change + weight_decay * x), m, v


@dataclass(frozen=True)
class AdamW(Method):
    """PyTorch's AdamW for all parameters, fused where the device has it; the person's schedule scales its rate."""

    lr: float = option(1e-3, "learning rate; schedules scale it", above=0)
    betas: tuple[float, ...] = option((0.9, 0.999), "decay of the averages of gradients and squares", least=0, below=1)
    eps: float = option(1e-8, "added to the root of the squares", above=0)
    weight_decay: float | None = option(None, "decoupled weight decay; none: as the person's groups have it", least=0)

    takes = "all"

    def problems(self) -> list[str]:
        return [] if len(self.betas) == 2 else [f"betas are two numbers, not {len(self.betas)}"]

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups; `weight_decay` is theirs unless the option is given."""
        places = {p.device.type for group in groups for p in group["params"]}
        beta1, beta2 = self.betas
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=(beta1, beta2),
            eps=self.eps,
            weight_decay=self.weight_decay or 0.0,
            fused=True if places <= {"cpu", "cuda"} else None,
        )


METHOD = AdamW
