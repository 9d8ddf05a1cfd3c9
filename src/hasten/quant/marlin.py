"""MARLIN: four-bit weights whose product stays faster than the dense one from one row of inputs to dozens.

    y[m, n] = sum_k x[m, k] * s[n, k // group] * (q[n, k] - 8) + bias[n]

The codes q are made by another method (the paper: GPTQ), symmetric, with one scale s for each 128 columns of a row or
for the whole row. What the method fixes is how they lie in memory and are multiplied: reordered once
so that an `and` and a shift unpack them in the order of the products, read once from memory for the whole batch, made
weights in registers or the nearest cache, sums in fp32. Inputs are not rounded. Shapes: x [..., in], q [out, in], s
[out, groups].

Departures: CPUs, not GPUs: two kernels, one for up to 8 rows that reads codes straight into registers and one for more
that unpacks 16 rows of W in the L1 cache, in the place of asynchronous copies and striped partitions. Weights are fp32
when they are multiplied, not fp16. The variant with 2:4 sparse weights is left out. `activations=8` rounds
inputs to 8 bits, 64 at a time, which the paper does not.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.kernels import lowbit
from hasten.math import packing
from hasten.math.shapes import Float, Int
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models",
    paper="2408.11743",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Close to 4x per layer over FP16 up to batch 16 to 32; up to 2.8x end to end in vLLM",
    claimed=2.8,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/marlin"),
    when="Generation for several sequences at once, layers from about 1000 inputs up, inputs that must not be rounded.",
    when_not="Hundreds of tokens at a time, where arithmetic takes the time and 8-bit inputs (quant/zeroquant) help.",
)

BITS, MIDDLE = 4, 8


def naive_marlin(
    x: Float[Tensor, "count columns"],
    codes: Int[Tensor, "rows columns"],
    scales: Float[Tensor, "rows groups"],
    bias: Float[Tensor, "rows"] | None = None,
    *,
    group: int = 128,
) -> Tensor:
    """The equation, number by number."""
    out = []
    for row in x.float():
        for n in range(len(codes)):
            terms = [row[k] * scales[n, k // group] * (int(codes[n, k]) - MIDDLE) for k in range(len(row))]
            out.append(torch.stack(terms).sum() + (0 if bias is None else bias[n].float()))
    return torch.stack(out).view(len(x), len(codes)).to(x.dtype)


def marlin(
    x: Float[Tensor, "count columns"],
    codes: Int[Tensor, "rows columns"],
    scales: Float[Tensor, "rows groups"],
    bias: Float[Tensor, "rows"] | None = None,
    *,
    group: int = 128,
) -> Tensor:
    """The same through packed codes and the kernels of `hasten.kernels.lowbit`.

    Args:
        codes: 0 to 15. group: columns that share a scale.
    """
    zeros = torch.full_like(scales, MIDDLE)
    packed = packing.pack(codes, BITS)
    return lowbit.linear(x, packed, scales, zeros, bias, bits=BITS, group=group, columns=codes.shape[1])


@dataclasses.dataclass(frozen=True)
class Marlin(Method):
    base: Method = option("quant/gptq", "the method that makes the codes; its bits, group and symmetric are set here")
    bits: int = option(BITS, "bits of a weight; 16 leaves the model as it is", choices=(BITS, FULL_BITS))
    group: int = option(128, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    activations: int = option(32, "32: inputs as they are; 8: rounded to 8 bits, 64 at a time", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        known = {field.name for field in dataclasses.fields(self.base)}
        if missing := [name for name in ("bits", "group", "symmetric") if name not in known]:
            return [f"base {self.base.name} has no option {missing[0]}: give a method that rounds uniformly, such as "
                    "quant/gptq or quant/round_to_nearest"]  # fmt: skip
        return group_problems(self.group)

    @property
    def statistic(self) -> str:
        """What the base looks at."""
        return str(getattr(self.base, "statistic", "hessian")) if "calibration" in self.base.card.needs else "none"

    def quantize(self, weight: Tensor, statistic: Tensor | None) -> Codes:
        group = whole_group(self.group, weight)
        base = dataclasses.replace(self.base, bits=self.bits, group=group, symmetric=True)  # type: ignore[call-arg]
        found = base.quantize(weight, statistic)  # type: ignore[attr-defined]
        if type(found) is not Codes or found.tables is not None or not bool((found.zeros == MIDDLE).all()):
            raise UsageError(f"{base.name} gives no symmetric {self.bits}-bit codes: take another base")
        return dataclasses.replace(found, activations=self.activations)


METHOD = Marlin
