"""D-Adaptation: Adam whose learning rate d is an estimate of the distance to the solution, which only rises.

The estimate follows from the inner products of gradients with the weighted sum of earlier ones; for gradient descent on
a convex loss it is a lower bound. Adam's form (section 4):

    r <- b r + (1 - b) lr d <g, s / (sqrt(v) + eps)>,     b = sqrt(beta2)
    m <- beta1 m + (1 - beta1) lr d g,    v <- beta2 v + (1 - beta2) g^2,     s <- b s + (1 - b) lr d g
    d <- max(d, coefficient r / ((1 - b) |s|_1)),         x <- x - m / (sqrt(v) + eps)

x: one parameter, g: its gradient; r and |s|_1 are sums over all parameters, so d is one number. The d of a step's first
two lines is that from before. `lr` is 1 times the schedule's factor.

Departures: r reads v before it is updated, as in the authors' code (dadaptation 3.2). `growth` bounds the ratio of d
from step to step, as there. `coefficient` is an addition, named as in Prodigy. Weight decay is AdamW's: x <- x - lr d
decay x.

The paper's betas are (0.9, 0.999). "How far away are truly hyperparameter-free learning algorithms?" (2505.24005)
calibrates them for all of AlgoPerf at once; its values were not to be had, so those here were chosen on tabular-mlp:
the memory of the paper's second beta is longer than runs of some hundred steps, and the target is missed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim._lists import dot, full, norm1, ratio

CARD = Card(
    title="Learning-Rate-Free Learning by D-Adaptation",
    paper="2301.07733",
    seams=("optim.update",),
    effects=("steps", "quality"),
    lossless=False,
    claim="matches hand-tuned learning rates of SGD and Adam on more than a dozen problems; no speed is claimed",
    claimed=None,
    identity="it replaces the optimizer of all parameters, so no option leaves the steps as they were",
    experiment=("tabular-mlp", "optim/d_adaptation"),
    tune={"coefficient": (0.25, 4.0)},
    when="A model whose learning rate nobody has tuned; its estimate rises more slowly than Prodigy's.",
    when_not="Short runs: d grows by small factors and may still be growing at the end. Prodigy is faster there.",
)

State = dict[str, Any]


def naive_d_adaptation(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    coefficient: float = 1.0,
    growth: float | None = None,
) -> tuple[list[Tensor], State]:
    """The equation with loops over parameters, in fp64.

    Args:
        gradients, weights: k tensors of any shapes.
        state: `average` (m), `square` (v), `sum` (s): k tensors each; `numerator` (r), `d`: 0-d.
        lr: the factor on d at this step.
        decay: k weight decays.

    Returns:
        k changes, to be added to the weights, and the new state.
    """
    beta1, beta2 = betas
    b, d = beta2**0.5, float(state["d"])
    new: State = {"average": [], "square": [], "sum": []}
    product = length = 0.0
    for g, m, v, s in zip(gradients, state["average"], state["square"], state["sum"], strict=True):
        g, v = g.double(), v.double()
        product += lr * d * float((g * s.double() / (v.sqrt() + eps)).sum())
        new["average"].append(beta1 * m.double() + (1 - beta1) * lr * d * g)
        new["square"].append(beta2 * v + (1 - beta2) * g**2)
        new["sum"].append(b * s.double() + (1 - b) * lr * d * g)
        length += float(new["sum"][-1].abs().sum())
    r = b * float(state["numerator"]) + (1 - b) * product
    found = coefficient * r / ((1 - b) * length) if length > 0 else 0.0
    after = max(d, found if growth is None else min(found, d * growth))
    changes = [
        -m / (v.sqrt() + eps) - lr * d * rate * x.double()
        for m, v, x, rate in zip(new["average"], new["square"], weights, decay, strict=True)
    ]
    return changes, {**new, "numerator": torch.tensor(r), "d": torch.tensor(after)}


def d_adaptation(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    coefficient: float = 1.0,
    growth: float | None = None,
) -> tuple[list[Tensor], State]:
    """As `naive_d_adaptation`, in fp32 and for all parameters at once; no number leaves the parameters' device."""
    beta1, beta2 = betas
    b, d, g = beta2**0.5, state["d"], full(gradients)
    scaled = torch._foreach_mul(g, lr * d)
    before = torch._foreach_add(torch._foreach_sqrt(state["square"]), eps)
    r = b * state["numerator"] + (1 - b) * dot(scaled, torch._foreach_div(state["sum"], before))
    m = torch._foreach_lerp(state["average"], scaled, 1 - beta1)
    v = torch._foreach_addcmul(torch._foreach_mul(state["square"], beta2), g, g, value=1 - beta2)
    s = torch._foreach_lerp(state["sum"], scaled, 1 - b)
    found = coefficient * ratio(r, (1 - b) * norm1(s))
    after = torch.maximum(d, found if growth is None else torch.minimum(found, d * growth))
    changes = torch._foreach_div(m, torch._foreach_add(torch._foreach_sqrt(v), eps))
    if any(decay):
        torch._foreach_add_(changes, torch._foreach_mul(torch._foreach_mul(full(weights), decay), lr * d))
    torch._foreach_neg_(changes)
    return list(changes), {"average": list(m), "square": list(v), "sum": list(s), "numerator": r, "d": after}


@dataclass(frozen=True)
class DAdaptation(Method):
    """D-Adapt Adam for all parameters; the person's schedule multiplies the estimated rate."""

    lr: float = option(1.0, "factor on the estimated learning rate; schedules scale it", above=0)
    coefficient: float = option(1.0, "factor on the estimate d; the option to tune, if any", above=0)
    d0: float = option(1e-6, "first estimate of the distance", above=0, most=1)
    betas: tuple[float, ...] = option((0.9, 0.99), "decay of the averages of gradients and squares", least=0, below=1)
    eps: float = option(1e-8, "added to the root of the squares", above=0)
    growth: float | None = option(None, "largest ratio of d from step to step; none: no bound", above=1)
    weight_decay: float | None = option(None, "decoupled weight decay; none: as the person's groups have it", least=0)

    def problems(self) -> list[str]:
        return [] if len(self.betas) == 2 else [f"betas are two numbers, not {len(self.betas)}"]

    def init(self, weights: list[Tensor]) -> State:
        """The state of k weights: three tensors of each one's shape in fp32, and two numbers."""
        zeros = [torch.zeros_like(one) for one in full(weights)]
        return {
            "average": zeros,
            "square": [one.clone() for one in zeros],
            "sum": [one.clone() for one in zeros],
            "numerator": zeros[0].new_zeros(()),
            "d": zeros[0].new_tensor(self.d0),
        }

    def update(
        self, gradients: list[Tensor], weights: list[Tensor], state: State, lr: float, decay: list[float]
    ) -> tuple[list[Tensor], State]:
        """Changes of k weights, in fp32, and the new state."""
        return d_adaptation(
            gradients, weights, state, lr, decay, self.betas, self.eps, self.coefficient, self.growth
        )  # fmt: skip


METHOD = DAdaptation
