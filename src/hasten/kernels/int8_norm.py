"""A norm over the last dimension whose output is int8 codes: what divides them was folded into its gain.

    v[k] = (x[k] - mean) / sqrt(mean((x - mean)^2) + eps) * gain[k] + shift[k]        without `centred`, mean = 0
    y[k] = clamp(round(v[k]), -most, most)

An input may have several columns: code i of `extra` is what is left of round(v[source[i]]) after the `place[i]` columns
before it have taken `most` each, so that the columns of an input add up to its rounded number.

One signature, two ways: `native`, one pass of the C++ kernel `int8_norm.cpp` in the place of about six operators; and
`torch`. They sum in another order, so a code may differ by one where v is within rounding of a half. NaN becomes
-most: int8 has none.
"""

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.math.shapes import Float, Int

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
PLACES = 64  # columns that an input may have at most


@functools.cache
def kernel(isa: str | None = None) -> Callable[..., None] | None:
    """The native kernel; None where it can't be built."""
    library = native.library("int8_norm.cpp", isa=isa)
    if library is None:
        return None
    function = library.hasten_int8_norm
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6 + [ctypes.c_float, ctypes.c_int]
    return function  # type: ignore[no-any-return]


def naive_norm(
    x: Tensor, gain: Tensor, shift: Tensor | None = None, source: Tensor | None = None, place: Tensor | None = None, *,
    eps: float, centred: bool = False, most: int = 127,
) -> Tensor:  # fmt: skip
    """`norm` number by number."""
    out = []
    for row in x.reshape(-1, x.shape[-1]).float():
        mean = row.mean() if centred else row.new_zeros(())
        root = ((row - mean).square().mean() + eps).sqrt()
        whole = []
        for k, value in enumerate(row):
            v = (value - mean) / root * gain[k] + (0 if shift is None else shift[k])
            whole.append(int(torch.round(v).clamp(-PLACES * most, PLACES * most)))
        codes = [min(max(code, -most), most) for code in whole]
        for k, taken in zip(source.tolist() if source is not None else (), place.tolist() if place is not None else (),
                            strict=True):  # fmt: skip
            left = min(max(abs(whole[k]) - taken * most, 0), most)
            codes.append(int(math.copysign(left, whole[k])))
        out.append(codes)
    return torch.tensor(out, dtype=torch.int8).view(*x.shape[:-1], -1)


def norm(
    x: Float[Tensor, "... columns"],
    gain: Float[Tensor, "columns"],
    shift: Float[Tensor, "columns"] | None = None,
    source: Int[Tensor, "extra"] | None = None,
    place: Int[Tensor, "extra"] | None = None,
    *,
    eps: float,
    centred: bool = False,
    most: int = 127,
) -> Int[Tensor, "... all"]:
    """The codes of x, int8 [..., columns + extra]; without gradients.

    Args:
        gain, shift: fp32. source: int64, the column that an extra one belongs to; place: int64, how many columns that
            one has before it, from 1 on.

    Raises:
        UsageError: sizes that do not go together.
    """
    columns, extra = x.shape[-1], 0 if source is None else len(source)
    if gain.shape != (columns,) or (shift is not None and shift.shape != (columns,)):
        raise UsageError(f"gain and shift must have {columns} numbers, as many as the input has columns")
    if extra and (place is None or place.shape != source.shape):  # type: ignore[union-attr]
        raise UsageError("source and place must have the same length")
    run = kernel() if x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling() else None
    if run is None:  # also while compiling: PyTorch's operators fuse there
        return torch_norm(x, gain, shift, source, place, eps=eps, centred=centred, most=most)
    return native_norm(run, x, gain, shift, source, place, eps=eps, centred=centred, most=most)


def native_norm(
    run: Callable[..., None], x: Tensor, gain: Tensor, shift: Tensor | None, source: Tensor | None,
    place: Tensor | None, *, eps: float, centred: bool, most: int,
) -> Tensor:  # fmt: skip
    """The codes by a kernel that `kernel` returned; CPU tensors, gain and shift fp32 and contiguous."""
    (*outer, columns), extra, threads = x.shape, 0 if source is None else len(source), torch.get_num_threads()
    if x.dtype not in _KINDS:
        x = x.float()
    x = x.detach().contiguous()
    y = torch.empty((*outer, columns + extra), dtype=torch.int8)
    run(x.data_ptr(), gain.data_ptr(), None if shift is None else shift.data_ptr(),
        None if source is None else source.data_ptr(), None if place is None else place.data_ptr(), y.data_ptr(),
        math.prod(outer), columns, extra, _KINDS[x.dtype], centred, most, eps, threads)  # fmt: skip
    return y


@torch.no_grad()
def torch_norm(
    x: Tensor, gain: Tensor, shift: Tensor | None, source: Tensor | None, place: Tensor | None, *, eps: float,
    centred: bool, most: int,
) -> Tensor:  # fmt: skip
    """The codes by PyTorch's operators."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    v = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
    v = v if shift is None else v + shift
    whole = v.nan_to_num(-PLACES * most).clamp(-PLACES * most, PLACES * most).round()
    codes = whole.clamp(-most, most)
    if source is not None and place is not None:
        of = whole[..., source]
        codes = torch.cat([codes, (of.abs() - place * most).clamp(0, most) * of.sign()], dim=-1)
    return codes.to(torch.int8)
