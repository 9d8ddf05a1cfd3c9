"""G_stack: train a shallow model first, then copy its whole stack of layers g times over and train the deep one on.

With F = f_l o ... o f_1 the shallow model of l layers (embedding, final norm and head aside), the deep one begins as

    G = F o F o ... o F   (g times: ABAB order, layer i of G is a copy of layer i mod l of F),

which is not the same function, but is near it: each layer adds a little to the residual stream, and the loss falls back
within a few steps. Embedding, final norm and head are kept. Layers: [l, ...] to [g l, ...].

As in the authors' code the deep model starts with an optimizer without state and a new warm-up (3000 of 300000 steps).

When to stack: the paper's fit of tokens d to the deep model's weights and the run's compute (`growth_tokens`). It comes
from models of some 10^8 weights and more; far below, it asks for more tokens than the run has. Where it gives less than
one step or more than half of the run, a tenth of the run is taken, and the run's report says so.
How often: the paper finds g between 2 and 4 best and recommends 4.

Departures: it is one run. The learning rate goes on along the run's schedule (the authors: 1e-3 for the small and 3e-4
for the large model, each with its own cosine). `carry=true` copies the optimizer's state.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.grow import base
from hasten.train import randomness

CARD = Card(
    title="Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
    paper="2405.15319",
    seams=("weights.resize",),
    effects=("time", "memory"),
    lossless=False,
    claim="a 7B model reaches with 194B tokens the loss of 300B tokens from scratch: 54.6% fewer FLOPs to equal loss",
    claimed=1.546,
    identity={"factor": 1},
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "grow/g_stack(factor=2, at=0.6)"),
    needs=("steps",),
    hosts=("decoder", "vit"),
    tune={"at": (0.02, 0.8), "warmup": (0.005, 0.2)},
    when="Pre-training a deep transformer from scratch: the shallow model takes 1/g of the time of a step.",
    when_not="Fine-tuning (the weights beyond the first layers are thrown away), and models of a few layers.",
)


def naive_g_stack(layers: Tensor, factor: int) -> Tensor:
    """The deep model's layers, one by one.

    Args:
        layers: [l, ...], one parameter of each shallow layer.
        factor: g.

    Returns:
        [g l, ...].
    """
    depth = len(layers)
    return torch.stack([layers[place % depth] for place in range(factor * depth)])


def g_stack(layers: Tensor, factor: int) -> Tensor:
    """As `naive_g_stack`, at once."""
    return layers.repeat(factor, *[1] * (layers.dim() - 1))


FALLBACK = 0.1
MOST = 0.5


def growth_tokens(parameters: float, flops: float) -> float:
    """Tokens d that the paper trains the shallow model on: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    Args:
        parameters: N of the deep model.
        flops: C, the budget of training (6 N times the tokens).
    """
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def growth_fraction(parameters: int, tokens: int, step: int) -> float | None:
    """The fraction of a run after which the paper stacks; None where its fit does not hold.

    Args:
        parameters: N of the deep model.
        tokens: of the whole run; step: of one optimizer step.
    """
    wanted = growth_tokens(parameters, 6.0 * parameters * tokens)
    return wanted / tokens if step <= wanted <= MOST * tokens else None


@dataclass(frozen=True)
class GStack(Method):
    """Growth in depth by stacking. The person brings the full model, which is made shallow when the run begins."""

    factor: int = option(4, "growth factor g: how many copies of the shallow stack make the depth", least=1, most=64)
    at: float | None = option(
        None, "when the model is stacked, as a fraction of the run's steps; none: the paper's timing", above=0, below=1
    )
    tokens: int | None = option(
        None,
        "tokens of an optimizer step for the paper's timing; none: as many as the loader's first example says",
        least=1,
    )
    carry: bool = option(False, "copies take over the optimizer state of the layers that they copy")
    warmup: float = option(
        0.01, "fraction of the steps in which the rate rises again after stacking", least=0, most=0.5
    )

    def problems(self) -> list[str]:
        return ["at says when: leave out tokens"] * (self.at is not None and self.tokens is not None)

    def attach(self, run: Any) -> None:
        """Finds the time of stacking, if it is not given, and makes the model shallow.

        Raises:
            UsageError: weights that can't change, a depth that is no multiple of the factor, or no equal layers.
        """
        base.check_growable(self.name, run)
        if self.at is not None or self.factor == 1:
            base.attach(self, run)
            return
        step = self.tokens or _tokens(run)
        parameters = sum(p.numel() for p in run.model.parameters())
        found = None if step is None else growth_fraction(parameters, step * run.steps, step)
        why = "the paper's timing" if found else "a tenth of the run: the paper's timing does not hold for its size"
        if step is None:
            why = "a tenth of the run: the loader does not say how many tokens a step has (tokens=N does)"
        run.context.note(self.name, at=found or FALLBACK, why=why)
        base.attach(replace(self, at=found or FALLBACK, tokens=None), run)

    def stages(self, depth: int, steps: int) -> list[tuple[int, list[int]]]:
        """The shallow model from step 0, the deep one from step `at`.

        Raises:
            UsageError: the depth is no multiple of the factor.
        """
        if depth % self.factor:
            fits = [g for g in range(2, depth + 1) if depth % g == 0]
            raise UsageError(
                f"{self.name}: {depth} layers can't be {self.factor} copies of a smaller stack: give a factor that "
                f"divides {depth} ({', '.join(map(str, fits)) or 'there is none'})"
            )
        shallow = list(range(depth // self.factor))
        if self.factor == 1:
            return [(0, shallow)]
        at = FALLBACK if self.at is None else self.at
        return [(0, shallow), (max(1, round(at * steps)), g_stack(torch.tensor(shallow), self.factor).tolist())]


def _tokens(run: Any) -> int | None:
    """Tokens of an optimizer step, from the length of the loader's first example; None where there is none to read."""
    loader: Any = run.loader
    size: Any = getattr(loader, "batch_size", None)
    data: Any = getattr(loader, "dataset", None)
    if not size or not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        return None
    with randomness.preserved(run.device):
        first = data[0]
    parts = first.values() if isinstance(first, dict) else first if isinstance(first, tuple | list) else [first]
    for one in parts:
        if isinstance(one, Tensor) and one.ndim == 1 and not one.is_floating_point():
            return int(size * len(one) * run.accumulate)
    return None


METHOD = GStack
