"""BitMoD: each group of weights takes, of four small data types, the one that fits it with the least error.

The data types are FP3 (0, +-1, +-2, +-4) and FP4 (0, +-1, +-2, +-3, +-4, +-6, +-8, +-12), whose code of minus zero is
given to a special value v, one of four for each group G (paper, section III):

    v in {3, -3, 6, -6} (FP3) or {10, -10, 16, -16} (FP4),    s = max |G| / max |D_v|,    D_v: the values with v
    q(w) = s * nearest(D_v, w / s),    and of the four, v with the least sum over G of (q(w) - w)^2

(the paper writes FP4 in halves: 5 and 8). The scales of a row are then whole multiples, 1 to 255, of its largest / 255
(section III). Shapes: weight [out, in], codes [out, in] (places in the ascending D_v), scales [out, groups], kinds
[out, groups] (which v, in the order above).

Departures: weights are coded again with their rounded scale, which the paper leaves open. Scales use all 255 steps of
an unsigned byte, the paper those of a signed one. The paper's bit-serial processor does not exist here: a product looks
codes up in the group's table and is exact in its inputs. A group's kind takes four bytes here, and two bits there.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math.shapes import Float, Int
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration",
    paper="2411.11745",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="On an accelerator of its own, 1.69x over ANT and 1.48x over OliVe; under 0.5% accuracy lost at 4 bits",
    claimed=1.69,
    identity={"bits": 16},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/bitmod(bits=4)"),
    when="Three or four bits without calibration data, where rounding to uniform steps loses too much.",
    when_not="With calibration data quant/gptq keeps more; large batches, where look-ups cost more than they save.",
)

SPECIAL = {3: (3.0, -3.0, 6.0, -6.0), 4: (10.0, -10.0, 16.0, -16.0)}
_BASE = {3: (0.0, 1, 2, 4), 4: (0.0, 1, 2, 3, 4, 6, 8, 12)}
STEPS = 255
Kinds = tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows groups"], Int[Tensor, "rows groups"]]


def data_types(bits: int) -> Float[Tensor, "4 entries"]:
    """The values of the four data types, each in ascending order."""
    base = sorted({sign * value for value in _BASE[bits] for sign in (1, -1)})
    return torch.tensor([sorted([*base, special]) for special in SPECIAL[bits]])


def naive_bitmod(
    weight: Float[Tensor, "rows columns"], *, bits: int = 4, group: int = 128, scale_bits: int = 8
) -> Kinds:
    """The equation, weight by weight."""
    rows, columns = weight.shape
    groups, tables = -(-columns // group), data_types(bits)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales, kinds = torch.zeros(rows, groups), torch.zeros(rows, groups, dtype=torch.int32)

    def code(value: Tensor, scale: Tensor, table: Tensor) -> int:
        return int((table - (value / scale if scale > 0 else 0)).abs().argmin())

    for n in range(rows):
        parts = weight[n].float().split(group)
        for g, part in enumerate(parts):
            least = torch.inf
            for kind, table in enumerate(tables):
                scale = part.abs().max() / table.abs().max()
                error = sum(float(scale * table[code(w, scale, table)] - w) ** 2 for w in part)
                if error < least:
                    least, scales[n, g], kinds[n, g] = error, scale, kind
        if scale_bits == 8 and scales[n].max() > 0:
            step = scales[n].max() / STEPS
            for g in range(groups):
                if scales[n, g] > 0:
                    scales[n, g] = step * max(1, round(float(scales[n, g] / step)))
        for g, part in enumerate(parts):
            for k, w in enumerate(part):
                codes[n, g * group + k] = code(w, scales[n, g], tables[kinds[n, g]])
    return codes, scales, kinds


def bitmod(weight: Float[Tensor, "rows columns"], *, bits: int = 4, group: int = 128, scale_bits: int = 8) -> Kinds:
    """As `naive_bitmod`, for all groups at once and one data type after another.

    Args:
        bits: 3 or 4. group: columns that share a scale and a data type; the last group may have fewer.
        scale_bits: 8: each row's scales become whole multiples of a step; 32: they stay.
    """
    columns = weight.shape[1]
    w = F.pad(weight.float(), (0, -columns % group)).unflatten(1, (-1, group))
    tables = data_types(bits).to(w.device)
    largest = w.abs().amax(2)
    scales, kinds = torch.zeros_like(largest), torch.zeros_like(largest, dtype=torch.int32)
    least = torch.full_like(largest, torch.inf)
    for kind, table in enumerate(tables):
        scale = largest / table.abs().max()
        error = (scale[..., None] * table[_nearest(w, scale, table)] - w).square().sum(2)
        better = error < least
        least = torch.where(better, error, least)
        scales, kinds = torch.where(better, scale, scales), torch.where(better, kind, kinds)
    if scale_bits == 8:
        step = scales.amax(1, keepdim=True) / STEPS
        scales = torch.where(scales > 0, step * (scales / step).round().clamp(min=1), 0)
    codes = torch.zeros_like(w, dtype=torch.uint8)
    for kind, table in enumerate(tables):
        codes = torch.where((kinds == kind)[..., None], _nearest(w, scales, table).to(torch.uint8), codes)
    return codes.flatten(1)[:, :columns].contiguous(), scales, kinds


def _nearest(w: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The places in an ascending table of the values nearest to w / scale; of two as near, the lower."""
    x = torch.where(scale[..., None] > 0, w / scale[..., None], 0)
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


@dataclasses.dataclass(frozen=True)
class BitMoD(Method):
    bits: int = option(4, "bits of a weight, 3 or 4; 16 leaves the model as it is", choices=(3, 4, FULL_BITS))
    group: int = option(
        128, "columns that share a scale and a data type, a power of two from 16 up; 0: the row", least=0
    )
    scale_bits: int = option(8, "bits of a group's scale; 32: not rounded", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, statistic: None) -> Codes:
        group = whole_group(self.group, weight)
        codes, scales, kinds = bitmod(weight, bits=self.bits, group=group, scale_bits=self.scale_bits)
        tables, levels = data_types(self.bits).to(weight.device), None
        if self.scale_bits == 8:
            step = scales.amax(1, keepdim=True) / STEPS
            scales = torch.where(step > 0, (scales / step).round(), 0).to(torch.uint8)
            levels = F.pad(step[:, None].expand(-1, -(-kinds.shape[1] // 16), -1), (0, 3))
        return Codes(codes, scales, kinds, group, self.bits, tables=tables, levels=levels)


METHOD = BitMoD
