"""y = x W^T + b for a W with zeros anywhere, held as a bit for each place and the numbers that are not zero.

    bits    uint8 [rows, 2 ceil(width / 16)]    bit k % 8 of byte k // 8: whether W[n, k] is held
    values  [numbers + 64]                      fp32, bf16 or int8, row after row, then padding
    starts  int64 [rows + 1]                    where a row's numbers begin
    scales  fp32 [rows]                         of int8: W[n, k] = scales[n] * value

Decoding is what this is for: a product with one row of x takes as long as reading W, and at 70% zeros in fp32 a third
of the bytes is read. With more rows of x the arithmetic counts, and that is as much as of a dense weight.

One signature, three ways to compute it:

- `native`: the C++ kernel `bitmap.cpp`, on a CPU, for up to eight rows of x; beyond, 512 rows of W are made dense at a
  time and multiplied by PyTorch, a little slower than a dense weight. AVX-512 spreads 16 numbers with one instruction;
  AVX2 eight with a table, at about 60% of that speed.
- `torch`: made dense likewise, for any device and CPUs without these instructions. No gain in speed.
- `naive`: the equation.

The kernel trusts `bits` and `starts`: call `check` once where they come from a file.
"""

import ctypes
import functools
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

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}
MOST = 8  # rows of x that the kernel multiplies
SLAB = 512  # rows of W that are dense at a time
PADDING = 64  # entries after the last, which a kernel may read
_CODES = 127


class _Bitmap(ctypes.Structure):
    """The kernel's `struct Bitmap`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "bits", "starts", "scales", "bias", "x", "y")),
        *((name, ctypes.c_int64) for name in ("kind", "count", "rows", "chunks", "first", "last", "threads")),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("bitmap.cpp", isa=isa)
    if found is not None:
        found.hasten_bitmap.restype = None
        found.hasten_bitmap.argtypes = [ctypes.POINTER(_Bitmap)]
    return found


def path(count: int = 1, device: torch.device | str = "cpu") -> str:
    """How `linear` computes `count` rows of x: `native` (real speed), `dense` or `torch` (memory only)."""
    if torch.device(device).type != "cpu" or library() is None or native.capability() not in native.FLAGS:
        return "torch"
    return "native" if count <= MOST else "dense"


def pack(
    weight: Float[Tensor, "rows width"], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(values, bits, starts, scales) of a weight. Its zeros are left out.

    Args:
        dtype: of the values: fp32, bf16 or int8 (symmetric codes with a scale for each row).

    Raises:
        UsageError: another dtype.
    """
    if dtype not in KINDS:
        raise UsageError(f"the values of a bitmap are float32, bfloat16 or int8, not {dtype}")
    weight, scales = weight.detach().float(), None
    held = weight != 0
    if dtype is torch.int8:
        scales = weight.abs().amax(1) / _CODES
        weight = (weight * torch.where(scales > 0, 1 / scales, 0)[:, None]).round().clamp(-_CODES, _CODES)
    starts = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    starts[1:] = held.sum(1).cumsum(0)
    eights = F.pad(held, (0, -weight.shape[1] % 16)).unflatten(1, (-1, 8)).to(torch.uint8)
    bits = (eights << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(2, dtype=torch.uint8)
    return F.pad(weight[held], (0, PADDING)).to(dtype), bits, starts, scales


def expand(
    values: Tensor, bits: Tensor, starts: Tensor, scales: Tensor | None = None, *, width: int
) -> Float[Tensor, "rows width"]:
    """The dense weight, fp32."""
    held = _held(bits)
    dense = torch.zeros(held.shape, device=values.device)
    dense[held] = values[starts[0] : starts[-1]].float()
    return (dense if scales is None else dense * scales[:, None])[:, :width]


def check(
    values: Tensor, bits: Tensor, starts: Tensor, scales: Tensor | None = None, *, rows: int, width: int
) -> None:  # fmt: skip
    """Whether the tensors describe a weight [rows, width].

    Raises:
        UsageError: a dtype, a shape, or bits that do not agree with the starts.
    """
    problem, shape = "", (rows, 2 * (-(-width // 16)))
    if values.dtype not in KINDS or bits.dtype != torch.uint8 or starts.dtype != torch.int64:
        kinds = f"{values.dtype}, {bits.dtype} and {starts.dtype}"
        problem = f"values must be fp32, bf16 or int8, bits uint8 and starts int64; they are {kinds}"
    elif tuple(bits.shape) != shape or starts.shape != (rows + 1,) or values.ndim != 1:
        problem = f"bits must be {shape} and starts {(rows + 1,)}, not {tuple(bits.shape)} and {tuple(starts.shape)}"
    elif (values.dtype == torch.int8) != (scales is not None) or (scales is not None and scales.shape != (rows,)):
        problem = "int8 values come with a scale for each row, others without"
    elif bool(_held(bits)[:, width:].any()):
        problem = "bits are set beyond the last column"
    elif int(starts[0]) or not torch.equal(_held(bits).sum(1), starts.diff()):
        problem = "the bits of a row must be as many as its starts say"
    elif len(values) != int(starts[-1]) + PADDING:
        problem = f"{int(starts[-1])} values and {PADDING} of padding are needed, not {len(values)}"
    if problem:
        raise UsageError(f"this is no bitmap of {rows} rows and {width} columns: {problem}")


def naive_linear(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """`linear` as the equation, number by number in fp32."""
    y = torch.zeros(*x.shape[:-1], len(bits))
    for n in range(len(bits)):
        at = int(starts[n])
        for k in range(x.shape[-1]):
            if int(bits[n, k // 8]) >> k % 8 & 1:
                y[..., n] += values[at].float() * x[..., k].float()
                at += 1
        y[..., n] = y[..., n] * (1 if scales is None else scales[n]) + (0 if bias is None else bias[n].float())
    return y.to(x.dtype)


def linear(
    x: Float[Tensor, "... width"],
    values: Tensor,
    bits: Int[Tensor, "rows bytes"],
    starts: Int[Tensor, "rows+1"],
    bias: Float[Tensor, "rows"] | None = None,
    scales: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "... rows"]:
    """x W^T + b in x's dtype, computed in fp32.

    Differentiable in x. Works under `torch.compile` and `torch.export` as the operator `hasten::bitmap_linear`.
    """
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if plain and not (x.requires_grad and torch.is_grad_enabled()):  # the dispatcher costs more than a small product
        return _compute(x, values, bits, starts, bias, scales)
    return torch.ops.hasten.bitmap_linear(x, values, bits, starts, bias, scales)


def native_linear(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None, *,
    isa: str | None = None,
) -> Tensor:  # fmt: skip
    """The product through the kernel; all tensors on the CPU, the weight's contiguous."""
    run = library(isa)
    assert run is not None, "ask path() first"
    dtype, (rows, row_bytes), count = x.dtype, bits.shape, math.prod(x.shape[:-1])
    x = x if dtype is torch.float32 else x.float()
    wide = row_bytes * 8
    x = x.contiguous() if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1]))
    bias = bias if bias is None or bias.dtype is torch.float32 else bias.float()
    y = torch.empty(*x.shape[:-1], rows)
    if count and rows:
        pointers = [None if t is None else t.data_ptr() for t in (values, bits, starts, scales, bias, x, y)]
        sizes = KINDS[values.dtype], count, rows, row_bytes // 2, 0, rows, torch.get_num_threads()
        run.hasten_bitmap(ctypes.byref(_Bitmap(*pointers, *sizes)))
    return y if dtype is torch.float32 else y.to(dtype)


def slab_linear(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    """The product with 512 rows of W dense at a time."""
    y = x.new_empty(*x.shape[:-1], len(bits))
    for at, weight in _slabs(values, bits, starts, scales, x.shape[-1]):
        rows = slice(at, at + len(weight))
        y[..., rows] = F.linear(x, weight.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return y


def _compute(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    run = native_linear if path(math.prod(x.shape[:-1]), x.device) == "native" else slab_linear
    return run(x, values, bits, starts, bias, scales)


def _held(bits: Tensor) -> Tensor:
    """bool [rows, 8 bytes]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(1)


def _slabs(
    values: Tensor, bits: Tensor, starts: Tensor, scales: Tensor | None, width: int
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """(first row, dense rows) of W."""
    run = library() if values.is_cpu else None
    for first in range(0, len(bits), SLAB):
        last = min(first + SLAB, len(bits))
        if run is None:
            scale = None if scales is None else scales[first:last]
            yield first, expand(values, bits[first:last], starts[first : last + 1], scale, width=width)
            continue
        dense = torch.empty(last - first, bits.shape[1] * 8)
        pointers = [None if t is None else t.data_ptr() for t in (values, bits, starts, scales, None, None, dense)]
        sizes = KINDS[values.dtype], 0, len(bits), bits.shape[1] // 2, first, last, torch.get_num_threads()
        run.hasten_bitmap(ctypes.byref(_Bitmap(*pointers, *sizes)))
        yield first, dense[:, :width]


_operator = torch.library.custom_op(
    "hasten::bitmap_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor bits, Tensor starts, Tensor? bias, Tensor? scales) -> Tensor",
)(_compute)


@_operator.register_fake
def _(
    x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bits, starts, _, scales = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(values, bits, starts, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x, 512 rows of W at a time; the weight and the bias are constants."""
    values, bits, starts, scales = ctx.saved_tensors
    total = torch.zeros(*grad.shape[:-1], ctx.width, device=grad.device)
    for at, weight in _slabs(values, bits, starts, scales, ctx.width):
        total += grad[..., at : at + len(weight)].float() @ weight
    return total.to(grad.dtype), *([None] * 5)


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.bitmap_linear)
def _flops(x: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (values[0] - PADDING)
