"""SpQR: weights in tiny groups whose scales and zero points are quantized too; what rounds badly is held as it is.

Columns are solved as in GPTQ. With U the upper Cholesky factor of H^-1, H = 2 X X^T (+ damping), weight w_q costs

    e_q^2 = ((w_q - quant(w_q)) / U_qq)^2            and is an outlier where e_q^2 > T = tau * mean_q(var(w_q) / U_qq^2)

(paper, section 4 and algorithm 1; the scale of T is the official code's). A group's range leaves out the weights
whose absence would lower the group's own error by more than T. Scale and zero point of a group are codes of 3 bits in
the range of 16 groups':

    w = a (s - b) * (code - c (z - d)) + outlier

Shapes: weight and codes [out, in], hessian [in, in], s and z [out, groups], a, b, c, d [out, ceil(groups / 16)].

Departures: the 16 groups follow each other in a row, while the official code takes those of 16 rows; their range is
set when the first of them is reached, from the weights as they are then, and later ones are clamped to it. A group of
equal weights ranges from them to zero, not from -1 to 1. Inputs that were always zero count as the mean of the others,
and their weights stay. An outlier is code plus remainder. In memory scales and zero points are bytes, a to d and
outliers 32 bits (an outlier's column 32 more), where the paper packs 3 and 16 bits: `average_bits` gives both.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.kernels.lowbit_weights import LEVEL_GROUPS as RUN  # groups whose statistics share their range
from hasten.math.cholesky import damped, inverse_factor
from hasten.math.shapes import Float
from hasten.quant.base import FULL_BITS, Codes, Sparse, group_problems, whole_group

CARD = Card(
    title="SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
    paper="2306.03078",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="LLaMA-33B on one 24 GB GPU at 1.15x the speed of FP16; under 1% of perplexity lost at about 4 bits a weight",
    claimed=1.15,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/spqr(bits=3)"),
    when="Three bits with as little loss as possible, where some weights are far larger than others, or matter more.",
    when_not="Speed first: groups of 16 and the held weights cost time and bytes; quant/gptq at 4 bits is smaller.",
)
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def naive_spqr(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    bits: int = 3,
    group: int = 16,
    statistic_bits: int = 3,
    threshold: float = 0.2,
    damp: float = 1.0,
    act_order: bool = True,
) -> Parts:
    """The equations in fp64, weight by weight, with the inverse Hessian updated after every column."""
    rows, columns = weight.shape
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w = weight.double()[:, order]
    inverses = [torch.linalg.inv(damped(hessian.double(), damp)[order][:, order])]
    for q in range(columns - 1):
        last = inverses[-1]
        inverses.append(last - torch.outer(last[:, q], last[q]) / last[q, q])
    cost = torch.stack([one[q, q] for q, one in enumerate(inverses)])  # U_qq^2
    spread = w.var(0) if rows > 1 else w[0].square()
    limit = threshold * float((spread / cost).mean()) if threshold else torch.inf

    def error(part: Tensor, at: int, scale: Tensor, zero: Tensor) -> Tensor:
        return (_rounded(part, scale, zero, bits)[1] - part).square() / cost[at : at + len(part)]

    def range_of(n: int, g: int) -> tuple[Tensor, Tensor]:
        at = g * group
        part, whole = w[n, at : at + group], torch.ones(min(group, columns - at), dtype=torch.bool)
        base, kept = error(part, at, *_range(part.min(), part.max(), bits)).sum(), whole.clone()
        for k in range(len(part)):
            others = whole.clone()
            others[k] = False
            if others.any() and limit < torch.inf:
                least, most = part[others].min(), part[others].max()
                kept[k] = base - error(part, at, *_range(least, most, bits))[others].sum() <= limit
        part = part[kept] if kept.any() else part.new_zeros(1)
        return _range(part.min(), part.max(), bits)

    groups = -(-columns // group)
    codes, rest = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, columns)
    scales, zeros = (torch.zeros(rows, groups, dtype=torch.uint8) for _ in range(2))
    levels = torch.zeros(rows, -(-groups // RUN), 4, dtype=torch.float64)
    for q in range(columns):
        g, run = q // group, q // group // RUN
        for n in range(rows):
            if q % (group * RUN) == 0:
                found = [range_of(n, one) for one in range(g, min(g + RUN, groups))]
                for i in (0, 1):
                    held = torch.stack([one[i] for one in found])
                    levels[n, run, 2 * i], levels[n, run, 2 * i + 1] = _level(held.min(), held.max(), statistic_bits)
            a, b, c, d = levels[n, run]
            if q % group == 0:
                scale, zero = range_of(n, g)
                scales[n, g], _ = _rounded(scale, a, b, statistic_bits)
                zeros[n, g], _ = _rounded(zero, c, d, statistic_bits)
            code, value = _rounded(w[n, q], a * (scales[n, g] - b), c * (zeros[n, g] - d), bits)
            codes[n, q], left = code, w[n, q] - value
            if left.square() / cost[q] > limit:
                rest[n, q] = left
            else:
                w[n] -= left / inverses[q][q, q] * inverses[q][q]
    return codes, scales, zeros, levels.float(), order, rest


def spqr(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    bits: int = 3,
    group: int = 16,
    statistic_bits: int = 3,
    threshold: float = 0.2,
    damp: float = 1.0,
    act_order: bool = True,
    block: int = 128,
) -> Parts:
    """The same for all rows at once; to columns behind a block, errors go on as one product.

    Args:
        threshold: tau; 0 for no outliers. The other arguments: the options of `SpQR`.
        block: a power of two.

    Returns:
        codes uint8 [rows, columns]; s and z uint8 [rows, groups]; levels fp32 [rows, ceil(groups / 16), 4], which are
        a to d; order int64 [columns], the input of each column of the codes; what is added, fp32 [rows, columns].

    Raises:
        UsageError: the Hessian is not positive definite even with strong damping.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian.float()[order][:, order], damp)
    cost = factor.diagonal().square()
    w = weight.float()[:, order]
    spread = w.var(0) if len(w) > 1 else w[0].square()
    limit = threshold * float((spread / cost).mean()) if threshold else torch.inf
    w = w.t().contiguous()  # [columns, rows]: a column of W is one run of memory
    codes, rest = torch.empty_like(w, dtype=torch.uint8), torch.zeros_like(w)
    scales, zeros, levels = [], [], []
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(w[start:end])
        for q in range(start, end):
            if q % (group * RUN) == 0:
                some = range(q, min(q + group * RUN, columns), group)
                found = [_kept_range(w[k : k + group].t(), cost[k : k + group], limit, bits) for k in some]
                held = [torch.stack([one[i] for one in found]) for i in (0, 1)]
                levels.append(torch.stack([x for one in held for x in _level(*one.aminmax(dim=0), statistic_bits)], 1))
            if q % group == 0:
                a, b, c, d = levels[-1].unbind(1)
                scale, zero = _kept_range(w[q : q + group].t(), cost[q : q + group], limit, bits)
                code, scale = _rounded(scale, a, b, statistic_bits)
                scales.append(code)
                code, zero = _rounded(zero, c, d, statistic_bits)
                zeros.append(code)
            codes[q], value = _rounded(w[q], scale, zero, bits)
            left = w[q] - value
            outlier = left.square() / cost[q] > limit
            rest[q] = torch.where(outlier, left, 0.0)
            error = torch.where(outlier, 0.0, left) / factor[q, q]
            w[q + 1 : end] -= torch.outer(factor[q, q + 1 : end], error)
            errors[q - start] = error
        w[end:] -= factor[start:end, end:].t() @ errors
    return codes.t(), torch.stack(scales, 1), torch.stack(zeros, 1), torch.stack(levels, 1), order, rest.t()


def _kept_range(part: Tensor, cost: Tensor, limit: float, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows] of a group [rows, columns], from the weights that are no likely outliers.

    Leaving out a weight that is neither the least nor the largest changes no range: only its own error goes.
    """
    low, high = part.aminmax(dim=1)
    if limit == torch.inf or part.shape[1] == 1:
        return _range(low, high, bits)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = _range(low, high, bits)
        return (_rounded(part, scale[:, None], zero[:, None], bits)[1] - part).square() / cost

    own = errors(low, high)
    saved = own.clone()
    for at, far in ((part.argmin(1, keepdim=True), torch.inf), (part.argmax(1, keepdim=True), -torch.inf)):
        inner = part.scatter(1, at, far)
        other = errors(inner.amin(1), high) if far > 0 else errors(low, inner.amax(1))
        saved.scatter_(1, at, own.sum(1, keepdim=True) - other.scatter(1, at, 0.0).sum(1, keepdim=True))
    kept = saved <= limit
    low, high = torch.where(kept, part, torch.inf).amin(1), torch.where(kept, part, -torch.inf).amax(1)
    return _range(low.nan_to_num(posinf=0.0), high.nan_to_num(neginf=0.0), bits)


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, not rounded, of codes that reach from low to high; to zero where these are equal."""
    equal = low == high
    low, high = torch.where(equal, low.clamp(max=0), low), torch.where(equal, high.clamp(min=0), high)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return scale, -low / scale


def _level(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The step and the offset whose codes reach from low to high; low alone where these are (nearly) equal."""
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 1e-6 * torch.maximum(low.abs(), high.abs()), step, 1.0)
    return step, -low / step


def _rounded(value: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and what they stand for."""
    code = torch.clamp(torch.round(value / scale + zero), 0, 2**bits - 1)
    return code.to(torch.uint8), scale * (code - zero)


def average_bits(form: Codes, statistic: int = 8, level: int = 32, outlier: int = 64) -> float:
    """Bits per weight: b_w + (b_s + b_z) / group + 4 levels / (16 group) + the outliers' share.

    Args:
        statistic, level, outlier: bits of a scale or zero point, of one of a to d, and of an outlier with its column.
            The defaults are what is held in memory; 3, 16 and 32 what the paper counts.
    """
    entries = 0 if form.outliers is None else len(form.outliers.values)
    return (form.bits + 2 * statistic / form.group + 4 * level / (RUN * form.group)
            + outlier * entries / form.codes.numel())  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SpQR(Method):
    bits: int = option(3, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, 6, 8, FULL_BITS))
    group: int = option(16, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    statistic_bits: int = option(3, "bits of a scale and of a zero point, a byte in memory", choices=range(2, 9))
    threshold: float = option(0.2, "squared error, over its expected scale, above which a weight is held; 0: none is",
                              least=0)  # fmt: skip
    damp: float = option(1.0, "added to the diagonal of the Hessian, as a fraction of its mean", above=0, most=1)
    act_order: bool = option(True, "quantize the columns with the largest inputs first; products reorder their inputs")
    activations: int = option(8, "8: products round their inputs to 8 bits, 64 at a time; 32: not", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    together = False  # the threshold is a layer's

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, hessian: Tensor) -> Codes:
        group = whole_group(self.group, weight)
        codes, scales, zeros, levels, order, rest = spqr(
            weight, hessian, bits=self.bits, group=group, statistic_bits=self.statistic_bits,
            threshold=self.threshold, damp=self.damp, act_order=self.act_order,
        )  # fmt: skip
        return Codes(codes, scales, zeros, group, self.bits, order if self.act_order else None, levels=levels,
                     outliers=Sparse.of(rest) if self.threshold else None, activations=self.activations)  # fmt: skip


METHOD = SpQR
