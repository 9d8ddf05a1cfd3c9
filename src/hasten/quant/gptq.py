"""GPTQ: quantize a weight column by column; each column's error is made up for by the columns that are still to come.

For row w of W and H = 2 X X^T (+ damping), in order q = 1, 2, ... (paper, eq. 2 and 3, with the fixed order of step 1):

    delta = - (w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_{q,:}            added to the columns after q
    H^-1 <- H^-1 - (H^-1)_{:,q} (H^-1)_{q,:} / [H^-1]_qq               q leaves

All needed rows of H^-1 are the rows of its upper Cholesky factor, up to their length (step 3); columns are updated
lazily, in blocks (step 2). Shapes: weight [out, in], hessian [in, in], codes [out, in], scales and zeros [out,
groups].

Departures: scales are rounded up to fp16 before codes are chosen. A column whose input was always zero is rounded, not
set to zero, and is damped as the mean of the others.
With groups smaller than a block, a group's range comes from up-to-date weights (the official code takes stale ones).
With `act_order`, ranges come from the original weights (its `static_groups`), so groups stay in the inputs' order.
Calibration leaves out padding. If the factor can't be computed, damping grows tenfold. Groups of 128 are the default,
not whole rows.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math.cholesky import damped, inverse_factor
from hasten.math.shapes import Float
from hasten.quant._grids import Triple, grid
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    paper="2210.17323",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="OPT-175B at 3 bits: 3.25x per generated token over FP16 on an A100, perplexity 8.34 to 8.68 on WikiText2",
    claimed=3.25,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/gptq(bits=4)"),
    when="Generation at small batch with layers from about 1000 inputs up, where reading weights is what takes time.",
    when_not="Narrow models, whose weights fit the processor's cache, and large batches: there only memory is saved.",
)


def naive_gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    bits: int = 4,
    group: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    mse: bool = False,
) -> Triple:
    """Equations 2 and 3 in fp64, with the inverse Hessian updated after every column."""
    w, columns = weight.double(), weight.shape[1]
    inverse = torch.linalg.inv(damped(hessian.double(), damp))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    ranges = [grid(w[:, start : start + group], bits, symmetric, mse) for start in range(0, columns, group)]
    for q in order.tolist():
        if not act_order and q % group == 0:
            ranges[q // group] = grid(w[:, q : q + group], bits, symmetric, mse)
        scale, zero = ranges[q // group]
        for row in range(weight.shape[0]):
            codes[row, q] = torch.clamp(torch.round(w[row, q] / scale[row]) + zero[row], 0, 2**bits - 1)
            error = w[row, q] - scale[row] * (codes[row, q] - zero[row])
            w[row] -= error / inverse[q, q] * inverse[q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    scales, zeros = (torch.stack(part, dim=1).float() for part in zip(*ranges, strict=True))
    return codes, scales, zeros


def gptq(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    bits: int = 4,
    group: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    mse: bool = False,
    block: int = 128,
) -> Triple:
    """The same in blocks of columns: within a block errors go on at once, to later blocks as one product.

    Args:
        group: columns that share a scale, a power of two; the last group may have fewer.
        damp: added to the diagonal of H, as a fraction of its mean.
        act_order: columns with the largest inputs first.
        symmetric: the zero point is the middle code. mse: ranges are searched for the least error.

    Raises:
        UsageError: the Hessian is not positive definite even with strong damping.
    """
    columns, maximum = weight.shape[1], 2**bits - 1
    w = weight.float()
    ranges = [grid(w[:, start : start + group], bits, symmetric, mse) for start in range(0, columns, group)]
    scales, zeros = (torch.stack(part, dim=1) for part in zip(*ranges, strict=True))
    order = torch.arange(columns, device=w.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    groups_of = (order // group).tolist()
    factor = inverse_factor(hessian[order][:, order] if act_order else hessian, damp)
    w = w[:, order].t().contiguous()  # [columns, rows]: a column of W is one run of memory
    codes = torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(w[start:end])
        for q in range(start, end):
            index = groups_of[q]
            if not act_order and q % group == 0:
                scales[:, index], zeros[:, index] = grid(w[q : q + group].t(), bits, symmetric, mse)
            scale, zero = scales[:, index], zeros[:, index]
            code = torch.round(w[q] / scale).add_(zero).clamp_(0, maximum)
            codes[q] = code
            error = (w[q] - scale * (code - zero)) / factor[q, q]
            w[q + 1 : end] -= torch.outer(factor[q, q + 1 : end], error)
            errors[q - start] = error
        w[end:] -= factor[start:end, end:].t() @ errors
    return torch.empty_like(codes).index_copy_(0, order, codes).t(), scales, zeros


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    bits: int = option(4, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, 6, 8, FULL_BITS))
    group: int = option(128, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    damp: float = option(0.01, "added to the diagonal of the Hessian, as a fraction of its mean", above=0, most=1)
    act_order: bool = option(False, "quantize the columns with the largest inputs first")
    symmetric: bool = option(False, "the zero point is the middle code")
    mse: bool = option(False, "search each range for the least error rather than covering all weights")
    activations: int = option(8, "8: products round their inputs to 8 bits, 64 at a time; 32: not", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, hessian: Tensor) -> Codes:
        group = whole_group(self.group, weight)
        codes, scales, zeros = gptq(weight, hessian, bits=self.bits, group=group, damp=self.damp,
                                    act_order=self.act_order, symmetric=self.symmetric, mse=self.mse)  # fmt: skip
        return Codes(codes, scales, zeros, group, self.bits, activations=self.activations)


METHOD = GPTQ
