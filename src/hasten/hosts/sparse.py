"""Linear layers that hold a weight with zeros, and multiply what remains.

`BlockSparseLinear` holds blocks and is faster than a dense layer for any number of tokens; `BitmapLinear` holds single
weights and is faster for up to eight tokens at a time, as in decoding. Both keep the places of the zeros when they are
`quantized` to eight bits.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.weights import linear_of
from hasten.kernels import bitmap, block_sparse, native


class _Sparse(nn.Module):
    """What both layers share: buffers but the bias keep their dtypes, and are checked when loaded."""

    kind: str
    keeps_zeros = True
    bias: Tensor | None

    def __init__(self, rows: int, columns: int, bias: Tensor | None, dtype: torch.dtype, held: dict[str, Any]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = columns, rows, dtype
        for name, tensor in held.items():
            self.register_buffer(name, None if tensor is None else tensor.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dense_weight(self) -> Tensor:
        """The weight [out, in], fp32."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses buffers that a kernel must not see.

        Raises:
            UsageError: they do not describe a weight of the layer's sizes.
        """
        raise NotImplementedError

    def dense(self) -> nn.Linear:
        """A plain linear layer with that weight in the dtype of the layer that was replaced."""
        return linear_of(self.dense_weight().to(self.dtype), self.bias).train(self.training)

    def fits(self, input: Tensor) -> Tensor:
        """The input; kernels trust its width.

        Raises:
            UsageError: it has another number of columns.
        """
        if input.shape[-1] != self.in_features:
            raise UsageError(f"the input has {input.shape[-1]} columns, the layer {self.in_features}")
        return input

    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kinds = {name: held.dtype for name, held in self._buffers.items() if held is not None and name != "bias"}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, kind in kinds.items():
            held, old = self._buffers[name], before[name]
            assert held is not None and old is not None
            if held.dtype != kind:
                self._buffers[name] = held.to(kind) if held.is_meta or old.is_meta else old.to(held.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not any(held.is_meta for held in self.buffers()):
            self.check()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.shape().items())

    def shape(self) -> dict[str, Any]:
        raise NotImplementedError


class BlockSparseLinear(_Sparse):
    """`y = x W^T + b` where W is zero but for blocks of r rows and c columns.

    Buffers, all of them in the state dict: `values`, `columns`, `starts`, for eight bits `scales` and `sums` (layout:
    `hasten.kernels.block_sparse`), and `bias` [out]. The output has the input's dtype. With `bits` 8 each token of the
    input is rounded to eight bits too.

    Args:
        block: (r, c).
        dtype: of the weight that was replaced; `dense` gives it back.
    """

    kind = "block_sparse"
    values: Tensor
    columns: Tensor
    starts: Tensor
    scales: Tensor | None
    sums: Tensor | None

    def __init__(
        self, held: dict[str, Any], bias: Tensor | None, *, rows: int, columns: int, block: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(rows, columns, bias, dtype, held)
        self.block = block

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, block: tuple[int, int] = (16, 1), bits: int = 32,
        dtype: torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """The layer of a weight [out, in] without its blocks that are all zero.

        Args:
            bits: 32 or 8. dtype: the weight's own where None.

        Raises:
            UsageError: blocks of more than 64 rows, or other bits.
        """
        names = ("values", "columns", "starts", "scales", "sums")
        held = dict(zip(names, block_sparse.pack(weight, *block, bits=bits), strict=True))
        rows, columns = weight.shape
        return cls(held, bias, rows=rows, columns=columns, block=(block[0], block[1]), dtype=dtype or weight.dtype)

    @classmethod
    def empty(
        cls, *, rows: int, columns: int, block: tuple[int, int], entries: int, bits: int, bias: bool, dtype: str,
        device: Any = None,
    ) -> Self:  # fmt: skip
        """A layer of zeros, to be filled by `load_state_dict`; takes what `shape` gives.

        Raises:
            UsageError: sizes that no layer has.
        """
        r, coded = block[0], bits == 8
        if not 1 <= r <= block_sparse.TALLEST or min(rows, columns) < 1 or entries < 0 or bits not in (8, 32):
            raise UsageError(f"there is no block-sparse layer of {rows}x{columns} in blocks of {r} rows, {bits} bits")
        bands = -(-rows // r)
        shape = (entries // block_sparse.GROUP, r, block_sparse.GROUP) if coded else (entries, r)
        held = {
            "values": torch.zeros(shape, dtype=torch.int8 if coded else torch.float32, device=device),
            "columns": torch.zeros(entries, dtype=torch.int32, device=device),
            "starts": torch.zeros(bands + 1, dtype=torch.int32, device=device),
            "scales": torch.zeros(bands * r, device=device) if coded else None,
            "sums": torch.zeros(bands * r, dtype=torch.int32, device=device) if coded else None,
        }
        kind = _dtype(dtype)
        held_bias = torch.zeros(rows, dtype=kind, device=device) if bias else None
        return cls(held, held_bias, rows=rows, columns=columns, block=(r, block[1]), dtype=kind)

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype is torch.int8 else 32

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        return {"rows": self.out_features, "columns": self.in_features, "block": list(self.block),
                "entries": len(self.columns), "bits": self.bits, "bias": self.bias is not None,
                "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers  # attribute access through nn.Module costs as much as a small product
        return block_sparse.linear(
            self.fits(input), held["values"], held["columns"], held["starts"], held["bias"],  # type: ignore[arg-type]
            held["scales"], held["sums"], rows=self.out_features,
        )  # fmt: skip

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        sizes = {"rows": self.out_features, "width": self.in_features}
        return block_sparse.expand(self.values, self.columns, self.starts, self.scales, **sizes)

    def quantized(self, bits: int = 8) -> "BlockSparseLinear":
        """The same layer in eight bits: its zeros stay, and products are of whole numbers."""
        made = self.from_dense(self.dense_weight(), self.bias, block=self.block, bits=bits, dtype=self.dtype)
        return made.train(self.training)

    def check(self) -> None:
        sizes = {"rows": self.out_features, "width": self.in_features}
        block_sparse.check(self.values, self.columns, self.starts, self.scales, self.sums, **sizes)

    def way(self) -> str:
        """What multiplies here; builds the kernel."""
        return _way(block_sparse.path(self.values.device))


class BitmapLinear(_Sparse):
    """`y = x W^T + b` where W has zeros anywhere.

    Buffers, all of them in the state dict: `values`, `bits`, `starts`, for eight bits `scales` (layout:
    `hasten.kernels.bitmap`), and `bias` [out]. The output has the input's dtype. More than eight tokens at a time are
    multiplied with a weight that is made dense for them, which takes a little longer than a dense layer.

    Args:
        dtype: of the weight that was replaced; `dense` gives it back.
    """

    kind = "bitmap"
    values: Tensor
    bits: Tensor
    starts: Tensor
    scales: Tensor | None

    def __init__(
        self, held: dict[str, Any], bias: Tensor | None, *, rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        super().__init__(rows, columns, bias, dtype, held)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, values: torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The layer of a weight [out, in] without its zeros.

        Args:
            values: fp32, bf16 or int8; bf16 for a bf16 weight and else fp32 where None. dtype: the weight's where None.

        Raises:
            UsageError: other values.
        """
        dtype = dtype or weight.dtype
        values = values or (torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)
        held = dict(zip(("values", "bits", "starts", "scales"), bitmap.pack(weight, values), strict=True))
        return cls(held, bias, rows=weight.shape[0], columns=weight.shape[1], dtype=dtype)

    @classmethod
    def empty(
        cls, *, rows: int, columns: int, numbers: int, values: str, bias: bool, dtype: str, device: Any = None
    ) -> Self:
        """A layer of zeros, to be filled by `load_state_dict`; takes what `shape` gives.

        Raises:
            UsageError: sizes that no layer has.
        """
        if min(rows, columns) < 1 or numbers < 0 or getattr(torch, values, None) not in bitmap.KINDS:
            raise UsageError(f"there is no bitmap layer of {rows}x{columns} with {numbers} values of {values}")
        kind, stored = _dtype(dtype), getattr(torch, values)
        held = {
            "values": torch.zeros(numbers + bitmap.PADDING, dtype=stored, device=device),
            "bits": torch.zeros(rows, 2 * (-(-columns // 16)), dtype=torch.uint8, device=device),
            "starts": torch.zeros(rows + 1, dtype=torch.int64, device=device),
            "scales": torch.zeros(rows, device=device) if stored is torch.int8 else None,
        }
        held_bias = torch.zeros(rows, dtype=kind, device=device) if bias else None
        return cls(held, held_bias, rows=rows, columns=columns, dtype=kind)

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        return {"rows": self.out_features, "columns": self.in_features, "numbers": len(self.values) - bitmap.PADDING,
                "values": str(self.values.dtype).removeprefix("torch."), "bias": self.bias is not None,
                "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers
        return bitmap.linear(
            self.fits(input), held["values"], held["bits"], held["starts"], held["bias"], held["scales"]  # type: ignore[arg-type]
        )  # fmt: skip

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return bitmap.expand(self.values, self.bits, self.starts, self.scales, width=self.in_features)

    def quantized(self, bits: int = 8) -> "BitmapLinear":
        """The same layer with values of eight bits, a scale for each row; its zeros stay.

        Raises:
            UsageError: other bits.
        """
        if bits != 8:
            raise UsageError(f"a bitmap layer has values of eight bits or none, not {bits}")
        made = self.from_dense(self.dense_weight(), self.bias, values=torch.int8, dtype=self.dtype)
        return made.train(self.training)

    def check(self) -> None:
        bitmap.check(self.values, self.bits, self.starts, self.scales, rows=self.out_features, width=self.in_features)

    def way(self) -> str:
        """What multiplies a few tokens here; builds the kernel."""
        return _way(bitmap.path(1, self.values.device))


def _way(path: str) -> str:
    return f"native, {native.capability()}" if path == "native" else "PyTorch" if path == "torch" else path


def _dtype(name: str) -> torch.dtype:
    given = getattr(torch, name, None)
    if not isinstance(given, torch.dtype) or not given.is_floating_point:
        raise UsageError(f"{name!r} is no dtype of a weight")
    return given
