"""Wanda: a weight counts as much as its absolute value times the norm of the input that it multiplies.

    S_ij = |W_ij| * ||X_j||_2,    W_ij <- 0  where S_ij is among the least of its row i

(paper, eq. 1; the comparison group is one output, section 3). W [out, in], ||X_j|| [in] over all calibration tokens;
no weight is updated. With n:m the n highest of each m in a row stay.

Departures: the norm is the root mean square over real tokens, which gives the same order; calibration leaves out
padding. Blocks (such as 16x1), which count by the mean of their scores and compete in the whole matrix, are an
addition. Of equal scores the earlier weight stays.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.math.shapes import Float
from hasten.prune import _patterns
from hasten.prune.base import WeightPruning

CARD = Card(
    title="A Simple and Effective Pruning Approach for Large Language Models",
    paper="2306.11695",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="LLaMA-7B: 2:4 gives 1.24x end to end on an A6000; at 50% perplexity 7.26, by magnitude 17.29, dense 5.68",
    claimed=1.24,
    identity={"sparsity": 0.0},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "prune/wanda(sparsity=0.5)"),
    when="Up to about half of a language model's weights, with a few calibration texts and no training.",
    when_not="Above 60%, where prune/owl and prune/sparsegpt keep more, and small models, whose weights all matter.",
)


def naive_wanda(
    weight: Float[Tensor, "rows columns"],
    norms: Float[Tensor, " columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
) -> Float[Tensor, "rows columns"]:
    """Equation 1, row by row (for blocks: block by block), from the least up."""
    found = weight.float().clone()
    rows, columns = found.shape
    scores = [[abs(float(found[i, j])) * float(norms[j]) for j in range(columns)] for i in range(rows)]
    some, size = _patterns.of(pattern), _patterns.block(pattern)
    if size is not None:
        held = {}
        for at in ((i, j) for i in range(0, rows, size[0]) for j in range(0, columns, size[1])):
            inside = [(i, j) for i in range(at[0], min(at[0] + size[0], rows))
                      for j in range(at[1], min(at[1] + size[1], columns))]  # fmt: skip
            held[at] = (sum(scores[i][j] for i, j in inside) / len(inside), inside)
        left = rows * columns * sparsity
        for at in sorted(held, key=lambda at: (held[at][0], -at[0], -at[1])):
            left -= len(held[at][1])
            if left < 0:
                break
            for i, j in held[at][1]:
                found[i, j] = 0
        return found
    for i in range(rows):
        groups = [range(columns)] if some is None else [range(j, min(j + some[1], columns)) for j in
                                                        range(0, columns, some[1])]  # fmt: skip
        for group in groups:
            gone = int(columns * sparsity) if some is None else max(0, len(group) - some[0])
            for j in sorted(group, key=lambda j: (scores[i][j], -j))[:gone]:
                found[i, j] = 0
    return found


def wanda(
    weight: Float[Tensor, "rows columns"],
    norms: Float[Tensor, " columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
) -> Float[Tensor, "rows columns"]:
    """As `naive_wanda`, with one sort.

    Args:
        norms: ||X_j|| of each input; a common factor does not matter.
        sparsity: fraction that becomes zero, rounded down to whole weights of a row (or blocks of the matrix).
        pattern: unstructured, n:m (n of each m in a row stay) or blocks such as 16x1.

    Returns:
        fp32 weights with zeros.
    """
    whole = weight.float()
    return torch.where(_patterns.keep(whole.abs() * norms.float(), sparsity, pattern), whole, 0)


@dataclasses.dataclass(frozen=True)
class Wanda(WeightPruning):
    def prune(self, weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
        return wanda(weight, norms, sparsity=sparsity, pattern=self.pattern)


METHOD = Wanda
