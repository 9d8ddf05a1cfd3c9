"""A quantized linear layer whose inputs are multiplied by a factor each before the product."""

from typing import Any, Self

import torch
from torch import Tensor

from hasten.quant._linear import Codes, QuantLinear


class BalancedLinear(QuantLinear):
    """`y = (x * factors) W^T + b`; `factors` [in], fp32, is one more buffer of the state dict."""

    kind = "balanced"
    factors: Tensor

    def __init__(self, packed: Tensor, *args: Any, columns: int, factors: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(packed, *args, columns=columns, **kwargs)
        given = torch.ones(columns, device=packed.device) if factors is None else factors.float().clone()
        self.register_buffer("factors", given)

    @classmethod
    def of(cls, codes: Codes, factors: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Self:
        """A layer of codes without order, tables, levels and outliers."""
        made = codes.layer(bias, dtype)
        return cls(made.packed, made.scales, made.zeros, made.bias, bits=codes.bits, group=codes.group, dtype=dtype,
                   columns=made.in_features, activations=codes.activations, factors=factors)  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.factors.to(input.dtype))

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out, in] with the factors in it, fp32."""
        return super().dense_weight() * self.factors.float()
