"""A linear layer with int8 weights that rounds its inputs to int8, and the form that methods hand over."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.weights import linear_of
from hasten.kernels import int8
from hasten.math.shapes import Float, Int

_EXACT = ("scales", "divisors")  # stay fp32 whatever the model becomes
DYNAMIC, STATIC, CODES = "dynamic", "static", "codes"


def rowwise(
    weight: Float[Tensor, "rows columns"], bits: int = 8, shrink: int = 1
) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows"]]:
    """Symmetric codes int8 and one scale for each row: the nearest multiples of max |w| / (2^(bits-1) - 1).

    Args:
        shrink: how many ranges are tried, each 1 % of the largest smaller; the one of least squared error is taken.
    """
    most, w = 2 ** (bits - 1) - 1, weight.float()
    top = w.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * most) if w.shape[1] else w.new_ones(len(w))
    scales, least = top / most, torch.full_like(top, torch.inf)
    for step in range(shrink if shrink > 1 else 0):
        scale = top * (1 - step / 100) / most
        error = (torch.clamp(torch.round(w / scale[:, None]), -most, most) * scale[:, None] - w).square().sum(1)
        scales, least = torch.where(error < least, scale, scales), torch.minimum(error, least)
    return torch.clamp(torch.round(w / scales[:, None]), -most, most).to(torch.int8), scales


@dataclasses.dataclass(frozen=True)
class Int8:
    """A weight in int8: `w[n, k] = scales[n] * codes[n, k] / divisors[k]`.

    Attributes:
        codes: int8 [out, in], -127 to 127.
        scales: fp32 [out].
        inputs: how they become int8. dynamic: each token by its largest number. static: divided by `divisors`.
            codes: they are int8 already (a `hasten.quant._norms.Int8Norm` makes them).
        divisors: fp32 [1] or [in] for static inputs and [in] for codes, all above 0: what inputs are, or were, divided
            by. None for dynamic inputs, where it stands for 1.
        source: int64 [columns] for codes where inputs take several columns: the input that a column belongs to. The
            codes of an input's columns add up to its number, so each column has the whole weight.
    """

    codes: Tensor
    scales: Tensor
    inputs: str = DYNAMIC
    divisors: Tensor | None = None
    source: Tensor | None = None

    def split(self, sizes: list[int]) -> list["Int8"]:
        """Parts with these numbers of rows."""
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), strict=True)
        return [dataclasses.replace(self, codes=codes, scales=scales) for codes, scales in parts]

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> "Int8Linear":
        """The layer; `dtype`: of the weight that it replaces."""
        return Int8Linear(int8.pack(self.codes), self.scales.clone(), int8.sums(self.codes), bias, self.divisors,
                          self.source, columns=self.codes.shape[1], inputs=self.inputs, dtype=dtype)  # fmt: skip


class Int8Linear(nn.Module):
    """`y = x W^T + b` with W and x in int8, as `Int8` says; products and sums of integers (`kernels.int8`).

    Buffers, all of them in the state dict: `packed` int8 [out / 16, columns / 4, 16, 4], `scales` fp32 [out], `sums`
    int32 [out], `bias` [out], and where there are such, `divisors` fp32 and `source` int64. The output has the input's
    dtype, for inputs that are codes that of the layer which was replaced.

    Args:
        columns: of the codes. dtype: of the weight that was replaced; `dense` gives it back.
    """

    kind = "int8"
    packed: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor | None
    divisors: Tensor | None
    source: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        sums: Tensor,
        bias: Tensor | None,
        divisors: Tensor | None = None,
        source: Tensor | None = None,
        *,
        columns: int,
        inputs: str,
        dtype: torch.dtype,
        features: int | None = None,
    ) -> None:
        super().__init__()
        self.columns, self.inputs, self.dtype = columns, inputs, dtype
        self.in_features = features or (columns if source is None else int(source.max()) + 1)
        self.out_features = len(scales)
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales", scales.float().contiguous())
        self.register_buffer("sums", sums.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("divisors", None if divisors is None else divisors.detach().float().clone())
        self.register_buffer("source", None if source is None else source.clone())

    @classmethod
    def empty(
        cls, *, rows: int, columns: int, inputs: str, bias: bool, dtype: str, divisors: int = 0,
        features: int | None = None, device: Any = None,
    ) -> Self:  # fmt: skip
        """A layer of zero codes, to be filled by `load_state_dict`; takes what `shape` gives.

        Raises:
            UsageError: sizes or words that no layer has.
        """
        given = getattr(torch, dtype, None)
        if not isinstance(given, torch.dtype) or not given.is_floating_point:
            raise UsageError(f"{dtype!r} is no dtype of a weight")
        if min(rows, columns, features or 1) < 1 or columns > int8.MOST_COLUMNS:
            raise UsageError(f"there is no int8 layer of {rows} x {columns}")
        if inputs not in (DYNAMIC, STATIC, CODES) or (inputs == DYNAMIC) != (divisors == 0):
            raise UsageError(f"an int8 layer with {inputs!r} inputs does not have {divisors} divisors")
        codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        return cls(
            int8.pack(codes), torch.zeros(rows, device=device), int8.sums(codes),
            torch.zeros(rows, dtype=given, device=device) if bias else None,
            torch.ones(divisors, device=device) if divisors else None,
            torch.zeros(columns, dtype=torch.int64, device=device) if features else None,
            columns=columns, inputs=inputs, dtype=given, features=features,
        )  # fmt: skip

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        return {"rows": self.out_features, "columns": self.columns, "inputs": self.inputs,
                "bias": self.bias is not None, "dtype": str(self.dtype).removeprefix("torch."),
                "divisors": 0 if self.divisors is None else len(self.divisors),
                "features": None if self.source is None else self.in_features}  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers  # attribute access through nn.Module costs as much as a small product
        if self.inputs == CODES:
            return int8.linear(input, held["packed"], held["scales"], held["sums"], held["bias"], dtype=self.dtype)  # type: ignore[arg-type]
        return int8.linear(input, held["packed"], held["scales"], held["sums"], held["bias"], scale=held["divisors"])  # type: ignore[arg-type]

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out, in] that the codes stand for, fp32, before inputs were divided."""
        weight = int8.unpack(self.packed, self.out_features, self.columns).float() * self.scales[:, None]
        if self.divisors is not None:
            weight = weight / self.divisors
        if self.source is None:
            return weight
        count = weight.new_zeros(self.in_features).index_add_(0, self.source, weight.new_ones(self.columns))
        return weight.new_zeros(len(weight), self.in_features).index_add_(1, self.source, weight) / count

    def dense(self) -> nn.Linear:
        """A plain linear layer with that weight in the dtype of the layer that was replaced."""
        return linear_of(self.dense_weight().to(self.dtype), self.bias).train(self.training)

    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def way(self) -> str:
        """What multiplies the codes here; builds the kernel."""
        found = int8.path(self.packed.device)
        return f"native, {int8.instruction_set()}" if found == "native" else "PyTorch" if found == "torch" else found

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.packed.is_meta:
            return
        if self.source is not None and not 0 <= int(self.source.min()) <= int(self.source.max()) < self.in_features:
            raise UsageError("an int8 layer names an input that it does not have: the file is damaged")
        if int(self.packed.min()) < -int8.MOST:
            raise UsageError("an int8 layer holds the code -128, which the kernels do not take: the file is damaged")

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"inputs={self.inputs}")  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: held for name in _EXACT if (held := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, held in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            away = held.is_meta or moved.is_meta
            self._buffers[name] = moved.to(held.dtype) if away else held.to(self.packed.device)
        return self
