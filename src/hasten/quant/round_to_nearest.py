"""Round to nearest: each weight becomes the nearest of the values that its group's scale and zero point give.

    q = clamp(round(w / s) + z, 0, 2^b - 1),    s = (max - min) / (2^b - 1),    z = round(-min / s)

with the least and largest of each group of weights, and zero (paper, section 3.1, as for its 8 bits; the baseline that
every later method is compared with). Shapes: weight [out, in], codes [out, in], scales and zeros [out, groups].

Departures: scales are rounded up to fp16 first; groups of 128 columns and 4 bits are the default, where the paper takes
whole tensors and 8 bits.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math.shapes import Float
from hasten.quant._grids import Triple, half, rounded
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    paper="1712.05877",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="MobileNets at 8 bits on Snapdragon CPUs: up to 2x less time at the same accuracy",
    claimed=2.0,
    identity={"bits": 16},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/round_to_nearest(bits=8)"),
    when="No calibration data, or 8 and 6 bits, where nothing better is needed.",
    when_not="Four bits and fewer: quant/gptq keeps more at the same size and speed.",
)


def naive_round_to_nearest(
    weight: Float[Tensor, "rows columns"], *, bits: int = 4, group: int = 128, symmetric: bool = False
) -> Triple:
    """The equation, weight by weight."""
    rows, columns = weight.shape
    groups, maximum = -(-columns // group), 2**bits - 1
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.zeros(rows, groups), torch.zeros(rows, groups)
    for n in range(rows):
        for g in range(groups):
            part = weight[n, g * group : (g + 1) * group].float()
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            if symmetric:
                high = max(-low, high)
                low = -high if low < 0 else low
            if low == high:
                low, high = -1.0, 1.0
            scale = half(torch.tensor(high - low) / maximum)
            zero = torch.tensor((maximum + 1) / 2) if symmetric else torch.round(-torch.tensor(low) / scale)
            scales[n, g], zeros[n, g] = scale, zero
            for k, value in enumerate(part):
                codes[n, g * group + k] = int(torch.clamp(torch.round(value / scale) + zero, 0, maximum))
    return codes, scales, zeros


def round_to_nearest(
    weight: Float[Tensor, "rows columns"], *, bits: int = 4, group: int = 128, symmetric: bool = False
) -> Triple:
    """As `naive_round_to_nearest`, for whole groups of columns at once."""
    return rounded(weight, bits, group, symmetric)


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Method):
    bits: int = option(4, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, 6, 8, FULL_BITS))
    group: int = option(128, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    symmetric: bool = option(False, "the zero point is the middle code")
    activations: int = option(8, "8: products round their inputs to 8 bits, 64 at a time; 32: not", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, statistic: None) -> Codes:
        group = whole_group(self.group, weight)
        codes, scales, zeros = round_to_nearest(weight, bits=self.bits, group=group, symmetric=self.symmetric)
        return Codes(codes, scales, zeros, group, self.bits, activations=self.activations)


METHOD = RoundToNearest
