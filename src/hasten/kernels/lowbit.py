"""y = x W^T + b where W is held as packed codes of 2, 3, 4, 6 or 8 bits, and the codes are what is multiplied.

    w[n, k] = scales[n, k // group] * (code[n, k] - zeros[n, k // group])          uniform
    w[n, k] = scales[n, k // group] * tables[zeros[n, k // group]][code[n, k]]     with tables

What `scales`, `zeros` and `levels` may be: `lowbit_weights`. One signature, four ways to compute it:

- `native`: the C++ kernel `lowbit.cpp` (AVX-512 with or without VNNI, AVX2 or plain). It reads the packed bytes and
  never the dense weight. From 9 rows of x on, `lowbit_gemm` is asked first.
- `triton`: `lowbit_triton`, for tensors on a GPU.
- `torch`: 64 rows of W at a time are made dense and multiplied. Bounded memory, any device, no gain in speed.
- `naive`: the equation.

`activations=8` multiplies integers: each run of 64 columns of a row of x is rounded to int8 with one scale (the
largest absolute value / 127; to nearest, ties to even), the sums of codes times those are exact, and only they are
scaled. All ways round x to the same integers. `activations=32` keeps x as it is.
"""

import ctypes
import functools
import importlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.kernels.lowbit_weights import LEVEL_GROUPS, check, compact, dequantize, statistics
from hasten.math import packing
from hasten.math.shapes import Float, Int

SLAB = 64  # rows of W that are dense at a time on the `torch` path
RUN = 64  # columns of x that share a scale with activations=8
TINY = 1e-30  # a run of x whose largest absolute value is below this is rounded to zeros
MANY = 9  # rows of x from which `lowbit_gemm` is asked
__all__ = ["check", "compact", "dequantize", "kernel", "linear", "naive_linear", "native_linear", "path", "statistics",
           "torch_linear"]  # fmt: skip
_KINDS = {torch.float32: 0, torch.float16: 1, torch.uint8: 2, torch.int32: 3, torch.bfloat16: 4}


def path(bits: int, group: int, device: torch.device | str = "cpu") -> str:
    """How `linear` computes such a weight here: `native` or `triton` (real speed), or `torch` (memory only)."""
    if torch.device(device).type == "cuda":
        return "torch" if _triton() is None else "triton"
    return "native" if torch.device(device).type == "cpu" and fits(group) and kernel(bits) is not None else "torch"


def fits(group: int) -> bool:
    """Whether the native kernel takes this group size: 16, 32 or a multiple of 64."""
    return group in (16, 32) or (group > 0 and group % 64 == 0)


@functools.cache
def kernel(bits: int, isa: str | None = None) -> Callable[..., None] | None:
    """The native kernel for codes of `bits` bits, built at the first call; None where it can't be built."""
    isa = isa or next(one for one in native.sets() if one != "AMX")
    library = native.library("lowbit.cpp", (f"BITS={bits}",), isa)
    if library is None:
        return None
    function = library.hasten_lowbit_linear
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    return function


@functools.cache
def _triton() -> Any:
    """The module of the GPU kernel, or None where Triton is not installed."""
    try:
        return importlib.import_module("hasten.kernels.lowbit_triton")
    except ImportError:
        return None


@functools.cache
def _gemm() -> Callable[..., Tensor | None]:
    try:
        return importlib.import_module("hasten.kernels.lowbit_gemm").gemm
    except ImportError:
        return lambda *_: None


def round_activations(x: Float[Tensor, "... columns"]) -> Float[Tensor, "... columns"]:
    """x as `activations=8` sees it, in fp32: whole numbers from -127 to 127 times one scale for each 64 columns.

    A run that holds NaN or infinity becomes NaN.
    """
    runs = F.pad(x.float(), (0, -x.shape[-1] % RUN)).unflatten(-1, (-1, RUN))
    most = runs.abs().amax(-1, keepdim=True)
    live = most >= TINY
    inverse = torch.where(live, 127 / most, 0)
    scale = torch.where(live, most / 127, torch.where(most < TINY, 0.0, torch.nan))
    scale = torch.where(most.isfinite(), scale, torch.nan)
    return ((runs * inverse).round() * scale).flatten(-2)[..., : x.shape[-1]]


def naive_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    columns: int,
    tables: Tensor | None = None,
    levels: Tensor | None = None,
    activations: int = 32,
) -> Tensor:
    """`linear` as the equation, row by row in fp32."""
    xs, rows = x.float(), []
    if activations == 8:
        runs = []
        for part in xs.split(RUN, dim=-1):
            scale = part.abs().amax(-1, keepdim=True) / 127
            runs.append(torch.where(scale == 0, 0, (part / scale).round() * scale))
        xs = torch.cat(runs, dim=-1)
    for n in range(packed.shape[0]):
        codes, weight = packing.naive_unpack(packed[n : n + 1], bits, columns)[0], []
        for k in range(columns):
            g = k // group
            scale, zero = scales[n, g].float(), zeros.expand(scales.shape)[n, g]
            if levels is not None:
                a, b, c, d = levels[n, g // LEVEL_GROUPS]
                scale, zero = a * (scale - b), zero if tables is not None else c * (zero - d)
            weight.append(scale * (codes[k] - zero.float() if tables is None else tables[int(zero), int(codes[k])]))
        rows.append((xs * torch.stack(weight)).sum(-1) + (0 if bias is None else bias[n].float()))
    return torch.stack(rows, dim=-1).to(x.dtype)


def linear(
    x: Float[Tensor, "... columns"],
    packed: Int[Tensor, "rows bytes"],
    scales: Tensor,
    zeros: Tensor,
    bias: Float[Tensor, "rows"] | None = None,
    *,
    bits: int,
    group: int,
    columns: int,
    tables: Float[Tensor, "count entries"] | None = None,
    levels: Float[Tensor, "rows runs 4"] | None = None,
    activations: int = 32,
) -> Float[Tensor, "... rows"]:
    """x times the transposed weight that the codes stand for, plus the bias, in x's dtype.

    Differentiable in x (with `activations=8`, as if x had not been rounded). Works under `torch.compile` and
    `torch.export` as the operator `hasten::lowbit_linear`.

    Args:
        packed: codes in the layout of `hasten.math.packing`.
        scales: [rows, groups], fp32 or fp16; uint8 with `levels`.
        zeros: [rows, groups] or [1, 1], fp32, fp16 or uint8; uint8 with `levels`; with `tables`, the number of each
            group's table, int32.
        group: columns that share a scale; the last group of a row may have fewer.
        columns: of the unpacked weight.
        tables: fp32 [count, 2^bits], for at most 4 bits: what each code stands for.
        levels: fp32 [rows, ceil(groups / 16), 4], of statistics that are themselves quantized.
        activations: 32, or 8 to round x and multiply integers (no tables).

    Raises:
        UsageError: shapes, dtypes or options that don't fit together.
    """
    if x.shape[-1] != columns:
        raise UsageError(f"x has {x.shape[-1]} columns, the weight {columns}")
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if plain and not (x.requires_grad and torch.is_grad_enabled()):  # the dispatcher costs more than a small product
        return _compute(x, packed, scales, zeros, bias, bits, group, tables, levels, activations)
    return torch.ops.hasten.lowbit_linear(x, packed, scales, zeros, bias, bits, group, tables, levels, activations)


def _compute(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group: int,
    tables: Tensor | None = None, levels: Tensor | None = None, activations: int = 32,
) -> Tensor:  # fmt: skip
    if x.is_cuda and (triton := _triton()) is not None:
        check(packed, scales, zeros, bias, bits, group, x.shape[-1], tables, levels, activations)
        rounded = round_activations(x).to(x.dtype) if activations == 8 else x
        return triton.linear(rounded, packed, scales, zeros, bias, bits, group, tables, levels)
    run = kernel(bits) if x.is_cpu and bits in packing.BITS and fits(group) else None
    if run is None:
        return torch_linear(x, packed, scales, zeros, bias, bits, group, tables, levels, activations)
    if x.numel() >= MANY * x.shape[-1]:
        check(packed, scales, zeros, bias, bits, group, x.shape[-1], tables, levels, activations)
        y = _gemm()(x, packed, scales, zeros, bias, bits, group, activations, tables, levels)
        if y is not None:
            return y
    return native_linear(run, x, packed, scales, zeros, bias, bits, group, tables, levels, activations)


class _Struct(ctypes.Structure):
    """`Weight` of lowbit.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "bias", "tables", "levels")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "groups", "group")),
        *((name, ctypes.c_int64) for name in ("scale_kind", "zero_kind", "bias_kind", "one_zero", "count")),
    ]


class _Held:
    """A weight that was checked, and its addresses; kept while its packed codes live."""

    def __init__(self, parts: tuple[Any, ...], bits: int, group: int, columns: int) -> None:
        packed, scales, zeros, bias, tables, levels = parts
        check(packed, scales, zeros, bias, bits, group, columns, tables, levels)
        name = id(packed)
        self.codes = weakref.ref(packed, lambda _: _held.pop(name, None))
        self.others, self.sizes = parts[1:], (bits, group, columns)
        self.where = tuple(None if part is None else part.data_ptr() for part in parts)
        self.struct = _Struct(
            *self.where, packed.shape[0], packing.padded(columns, bits), columns, scales.shape[1], group,
            _KINDS[scales.dtype], _KINDS[zeros.dtype], 0 if bias is None else _KINDS[bias.dtype], zeros.numel() == 1,
            0 if tables is None else len(tables),
        )  # fmt: skip
        self.address = ctypes.addressof(self.struct)


_held: dict[int, _Held] = {}


def _hold(
    packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, tables: Tensor | None, levels: Tensor | None,
    bits: int, group: int, columns: int,
) -> _Held:  # fmt: skip
    """The checked weight; checked again only when one of its tensors is another, or lies elsewhere in memory."""
    held = _held.get(id(packed))
    if held is not None and held.codes() is packed:
        a, b, c, d, e = held.others
        p, q, r, s, t, u = held.where
        if (scales is a and zeros is b and bias is c and tables is d and levels is e
                and held.sizes == (bits, group, columns)
                and packed.data_ptr() == p and scales.data_ptr() == q and zeros.data_ptr() == r
                and (bias is None or bias.data_ptr() == s) and (tables is None or tables.data_ptr() == t)
                and (levels is None or levels.data_ptr() == u)):  # fmt: skip
            return held
    held = _held[id(packed)] = _Held((packed, scales, zeros, bias, tables, levels), bits, group, columns)
    return held


def native_linear(
    run: Callable[..., None], x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
    bits: int, group: int, tables: Tensor | None = None, levels: Tensor | None = None, activations: int = 32,
) -> Tensor:  # fmt: skip
    """The product through a kernel that `kernel` returned; all tensors on the CPU and contiguous but x."""
    if activations != 32 and (activations != 8 or tables is not None):
        check(packed, scales, zeros, bias, bits, group, x.shape[-1], tables, levels, activations)
    *outer, columns = x.shape
    held = _hold(packed, scales, zeros, bias, tables, levels, bits, group, columns)
    dtype = x.dtype
    if dtype is not torch.float32:
        x = x.float()
    x = x.contiguous()
    y = torch.empty((*outer, packed.shape[0]))
    run(held.address, x.data_ptr(), y.data_ptr(), math.prod(outer), activations, torch.get_num_threads())
    return y if dtype is torch.float32 else y.to(dtype)


def torch_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group: int,
    tables: Tensor | None = None, levels: Tensor | None = None, activations: int = 32,
) -> Tensor:  # fmt: skip
    """The product with 64 rows of W dense at a time."""
    check(packed, scales, zeros, bias, bits, group, x.shape[-1], tables, levels, activations)
    xs = round_activations(x) if activations == 8 else x
    parts = []
    for start in range(0, packed.shape[0], SLAB):
        slab = _slab(start, packed, scales, zeros, tables, levels, bits, group, x.shape[-1]).to(xs.dtype)
        parts.append(F.linear(xs, slab, None if bias is None else bias[start : start + SLAB].to(xs.dtype)))
    return torch.cat(parts, dim=-1).to(x.dtype) if parts else x.new_zeros(*x.shape[:-1], 0)


def _slab(
    start: int, packed: Tensor, scales: Tensor, zeros: Tensor, tables: Tensor | None, levels: Tensor | None,
    bits: int, group: int, columns: int,
) -> Tensor:  # fmt: skip
    """SLAB rows of the dense weight."""
    rows = slice(start, start + SLAB)
    zero, level = zeros[rows] if len(zeros) == len(packed) else zeros, None if levels is None else levels[rows]
    sizes = {"bits": bits, "group": group, "columns": columns}
    return dequantize(packed[rows], scales[rows], zero, **sizes, tables=tables, levels=level)


_operator = torch.library.custom_op(
    "hasten::lowbit_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, int bits, int group, "
    "Tensor? tables=None, Tensor? levels=None, int activations=32) -> Tensor",
)(_compute)


@_operator.register_fake
def _(x: Tensor, packed: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, _bias, ctx.bits, ctx.group, tables, levels, _activations = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(packed, scales, zeros, tables, levels)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x, 64 rows of W at a time; the weight and the bias are constants."""
    packed, scales, zeros, tables, levels = ctx.saved_tensors
    total = torch.zeros(*grad.shape[:-1], ctx.columns, dtype=torch.float32, device=grad.device)
    for start in range(0, packed.shape[0], SLAB):
        slab = _slab(start, packed, scales, zeros, tables, levels, ctx.bits, ctx.group, ctx.columns)
        total += grad[..., start : start + SLAB].float() @ slab
    return total.to(grad.dtype), *[None] * 9


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.lowbit_linear)
def _flops(x: Any, packed: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x) * packed[0]
