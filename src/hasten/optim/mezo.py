"""MeZO: fine-tuning by two forward passes a step, which give the gradient's share along one random direction.

With a direction z ~ N(0, I) that a seed gives, and losses of one batch (SPSA, Definition 1, and Algorithm 1):

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);     theta <- theta - lr (g z + weight_decay theta)

The weights are moved in place and z is drawn from its seed whenever it is needed. Nothing is propagated back, so there
is no graph, no gradient and no optimizer state: the memory is that of inference. theta, z: of one shape. With `samples`
the step averages n directions (n-SPSA).

While it trains, `requires_grad` of the weights is off. The run's clip has nothing to act on. The other settings of the
person's optimizer do not count; schedules scale `lr`.

Departures: putting the weights back and updating them is one sweep (three draws of z a step, not four). The model stays
in train mode, and both passes drop the same units; the authors switch dropout off. Their runs keep `lr` constant.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim import _zeroth

CARD = Card(
    title="Fine-Tuning Language Models with Just Forward Passes",
    paper="2305.17333",
    seams=("step.passes", "optim.update"),
    effects=("memory",),
    lossless=False,
    claim="up to 12x less memory than fine-tuning with Adam and up to 2x fewer GPU hours (OPT, fewer GPUs at work)",
    claimed=None,
    identity="a step goes along a random direction, so no option leaves the steps as they were",
    experiment=("stdlib-tune", "optim/mezo(lr=0.0001)"),
    tune={"lr": (2e-5, 1e-3), "eps": (1e-4, 1e-2)},
    when="Fine-tuning a large model where there is memory for inference only, or where the loss has no gradient.",
    when_not="Where backward passes fit into memory: on stdlib-tune AdamW needs 2 steps where MeZO needs about 90.",
)


def naive_mezo(
    weights: Tensor, z: Tensor, plus: float, minus: float, eps: float, lr: float, weight_decay: float = 0.0
) -> Tensor:
    """One step with a loop over the weights, in fp32.

    Args:
        weights, z: [...], theta and the direction.
        plus, minus: L(theta + eps z) and L(theta - eps z).

    Returns:
        The new theta, fp32.
    """
    out = weights.to(torch.float32, copy=True).contiguous()
    for place, (theta, along) in enumerate(zip(weights.flatten().tolist(), z.flatten().tolist(), strict=True)):
        gradient = (plus - minus) / (2 * eps) * along
        out.view(-1)[place] = theta - lr * (gradient + weight_decay * theta)
    return out


def mezo(
    weights: Tensor, z: Tensor, plus: float, minus: float, eps: float, lr: float, weight_decay: float = 0.0
) -> Tensor:
    """As `naive_mezo`, on the way that the weights take: to +eps z, to -eps z, to the new theta."""
    theta = weights.to(torch.float32, copy=True).contiguous()
    _zeroth.move(theta, z, 0.0, eps)
    _zeroth.move(theta, z, eps, -eps)
    _zeroth.move(theta, z, -eps, -lr * (plus - minus) / (2 * eps), decay=lr * weight_decay)
    return theta


@dataclass(frozen=True)
class MeZO(Method):
    """MeZO for all parameters that the person's optimizer holds."""

    lr: float = option(1e-6, "learning rate; the authors use 1e-7 to 1e-6 for models of 1 to 66 billion", above=0)
    eps: float = option(1e-3, "perturbation scale", above=0)
    samples: int = option(1, "directions n a batch, at two forward passes each", least=1, most=1000)
    weight_decay: float = option(0.0, "decay of matrices, scaled by the rate", least=0)

    def attach(self, run: Any) -> None:
        """Makes the run step by pairs of passes.

        Raises:
            UsageError: fp16, or several processes.
        """
        _zeroth.attach(self, run)


METHOD = MeZO
