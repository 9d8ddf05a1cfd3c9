"""OWL: blocks of a model that have more outliers are pruned less.

For block l with the scores A_ij = ||X_j||_2 |W_ij| of all its weights in the dense model (paper, section 4.1):

    D_l = share of the scores above M * mean(A)                            layerwise outlier distribution
    S_l = S - (2 lambda / (max D - min D)) (D_l - mean D)                  mean S, about within [S - lambda, S + lambda]

and `base` prunes the weights of block l to the sparsity S_l. W [out, in], X_j over all calibration tokens.

Departures: the mean over blocks counts weights, so that the model has sparsity S where blocks differ in size. Where S_l
would leave [0, 1), lambda shrinks for all. Models without a chain of blocks are judged matrix by matrix, and matrices
outside the blocks are pruned to S. n:m patterns, which fix the sparsity, are left out.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.hosts.streaming import STATISTICS, gather
from hasten.hosts.weights import Weight
from hasten.prune import _patterns
from hasten.prune.base import WeightPruning

CARD = Card(
    title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    paper="2310.05175",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="70%: 2.6x end to end in DeepSparse on CPU; LLaMA-7B perplexity 24.55 with Wanda, uniform 85.77",
    claimed=2.6,
    identity={"sparsity": 0.0},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "prune/owl(sparsity=0.6)"),
    when="60% and more of a deep language model's weights.",
    when_not="Up to half of the weights, and small models, which lack such outliers: uniform sparsity keeps more.",
)

OWN = ("sparsity", "pattern", "layout", "ignore")


def naive_owl(
    scores: Sequence[Sequence[Tensor]], *, sparsity: float = 0.7, multiple: float = 5.0, spread: float = 0.08
) -> list[float]:
    """The equations with loops over weights, in fp64."""
    sizes = [sum(part.numel() for part in block) for block in scores]
    outliers = []
    for block, size in zip(scores, sizes, strict=True):
        values = [value for part in block for value in part.double().flatten().tolist()]
        mean = sum(values) / size
        outliers.append(sum(value > multiple * mean for value in values) / size)
    mean = sum(one * size for one, size in zip(outliers, sizes, strict=True)) / sum(sizes)
    if max(outliers) == min(outliers):
        return [sparsity] * len(scores)
    factor = 2 * spread / (max(outliers) - min(outliers))
    factor = min(factor, sparsity / (max(outliers) - mean), 0.99 * (1 - sparsity) / (mean - min(outliers)))
    return [sparsity - factor * (one - mean) for one in outliers]


def owl(
    scores: Sequence[Sequence[Tensor]], *, sparsity: float = 0.7, multiple: float = 5.0, spread: float = 0.08
) -> list[float]:
    """As `naive_owl`, for whole matrices at once.

    Args:
        scores: of each block those of its weights, any shapes.
        sparsity: S; multiple: M; spread: lambda.

    Returns:
        the sparsity of each block; the mean, by numbers of weights, is S.
    """
    return shared_out([outliers(block, multiple) for block in scores], sparsity, spread)


def outliers(scores: Sequence[Tensor], multiple: float) -> tuple[float, int]:
    """(share of the scores that are more than `multiple` times their mean, their number)."""
    number = sum(part.numel() for part in scores)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores) / number
    return sum(int((part.double() > multiple * mean).sum()) for part in scores) / number, number


def shared_out(found: Sequence[tuple[float, int]], sparsity: float, spread: float) -> list[float]:
    """The sparsity of blocks with these shares of outliers and numbers of weights."""
    d, n = torch.tensor(found, dtype=torch.float64).unbind(1)
    low, high = float(d.min()), float(d.max())
    if low == high:
        return [sparsity] * len(d)
    mean = float((d * n).sum() / n.sum())
    factor = min(2 * spread / (high - low), sparsity / (high - mean), 0.99 * (1 - sparsity) / (mean - low))
    return (sparsity - factor * (d - mean)).tolist()  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class OWL(WeightPruning):
    sparsity: float = option(0.7, "fraction of the weights that become zero, in all; 0: none", least=0, below=1)
    base: Method = option("prune/wanda", "the method that prunes a matrix to the sparsity that it is given")
    multiple: float = option(5.0, "M: scores above this many times their block's mean are outliers", above=1)
    spread: float = option(0.08, "lambda: blocks differ by at most twice this much in sparsity", least=0, below=0.5)

    def problems(self) -> list[str]:
        if not isinstance(self.base, WeightPruning) or isinstance(self.base, OWL):
            return [f"base must be a method that prunes single matrices, such as prune/wanda, not {self.base}"]
        given = sorted(set(self.base.changed()) & set(OWN))
        found = [f"{', '.join(given)} of base must be left out: those of prune/owl hold"] if given else []
        if _patterns.of(self.pattern):
            return [
                *found,
                f"pattern {self.pattern} fixes the sparsity of every layer: leave it out or use {self.base}",
            ]
        return found + super().problems()

    @property
    def statistic(self) -> str:  # type: ignore[override]
        """What the base asks for."""
        return self._base().statistic

    def _base(self) -> WeightPruning:
        base = dataclasses.replace(self.base, **{name: getattr(self, name) for name in OWN})
        assert isinstance(base, WeightPruning)
        return base

    def prune(self, weight: Tensor, statistic: object, sparsity: float) -> Tensor:
        return self._base().prune(weight, statistic, sparsity)

    def allocate(self, host: Host, context: Context, weights: dict[str, Weight]) -> dict[str, float]:
        """The sparsity of each matrix, from one pass of the calibration data through the dense model."""
        norms: dict[str, Tensor] = {}
        with torch.no_grad():
            for inputs in gather(host, context.calibration or [], weights, STATISTICS["norms"]):
                norms.update({path: value for paths, value in inputs.shared() for path in paths})
        block_of = _blocks(host, weights)
        judged = [one for one in dict.fromkeys(block_of.values()) if one]
        found = {}
        for block in judged:
            paths = [path for path in norms if block_of[path] == block]
            if paths:
                found[block] = outliers([weights[p].matrix.float().abs() * norms[p] for p in paths], self.multiple)
        if not found:
            return dict.fromkeys(weights, self.sparsity)
        shares = dict(zip(found, shared_out(list(found.values()), self.sparsity, self.spread), strict=True))
        context.note(self.name, outliers_percent={block: round(100 * d, 4) for block, (d, _) in found.items()})
        return {path: shares.get(block, self.sparsity) for path, block in block_of.items()}


def _blocks(host: Host, paths: Iterable[str]) -> dict[str, str]:
    """The block of each matrix, "" outside them all; where a model has no blocks, each matrix is its own."""
    try:
        blocks = [layer.path for layer in host.layers]
    except UsageError:
        return {path: path for path in paths}
    return {path: next((block for block in blocks if path.startswith(block + ".")), "") for path in paths}


METHOD = OWL
