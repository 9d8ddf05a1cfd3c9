"""A quantized linear layer whose inputs are rounded to 6 bits before the product."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.math.shapes import Float
from hasten.quant._linear import EXACT, Codes, QuantLinear

BITS, RUN = 6, 128  # columns of an input that share a scale


def round_inputs(x: Float[Tensor, "... columns"], bits: int = BITS, run: int = RUN) -> Float[Tensor, "... columns"]:
    """x in fp32, rounded to whole numbers from -(2^(bits-1) - 1) to 2^(bits-1) - 1 times one scale for each run."""
    columns, most = x.shape[-1], 2 ** (bits - 1) - 1
    x = x.float() if columns % run == 0 else F.pad(x.float(), (0, -columns % run))
    parts = x.unflatten(-1, (-1, run))
    step = parts.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(most)
    return (parts / step).round().mul(step).flatten(-2)[..., :columns]


@dataclasses.dataclass(frozen=True)
class SixBitInputs(Codes):
    """`Codes` whose layer rounds its inputs to 6 bits, 128 at a time, and multiplies them exactly."""

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> "SixBitLinear":
        plain = dataclasses.replace(self, activations=EXACT)
        made = Codes.layer(plain, bias, dtype)
        return SixBitLinear(made.packed, made.scales, made.zeros, made.bias, made.order, bits=self.bits,
                            group=self.group, columns=made.in_features, dtype=dtype)  # fmt: skip


class SixBitLinear(QuantLinear):
    """A quantized layer that rounds its inputs to 6 bits, 128 at a time."""

    kind = "six_bit_inputs"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(round_inputs(input)).to(input.dtype)

    def way(self) -> str:
        return f"{super().way()}, inputs rounded to 6 bits first"
