"""y = x W^T + b where W [rows, width] is zero but for blocks of r rows and c columns.

Bands of r rows have their own lists of columns; a block of c columns is c entries of its band's list, so that storage
and speed depend on r alone. Rows are padded with zeros to a multiple of r.

    fp32: values [n, r]           W[band r + i, columns[e]] = values[e, i],  e from starts[band] to starts[band + 1]
    int8: values [n / 4, r, 4]    the same with scales[band r + i] * values[e // 4, i, e % 4]

`columns` int32 [n], `starts` int32 [bands + 1], `scales` fp32 and `sums` int32 [bands r] (the sum of a row's codes).
For int8 each list is filled up to a multiple of four with zeros, and each token of x is rounded to codes of its own:

    y[m, n] = s[m] scales[n] (sum over k of code_x[m, k] code_w[n, k]) + b[n],    s[m] = max |x[m]| / 127

One signature, four ways to compute it:

- `native`: the C++ kernel `block_sparse.cpp`, on a CPU. int8 has an instruction of its own (AVX-512 VNNI) for r of a
  multiple of four; without it codes are multiplied in fp32, as fast as fp32 weights and a quarter of the bytes.
- `triton`: `block_sparse_triton`, for tensors on a GPU.
- `torch`: 64 rows or more of W are made dense at a time and multiplied. Any device, no gain in speed.
- `naive`: the equation.

The kernel trusts `columns` and `starts`: call `check` once where they come from a file.
"""

import ctypes
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.math.shapes import Float, Int

TALLEST = 64  # rows of a block at most
SLAB = 64  # rows of W that are dense at a time on the `torch` path
GROUP = 4  # columns that one instruction multiplies
_CODES = 127


class _Product(ctypes.Structure):
    """The kernel's `struct Product`."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("values", "columns", "starts", "scales", "sums", "bias", "x", "y")),
        *((n, ctypes.c_int64) for n in ("r", "bands", "count", "rows", "width", "threads", "vnni")),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("block_sparse.cpp", isa=isa)
    if found is not None:
        found.hasten_block_sparse.restype = None
        found.hasten_block_sparse.argtypes = [ctypes.POINTER(_Product)]
    return found


@functools.cache
def _triton() -> Any:
    """The module of the GPU kernel, or None where Triton is not installed."""
    try:
        return importlib.import_module("hasten.kernels.block_sparse_triton")
    except ImportError:
        return None


def path(device: torch.device | str = "cpu") -> str:
    """How `linear` computes here: `native` or `triton` (real speed), or `torch` (memory only)."""
    if torch.device(device).type == "cuda" and _triton() is not None:
        return "triton"
    return "native" if torch.device(device).type == "cpu" and library() is not None else "torch"


def pack(
    weight: Float[Tensor, "rows width"], r: int, c: int = 1, bits: int = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(values, columns, starts, scales, sums) of a weight, without the blocks of r x c that are all zero.

    Args:
        bits: 32 or 8. Eight-bit codes are symmetric, with a scale for each row; scales and sums are None for 32.

    Raises:
        UsageError: more than 64 rows of a block, or other bits.
    """
    if not 1 <= r <= TALLEST or c < 1 or bits not in (8, 32):
        raise UsageError(
            f"blocks have 1 to {TALLEST} rows, a column or more, and 8 or 32 bits; not {r}x{c}, {bits} bits"
        )
    rows, width = weight.shape
    bands = -(-rows // r)
    full = F.pad(weight.detach().float(), (0, 0, 0, bands * r - rows)).view(bands, r, width)
    kept = F.pad((full != 0).any(1), (0, -width % c)).unflatten(1, (-1, c)).any(2)  # [bands, blocks]
    entries = kept.repeat_interleave(c, 1)[:, :width]
    counts = entries.sum(1)
    padding = -counts % GROUP if bits == 8 else torch.zeros_like(counts)
    starts = torch.zeros(bands + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = (counts + padding).cumsum(0)
    band, column = entries.nonzero(as_tuple=True)
    place = torch.arange(len(band), device=weight.device) + (padding.cumsum(0) - padding)[band]
    columns = torch.zeros(int(starts[-1]), dtype=torch.int32, device=weight.device)
    columns[place] = column.int()
    values = full.new_zeros(len(columns), r)
    values[place] = full[band, :, column]
    if bits == 32:
        return values, columns, starts, None, None
    scales = full.abs().amax(2).flatten() / _CODES
    inverse = torch.where(scales > 0, 1 / scales, 0)
    codes = (full.flatten(0, 1) * inverse[:, None]).round().clamp(-_CODES, _CODES).view_as(full)
    values[place] = codes[band, :, column]
    grouped = values.view(-1, GROUP, r).mT.to(torch.int8).contiguous()
    return grouped, columns, starts, scales, codes.sum(2).flatten().int()


def expand(
    values: Tensor, columns: Tensor, starts: Tensor, scales: Tensor | None = None, *, rows: int, width: int
) -> Float[Tensor, "rows width"]:
    """The dense weight, fp32."""
    return _dense(values, columns, starts, scales, width, 0, len(starts) - 1)[:rows]


def check(
    values: Tensor, columns: Tensor, starts: Tensor, scales: Tensor | None = None, sums: Tensor | None = None, *,
    rows: int, width: int,
) -> None:  # fmt: skip
    """Whether the tensors describe a weight [rows, width].

    Raises:
        UsageError: a dtype, a shape, or a column outside the weight.
    """
    problem, coded = "", values.dtype == torch.int8
    shape = (len(columns) // GROUP, values.shape[1], GROUP) if coded else (len(columns), values.shape[1])
    r, bands = values.shape[1], len(starts) - 1
    if values.dtype not in (torch.float32, torch.int8) or {columns.dtype, starts.dtype} != {torch.int32}:
        kinds = f"{values.dtype}, {columns.dtype} and {starts.dtype}"
        problem = f"values must be fp32 or int8, columns and starts int32; they are {kinds}"
    elif tuple(values.shape) != shape or not 1 <= r <= TALLEST or bands != -(-rows // r):
        problem = f"values {tuple(values.shape)} do not fit {len(columns)} columns in {bands} bands"
    elif coded != (scales is not None) or coded != (sums is not None):
        problem = "int8 values come with scales and sums, fp32 ones without"
    elif any(x is not None and x.shape != (bands * r,) for x in (scales, sums)):
        problem = f"scales and sums must have {bands * r} entries"
    elif int(starts[0]) or int(starts[-1]) != len(columns) or bool((starts.diff() < 0).any()):
        problem = f"starts must rise from 0 to the number of columns, {len(columns)}"
    elif coded and bool((starts % GROUP).any()):
        problem = f"starts of int8 values must be multiples of {GROUP}"
    elif len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= width):
        problem = f"columns lie between {int(columns.min())} and {int(columns.max())}, outside a width of {width}"
    if problem:
        raise UsageError(f"this is no block-sparse weight of {rows} rows and {width} columns: {problem}")


def naive_linear(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None = None,
    scales: Tensor | None = None, sums: Tensor | None = None, *, rows: int,
) -> Tensor:  # fmt: skip
    """`linear` as the equation, entry by entry in fp32 (codes of eight bits: exactly)."""
    flat = x.reshape(-1, x.shape[-1]).float()
    r, size = values.shape[1], torch.ones(len(flat), 1)
    if scales is not None:
        flat, size = round_tokens(flat)
    y = torch.zeros(len(flat), rows, dtype=torch.float64 if scales is not None else torch.float32)
    for band in range(len(starts) - 1):
        for e in range(int(starts[band]), int(starts[band + 1])):
            for i in range(min(r, rows - band * r)):
                w = values[e, i] if scales is None else values[e // GROUP, i, e % GROUP]
                y[:, band * r + i] += w.float() * flat[:, int(columns[e])]
    y = y.float() if scales is None else y.float() * (scales[:rows] * size)
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], rows)


def linear(
    x: Float[Tensor, "... width"],
    values: Tensor,
    columns: Int[Tensor, "n"],
    starts: Int[Tensor, "bands+1"],
    bias: Float[Tensor, "rows"] | None = None,
    scales: Float[Tensor, "padded"] | None = None,
    sums: Int[Tensor, "padded"] | None = None,
    *,
    rows: int,
) -> Float[Tensor, "... rows"]:
    """x W^T + b in x's dtype, computed in fp32 or with codes of eight bits.

    Differentiable in x; for int8 the rounding of x is passed straight through. Works under `torch.compile` and
    `torch.export` as the operator `hasten::block_sparse_linear`.

    Args:
        values, columns, starts, scales, sums: as `pack` gives them.
        rows: of W without its padding.
    """
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if plain and not (x.requires_grad and torch.is_grad_enabled()):  # the dispatcher costs more than a small product
        return _compute(x, values, columns, starts, bias, scales, sums, rows)
    return torch.ops.hasten.block_sparse_linear(x, values, columns, starts, bias, scales, sums, rows)


def round_tokens(x: Float[Tensor, "m width"]) -> tuple[Tensor, Tensor]:
    """The symmetric eight-bit codes of each token as whole floats, and what a code stands for [m, 1]."""
    most = x.abs().amax(1, keepdim=True)
    inverse = torch.full_like(most, _CODES) / most  # 127 / most would be a product with the reciprocal, an ulp apart
    return (x * torch.where(most > 0, inverse, 0)).round(), most / _CODES


def native_linear(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None,
    sums: Tensor | None, rows: int, *, isa: str | None = None, vnni: bool = True,
) -> Tensor:  # fmt: skip
    """The product through the kernel; all tensors on the CPU, the weight's contiguous. vnni: where it is there."""
    run = library(isa)
    assert run is not None, "ask path() first"
    dtype, width, count = x.dtype, x.shape[-1], math.prod(x.shape[:-1])
    x = x if dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
    bias = bias if bias is None or bias.dtype is torch.float32 else bias.float()
    y = torch.empty(*x.shape[:-1], rows)
    if count:
        pointers = [None if t is None else t.data_ptr() for t in (values, columns, starts, scales, sums, bias, x, y)]
        sizes = values.shape[1], starts.shape[0] - 1, count, rows, width, torch.get_num_threads(), vnni
        run.hasten_block_sparse(ctypes.byref(_Product(*pointers, *sizes)))
    return y if dtype is torch.float32 else y.to(dtype)


def torch_linear(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None,
    sums: Tensor | None, rows: int,
) -> Tensor:  # fmt: skip
    """The product with 64 rows of W (or one block's, if that is more) dense at a time."""
    flat = x.reshape(-1, x.shape[-1])
    inputs, size = (flat, None) if scales is None else round_tokens(flat.float())
    parts = []
    for weight in _slabs(values, columns, starts, scales, x.shape[-1], rows):
        part = F.linear(inputs, weight.to(inputs.dtype))
        parts.append(part if size is None else (part * size).to(x.dtype))
    y = torch.cat(parts, dim=-1).view(*x.shape[:-1], rows)
    return y if bias is None else y + bias.to(y.dtype)


def _compute(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None,
    sums: Tensor | None, rows: int,
) -> Tensor:  # fmt: skip
    if x.is_cuda and (gpu := _triton()) is not None:
        run = gpu.linear
    else:
        run = native_linear if x.is_cpu and library() is not None else torch_linear
    return run(x, values, columns, starts, bias, scales, sums, rows)


def _dense(
    values: Tensor, columns: Tensor, starts: Tensor, scales: Tensor | None, width: int, first: int, last: int
) -> Tensor:  # fmt: skip
    """The rows of the bands from `first` to before `last`."""
    r, (begin, end) = values.shape[1], starts[[first, last]].tolist()
    entries = values[begin:end] if scales is None else values[begin // GROUP : end // GROUP].mT.reshape(-1, r)
    bands = torch.arange(last - first, device=values.device)
    band = bands.repeat_interleave(starts[first : last + 1].diff().long())
    dense = torch.zeros(last - first, width, r, device=values.device)
    # padding names column 0 once more, so entries are added
    dense.index_put_((band, columns[begin:end].long()), entries.float(), accumulate=True)
    weight = dense.mT.flatten(0, 1)
    return weight if scales is None else weight * scales[first * r : last * r, None]


def _slabs(
    values: Tensor, columns: Tensor, starts: Tensor, scales: Tensor | None, width: int, rows: int
) -> Iterator[Tensor]:
    r, bands = values.shape[1], len(starts) - 1
    step = max(1, SLAB // r)
    for first in range(0, bands, step):
        last = min(bands, first + step)
        yield _dense(values, columns, starts, scales, width, first, last)[: rows - first * r]


_operator = torch.library.custom_op(
    "hasten::block_sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? bias, Tensor? scales, Tensor? sums, "
    "int rows) -> Tensor",
)(_compute)


@_operator.register_fake
def _(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None,
    sums: Tensor | None, rows: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], rows)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, columns, starts, _, scales, _, ctx.rows = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(values, columns, starts, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x, a slab of W at a time; the weight and the bias are constants."""
    total, at = torch.zeros(*grad.shape[:-1], ctx.width, device=grad.device), 0
    values, columns, starts, scales = ctx.saved_tensors
    for weight in _slabs(values, columns, starts, scales, ctx.width, ctx.rows):
        total += grad[..., at : at + len(weight)].float() @ weight
        at += len(weight)
    return total.to(grad.dtype), *([None] * 7)


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.block_sparse_linear)
def _flops(x: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(values)
