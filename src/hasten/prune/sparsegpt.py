"""SparseGPT: weights are pruned column by column; each one's error is made up for by the columns still to come.

For a row w of W and H = 2 X X^T (+ damping), columns q = 1, 2, ..., with H_q what is left of H without those before q:

    eps_q = w_q^2 / [H_q^-1]_qq                                   the error that pruning w_q leaves (paper, eq. 3)
    w <- w - w_q / [H_q^-1]_qq (H_q^-1)_{q,:}    if q is pruned   the other weights make up for it (eq. 3)

The rows of all H_q^-1 are those of the upper Cholesky factor U of H^-1 up to their length, [H_q^-1]_qq = U_qq^2. The
mask is chosen for `block` columns at a time, by eps with the weights as they are then, over all rows (section 3.3,
adaptive mask selection); with n:m for each m columns and each row. Later blocks are updated lazily, as one product.
W [out, in], H [in, in].

Departures: blocks such as 16x1 are an addition; they count by the mean of their weights' eps, so correlations inside a
block are left out of the choice, not of the update. Columns whose input was always zero are pruned first, but those
beyond the sparsity keep their weights (the official code zeroes all). Calibration leaves out padding. If the factor
can't be computed, damping grows tenfold.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.math.cholesky import damped, inverse_factor
from hasten.math.shapes import Float
from hasten.prune import _patterns
from hasten.prune.base import WeightPruning

CARD = Card(
    title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    paper="2301.00774",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="OPT-2.7B at 50%: 1.82x end to end in DeepSparse on CPU; OPT-175B: perplexity 8.21, dense 8.35",
    claimed=1.82,
    identity={"sparsity": 0.0},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "prune/sparsegpt(sparsity=0.5)"),
    when="Half of the weights and more, 2:4, and blocks: the update of the others is what keeps quality there.",
    when_not="Few calibration tokens for wide layers (fewer than inputs), or no time: prune/wanda takes a tenth of it.",
)

DEAD = 1e-6  # what the error of a weight counts whose input was always zero


def naive_sparsegpt(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    damp: float = 0.01,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """The equations in fp64, each H_q inverted anew."""
    w, columns = weight.double().clone(), weight.shape[1]
    counts = torch.where(hessian.diagonal() == 0, DEAD, 1.0).double()
    hessian = damped(hessian.double(), damp)
    inverses = [torch.linalg.inv(hessian[q:, q:]) for q in range(columns)]
    width = _chosen_together(pattern, block)
    kept = torch.ones_like(w, dtype=torch.bool)
    for q in range(columns):
        if q % width == 0:
            stop = min(q + width, columns)
            error = torch.stack([w[:, p].square() / inverses[p][0, 0] * counts[p] for p in range(q, stop)], dim=1)
            kept[:, q:stop] = _patterns.keep(error, sparsity, pattern, by_row=False)
        for row in range(w.shape[0]):
            if not kept[row, q]:
                w[row, q:] -= w[row, q] / inverses[q][0, 0] * inverses[q][0]
                w[row, q] = 0
    return w.float()


def sparsegpt(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    damp: float = 0.01,
    block: int = 128,
) -> Float[Tensor, "rows columns"]:
    """As `naive_sparsegpt`, with one Cholesky factor and lazy updates.

    Args:
        sparsity: fraction that becomes zero, in each block of columns, rounded down to whole weights or blocks.
        pattern: unstructured, n:m (n of each m in a row stay) or blocks such as 16x1.
        damp: added to the diagonal of H, as a fraction of its mean.
        block: columns whose mask is chosen together, rounded down to whole groups of the pattern.

    Returns:
        fp32 weights with zeros.

    Raises:
        UsageError: the Hessian is not positive definite even with strong damping.
    """
    columns, width = weight.shape[1], _chosen_together(pattern, block)
    step = max(1, block // width) * width
    w = weight.float().t().contiguous()  # [columns, rows]: a column of W is one run of memory
    factor = inverse_factor(hessian.float(), damp)
    counts = torch.where(hessian.diagonal() == 0, DEAD, 1.0).to(w) / factor.diagonal().square()  # eps = counts w^2
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty_like(w[start:end])
        for q in range(start, end):
            if (q - start) % width == 0:
                stop = min(q + width, end)
                eps = (w[q:stop].square() * counts[q:stop, None]).t()
                gone = ~_patterns.keep(eps, sparsity, pattern, by_row=False).t()
            pruned = gone[(q - start) % width]
            errors[q - start] = torch.where(pruned, w[q], 0) / factor[q, q]
            w[q + 1 : end] -= torch.outer(factor[q, q + 1 : end], errors[q - start])
            w[q].masked_fill_(pruned, 0)
        w[end:] -= factor[start:end, end:].t() @ errors
    return w.t().contiguous()


def _chosen_together(pattern: str, block: int) -> int:
    """The columns for which the mask is chosen at once."""
    some, size = _patterns.of(pattern), _patterns.block(pattern)
    if some is not None:
        return some[1]
    unit = size[1] if size is not None else 1
    return max(1, block // unit) * unit


@dataclasses.dataclass(frozen=True)
class SparseGPT(WeightPruning):
    damp: float = option(0.01, "added to the diagonal of the Hessian, as a fraction of its mean", above=0, most=1)
    block: int = option(128, "columns whose mask is chosen together", least=1)

    statistic = "hessian"

    def prune(self, weight: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
        return sparsegpt(weight, hessian, sparsity=sparsity, pattern=self.pattern, damp=self.damp, block=self.block)


METHOD = SparseGPT
