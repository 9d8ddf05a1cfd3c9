"""y = x W^T + b with W in int8 and x rounded to int8 on the way in: integers are what is multiplied.

    q[m, k] = clamp(round(x[m, k] / s[m, k]), -127, 127)
    y[m, n] = f[m] * scales[n] * sum_k q[m, k] * code[n, k] + bias[n]

Without `scale`, s[m, k] = f[m] = max |x[m, :]| / 127 (per token, dynamic). With it, s[m, k] = scale[k] (or scale[0])
and f = 1: what x was divided by is part of the weight's scales (static). x of int8 are codes already, f = 1. Rounding
is to nearest, ties to even.

One signature, three ways to compute it, all with the same integers:

- `native`: the C++ kernel `int8.cpp` on a CPU, for AMX, AVX-512 VNNI, AVX2 or plain C, whichever is the best here;
  rounding and scales are part of it. x in fp32, bfloat16 or int8; other dtypes are converted on the way in, all but
  fp32 on the way out.
- `torch`: rounds, multiplies as int32 (fp64 on a GPU, where its sums are exact), scales. No gain in speed.
- `naive`: the equation.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.math.shapes import Float, Int

LANES, STEP, MOST = 16, 64, 127
MOST_COLUMNS = 65536  # sums of that many products of 255 and 127 fit 32 bits
LEAST = 1e-30  # a token with no number above this is taken as zero
SLAB = 256  # rows of W that are int32 at a time on the `torch` path
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def path(device: torch.device | str = "cpu") -> str:
    """How `linear` computes here: `native` or `triton` (real speed), or `torch` (memory only)."""
    if torch.device(device).type == "cuda" and _triton() is not None:
        return "triton"
    return "native" if torch.device(device).type == "cpu" and kernel() is not None else "torch"


@functools.cache
def kernel(isa: str | None = None) -> Callable[..., None] | None:
    """The native kernel, for the best instruction set here where `isa` is None; None where it can't be built."""
    for one in native.sets() if isa is None else (isa,):
        library = native.library("int8.cpp", isa=one)
        if library is not None and library.hasten_int8_allowed():
            function: Any = library.hasten_int8_linear
            function.restype = None
            function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 5 + [ctypes.c_int]
            function.isa = one
            return function
    return None


@functools.cache
def _triton() -> Any:
    """The module of the GPU kernel, or None where it or Triton is not there."""
    try:
        from hasten.kernels import int8_triton  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    return int8_triton


def instruction_set() -> str | None:
    """What the native kernel was built for, a word of `native.sets()`."""
    return getattr(kernel(), "isa", None)


def pack(codes: Int[Tensor, "rows columns"]) -> Int[Tensor, "blocks fours 16 4"]:
    """Codes (-127 to 127) in the order that the kernel reads: [rows / 16][columns / 4][16][4], columns padded to 64."""
    rows, columns = codes.shape
    wide = torch.zeros(_up(rows, LANES), _up(columns, STEP), dtype=torch.int8, device=codes.device)
    wide[:rows, :columns] = codes
    return wide.view(-1, LANES, wide.shape[1] // 4, 4).transpose(1, 2).contiguous()


def unpack(packed: Int[Tensor, "blocks fours 16 4"], rows: int, columns: int) -> Int[Tensor, "rows columns"]:
    """The codes that `pack` was given."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1] * 4)[:rows, :columns]


def sums(codes: Int[Tensor, "rows columns"]) -> Int[Tensor, "rows"]:
    """What `linear` takes beside packed codes: their sum for each row, int32."""
    return codes.sum(1, dtype=torch.int32)


def encode(
    x: Float[Tensor, "... columns"], scale: Float[Tensor, "given"] | None = None
) -> tuple[Float[Tensor, "... columns"], Float[Tensor, "... 1"]]:
    """x rounded as `linear` does it: codes (whole numbers, in fp32) and what their products are multiplied by.

    A token with NaN (or, without `scale`, infinity) has a factor of NaN; the codes of such numbers are 0.
    """
    x = x.float()
    if scale is not None:
        codes = (x * (1 / scale.float())).clamp(-MOST, MOST).round()
        factors = torch.where(codes.isnan().any(-1, keepdim=True), torch.nan, 1.0)
        return codes.nan_to_num(0.0), factors
    top = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite, some = top.isfinite(), top >= LEAST
    most = torch.full_like(top, MOST)  # PyTorch divides by a number, and a number, through a rounded reciprocal
    inverse = torch.where(finite & some, most / top, 0.0)
    factors = torch.where(finite, torch.where(some, top / most, 0.0), torch.nan)
    return (x * inverse).nan_to_num(0.0).round(), factors


def naive_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` as the equation, number by number."""
    columns, codes = x.shape[-1], unpack(packed, len(scales), x.shape[-1]).tolist()
    out = []
    for row in x.reshape(-1, columns):
        if x.dtype is torch.int8:
            q, factor = row.tolist(), 1.0
        else:
            top = row.float().abs().amax()
            s = top / MOST if scale is None else scale
            inverse = (MOST / top if top >= LEAST else top * 0) if scale is None else 1 / scale
            q = (row.float() * inverse).round().clamp(-MOST, MOST).int().tolist()
            factor = float(s) if scale is None else 1.0
        total = [sum(a * b for a, b in zip(q, line, strict=True)) for line in codes]
        out.append([t * factor * float(s) for t, s in zip(total, scales, strict=True)])
    y = torch.tensor(out).view(*x.shape[:-1], len(scales))
    return (y if bias is None else y + bias.float()).to(dtype or _dtype(x))


def linear(
    x: Float[Tensor, "... columns"] | Int[Tensor, "... columns"],
    packed: Int[Tensor, "blocks fours 16 4"],
    scales: Float[Tensor, "rows"],
    sums: Int[Tensor, "rows"],
    bias: Float[Tensor, "rows"] | None = None,
    *,
    scale: Float[Tensor, "given"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... rows"]:
    """x, rounded to int8, times the transposed int8 weight, scaled, plus the bias.

    Differentiable in x as if x were not rounded (straight through). Works under `torch.compile` and `torch.export` as
    the operator `hasten::int8_linear`.

    Args:
        x: any floating dtype, or int8 codes.
        packed: what `pack` gives; `sums`: what `sums` gives, int32.
        scales: fp32, of W's rows.
        scale: fp32 [1] or [columns], all above 0: x is divided by it, and the products are not multiplied by it again.
        dtype: of the result; x's where None, fp32 for int8 codes.

    Raises:
        UsageError: sizes or dtypes that do not go together.
    """
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if plain and not (x.requires_grad and torch.is_grad_enabled()):  # the dispatcher costs more than a small product
        return _compute(x, packed, scales, sums, bias, scale, dtype)
    return torch.ops.hasten.int8_linear(x, packed, scales, sums, bias, scale, dtype)


def _compute(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    _check(x, packed, scales, sums, bias, scale)
    if x.is_cuda and (gpu := _triton()) is not None:
        return gpu.linear(x, packed, scales, sums, bias, scale, dtype)  # type: ignore[no-any-return]
    if not x.is_cpu or (run := kernel()) is None:
        return torch_linear(x, packed, scales, sums, bias, scale, dtype)
    return native_linear(run, x, packed, scales, sums, bias, scale, dtype)


def _check(x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """Refuses what the kernels can't read safely.

    Raises:
        UsageError: sizes or dtypes that do not go together.
    """
    columns, rows = x.shape[-1], scales.shape[0]
    if packed.shape != (-(-rows // LANES), _up(columns, STEP) // 4, LANES, 4) or packed.dtype is not torch.int8:
        raise UsageError(f"packed must be int8 [{-(-rows // LANES)}, {_up(columns, STEP) // 4}, 16, 4] for inputs of "
                         f"{columns} and {rows} scales; it is {packed.dtype} {list(packed.shape)}")  # fmt: skip
    if columns > MOST_COLUMNS:
        raise UsageError(f"{columns} columns are more than {MOST_COLUMNS}: their sums would not fit 32 bits")
    if scales.dtype is not torch.float32 or sums.dtype is not torch.int32 or sums.shape != (rows,):
        raise UsageError(f"scales must be fp32 and sums int32, [rows] both; they are {scales.dtype}, {sums.dtype}")
    if bias is not None and bias.shape != (rows,):
        raise UsageError(f"bias must be [{rows}]; it is {list(bias.shape)}")
    if scale is not None and (scale.dtype is not torch.float32 or scale.shape not in ((1,), (columns,))):
        raise UsageError(f"scale must be fp32 [1] or [{columns}]; it is {scale.dtype} {list(scale.shape)}")
    if not (packed.is_contiguous() and scales.is_contiguous() and sums.is_contiguous()):
        raise UsageError("packed, scales and sums must be contiguous")


def native_linear(
    run: Callable[..., None], x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None,
    scale: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The product through a kernel that `kernel` returned; all tensors on the CPU, the weight's contiguous."""
    (*outer, columns), rows, wanted = x.shape, len(scales), dtype or _dtype(x)
    if x.dtype not in _KINDS:
        x = x.float()
    bias = None if bias is None else bias.float().contiguous()
    x, scale = x.contiguous(), None if scale is None else scale.contiguous()
    y = torch.empty((*outer, rows))
    run(packed.data_ptr(), scales.data_ptr(), sums.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(),
        None if scale is None else scale.data_ptr(), y.data_ptr(), math.prod(outer), rows, columns, _KINDS[x.dtype],
        0 if scale is None else len(scale), torch.get_num_threads())  # fmt: skip
    return y if wanted is torch.float32 else y.to(wanted)


def torch_linear(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The product by PyTorch's operators, 256 rows of W at a time."""
    rows, columns, exact = len(scales), x.shape[-1], torch.int32 if x.is_cpu else torch.float64
    codes = unpack(packed, rows, columns)
    x_codes, factors = (x, 1.0) if x.dtype is torch.int8 else encode(x, scale)
    x_codes = x_codes.to(exact)
    parts = [x_codes @ part.to(exact).t() for part in codes.split(SLAB)]
    y = torch.cat(parts, dim=-1).float() * (factors * scales.float())
    return (y if bias is None else y + bias.float()).to(dtype or _dtype(x))


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype is torch.int8 else x.dtype


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


_operator = torch.library.custom_op(
    "hasten::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, Tensor? scale, ScalarType? dtype)"
    " -> Tensor",
)(_compute)


@_operator.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], scales.shape[0], dtype=dtype or _dtype(x))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, _, _, ctx.scale, _ = inputs
    ctx.columns, ctx.dtype = x.shape[-1], x.dtype
    ctx.save_for_backward(packed, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x, 256 rows of W at a time; rounding counts as the identity, weight and bias as constants."""
    packed, scales = ctx.saved_tensors
    total = torch.zeros(*grad.shape[:-1], ctx.columns, dtype=torch.float32, device=grad.device)
    for start in range(0, len(scales), SLAB):
        part = unpack(packed[start // LANES : (start + SLAB) // LANES], len(scales) - start, ctx.columns)
        total += (grad[..., start : start + SLAB].float() * scales[start : start + SLAB]) @ part.float()
    if ctx.scale is not None:
        total = total / ctx.scale
    return total.to(ctx.dtype), None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.int8_linear)
def _flops(x: Any, packed: Any, scales: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x) * scales[0]
