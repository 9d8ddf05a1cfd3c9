"""ZeroQuant: weights in 8 bits (or 4), and every token of the activations in 8 bits with a scale of its own.

    x_q = round(x / S_x),  S_x = max |x| / 127 for each token x;    W_q = round(W / S_w),  S_w = max |W| / (2^(b-1) - 1)
    y = S_x S_w (x_q W_q^T) + bias

in integers but for the last line (the paper's token-wise quantization, and its fused kernels: rounding and scaling are
part of the product). Scales of tokens are found as they come, so nothing is calibrated. Shapes: x [..., in], W [out,
in], S_w [out].

Departures: S_w is one number for each row of W, finer than the paper's groups, which hold several rows. With `group`
or 4 bits, it is one for so many columns of a row, and tokens are rounded 64 inputs at a time, not whole: 4 bits would
lose too much otherwise, and the product reads 4-bit codes as they are. Layer-by-layer distillation is left out. All
linear layers get the same bits, where the paper also mixes 4 for feed-forward weights with 8.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.kernels import int8
from hasten.math.shapes import Float
from hasten.quant._grids import rounded
from hasten.quant._int8 import Int8, rowwise
from hasten.quant.base import FULL_BITS, Codes, Form, group_problems, whole_group

CARD = Card(
    title="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
    paper="2206.01861",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="W8A8 over FP16 on GPUs: up to 5.19x for BERT, 4.16x for GPT-3 style models, with little loss of accuracy",
    claimed=5.19,
    identity={"bits": 16},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=perplexity)", "quant/zeroquant"),
    when="Many tokens at a time: prompts, encoders, images, denoisers. Layers from about 256 inputs up.",
    when_not="One token at a time, where weights of 4 bits are read in half the time, and outliers in activations.",
)

SHRINK = 1  # ranges that are tried: the largest number gives it


def naive_zeroquant(x: Float[Tensor, "tokens columns"], weight: Float[Tensor, "rows columns"]) -> Tensor:
    """The equation at 8 bits, token by token and row by row."""
    out = torch.zeros(len(x), len(weight))
    for t, token in enumerate(x.float()):
        s_x = token.abs().max() / 127
        inverse = torch.full_like(s_x, 127) / token.abs().max() if s_x > 0 else s_x
        x_q = [int(torch.round(value * inverse)) for value in token]
        for n, row in enumerate(weight.float()):
            s_w = row.abs().max() / 127
            w_q = [int(torch.round(value / s_w)) if s_w > 0 else 0 for value in row]
            out[t, n] = s_x * s_w * sum(a * b for a, b in zip(x_q, w_q, strict=True))
    return out.to(x.dtype)


def zeroquant(x: Float[Tensor, "tokens columns"], weight: Float[Tensor, "rows columns"]) -> Tensor:
    """The same through the kernel that the layers use: rounding, products and scales in one pass."""
    codes, scales = rowwise(weight, shrink=SHRINK)
    return int8.linear(x, int8.pack(codes), scales, int8.sums(codes))


@dataclasses.dataclass(frozen=True)
class ZeroQuant(Method):
    bits: int = option(8, "bits of a weight; 16 leaves the model as it is", choices=(4, 8, FULL_BITS))
    group: int = option(0, "columns that share a weight's scale, a power of two from 16 up; 0: the row", least=0)
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, statistic: None) -> Form:
        if self.bits == 8 and not self.group and weight.shape[1] <= int8.MOST_COLUMNS:  # noqa: PLR2004
            return Int8(*rowwise(weight, shrink=SHRINK))
        group = whole_group(self.group, weight)
        return Codes(*rounded(weight, self.bits, group, symmetric=True), group, self.bits, activations=8)


METHOD = ZeroQuant
