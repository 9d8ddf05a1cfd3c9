"""y + x S^T for a very sparse S [rows, width], such as the outliers that a quantized weight leaves out.

S is held in compressed rows: `values` [n] in fp32, bf16 or fp16, row after row; `columns` [n], int32 or uint16; row r
has the numbers from `starts[r]` to before `starts[r + 1]`, int32 [rows + 1].

    product[m, r] = sum over i from starts[r] to starts[r + 1] of values[i] * x[m, columns[i]]

One signature, three ways to compute it:

- `native`: the C++ kernel `csr.cpp`, on a CPU. One row of x is gathered from, more are turned into panels of 16.
- `torch`: gathers and `index_add`, in bounded memory. Any device.
- `naive`: the equation.

The kernel trusts `columns` and `starts`: call `check` once where they come from a file.
"""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.math.shapes import Float, Int

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST_NARROW = 1 << 16  # columns that uint16 can name
_AT_ONCE = 1 << 22  # products held at a time on the `torch` path


class _Sparse(ctypes.Structure):
    """The kernel's `struct Sparse`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "columns", "starts", "x", "y")),
        *((name, ctypes.c_int64) for name in ("kind", "narrow", "count", "rows", "width", "add", "threads")),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("csr.cpp", isa=isa)
    if found is not None:
        found.hasten_csr.restype = None
        found.hasten_csr.argtypes = [ctypes.POINTER(_Sparse)]
    return found


def path(device: torch.device | str = "cpu") -> str:
    """How `product` and `add` compute here: native or torch."""
    return "native" if torch.device(device).type == "cpu" and library() is not None else "torch"


def check(values: Tensor, columns: Tensor, starts: Tensor, *, rows: int, width: int) -> None:
    """Whether the three tensors describe a matrix [rows, width].

    Raises:
        UsageError: a dtype, a shape, or a place outside the matrix.
    """
    problem = ""
    if values.dtype not in KINDS or columns.dtype not in (torch.int32, torch.uint16) or starts.dtype != torch.int32:
        problem = (
            f"values, columns and starts must be floats, int32 or uint16, and int32; they are {values.dtype}, "
            f"{columns.dtype} and {starts.dtype}"
        )
    elif values.ndim != 1 or columns.shape != values.shape or starts.shape != (rows + 1,):
        problem = (
            f"{rows} rows need {rows + 1} starts and as many columns as values; there are {tuple(starts.shape)} "
            f"starts, {tuple(columns.shape)} columns and {tuple(values.shape)} values"
        )
    elif int(starts[0]) != 0 or int(starts[-1]) != len(values) or bool((starts.diff() < 0).any()):
        problem = f"starts must rise from 0 to the number of values, {len(values)}"
    elif len(columns):
        low, high = (int(edge) for edge in columns.to(torch.int32).aminmax())
        if low < 0 or high >= width:
            problem = f"columns lie between {low} and {high}, outside a width of {width}"
    if problem:
        raise UsageError(f"this is no sparse matrix of {rows} rows and {width} columns: {problem}")


def compress(
    dense: Float[Tensor, "rows width"], dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "rows+1"]]:
    """The numbers of a matrix that are not zero: values, columns (uint16 where they fit) and starts."""
    found = dense.nonzero()
    starts = torch.zeros(len(dense) + 1, dtype=torch.int32, device=dense.device)
    starts[1:] = (dense != 0).sum(1).cumsum(0)
    narrow = torch.uint16 if dense.shape[1] <= WIDEST_NARROW else torch.int32
    return dense[found[:, 0], found[:, 1]].to(dtype), found[:, 1].to(narrow), starts


def expand(values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Float[Tensor, "rows width"]:
    """The dense matrix, fp32; numbers of one place are added."""
    dense = torch.zeros(len(starts) - 1, width, device=values.device)
    return dense.index_put_((_rows_of(starts), columns.long()), values.float(), accumulate=True)


def naive_product(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """`product` as the equation, number by number in fp32."""
    y = torch.zeros(*x.shape[:-1], len(starts) - 1)
    for r in range(len(starts) - 1):
        for i in range(int(starts[r]), int(starts[r + 1])):
            y[..., r] += values[i].float() * x[..., int(columns[i])].float()
    return y.to(x.dtype)


def product(
    x: Float[Tensor, "... width"], values: Float[Tensor, "n"], columns: Int[Tensor, "n"], starts: Int[Tensor, "rows+1"]
) -> Float[Tensor, "... rows"]:
    """x S^T in x's dtype, computed in fp32.

    Differentiable in x. Works under `torch.compile` and `torch.export` as the operator `hasten::csr_product`.
    """
    if _plain(x):
        return _product(x, values, columns, starts)
    return torch.ops.hasten.csr_product(x, values, columns, starts)


def add(
    y: Float[Tensor, "... rows"],
    x: Float[Tensor, "... width"],
    values: Float[Tensor, "n"],
    columns: Int[Tensor, "n"],
    starts: Int[Tensor, "rows+1"],
) -> Float[Tensor, "... rows"]:
    """y + x S^T in y's dtype. What is returned may be y itself, written to: use it no more."""
    run = library() if y.is_cpu and _plain(x) else None
    if run is None or (y.requires_grad and torch.is_grad_enabled()):
        return (y.float() + product(x.float(), values, columns, starts)).to(y.dtype)
    total = y.detach().float().contiguous()
    _call(run, x, total, values, columns, starts, add=True)
    return total.to(y.dtype)


def native_product(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, *, isa: str | None = None) -> Tensor:
    """The product through the kernel; all tensors on the CPU and contiguous."""
    run = library(isa)
    assert run is not None, "ask path() first"
    y = torch.empty(*x.shape[:-1], len(starts) - 1)
    _call(run, x, y, values, columns, starts, add=False)
    return y.to(x.dtype)


def torch_product(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """The product by PyTorch's operators, some million numbers at a time."""
    flat, rows, wide = x.flatten(0, -2) if x.ndim > 1 else x[None], _rows_of(starts), columns.long()
    y = torch.zeros(len(flat), len(starts) - 1, device=x.device)
    step = max(1, _AT_ONCE // max(1, len(flat)))
    for i in range(0, len(values), step):
        y.index_add_(1, rows[i : i + step], flat[:, wide[i : i + step]].float() * values[i : i + step].float())
    return y.to(x.dtype).view(*x.shape[:-1], len(starts) - 1)


def _plain(x: Tensor) -> bool:
    """Whether the dispatcher, which costs more than a small product, may be left out."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    return plain and not (x.requires_grad and torch.is_grad_enabled())


def _product(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    if not x.is_cpu or library() is None:
        return torch_product(x, values, columns, starts)
    return native_product(x, values, columns, starts)


def _call(
    run: ctypes.CDLL, x: Tensor, y: Tensor, values: Tensor, columns: Tensor, starts: Tensor, *, add: bool
) -> None:  # fmt: skip
    if values.dtype not in KINDS:
        values = values.float()
    x = x.detach().float().contiguous()
    count, rows = math.prod(x.shape[:-1]), len(starts) - 1
    if not count or not rows:
        return
    call = _Sparse(values.data_ptr(), columns.data_ptr(), starts.data_ptr(), x.data_ptr(), y.data_ptr())
    call.kind, call.narrow, call.add = KINDS[values.dtype], columns.dtype == torch.uint16, add
    call.count, call.rows, call.width, call.threads = count, rows, x.shape[-1], torch.get_num_threads()
    run.hasten_csr(ctypes.byref(call))


def _rows_of(starts: Tensor) -> Int[Tensor, "n"]:
    """The row of each number."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff().long())


_operator = torch.library.custom_op(
    "hasten::csr_product",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor columns, Tensor starts) -> Tensor",
)(_product)


@_operator.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], starts.shape[0] - 1)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *matrix = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(*matrix)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x; the matrix is constant."""
    values, columns, starts = ctx.saved_tensors
    flat, rows, wide = grad.reshape(-1, grad.shape[-1]).float(), _rows_of(starts), columns.long()
    total = torch.zeros(len(flat), ctx.width, device=grad.device)
    step = max(1, _AT_ONCE // max(1, len(flat)))
    for i in range(0, len(values), step):
        total.index_add_(1, wide[i : i + step], flat[:, rows[i : i + step]] * values[i : i + step].float())
    return total.to(grad.dtype).view(*grad.shape[:-1], ctx.width), None, None, None


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.csr_product)
def _flops(x: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * values[0]
