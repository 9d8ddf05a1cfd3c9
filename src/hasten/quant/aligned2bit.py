"""2-bit weights with aligned 4-bit groups: where a group's range is wide, its weights get four bits instead of two.

In each row, the groups of 64 weights are taken in runs of `block`; in every run the `wide` groups of widest range

    R(G) = max(G, 0) - min(G, 0)

have 4 bits, so 4-bit codes lie at the same offsets in each row and are read without branches ("memory alignment").
Codes come from GPTQ's column order with error compensation, for H = 2 X X^T (+ damping) and q = 1, 2, ...:

    delta = - (w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_{q,:},    quant with 2 or 4 bits, as q's group in that row has

Shapes: weight [out, in], hessian [in, in], codes [out, in], scales and zeros [out, groups], chosen bool [out, groups].

Departures: the paper has no code to compare with; groups of 64 (a run of 64 inputs shares a scale in the product),
one wide group of 8, and a search of each group's scale for the least error (norm 2.4, as GPTQ's code has it) are
choices made here. Scales are fp16 and not quantized a second time: 2.77 bits for each weight in all (the paper:
2.85). A shorter last run has its share of wide groups, rounded up. Sparse outliers, which later versions of the paper
add, are left out. The product is a 2-bit one over all columns, to which the low bits of wide groups are added;
"asynchronous dequantization" is a schedule of GPU memory copies that a processor's own prefetching stands for.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.kernels import low_plane
from hasten.math.cholesky import damped, inverse_factor
from hasten.math.shapes import Bool, Float, Int
from hasten.quant._grids import grid
from hasten.quant._mixed import GROUP, MixedCodes
from hasten.quant.base import FULL_BITS

CARD = Card(
    title="Enabling Fast 2-bit LLM on GPUs: Memory Alignment and Asynchronous Dequantization",
    paper="2311.16442",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Llama2-7B at 2.85 bits for each weight: 1.74x end to end over FP16 on a GPU",
    claimed=1.74,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/aligned2bit"),
    when="Memory for less than three bits a weight, on models large enough to bear it.",
    when_not="Small models lose much at two bits; with memory for three or four bits quant/gptq keeps far more.",
)

SLACK = 2.0**-24  # the least scale that fp16 holds
Parts = tuple[
    Int[Tensor, "rows columns"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"], Bool[Tensor, "rows groups"]
]


def naive_aligned2bit(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    block: int = 8,
    wide: int = 1,
    damp: float = 0.01,
    mse: bool = True,
) -> Parts:
    """The equations in fp64, with the inverse Hessian updated after every column."""
    w, columns = weight.double(), weight.shape[1]
    groups = -(-columns // GROUP)
    chosen = torch.zeros(len(w), groups, dtype=torch.bool)
    for n in range(len(w)):
        ranges = [max(0.0, float(p.max())) - min(0.0, float(p.min())) for p in weight[n].float().split(GROUP)]
        for start in range(0, groups, block):
            run = list(range(start, min(start + block, groups)))
            for g in sorted(run, key=lambda g: (-ranges[g], g))[: -(-len(run) * wide // block)]:
                chosen[n, g] = True
    inverse = torch.linalg.inv(damped(hessian.double(), damp))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales, zeros = torch.zeros(len(w), groups), torch.zeros(len(w), groups)
    for q in range(columns):
        g = q // GROUP
        for n in range(len(w)):
            bits = 4 if chosen[n, g] else 2
            if q % GROUP == 0:
                scale, zeros[n, g] = grid(w[n : n + 1, q : q + GROUP], bits, False, mse)
                scales[n, g] = scale.half().clamp(min=SLACK)
            codes[n, q] = torch.clamp(torch.round(w[n, q] / scales[n, g]) + zeros[n, g], 0, 2**bits - 1)
            error = w[n, q] - scales[n, g] * (codes[n, q] - zeros[n, g])
            w[n] -= error / inverse[q, q] * inverse[q]
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes, scales, zeros, chosen


def aligned2bit(
    weight: Float[Tensor, "rows columns"],
    hessian: Float[Tensor, "columns columns"],
    *,
    block: int = 8,
    wide: int = 1,
    damp: float = 0.01,
    mse: bool = True,
) -> Parts:
    """The same group by group: within a group errors go on at once, to later groups as one product.

    Args:
        block: groups of 64 columns in a run; wide: how many of them have 4 bits.
        damp: added to the diagonal of H, as a fraction of its mean. mse: scales are searched for the least error.

    Raises:
        UsageError: the Hessian is not positive definite even with strong damping.
    """
    chosen = widest(weight, block, wide)
    factor = inverse_factor(hessian, damp)
    w = weight.float().t().contiguous()  # [columns, rows]: a column of W is one run of memory
    codes, scales, zeros = torch.empty_like(w, dtype=torch.uint8), [], []
    for start in range(0, len(w), GROUP):
        four = chosen[:, start // GROUP]
        end = min(start + GROUP, len(w))
        part = w[start:end].t()
        narrow, broad = grid(part, 2, False, mse), grid(part, 4, False, mse)
        scale = torch.where(four, broad[0], narrow[0]).half().float().clamp(min=SLACK)
        zero, most = torch.where(four, broad[1], narrow[1]), torch.where(four, 15.0, 3.0)
        errors = torch.zeros_like(w[start:end])
        for q in range(start, end):
            code = torch.minimum(torch.round(w[q] / scale).add_(zero).clamp_(min=0), most)
            codes[q] = code
            error = (w[q] - scale * (code - zero)) / factor[q, q]
            w[q + 1 : end] -= torch.outer(factor[q, q + 1 : end], error)
            errors[q - start] = error
        w[end:] -= factor[start:end, end:].t() @ errors
        scales.append(scale)
        zeros.append(zero)
    return codes.t().contiguous(), torch.stack(scales, 1), torch.stack(zeros, 1), chosen


def widest(weight: Float[Tensor, "rows columns"], block: int, wide: int) -> Bool[Tensor, "rows groups"]:
    """Which groups have 4 bits: of each run the `wide` of widest range, of equal ones the first."""
    w = weight.float()
    parts = w.split(GROUP, dim=1)
    ranges = torch.stack([part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0) for part in parts], dim=1)
    chosen = torch.zeros_like(ranges, dtype=torch.bool)
    for start in range(0, ranges.shape[1], block):
        run = ranges[:, start : start + block]
        order = run.argsort(dim=1, descending=True, stable=True)[:, : -(-run.shape[1] * wide // block)]
        chosen[:, start : start + block].scatter_(1, order, True)
    return chosen


def mixed(
    codes: Int[Tensor, "rows columns"],
    scales: Float[Tensor, "rows groups"],
    zeros: Float[Tensor, "rows groups"],
    chosen: Bool[Tensor, "rows groups"],
    *,
    block: int,
    wide: int,
    activations: int,
) -> MixedCodes:
    """The codes in two planes: the high bits of all, and the low bits of the groups with four."""
    rows, columns = codes.shape
    groups = chosen.shape[1]
    whole = F.pad(codes, (0, groups * GROUP - columns)).unflatten(1, (groups, GROUP))
    at = chosen.nonzero()[:, 1].view(rows, low_plane.slots(columns, block, wide))
    low = whole.gather(1, at[..., None].expand(-1, -1, GROUP)) & 3
    high = torch.where(chosen[..., None], whole >> 2, whole).flatten(1)[:, :columns].contiguous()
    starts = torch.arange(at.shape[1], device=at.device) // wide * block
    return MixedCodes(high, low_plane.pack(low), (at - starts).to(torch.uint8), (scales * (1 + 3 * chosen)).half(),
                      (zeros / (1 + 3 * chosen)).half(), block, wide, activations)  # fmt: skip


def average_bits(form: MixedCodes) -> float:
    """Bits that a product reads for each weight: codes, places, scales and zero points."""
    sizes = (part.nbytes for part in (form.low, form.places, form.scales, form.zeros))
    return 2 + 8 * sum(sizes) / form.high.numel()


@dataclasses.dataclass(frozen=True)
class Aligned2Bit(Method):
    bits: int = option(2, "bits of most weights; 16 leaves the model as it is", choices=(2, FULL_BITS))
    block: int = option(8, "groups of 64 columns in a run", least=1, most=256)
    wide: int = option(1, "how many groups of a run have 4 bits: those of widest range", least=1)
    damp: float = option(0.01, "added to the diagonal of the Hessian, as a fraction of its mean", above=0, most=1)
    mse: bool = option(True, "search each scale for the least error rather than covering all weights")
    activations: int = option(8, "8: products round their inputs to 8 bits, 64 at a time; 32: not", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return [] if self.wide <= self.block else [f"wide={self.wide} must be at most block={self.block}"]

    def quantize(self, weight: Tensor, hessian: Tensor) -> MixedCodes:
        parts = aligned2bit(weight, hessian, block=self.block, wide=self.wide, damp=self.damp, mse=self.mse)
        return mixed(*parts, block=self.block, wide=self.wide, activations=self.activations)


METHOD = Aligned2Bit
