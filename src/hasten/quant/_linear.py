"""A linear layer that holds its weight as packed codes and multiplies them, and the form that methods hand over."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.weights import linear_of
from hasten.kernels import csr, lowbit, native
from hasten.math import packing

_EXACT = ("scales", "zeros", "tables", "levels", "outlier_values")  # stay as they are whatever the model becomes
EXACT, ROUNDED = 32, 8  # bits of the activations that a product takes


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A few weights that are held apart, [out, in] in compressed rows; they are added to what the codes stand for.

    Attributes:
        values: fp32 [entries]; `columns`: int32 [entries]; `starts`: int32 [out + 1], the first entry of each row.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> "Sparse":
        """The non-zeros of a matrix [out, in]."""
        rows, columns = dense.nonzero(as_tuple=True)
        starts = torch.zeros(len(dense) + 1, dtype=torch.int64, device=dense.device)
        starts[1:] = torch.bincount(rows, minlength=len(dense)).cumsum(0)
        return cls(dense[rows, columns].float(), columns.int(), starts.int())

    def dense(self, columns: int) -> Tensor:
        """fp32 [out, columns]."""
        rows = torch.repeat_interleave(
            torch.arange(len(self.starts) - 1, device=self.starts.device), self.starts.diff()
        )
        made = torch.zeros(len(self.starts) - 1, columns, device=self.values.device)
        return made.index_put_((rows, self.columns.long()), self.values.float(), accumulate=True)

    def split(self, sizes: list[int]) -> list["Sparse"]:
        found, row = [], 0
        for size in sizes:
            start, end = int(self.starts[row]), int(self.starts[row + size])
            part = slice(start, end)
            starts = self.starts[row : row + size + 1] - start
            found.append(Sparse(self.values[part].clone(), self.columns[part].clone(), starts.clone()))
            row += size
        return found


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized weight: `w[n, k] = scales[n, k // group] * (codes[n, k] - zeros[n, k // group])`.

    Attributes:
        codes: integers [out, in]; with `order`, column k belongs to input `order[k]`.
        scales, zeros: fp32 [out, groups].
        group: columns that share a scale. Powers of two from 16 up have a native kernel.
        bits: of a code: 2, 3, 4, 6 or 8.
        order: int64 [in], or None where columns are in the order of the inputs.
        tables: fp32 [tables, 2^bits] where codes are entries of look-up tables, up to 4 bits; then `zeros` is int32,
            the table of each group: `w[n, k] = scales[n, g] * tables[zeros[n, g]][codes[n, k]]`.
        levels: fp32 [out, ceil(groups / 16), 4] where statistics are quantized themselves; `scales` and `zeros` are
            then uint8, and with (a, b, c, d) of each 16 groups, scale = a (scales - b), zero = c (zeros - d).
        outliers: weights that are added, columns in the order of the codes.
        activations: 32: products take the inputs as they are; 8: inputs are rounded to 8 bits, 64 at a time.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int
    bits: int
    order: Tensor | None = None
    tables: Tensor | None = None
    levels: Tensor | None = None
    outliers: Sparse | None = None
    activations: int = EXACT

    def split(self, sizes: list[int]) -> list["Codes"]:
        """Parts with these numbers of rows; tables that only other parts use are left out."""
        levels = [None] * len(sizes) if self.levels is None else self.levels.split(sizes)
        outliers = [None] * len(sizes) if self.outliers is None else self.outliers.split(sizes)
        parts = []
        for codes, scales, zeros, level, outlier in zip(
            self.codes.split(sizes), self.scales.split(sizes), self.zeros.split(sizes), levels, outliers, strict=True
        ):
            tables = self.tables
            if tables is not None:
                used, zeros = zeros.unique(return_inverse=True)
                tables, zeros = tables[used.long()], zeros.int()
            parts.append(dataclasses.replace(self, codes=codes, scales=scales, zeros=zeros, tables=tables,
                                             levels=level, outliers=outlier))  # fmt: skip
        return parts

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> "QuantLinear":
        packed = packing.pack(self.codes, self.bits)
        sizes = {"bits": self.bits, "group": self.group, "columns": self.codes.shape[1], "dtype": dtype}
        more = {"tables": self.tables, "levels": self.levels, "outliers": self.outliers}
        return QuantLinear(packed, self.scales.clone(), self.zeros.clone(), bias, self.order, **more, **sizes,  # type: ignore[arg-type]
                           activations=self.activations)  # fmt: skip


class QuantLinear(nn.Module):
    """`y = x W^T + b` with W as `Codes` says.

    Buffers, all of them in the state dict: `packed` uint8 [out, bytes] (layout: `hasten.math.packing`), `scales` and
    `zeros` [out, groups] (in the smallest types that hold them exactly; zeros [1, 1] where all are equal), `bias`
    [out], and where there are such, `order` int64 [in], `tables`, `levels`,
    `outlier_values` fp32, `outlier_columns` and `outlier_starts` int32. The output has the input's dtype.

    Args:
        dtype: of the weight that was replaced; `dense` gives it back.
    """

    kind = "codes"
    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    order: Tensor | None
    tables: Tensor | None
    levels: Tensor | None
    outlier_values: Tensor | None
    outlier_columns: Tensor
    outlier_starts: Tensor

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        order: Tensor | None = None,
        *,
        bits: int,
        group: int,
        columns: int,
        dtype: torch.dtype,
        tables: Tensor | None = None,
        levels: Tensor | None = None,
        outliers: Sparse | None = None,
        activations: int = EXACT,
    ) -> None:
        super().__init__()
        self.bits, self.group, self.dtype, self.activations = bits, group, dtype, activations
        self.in_features, self.out_features = columns, packed.shape[0]
        self.register_buffer("packed", packed.contiguous())
        if levels is None and tables is None:
            scales, zeros = lowbit.compact(scales.float(), zeros.float())
        elif levels is None:
            scales = lowbit.compact(scales.float(), torch.zeros(1, 1))[0]
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zeros", zeros.contiguous())
        self.register_buffer("order", order)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("tables", None if tables is None else tables.float().contiguous())
        self.register_buffer("levels", None if levels is None else levels.float().contiguous())
        self.register_buffer("outlier_values", None if outliers is None else outliers.values.contiguous())
        self.register_buffer("outlier_columns", None if outliers is None else outliers.columns.contiguous())
        self.register_buffer("outlier_starts", None if outliers is None else outliers.starts.contiguous())

    @classmethod
    def empty(
        cls,
        *,
        bits: int,
        group: int,
        columns: int,
        rows: int,
        bias: bool,
        order: bool,
        dtype: str,
        tables: int = 0,
        levels: bool = False,
        outliers: int | None = None,
        activations: int = EXACT,
        statistics: tuple[str, str] = ("float32", "float32"),
        one_zero: bool = False,
        device: Any = None,
    ) -> Self:
        """A layer of zero codes, to be filled by `load_state_dict`; takes what `shape` gives.

        Raises:
            UsageError: sizes that no layer has.
        """
        if bits not in packing.BITS or activations not in (EXACT, ROUNDED) or min(group, columns, rows) < 1:
            raise UsageError(f"there is no quantized layer of {bits} bits, {rows} x {columns} in groups of {group}")
        given = getattr(torch, dtype, None)
        if not isinstance(given, torch.dtype) or not given.is_floating_point:
            raise UsageError(f"{dtype!r} is no dtype of a weight")
        groups, where = -(-columns // group), {"device": device}
        if not {"float32", "float16", "uint8", "int32"}.issuperset(statistics):
            raise UsageError(f"{statistics} are no types of scales and zero points")
        scale, zero = (getattr(torch, one) for one in statistics)
        sparse = None
        if outliers is not None:
            sparse = Sparse(torch.zeros(outliers, **where), torch.zeros(outliers, dtype=torch.int32, **where),
                            torch.zeros(rows + 1, dtype=torch.int32, **where))  # fmt: skip
        made = cls(
            torch.zeros(rows, packing.row_bytes(columns, bits), dtype=torch.uint8, **where),
            torch.zeros(rows, groups, dtype=scale, **where),
            torch.zeros(rows, groups, dtype=zero, **where),
            torch.zeros(rows, dtype=given, **where) if bias else None,
            torch.arange(columns, **where) if order else None,
            bits=bits, group=group, columns=columns, dtype=given, outliers=sparse, activations=activations,
            tables=torch.zeros(tables, 2**bits, **where) if tables else None,
            levels=torch.zeros(rows, -(-groups // 16), 4, **where) if levels else None,
        )  # fmt: skip
        made.scales = torch.zeros(rows, groups, dtype=scale, **where)
        made.zeros = torch.zeros((1, 1) if one_zero else (rows, groups), dtype=zero, **where)
        return made

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        found: dict[str, Any] = {"bits": self.bits, "group": self.group, "columns": self.in_features,
                 "rows": self.out_features, "bias": self.bias is not None, "order": self.order is not None,
                 "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip
        if self.tables is not None:
            found["tables"] = len(self.tables)
        if self.levels is not None:
            found["levels"] = True
        if self.outlier_values is not None:
            found["outliers"] = len(self.outlier_values)
        if self.activations != EXACT:
            found["activations"] = self.activations
        found["statistics"] = [str(part.dtype).removeprefix("torch.") for part in (self.scales, self.zeros)]
        if self.zeros.shape != self.scales.shape:
            found["one_zero"] = True
        return found

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers  # attribute access through nn.Module costs as much as a small product
        order = held["order"]
        if order is not None:
            input = input.index_select(-1, order)
        y = lowbit.linear(
            input, held["packed"], held["scales"], held["zeros"], held["bias"],  # type: ignore[arg-type]
            bits=self.bits, group=self.group, columns=self.in_features, tables=held["tables"], levels=held["levels"],
            activations=self.activations,
        )  # fmt: skip
        values = held["outlier_values"]
        return y if values is None else csr.add(y, input, values, held["outlier_columns"], held["outlier_starts"])  # type: ignore[arg-type]

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight [out, in] that the codes stand for, fp32, columns in the order of the inputs."""
        weight = lowbit.dequantize(self.packed, self.scales, self.zeros, bits=self.bits, group=self.group,
                                   columns=self.in_features, tables=self.tables, levels=self.levels)  # fmt: skip
        if self.outlier_values is not None:
            weight = weight + Sparse(self.outlier_values, self.outlier_columns, self.outlier_starts).dense(
                self.in_features
            )
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)

    def dense(self) -> nn.Linear:
        """A plain linear layer with that weight in the dtype of the layer that was replaced."""
        return linear_of(self.dense_weight().to(self.dtype), self.bias).train(self.training)

    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def way(self) -> str:
        """What multiplies the codes here; builds the kernel."""
        if lowbit.path(self.bits, self.group, self.packed.device) == "native":
            return f"native, {native.capability()}"
        return "PyTorch" if self.packed.device.type == "cpu" else lowbit.path(self.bits, self.group, self.packed.device)

    def check(self) -> None:
        """Refuses values of buffers that a kernel must not see; called after loading.

        Raises:
            UsageError: a table or a column that is not there, or an order that is no permutation.
        """
        if self.tables is not None and self.zeros.numel():
            least, most = int(self.zeros.min()), int(self.zeros.max())
            if least < 0 or most >= len(self.tables):
                raise UsageError("a quantized layer names a look-up table that it does not have: the file is damaged")
        if self.outlier_values is not None:
            sizes = {"rows": self.out_features, "width": self.in_features}
            csr.check(self.outlier_values, self.outlier_columns, self.outlier_starts, **sizes)  # type: ignore[arg-type]
        if self.order is not None:
            whole = torch.arange(self.in_features, device=self.order.device)
            if not torch.equal(self.order.sort().values, whole):
                raise UsageError("the column order of a quantized layer is no permutation: the file is damaged")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not self.packed.is_meta:
            self.check()

    def extra_repr(self) -> str:
        held = {"ordered": self.order, "tables": self.tables, "outliers": self.outlier_values}
        more = "".join(f", {word}" for word, tensor in held.items() if tensor is not None)
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"bits={self.bits}, group={self.group}{more}")  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: held for name in _EXACT if (held := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, held in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved.to(held.dtype) if held.is_meta or moved.is_meta else held.to(self.packed.device)  # type: ignore[operator]
        return self
