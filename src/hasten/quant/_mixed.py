"""A linear layer whose weight has 2-bit codes, and two bits more in some groups of 64 columns of each row."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.weights import linear_of
from hasten.kernels import low_plane, lowbit, native
from hasten.math import packing
from hasten.quant._linear import EXACT, ROUNDED

GROUP = low_plane.GROUP
_EXACT = ("scales", "zeros")  # stay as they are whatever the model becomes


@dataclasses.dataclass(frozen=True)
class MixedCodes:
    """A quantized weight [out, in] in groups of 64 columns.

        w[n, k] = s (c - z),    of a group with 4 bits: c = 4 high + low, else c = high

    Attributes:
        high: integers 0 to 3 [out, in].
        low: uint8 [out, slots, 16], `places`: uint8 [out, slots]; as `kernels.low_plane` has them.
        scales, zeros: fp16 [out, groups], of `high`: s and z, in groups with 4 bits 4 s and z / 4.
        block, wide: groups of a run, and how many of them have 4 bits.
        activations: as `Codes` has it.
    """

    high: Tensor
    low: Tensor
    places: Tensor
    scales: Tensor
    zeros: Tensor
    block: int
    wide: int
    activations: int = EXACT

    def split(self, sizes: list[int]) -> list["MixedCodes"]:
        """Parts with these numbers of rows."""
        names = ("high", "low", "places", "scales", "zeros")
        parts = zip(*(getattr(self, name).split(sizes) for name in names), strict=True)
        return [dataclasses.replace(self, **dict(zip(names, part, strict=True))) for part in parts]

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> "MixedLinear":
        packed = packing.pack(self.high, 2)
        low, places, scales, zeros = (one.clone() for one in (self.low, self.places, self.scales, self.zeros))
        return MixedLinear(packed, low, places, scales, zeros, bias, block=self.block, wide=self.wide,
                           columns=self.high.shape[1], dtype=dtype, activations=self.activations)  # fmt: skip


class MixedLinear(nn.Module):
    """`y = x W^T + b` with W as `MixedCodes` says: a product of 2-bit codes, to which the low bits are added.

    Buffers, all of them in the state dict: `packed` uint8 [out, bytes], `low`, `places`, `scales`, `zeros`, `bias`.
    Each is read once for a product: 2 + 2 wide / block bits of codes for each weight, 32 / 64 of statistics, and a byte
    for each group of 4 bits. The output has the input's dtype.
    """

    kind = "mixed"
    packed: Tensor
    low: Tensor
    places: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, low: Tensor, places: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, *,
        block: int, wide: int, columns: int, dtype: torch.dtype, activations: int = EXACT,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block, self.wide, self.dtype, self.activations = block, wide, dtype, activations
        self.in_features, self.out_features = columns, packed.shape[0]
        parts = {"packed": packed, "low": low, "places": places, "scales": scales.half(), "zeros": zeros.half()}
        for name, part in parts.items():
            self.register_buffer(name, part.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def empty(
        cls, *, block: int, wide: int, columns: int, rows: int, bias: bool, dtype: str, activations: int = EXACT,
        device: Any = None,
    ) -> Self:  # fmt: skip
        """A layer of zero codes, to be filled by `load_state_dict`; takes what `shape` gives.

        Raises:
            UsageError: sizes that no layer has.
        """
        given = getattr(torch, dtype, None)
        if not 0 < wide <= block or min(columns, rows) < 1 or activations not in (EXACT, ROUNDED):
            raise UsageError(f"there is no quantized layer {rows} x {columns} with {wide} groups of 4 bits in {block}")
        if not isinstance(given, torch.dtype) or not given.is_floating_point:
            raise UsageError(f"{dtype!r} is no dtype of a weight")
        slots, groups = low_plane.slots(columns, block, wide), -(-columns // GROUP)
        places = torch.arange(slots, device=device).remainder(wide).to(torch.uint8).expand(rows, -1)
        scales, zeros = (torch.zeros(rows, groups, dtype=torch.float16, device=device) for _ in range(2))
        return cls(
            torch.zeros(rows, packing.row_bytes(columns, 2), dtype=torch.uint8, device=device),
            torch.zeros(rows, slots, low_plane.BYTES, dtype=torch.uint8, device=device),
            places, scales, zeros,
            torch.zeros(rows, dtype=given, device=device) if bias else None,
            block=block, wide=wide, columns=columns, dtype=given, activations=activations,
        )  # fmt: skip

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        return {"block": self.block, "wide": self.wide, "columns": self.in_features, "rows": self.out_features,
                "bias": self.bias is not None, "dtype": str(self.dtype).removeprefix("torch."),
                "activations": self.activations}  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers  # attribute access through nn.Module costs as much as a small product
        x = input if input.dtype is torch.float32 else input.float()
        scales = held["scales"]
        y = lowbit.linear(x, held["packed"], scales, held["zeros"], held["bias"], bits=2, group=GROUP,  # type: ignore[arg-type]
                          columns=self.in_features, activations=self.activations)  # fmt: skip
        y = low_plane.add(y, x, held["low"], held["places"], scales, block=self.block, wide=self.wide,  # type: ignore[arg-type]
                          activations=self.activations)  # fmt: skip
        return y if input.dtype is torch.float32 else y.to(input.dtype)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out, in] that the codes stand for, fp32."""
        high = lowbit.dequantize(self.packed, self.scales, self.zeros, bits=2, group=GROUP, columns=self.in_features)
        low = low_plane.dense(self.low, self.places, self.scales, self.block, self.wide, self.in_features)
        return high + low

    def dense(self) -> nn.Linear:
        """A plain linear layer with that weight in the dtype of the layer that was replaced."""
        return linear_of(self.dense_weight().to(self.dtype), self.bias).train(self.training)

    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def way(self) -> str:
        """What multiplies the codes here; builds the kernels."""
        both = lowbit.path(2, GROUP, self.packed.device), low_plane.path(self.packed.device)
        return f"native, {native.capability()}" if both == ("native", "native") else "PyTorch"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not self.packed.is_meta:
            low_plane.check(self.low, self.places, self.scales, self.block, self.wide, self.in_features)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"bits=2, {self.wide} of {self.block} groups 4")  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: self._buffers[name] for name in _EXACT}
        super()._apply(fn, recurse)
        for name, held in exact.items():
            moved = self._buffers[name]
            assert moved is not None and held is not None
            self._buffers[name] = moved.to(held.dtype) if held.is_meta or moved.is_meta else held.to(self.packed.device)
        return self
