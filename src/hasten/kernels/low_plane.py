"""y + x L^T for a plane L of two low bits that only some groups of 64 columns of each row have.

It makes a product of 2-bit codes (`lowbit`, groups of 64, scales S [rows, groups]) one where some groups have 4 bits: a
4-bit code is 4 high + low, so with S = 4 s the two products together are s (4 high + low - zero). In every run of
`block` groups each row has `wide` such groups (a shorter last run: its share, rounded up), so their codes lie at fixed
offsets; only which groups they are, differs:

    product[m, n] = sum over slots i of scales[n, g] / 4 * sum_{k < 64} low[n, i, k] x[m, 64 g + k],
    g = i // wide * block + places[n, i]

Low codes are uint8 [rows, slots, 16]: byte b holds, from its lowest bits up, the columns b, b + 16, b + 32, b + 48 of
the group. With `activations=8`, groups of x are rounded to 8 bits just as `lowbit` rounds them.

- `native`: the C++ kernel `low_plane.cpp`, on a CPU. It reads packed codes.
- `torch`: 64 rows of L at a time are made dense. Any device, no gain in speed.
- `naive`: the equation.
"""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.kernels.lowbit import round_activations
from hasten.math.shapes import Float, Int

GROUP, BYTES, SLAB = 64, 16, 64


class _Plane(ctypes.Structure):
    """The kernel's `struct Plane`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "places", "scales", "x", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "slots", "block", "wide")),
        *((name, ctypes.c_int64) for name in ("count", "activations", "threads")),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    isa = isa or next(one for one in native.sets() if one != "AMX")
    found = native.library("low_plane.cpp", isa=isa)
    if found is not None:
        found.hasten_low_plane.restype = None
        found.hasten_low_plane.argtypes = [ctypes.POINTER(_Plane)]
    return found


def path(device: torch.device | str = "cpu") -> str:
    """How `product` and `add` compute here: native or torch."""
    return "native" if torch.device(device).type == "cpu" and library() is not None else "torch"


def slots(columns: int, block: int, wide: int) -> int:
    """How many groups of a row have low bits."""
    groups = -(-columns // GROUP)
    return groups // block * wide + -(-(groups % block) * wide // block)


def pack(low: Int[Tensor, "rows slots 64"]) -> Int[Tensor, "rows slots 16"]:
    """Codes from 0 to 3 of the groups, packed."""
    quarters = low.to(torch.uint8).unflatten(2, (4, BYTES))
    return (quarters << torch.arange(0, 8, 2, dtype=torch.uint8, device=low.device)[:, None]).sum(2, dtype=torch.uint8)


def check(codes: Tensor, places: Tensor, scales: Tensor, block: int, wide: int, columns: int) -> None:
    """Refuses what the kernel can't read safely.

    Raises:
        UsageError: a dtype, a shape, or a place outside its run of groups.
    """
    rows, groups = len(places), -(-columns // GROUP)
    if not 0 < wide <= block or columns < 1:
        raise UsageError(f"a plane of low bits has 1 to block={block} groups of each block, not {wide}")
    some = slots(columns, block, wide)
    for name, part, shape, dtype in [
        ("codes", codes, (rows, some, BYTES), torch.uint8),
        ("places", places, (rows, some), torch.uint8),
        ("scales", scales, (rows, groups), torch.float16),
    ]:
        if part.shape != shape or part.dtype != dtype or not part.is_contiguous():
            raise UsageError(f"{name} of a plane of low bits must be contiguous {dtype} {list(shape)} for {columns} "
                             f"columns; it is {part.dtype} {list(part.shape)}")  # fmt: skip
    if places.numel() and int((places.int() + _starts(places, block, wide)).max()) >= groups or (places >= block).any():
        raise UsageError(f"a plane of low bits names a group outside its run of {block}, or after the last, {groups}")


def _starts(places: Tensor, block: int, wide: int) -> Int[Tensor, "slots"]:
    """The first group of the run to which each slot belongs."""
    return torch.arange(places.shape[1], device=places.device) // wide * block


def dense(
    codes: Tensor, places: Tensor, scales: Tensor, block: int, wide: int, columns: int
) -> Float[Tensor, "rows columns"]:
    """L, fp32."""
    at = places.long() + _starts(places, block, wide)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)[:, None]
    low = ((codes[:, :, None] >> shifts) & 3).flatten(2).float() * (scales.float().gather(1, at) / 4)[..., None]
    made = torch.zeros(len(codes), scales.shape[1], GROUP, device=codes.device)
    return made.scatter_(1, at[..., None].expand_as(low), low).flatten(1)[:, :columns]


def naive_product(
    x: Tensor, codes: Tensor, places: Tensor, scales: Tensor, *, block: int, wide: int, activations: int = 32
) -> Tensor:
    """`product` as the equation, code by code in fp32."""
    xs, y = x.float(), torch.zeros(*x.shape[:-1], len(codes))
    if activations == 8:
        parts = []
        for part in xs.split(GROUP, dim=-1):
            step = part.abs().amax(-1, keepdim=True) / 127
            parts.append(torch.where(step == 0, 0, (part / step).round() * step))
        xs = torch.cat(parts, dim=-1)
    for n in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            g = i // wide * block + int(places[n, i])
            for k in range(min(GROUP, x.shape[-1] - GROUP * g)):
                low = int(codes[n, i, k % BYTES]) >> 2 * (k // BYTES) & 3
                y[..., n] += scales[n, g].float() / 4 * low * xs[..., GROUP * g + k]
    return y.to(x.dtype)


def product(
    x: Float[Tensor, "... columns"], codes: Int[Tensor, "rows slots 16"], places: Int[Tensor, "rows slots"],
    scales: Float[Tensor, "rows groups"], *, block: int, wide: int, activations: int = 32,
) -> Float[Tensor, "... rows"]:  # fmt: skip
    """x L^T in x's dtype, computed in fp32; differentiable in x. The operator is `hasten::low_plane`."""
    return torch.ops.hasten.low_plane(x, codes, places, scales, block, wide, activations)


def add(
    y: Float[Tensor, "... rows"], x: Float[Tensor, "... columns"], codes: Int[Tensor, "rows slots 16"],
    places: Int[Tensor, "rows slots"], scales: Float[Tensor, "rows groups"], *, block: int, wide: int,
    activations: int = 32,
) -> Float[Tensor, "... rows"]:  # fmt: skip
    """y + x L^T in y's dtype. What is returned may be y itself, written to: use it no more."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    run = library() if plain and x.is_cpu else None
    if run is None or (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        sizes = {"block": block, "wide": wide, "activations": activations}
        return (y.float() + product(x.float(), codes, places, scales, **sizes)).to(y.dtype)
    total = y.detach().float().contiguous()
    _call(run, x, total, codes, places, scales, block, wide, activations)
    return total.to(y.dtype)


def native_product(
    x: Tensor, codes: Tensor, places: Tensor, scales: Tensor, *, block: int, wide: int, activations: int = 32,
    isa: str | None = None,
) -> Tensor:  # fmt: skip
    """The product through the kernel; all tensors on the CPU and as `check` wants them."""
    run = library(isa)
    assert run is not None, "ask path() first"
    y = torch.zeros(*x.shape[:-1], len(codes))
    _call(run, x, y, codes, places, scales, block, wide, activations)
    return y.to(x.dtype)


def torch_product(
    x: Tensor, codes: Tensor, places: Tensor, scales: Tensor, *, block: int, wide: int, activations: int = 32
) -> Tensor:
    """The product with 64 rows of L dense at a time."""
    xs = round_activations(x) if activations == 8 else x.float()
    parts = [F.linear(xs, dense(c, p, s, block, wide, x.shape[-1])) for c, p, s in _slabs(codes, places, scales)]
    return torch.cat(parts, dim=-1).to(x.dtype)


def _slabs(*parts: Tensor) -> Any:
    return zip(*(part.split(SLAB) for part in parts), strict=True)


def _call(
    run: ctypes.CDLL, x: Tensor, y: Tensor, codes: Tensor, places: Tensor, scales: Tensor, block: int, wide: int,
    activations: int,
) -> None:  # fmt: skip
    x = x.detach().float().contiguous()
    count = math.prod(x.shape[:-1])
    if not count:
        return
    call = _Plane(codes.data_ptr(), places.data_ptr(), scales.data_ptr(), x.data_ptr(), y.data_ptr(), len(codes),
                  x.shape[-1], codes.shape[1], block, wide, count, activations, torch.get_num_threads())  # fmt: skip
    run.hasten_low_plane(ctypes.byref(call))


def _compute(
    x: Tensor, codes: Tensor, places: Tensor, scales: Tensor, block: int, wide: int, activations: int
) -> Tensor:
    compute = native_product if x.is_cpu and library() is not None else torch_product
    return compute(x, codes, places, scales, block=block, wide=wide, activations=activations)


_operator = torch.library.custom_op(
    "hasten::low_plane",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor places, Tensor scales, int block, int wide, int activations) -> Tensor",
)(_compute)


@_operator.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, places, scales, block, wide, _activations = inputs
    ctx.sizes = block, wide, x.shape[-1]
    ctx.save_for_backward(codes, places, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x, as if x had not been rounded; L is constant."""
    total = torch.zeros(*grad.shape[:-1], ctx.sizes[-1], device=grad.device)
    for part, (c, p, s) in zip(grad.split(SLAB, dim=-1), _slabs(*ctx.saved_tensors), strict=True):
        total += part.float() @ dense(c, p, s, *ctx.sizes)
    return total.to(grad.dtype), *[None] * 6


_operator.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.hasten.low_plane)
def _flops(x: Any, codes: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * codes[0] * codes[1] * GROUP
