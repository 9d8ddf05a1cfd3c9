"""Multi-level training: a V-cycle from the large model to one of half its width and depth, and back.

The large model is trained for a short while (E_a), halved, the small one trained at little cost (E_small), doubled,
and mixed with the large weights from before. With a layer's W_k [out, in] of level k (level k + 1 is smaller):

    coalescing       U = F_out W F_in,      [W_{k+1}^1, ...] = [U^1, ...] R
    de-coalescing    U = T_out W T_in,      [W_k^1, ...]     = [U^1, ...] G
    interpolation    W_k <- (1 - alpha) W_k + alpha W_k'    (W_k' is the de-coalesced weight)

F_out takes the mean of the channels i and i + n/2, F_in the sum of what read them; T_out copies channels, T_in halves
what reads them (row-normalised, section 3); R is the mean of two adjacent layers, G a copy to both. Heads are taken
whole. The states of the optimizer start anew at each change, as in the authors' runs.

Departures: it is one run, so the rate follows the run's one schedule; the authors' stages have their own (their example
trains the small GPT-2 at 4 times the rate: `rate`). Where head and embedding are tied, the authors treat both as
readers (embeddings x 2 and x 1/2, which changes the function before a pre-norm block); here the embedding writes and
the last norm's gain reads, so that de-coalescing alone keeps the function of the small model, widened.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.grow import _widths
from hasten.grow.base import check_growable
from hasten.hosts.axes import Axis, mapped
from hasten.hosts.widths import Sizes, Widths

CARD = Card(
    title="A Multi-Level Framework for Accelerating Training Transformer Models",
    paper="2404.07999",
    seams=("weights.resize",),
    effects=("time", "steps"),
    lossless=False,
    claim="GPT-Base pre-trained to the same loss with about 20% less computation, BERT-Large with up to 51.6% less",
    claimed=1.25,
    identity={"levels": 1},
    needs=("steps",),
    hosts=("decoder", "vit"),
    experiment=(
        "stdlib-lm(task=train, length=64, rows=8, target=3.3)",
        "grow/multilevel(width=1, initial=0.05, small=0.5, alpha=0.9)",
    ),
    tune={"alpha": (0.1, 1.0), "small": (0.2, 0.7)},
    when="Pre-training from scratch for long: while the small model trains, a step costs a quarter or less.",
    when_not="Fine-tuning (halving destroys what was learnt), and models whose width or depth is odd.",
)


def naive_multilevel(weights: Tensor, small: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Both ends of a cycle for one weight matrix of each layer, entry by entry.

    Args:
        weights: [L, o, i] of the large model when it is halved. small: [L/2, o/2, i/2] of the trained small model.
        alpha: weight of what comes from the small model.

    Returns:
        The coalesced weights [L/2, o/2, i/2], and the interpolated ones [L, o, i].
    """
    depth, rows, columns = small.shape
    down, up = torch.empty_like(small), torch.empty_like(weights)
    for layer in range(depth):
        for o in range(rows):
            for i in range(columns):
                total = weights.new_zeros(())
                for near in (2 * layer, 2 * layer + 1):
                    for row in (o, o + rows):
                        for column in (i, i + columns):
                            total = total + weights[near, row, column]
                            wide = small[layer, o, i] / 2
                            up[near, row, column] = (1 - alpha) * weights[near, row, column] + alpha * wide
                down[layer, o, i] = total / 4  # a mean of two layers and of two rows, a sum of two columns
    return down, up


def multilevel(weights: Tensor, small: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """As `naive_multilevel`, by the maps that the method applies to a model."""
    axes = (None, Axis("out"), Axis("in", reads=True))
    pairs = {"out": small.shape[1], "in": small.shape[2]}
    means = {kind: torch.eye(n).repeat(1, 2) / 2 for kind, n in pairs.items()}
    copies = {kind: torch.eye(n).repeat(2, 1) for kind, n in pairs.items()}
    down = mapped(weights.unflatten(0, (-1, 2)).mean(1), axes, means)
    return down, interpolated(weights, mapped(small.repeat_interleave(2, 0), axes, copies), alpha)


def interpolated(large: Tensor, wide: Tensor, alpha: float) -> Tensor:
    return torch.lerp(large, wide.to(large), alpha)


@dataclass(frozen=True)
class Multilevel(Method):
    """A V-cycle. The person brings the large model, and gets it back."""

    levels: int = option(2, "models in the cycle, each `width` and `depth` times smaller; 1: none", least=1, most=4)
    width: int = option(2, "by how much each level divides width, heads and feed-forward neurons", least=1, most=8)
    depth: int = option(2, "by how much each level divides the layers", least=1, most=8)
    initial: float = option(0.05, "E_a: steps before each coalescing, as a fraction of the run's", above=0, below=1)
    small: float = option(0.5, "E_small: steps of each smaller model, as a fraction of the run's", above=0, below=1)
    alpha: float = option(0.5, "weight of the smaller model's weights in the interpolation", least=0, most=1)
    rate: float = option(1.0, "factor on the learning rate while a smaller model is trained", above=0)
    warmup: float = option(0.0, "fraction of the steps in which the rate rises after each change", least=0, most=0.5)

    def problems(self) -> list[str]:
        if self.levels > 1 and (self.levels - 1) * (self.initial + self.small) >= 1:
            return [
                "initial and small leave no steps for the large model: together they must be below 1 for each level"
            ]
        return ["width and depth are both 1: no level is smaller"] if self.width == self.depth == 1 else []

    def stages(self, steps: int) -> list[tuple[int, int]]:
        """(first step, level) of each stage of the cycle; level 0 is the person's model."""
        found, at = [(0, 0)], 0.0
        for level in range(1, self.levels):
            at += self.initial * steps
            found.append((max(level, round(at)), level))
        for level in range(self.levels - 2, -1, -1):
            at += self.small * steps
            found.append((max(found[-1][0] + 1, round(at)), level))
        return found

    def attach(self, run: Any) -> None:
        """Hooks the cycle into a run.

        Raises:
            UsageError: sizes that `width` and `depth` do not divide, or a model whose sizes are not understood.
        """
        if self.levels == 1:
            return
        check_growable(self.name, run)
        widths, stages = Widths(run.host), self.stages(run.steps)
        sizes = [widths.check(self.width**-level, self.depth**-level) for level in range(self.levels)]
        state, at, rise = run.state[self.name], {"stage": 0}, round(self.warmup * run.steps)
        state.update(stage=0, saved={})

        def enter(run: Any, stage: int) -> None:
            for now in range(at["stage"] + 1, stage + 1):
                (_, before), (_, level) = stages[now - 1], stages[now]
                if level > before:
                    state["saved"][str(before)] = {n: t.clone() for n, t in widths.tensors().items()}
                    self.coalesce(run, widths, sizes[level])
                else:
                    self.widen(run, widths, sizes[level], state["saved"].pop(str(level)))
                at["stage"] = state["stage"] = now

        def step(run: Any) -> None:
            enter(run, sum(run.step >= start for start, _ in stages) - 1)

        def restore(run: Any, _: dict[str, Any]) -> None:
            """Goes through the same moves, so that the optimizer's groups list the weights in the same order."""
            _widths.check_fresh(self.name, at["stage"])
            found = dict(state)
            state["saved"] = {}
            enter(run, found["stage"])
            state.update(found)

        run.on("step", step)
        run.on("restore", restore)
        if rise or self.rate != 1:
            run.multiply_lr(
                lambda run: (
                    (self.rate if stages[at["stage"]][1] else 1.0)
                    * (_widths.rising(run.step - stages[at["stage"]][0], rise) if at["stage"] else 1.0)
                )
            )

    def coalesce(self, run: Any, widths: Widths, wanted: Sizes) -> None:
        """One level down."""
        sizes = widths.sizes
        groups = [list(range(j, j + self.depth)) for j in range(0, sizes.layers, self.depth)]
        weights = _widths.remade(widths, widths.tensors(), _widths.means(sizes, wanted), groups)
        _widths.move(run, widths, weights, [group[0] for group in groups])

    def widen(self, run: Any, widths: Widths, wanted: Sizes, saved: dict[str, Tensor]) -> None:
        """One level up: de-coalesced and interpolated with the weights that the larger model had."""
        sizes = widths.sizes
        layers = _widths.stretched(sizes.layers, wanted.layers)
        wide = _widths.remade(widths, widths.tensors(), _widths.copies(sizes, wanted), [[layer] for layer in layers])
        weights = {name: interpolated(saved[name], tensor, self.alpha) for name, tensor in wide.items()}
        _widths.move(run, widths, weights, layers)


METHOD = Multilevel
