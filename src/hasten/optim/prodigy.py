"""Prodigy: Adam with a learning rate d that is an estimate of the distance from the first weights to the solution.

For gradient descent on a convex loss d is a lower bound of that distance; it only grows. Algorithm 4, Adam's form:

    m <- beta1 m + (1 - beta1) d g,        v <- beta2 v + (1 - beta2) d^2 g^2
    r <- b r + (1 - b) lr d^2 <g, x0 - x>, s <- b s + (1 - b) lr d^2 g,        b = sqrt(beta2) unless `beta3` is given
    d' = max(d, coefficient r / |s|_1),    x <- x - lr d m / (sqrt(v) + d' eps)

x: one parameter, x0: its first value, g: its gradient; r and |s|_1 are sums over all parameters, so d is one number.
`lr` is 1 times the schedule's factor.

Departures, all as in the authors' code: (1 - b) is left out of r and s, where it cancels, and both are
divided by the first d; eps is multiplied by the new d; `growth` bounds d' / d; weight decay is AdamW's, x <- x - lr d
decay x; `safe` leaves lr out of s, so that a warm-up, whose small lr keeps x near x0, does not blow d up.

The paper's defaults are those here but safe=false. "How far away are truly hyperparameter-free learning algorithms?"
(2505.24005) calibrates the other options for all of AlgoPerf at once; its values were not to be had, so these were
checked on the workloads of `benchmarks/_optim_free.py` instead: with 5% of warm-up and a linear decay they reach the
targets of tabular-mlp and digits-vit. On stdlib-lm, whose tuned run has 40% of warm-up, the target is missed, and at a
quarter of its tokens a warm-up of 30%, betas of 0.99 or 0.95 or a d0 of 1e-4 did not help.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim._lists import dot, full, norm1, ratio

CARD = Card(
    title="Prodigy: An Expeditiously Adaptive Parameter-Free Learner",
    paper="2306.06101",
    seams=("optim.update",),
    effects=("steps", "quality"),
    lossless=False,
    claim="test accuracy close to that of hand-tuned Adam without a learning rate, on 10 networks; no speed is claimed",
    claimed=None,
    identity="it replaces the optimizer of all parameters, so no option leaves the steps as they were",
    experiment=("tabular-mlp", "optim/prodigy"),
    tune={"coefficient": (0.25, 4.0)},
    when="A model whose learning rate nobody has tuned, in runs of some hundred steps with a decaying schedule.",
    when_not="Short runs of language models from scratch, which it does not bring to the tuned loss; tuned rates.",
)

State = dict[str, Any]


def naive_prodigy(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    betas: tuple[float, ...] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    coefficient: float = 1.0,
    d0: float = 1e-6,
    growth: float | None = None,
    safe: bool = True,
) -> tuple[list[Tensor], State]:
    """The equation with loops over parameters, in fp64.

    Args:
        gradients, weights: k tensors of any shapes.
        state: `start`, `average` (m), `square` (v), `sum` (s): k tensors each; `numerator` (r), `d`, `largest`: 0-d.
        lr: the factor on d at this step.
        decay: k weight decays.

    Returns:
        k changes, to be added to the weights, and the new state.
    """
    beta1, beta2 = betas
    b = beta2**0.5 if beta3 is None else beta3
    d, largest, r, length = float(state["d"]), float(state["largest"]), float(state["numerator"]) * b, 0.0
    new: State = {"start": state["start"], "average": [], "square": [], "sum": []}
    for g, x, x0, m, v, s in zip(
        gradients, weights, state["start"], state["average"], state["square"], state["sum"], strict=True
    ):
        g = g.double()
        r += lr * d**2 / d0 * float((g * (x0.double() - x.double())).sum())
        new["average"].append(beta1 * m.double() + (1 - beta1) * d * g)
        new["square"].append(beta2 * v.double() + (1 - beta2) * d**2 * g**2)
        new["sum"].append(b * s.double() + (1.0 if safe else lr) * d**2 / d0 * g)
        length += float(new["sum"][-1].abs().sum())
    found = coefficient * r / length if length > 0 else 0.0
    first = d == float(torch.tensor(d0, dtype=state["d"].dtype))
    largest = max(largest, found)
    step, d = lr * d, max(d, found) if first else d
    d = largest if growth is None else min(largest, d * growth)
    changes = [
        -step * (m / (v.sqrt() + d * eps) + rate * x.double())
        for m, v, x, rate in zip(new["average"], new["square"], weights, decay, strict=True)
    ]
    for name, value in (("numerator", r), ("d", d), ("largest", largest)):
        new[name] = torch.tensor(value)
    return changes, new


def prodigy(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    betas: tuple[float, ...] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    coefficient: float = 1.0,
    d0: float = 1e-6,
    growth: float | None = None,
    safe: bool = True,
) -> tuple[list[Tensor], State]:
    """As `naive_prodigy`, in fp32 and for all parameters at once; every number stays on the parameters' device."""
    beta1, beta2 = betas
    b = beta2**0.5 if beta3 is None else beta3
    d, starts, x = state["d"], state["start"], full(weights)
    scaled = torch._foreach_mul(full(gradients), d)
    r = state["numerator"] * b + lr * d / d0 * dot(scaled, torch._foreach_sub(starts, x))
    m = torch._foreach_lerp(state["average"], scaled, 1 - beta1)
    v = torch._foreach_addcmul(torch._foreach_mul(state["square"], beta2), scaled, scaled, value=1 - beta2)
    s = torch._foreach_add(
        torch._foreach_mul(state["sum"], b), torch._foreach_mul(scaled, (1.0 if safe else lr) / d0 * d)
    )
    found = coefficient * ratio(r, norm1(s))
    largest = torch.maximum(state["largest"], found)
    if growth is None:
        after = largest
    else:
        after = torch.minimum(largest, growth * torch.where(d == d0, torch.maximum(d, found), d))
    changes = torch._foreach_div(m, torch._foreach_add(torch._foreach_sqrt(v), after * eps))
    if any(decay):
        torch._foreach_add_(changes, torch._foreach_mul(x, decay))
    torch._foreach_mul_(changes, -lr * d)
    return list(changes), {
        "start": starts,
        "average": list(m),
        "square": list(v),
        "sum": list(s),
        "numerator": r,
        "d": after,
        "largest": largest,
    }


@dataclass(frozen=True)
class Prodigy(Method):
    """Prodigy for all parameters; the person's schedule multiplies the estimated rate."""

    lr: float = option(1.0, "factor on the estimated learning rate; schedules scale it", above=0)
    coefficient: float = option(1.0, "factor on the estimate d; the option to tune, if any", above=0)
    d0: float = option(1e-6, "first estimate of the distance", above=0, most=1)
    betas: tuple[float, ...] = option((0.9, 0.999), "decay of the averages of gradients and squares", least=0, below=1)
    beta3: float | None = option(
        None, "decay of the estimate's sums; none: the root of the second beta", least=0, below=1
    )
    eps: float = option(1e-8, "added to the root of the squares, times d", above=0)
    growth: float | None = option(None, "largest ratio of d from step to step; none: no bound", above=1)
    safe: bool = option(True, "leave the schedule's factor out of the estimate's denominator: warm-ups need it")
    weight_decay: float | None = option(None, "decoupled weight decay; none: as the person's groups have it", least=0)

    def problems(self) -> list[str]:
        return [] if len(self.betas) == 2 else [f"betas are two numbers, not {len(self.betas)}"]

    def init(self, weights: list[Tensor]) -> State:
        """The state of k weights: four tensors of each one's shape in fp32, and three numbers."""
        zeros = [torch.zeros_like(one) for one in full(weights)]
        first = zeros[0].new_tensor(self.d0)
        return {
            "start": [one.clone() for one in full(weights)],
            "average": zeros,
            "square": [one.clone() for one in zeros],
            "sum": [one.clone() for one in zeros],
            "numerator": torch.zeros_like(first),
            "d": first,
            "largest": first.clone(),
        }

    def update(
        self, gradients: list[Tensor], weights: list[Tensor], state: State, lr: float, decay: list[float]
    ) -> tuple[list[Tensor], State]:
        """Changes of k weights, in fp32, and the new state."""
        return prodigy(
            gradients, weights, state, lr, decay, self.betas, self.beta3, self.eps, self.coefficient, self.d0,
            self.growth, self.safe,
        )  # fmt: skip


METHOD = Prodigy
