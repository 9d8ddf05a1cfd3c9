"""DoG, distance over gradients: SGD whose step size is the largest distance from the first weights so far, over the
root of the sum of all squared gradient norms.

The step size needs no learning rate, only a small first distance r_eps (equation 1 and section 2):

    rbar <- max(rbar, |x - x0|),   rbar = r_eps = reps_rel (1 + |x0|) at first
    G <- G + |g|^2,                x <- x - lr rbar / sqrt(G + eps) g

x, x0, g: all parameters as one vector; with `layerwise` (L-DoG, section 3.4) each parameter by itself. `lr` is 1 times
the schedule's factor. What is evaluated, and what is there when the run is finished, is an average of the weights of
polynomial decay (gamma is `average`; Shamir and Zhang, 2013): mean <- mean + (1 + gamma) / (t + gamma) (x - mean).

Departures: the person's schedule multiplies the step size; the paper has none. Weight decay is added to the gradient,
as in the authors' code, and is 0 unless given: an AdamW's decay is on another scale. The paper's defaults are
layerwise=false and reps_rel=1e-6, and 1e-4 for batch normalisation; "How far away are truly hyperparameter-free
learning algorithms?" (2505.24005) calibrates such options for all of AlgoPerf at once; its values were not to be had,
so those here were chosen on tabular-mlp, where from 1e-6 the error is several times larger after 240 steps.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim._lists import full, norms2
from hasten.optim.base import RuleOptimizer

CARD = Card(
    title="DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule",
    paper="2302.12022",
    seams=("optim.update",),
    effects=("steps", "quality", "memory"),
    lossless=False,
    claim="close to SGD with a tuned learning rate on vision and language transfer; L-DoG exceeds it, not tuned Adam",
    claimed=None,
    identity="it replaces the optimizer of all parameters, so no option leaves the steps as they were",
    experiment=("tabular-mlp(target=0.01)", "optim/dog"),
    tune={"reps_rel": (1e-6, 1e-2)},
    when="Fine-tuning and convolutional networks, for which SGD is good enough, with nothing to tune and two copies "
    "of the weights as state.",
    when_not="Transformers from scratch, where Adam's step for each weight matters; very short runs.",
)

State = dict[str, Any]


def naive_dog(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    layerwise: bool = False,
    eps: float = 1e-8,
) -> tuple[list[Tensor], State]:
    """The equation with loops over parameters, in fp64.

    Args:
        gradients, weights: k tensors of any shapes.
        state: `start` (x0): k tensors; `distance` (rbar) and `squares` (G): k 0-d tensors each, all equal unless
            `layerwise`.
        lr: the factor on the step size.
        decay: k weight decays.

    Returns:
        k changes, to be added to the weights, and the new state.
    """
    total = [g.double() + rate * x.double() for g, x, rate in zip(gradients, weights, decay, strict=True)]
    moved = [float((x.double() - x0.double()).square().sum()) for x, x0 in zip(weights, state["start"], strict=True)]
    grown = [float(g.square().sum()) for g in total]
    if not layerwise:
        moved, grown = [sum(moved)] * len(moved), [sum(grown)] * len(grown)
    distances = [max(float(r), m**0.5) for r, m in zip(state["distance"], moved, strict=True)]
    squares = [float(s) + more for s, more in zip(state["squares"], grown, strict=True)]
    changes = [-lr * r / (s + eps) ** 0.5 * g for g, r, s in zip(total, distances, squares, strict=True)]
    as_tensors = [[torch.tensor(one) for one in values] for values in (distances, squares)]
    return changes, {"start": state["start"], "distance": as_tensors[0], "squares": as_tensors[1]}


def dog(
    gradients: list[Tensor],
    weights: list[Tensor],
    state: State,
    lr: float,
    decay: list[float],
    layerwise: bool = False,
    eps: float = 1e-8,
) -> tuple[list[Tensor], State]:
    """As `naive_dog`, in fp32 and for all parameters at once; every number stays on the parameters' device."""
    g, x = full(gradients), full(weights)
    if any(decay):
        g = list(torch._foreach_add(g, torch._foreach_mul(x, decay)))
    moved, grown = norms2(list(torch._foreach_sub(x, state["start"]))), norms2(g).square()
    if not layerwise:
        moved, grown = moved.norm().expand_as(moved), grown.sum().expand_as(grown)
    distance = torch.maximum(torch.stack(state["distance"]), moved)
    squares = torch.stack(state["squares"]) + grown
    sizes = -lr * distance / (squares + eps).sqrt()
    changes = torch._foreach_mul(g, list(sizes.unbind()))
    return list(changes), {
        "start": state["start"],
        "distance": list(distance.unbind()),
        "squares": list(squares.unbind()),
    }


@dataclass(frozen=True)
class DoG(Method):
    """DoG or L-DoG for all parameters; the person's schedule multiplies the step size."""

    lr: float = option(1.0, "factor on the step size; schedules scale it", above=0)
    layerwise: bool = option(True, "a step size for each parameter (L-DoG), else one for all")
    reps_rel: float = option(1e-3, "first distance relative to 1 + the norm of the first weights", above=0, most=1)
    average: float | None = option(8.0, "power of the average that is evaluated, gamma; none: no average", least=0)
    eps: float = option(1e-8, "added to the sum of squared gradient norms", above=0)
    weight_decay: float | None = option(0.0, "added to the gradient, times the weight; none: the person's", least=0)

    def attach(self, run: Any) -> None:
        """Steps by the rule; evaluations, and the end of the run, see the average of the weights."""
        run.replace_optimizer(lambda old, run: RuleOptimizer(self, old))
        if self.average is not None:
            run.on("evaluate", averaged)
            run.changes.call(lambda: put_means(run))

    def init(self, weights: list[Tensor]) -> State:
        """The state of k weights: one or two copies of each in fp32, and two numbers each."""
        start = [one.clone() for one in full(weights)]
        norms = norms2(start)
        if not self.layerwise:
            norms = norms.norm().expand_as(norms)
        state: State = {
            "start": start,
            "distance": [one.clone() for one in (self.reps_rel * (1 + norms)).unbind()],
            "squares": [torch.zeros_like(one) for one in norms.unbind()],
        }
        if self.average is not None:
            state |= {"mean": [one.clone() for one in start], "step": norms.new_zeros(())}
        return state

    def update(
        self, gradients: list[Tensor], weights: list[Tensor], state: State, lr: float, decay: list[float]
    ) -> tuple[list[Tensor], State]:
        """Changes of k weights, in fp32, and the new state."""
        changes, new = dog(gradients, weights, state, lr, decay, self.layerwise, self.eps)
        if self.average is not None:
            step = state["step"] + 1
            share = (1 + self.average) / (step + self.average)
            away = torch._foreach_sub(torch._foreach_add(full(weights), changes), state["mean"])
            new |= {"mean": list(torch._foreach_add(state["mean"], torch._foreach_mul(away, share))), "step": step}
        return changes, new


@contextlib.contextmanager
def averaged(run: Any) -> Iterator[None]:
    """Inside it the run's model has the means of its weights."""
    kept = put_means(run)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


@torch.no_grad()
def put_means(run: Any) -> list[tuple[Tensor, Tensor]]:
    """Puts the means into the weights; returns each weight with what it had."""
    state = run.optimizer.state
    found = [p for group in run.optimizer.param_groups for p in group["params"] if "mean" in state.get(p, {})]
    kept = [(p, p.detach().clone()) for p in found]
    for p in found:
        p.copy_(state[p]["mean"])
    return kept


METHOD = DoG
