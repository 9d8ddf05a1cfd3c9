"""NadamW: AdamW with Nesterov's momentum, at one setting that was calibrated on many networks at once.

The step looks one momentum step ahead. mu_t rises to beta1 (Dozat, "Incorporating Nesterov Momentum into Adam", 2016):

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    mu_t = beta1 (1 - 0.96^(t psi) / 2)
    x <- x - lr ((1 - mu_t) g / (1 - mu_1 .. mu_t) + mu_{t+1} m / (1 - mu_1 .. mu_{t+1}))
             / (sqrt(v / (1 - beta2^t)) + eps) - lr decay x

x, g, m, v: any shape; t counts steps from 1; `lr` is the schedule's factor times the option `lr`.

The paper finds that a calibrated NadamW is at least as good as the calibrated methods without a learning rate. The
defaults here are AlgoPerf's NadamW of the self-tuning ruleset, one setting for all its workloads (lr 0.00175, betas
0.9327 and 0.9955, weight decay 0.0812); it comes with 2% of warm-up and a cosine, which stay the person's own here.

Departures: mu_t is PyTorch's (psi is `momentum_decay`); AlgoPerf's code has mu_t = beta1 and one correction of both
terms. The default weight decay is the person's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="How far away are truly hyperparameter-free learning algorithms?",
    paper="2505.24005",
    seams=("optim.update",),
    effects=("steps", "quality"),
    lossless=False,
    claim="calibrated once for all of AlgoPerf's workloads it slightly exceeds the best method without a learning rate",
    claimed=None,
    identity="it replaces the optimizer of all parameters, so no option leaves the steps as they were",
    experiment=("tabular-mlp", "optim/nadamw"),
    tune={"lr": (1e-4, 1e-1)},
    when="As the first optimizer of a new model: a setting that has served many networks.",
    when_not="A run whose own optimizer is tuned already.",
)


def naive_nadamw(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    product: float,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 0.004,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The equation, entry by entry in fp64.

    Args:
        weight, gradient, average, square: one shape.
        product: mu_1 .. mu_{t-1}; 1 at the first step.
        step: t, from 1.

    Returns:
        The new weight, average, square and product.
    """
    beta1, beta2 = betas
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product *= now
    found: list[list[float]] = [[], [], []]
    for x, g, m, v in zip(*(one.flatten().tolist() for one in (weight, gradient, average, square)), strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        ahead = (1 - now) / (1 - product) * g + following / (1 - product * following) * m
        change = ahead / ((v / (1 - beta2**step)) ** 0.5 + eps)
        for kept, value in zip(found, (x - lr * (change + weight_decay * x), m, v), strict=True):
            kept.append(value)
    x, m, v = (torch.tensor(one, dtype=torch.float64).view(weight.shape) for one in found)
    return x, m, v, product


def nadamw(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    product: float,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 0.004,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """As `naive_nadamw`, with tensors; in fp32, or in the weight's type where that is finer."""
    beta1, beta2 = betas
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product *= now
    dtype = torch.promote_types(weight.dtype, torch.float32)
    x, g = weight.to(dtype), gradient.to(dtype)
    m = average.to(dtype).lerp(g, 1 - beta1)
    v = (square.to(dtype) * beta2).addcmul(g, g, value=1 - beta2)
    ahead = g * ((1 - now) / (1 - product)) + m * (following / (1 - product * following))
    change = ahead / ((v / (1 - beta2**step)).sqrt() + eps)
    return x - lr * (change + weight_decay * x), m, v, product


@dataclass(frozen=True)
class NadamW(Method):
    """PyTorch's NAdam with decoupled weight decay for all parameters; the person's schedule scales its rate."""

    lr: float = option(0.00175, "learning rate; schedules scale it", above=0)
    betas: tuple[float, ...] = option(
        (0.9327, 0.9955), "decay of the averages of gradients and squares", least=0, below=1
    )
    eps: float = option(1e-8, "added to the root of the squares", above=0)
    weight_decay: float | None = option(None, "decoupled weight decay; none: as the person's groups have it", least=0)
    momentum_decay: float = option(0.004, "psi, how fast the momentum rises to the first beta", least=0)

    takes = "all"

    def problems(self) -> list[str]:
        return [] if len(self.betas) == 2 else [f"betas are two numbers, not {len(self.betas)}"]

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups; `weight_decay` is theirs unless the option is given."""
        beta1, beta2 = self.betas
        return torch.optim.NAdam(
            groups,
            lr=self.lr,
            betas=(beta1, beta2),
            eps=self.eps,
            weight_decay=self.weight_decay or 0.0,
            momentum_decay=self.momentum_decay,
            decoupled_weight_decay=True,
        )


METHOD = NadamW
