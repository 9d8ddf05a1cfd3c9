"""LLR: matrices whose spectrum has a lighter tail get a larger learning rate.

The tail of the eigenvalues of W'W says how far a matrix is trained: a heavy one has learnt, a light one lags behind and
may go faster. Every T steps of the run's first part, for the k eigenvalues l_1 <= .. <= l_k, k = min(m, n), of each:

    i = floor(k / 2) + 1,  r = k - i + 1;    alpha = 1 + r / sum_{j >= i} (ln l_j - ln l_i)          Hill's estimator
    factor = s1 + (s2 - s1) (alpha - min alpha) / (max alpha - min alpha)                   over all of the matrices

W: [m, n]; alpha and factor: a number for each. The factor multiplies the rate that the person's optimizer and schedule
give. A new factor is reached in a straight line over some steps. The first part is a fifth of the run, as in the
authors' configurations; then the factors stay. Embeddings and heads get s2. What is no matrix keeps its rate, and so do
matrices of fewer than 50 eigenvalues.

Departures: eigenvalues are those of the smaller Gram matrix in fp32 (the authors: squares of all singular values). They
move the rate, schedule included, in a straight line, here the factor does. An eigenvalue counts as at least 1e-7 of the
largest, and equal alphas give s1, where theirs are not finite. Growth of the model starts anew, without a line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim._optimizers import Parts, split_groups, without

CARD = Card(
    title="One LR Doesn't Fit All: Heavy-Tail Guided Layerwise Learning Rates for LLMs",
    paper="2605.22297",
    seams=("lr.layers",),
    effects=("steps", "quality"),
    lossless=False,
    claim="up to 1.5x fewer tokens than AdamW with one rate; LLaMA 60M to 3B on FineWeb; 1B zero-shot 47.09 to 49.02",
    claimed=1.5,
    identity={"low": 1.0, "high": 1.0},
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "optim/llr(every=10, smooth=10)"),
    needs=("steps",),
    tune={"high": (1.2, 6.0), "every": (5.0, 80.0)},
    when="Pre-training transformers from scratch at a rate that was tuned without it.",
    when_not="Fine-tuning; a rate already at the edge of divergence, which factors above 1 go over.",
)

FLOOR = 1e-7  # of the largest eigenvalue
FLAT = 1e-6  # mean of ln l_j - ln l_i below which a tail counts as flat: alpha ends at a million


def naive_llr(weights: Sequence[Tensor], low: float, high: float) -> Tensor:
    """The equations with loops, in fp64, from singular values.

    Args:
        weights: [m_i, n_i] each, at least one.
        low, high: s1 and s2.

    Returns:
        [weights] factors in fp64.
    """
    alphas = []
    for weight in weights:
        eigenvalues = sorted(value**2 for value in torch.linalg.svdvals(weight.detach().double()).tolist())
        floor = max(eigenvalues[-1] * FLOOR, 1e-300)
        logs = [math.log(max(value, floor)) for value in eigenvalues]
        tail = logs[len(logs) // 2 :]
        alphas.append(1 + len(tail) / max(sum(one - tail[0] for one in tail), FLAT * len(tail)))
    span = max(alphas) - min(alphas)
    return torch.tensor([low + (high - low) * ((a - min(alphas)) / span if span else 0.0) for a in alphas]).double()


def llr(weights: Sequence[Tensor], low: float, high: float) -> Tensor:
    """As `naive_llr`, from eigenvalues of the smaller Gram matrices in fp32; matrices of one shape in one call."""
    alphas = torch.zeros(len(weights), dtype=torch.float64)
    shapes: dict[torch.Size, list[int]] = {}
    for place, weight in enumerate(weights):
        shapes.setdefault(weight.shape, []).append(place)
    for places in shapes.values():
        stack = torch.stack([weights[place].detach().float() for place in places])
        stack = stack / stack.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)  # alpha does not depend on the scale
        gram = stack @ stack.mT if stack.shape[-2] <= stack.shape[-1] else stack.mT @ stack
        values = torch.linalg.eigvalsh(gram).double()
        values = torch.maximum(values, (values[:, -1:] * FLOOR).clamp_min(1e-300))
        tail = values[:, values.shape[-1] // 2 :].log()
        alphas[places] = 1 + 1 / (tail - tail[:, :1]).mean(-1).clamp_min(FLAT).cpu()
    span = alphas.max() - alphas.min()
    return low + (high - low) * ((alphas - alphas.min()) / span if span else torch.zeros_like(alphas))


@dataclass(frozen=True)
class LLR(Method):
    """A learning rate for each matrix, from the tail of its spectrum, on top of any optimizer and schedule."""

    low: float = option(1.0, "factor s1 of the matrix with the heaviest tail", above=0)
    high: float = option(3.0, "factor s2 of the matrix with the lightest tail, of embeddings and heads", above=0)
    every: int = option(40, "steps T between two estimates", least=1)
    smooth: int = option(20, "steps in which the factors reach a new estimate; 1: at once", least=1)
    until: float = option(0.2, "fraction of the run's steps in which there are new estimates", least=0, most=1)
    smallest: int = option(50, "eigenvalues below which a matrix keeps its rate", least=2)

    def problems(self) -> list[str]:
        if self.low > self.high:
            return [f"low ({self.low}) is above high ({self.high}): swap them"]
        return [] if self.smooth <= self.every else [f"smooth ({self.smooth}) is at most every ({self.every})"]

    def multipliers(self, weights: Sequence[Tensor]) -> Tensor:
        """[weights] factors on the rates of matrices [m_i, n_i], float64; 1 for those with few eigenvalues."""
        factors = torch.ones(len(weights), dtype=torch.float64)
        judged = [place for place, weight in enumerate(weights) if min(weight.shape) >= self.smallest]
        if judged:
            factors[judged] = llr([_whole(weights[place]) for place in judged], self.low, self.high)
        return factors

    def attach(self, run: Any) -> None:
        """Gives each matrix a parameter group of its own and sets its `lr_factor` before each step.

        `run.state` holds the factors `before` and `after` the last estimate (matrices, then embeddings and heads) and
        the step `at` which it was made.
        """
        state = run.state[self.name]

        def split(run: Any) -> None:
            split_groups(run.optimizer, [p for part in _trained(run) for p in part])

        def resized(run: Any) -> None:
            split(run)
            state.clear()

        def gradients(run: Any) -> None:
            matrices, tables = _trained(run)
            due = run.step % self.every == 0 and run.step <= self.until * run.steps and run.step != state.get("at")
            if due or not state:
                after = self.multipliers(matrices).tolist() + [self.high] * len(tables)
                before = self._now(run.step - 1, state) if state else ([1.0] * len(after) if run.step == 0 else after)
                state.update(before=before, after=after, at=run.step)
            groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
            for p, factor in zip(matrices + tables, self._now(run.step, state), strict=True):
                groups[id(p)]["lr_factor"] = factor

        run.replace_optimizer(lambda old, run: old if isinstance(old, Parts) else without(old, []))
        run.on("attached", split)
        run.on("resize", resized)
        run.on("gradients", gradients)

    def _now(self, step: int, state: dict[str, Any]) -> list[float]:
        share = min(1.0, (step + 1 - state["at"]) / self.smooth)
        return [old + share * (new - old) for old, new in zip(state["before"], state["after"], strict=True)]


def _trained(run: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The trained matrices of hidden layers, and the other parameters of two dimensions: embeddings and heads."""
    trained = {id(p): p for group in run.optimizer.param_groups for p in group["params"]}
    matrices = [weight for _, weight in run.host.matrices() if id(weight) in trained]
    mine = {id(p) for p in matrices}
    return matrices, [p for p in run.parameters() if p.dim() == 2 and id(p) in trained and id(p) not in mine]


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # type: ignore[operator]


METHOD = LLR
