"""Schedule-Free AdamW: an average of the iterates takes the place of a decaying learning rate.

The gradient is taken between the fast iterate z and the average x; the average is what is evaluated (equations 1-3):

    y = (1 - beta1) z + beta1 x,    v <- beta2 v + (1 - beta2) g(y)^2,    t from 1
    z <- z - lr_t (g(y) / (sqrt(v / (1 - beta2^t)) + eps) + decay y),    lr_t = lr min(1, t / warmup)
    x <- (1 - c) x + c z,    c = w_t / (w_1 + .. + w_t),    w_t = t^r (max of lr up to t)^2

While the model trains it holds y; around evaluations, and when the run is finished, it holds x. z and v: one tensor a
parameter each, the memory of AdamW.

The optimizer is the authors' library `schedulefree`, which has its own warm-up: the person's schedule is left out. The
defaults are those of the authors' entry that won AlgoPerf's self-tuning ruleset (lr 0.0025, betas 0.9 and 0.9955, r
0.75); it takes 1.5% of the steps as warm-up, here `warmup` steps, and a weight decay of 0.0812, here the person's. The
library's own are betas (0.9, 0.999) and r = 0. Models with batch normalisation need its statistics computed anew for x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import MissingDependencyError
from hasten.core.options import Method, option

CARD = Card(
    title="The Road Less Scheduled",
    paper="2405.15682",
    seams=("optim.update", "lr"),
    effects=("steps", "quality"),
    lossless=False,
    claim="matches or exceeds tuned cosine schedules on 11 problems, without the number of steps; won AlgoPerf 2024's "
    "self-tuning track",
    claimed=None,
    identity="it replaces the optimizer of all parameters, so no option leaves the steps as they were",
    experiment=("tabular-mlp", "optim/schedule_free"),
    tune={"lr": (1e-4, 1e-1)},
    when="Runs of open length, and runs that are evaluated or stopped early: the average is good at any time.",
    when_not="Runs of known length with a tuned decay; models with batch normalisation.",
)


def naive_schedule_free(
    weight: Tensor,
    gradient: Tensor,
    fast: Tensor,
    square: Tensor,
    weights_sum: float,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup: int = 0,
    r: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The equation, entry by entry in fp64.

    Args:
        weight: y; `gradient`: g(y); `fast`: z; `square`: v; all of one shape.
        weights_sum: w_1 + .. + w_{t-1}, 0 at the first step.
        step: t, from 1.

    Returns:
        The new y, z, v and sum of weights.
    """
    beta1, beta2 = betas
    rate = lr * min(1.0, step / warmup if warmup else 1.0)
    mine = step**r * rate**2
    weights_sum += mine
    share = mine / weights_sum
    found: list[list[float]] = [[], [], []]
    for y, g, z, v in zip(*(one.flatten().tolist() for one in (weight, gradient, fast, square)), strict=True):
        x = (y - (1 - beta1) * z) / beta1
        v = beta2 * v + (1 - beta2) * g * g
        z = z - rate * (g / ((v / (1 - beta2**step)) ** 0.5 + eps) + weight_decay * y)
        x = (1 - share) * x + share * z
        for kept, value in zip(found, ((1 - beta1) * z + beta1 * x, z, v), strict=True):
            kept.append(value)
    y, z, v = (torch.tensor(one, dtype=torch.float64).view(weight.shape) for one in found)
    return y, z, v, weights_sum


def schedule_free(
    weight: Tensor,
    gradient: Tensor,
    fast: Tensor,
    square: Tensor,
    weights_sum: float,
    step: int,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup: int = 0,
    r: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """As `naive_schedule_free`, without computing x: y moves towards z and along the step."""
    beta1, beta2 = betas
    rate = lr * min(1.0, step / warmup if warmup else 1.0)
    mine = step**r * rate**2
    weights_sum += mine
    share = mine / weights_sum
    dtype = torch.promote_types(weight.dtype, torch.float32)
    y, g, z = weight.to(dtype), gradient.to(dtype), fast.to(dtype)
    v = (square.to(dtype) * beta2).addcmul(g, g, value=1 - beta2)
    direction = g / ((v / (1 - beta2**step)).sqrt() + eps) + weight_decay * y
    y = y.lerp(z, share) - rate * (1 - beta1 * (1 - share)) * direction
    return y, z - rate * direction, v, weights_sum


@dataclass(frozen=True)
class ScheduleFree(Method):
    """Schedule-Free AdamW for all parameters, with a warm-up of its own and no other schedule."""

    lr: float = option(0.0025, "learning rate after the warm-up", above=0)
    warmup: int = option(10, "steps in which the rate rises", least=0)
    betas: tuple[float, ...] = option(
        (0.9, 0.9955), "place of y between z and x, decay of the average of squares", above=0, below=1
    )
    r: float = option(0.75, "power of the step in the weights of the average; 0: all equal", least=0)
    eps: float = option(1e-8, "added to the root of the squares", above=0)
    weight_decay: float | None = option(None, "decoupled weight decay; none: as the person's groups have it", least=0)

    takes = "all"
    own_schedule = True

    def problems(self) -> list[str]:
        return [] if len(self.betas) == 2 else [f"betas are two numbers, not {len(self.betas)}"]

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups; `weight_decay` is theirs unless the option is given.

        Raises:
            MissingDependencyError: the package schedulefree is not installed.
        """
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            raise MissingDependencyError("schedulefree", "train") from None
        beta1, beta2 = self.betas
        return AdamWScheduleFree(
            groups,
            lr=self.lr,
            betas=(beta1, beta2),
            eps=self.eps,
            weight_decay=self.weight_decay or 0.0,
            warmup_steps=self.warmup,
            r=self.r,
        )


METHOD = ScheduleFree
