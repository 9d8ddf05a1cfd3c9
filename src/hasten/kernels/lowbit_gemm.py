"""Products of many rows of x with packed codes: what `lowbit.linear` asks first from 9 rows on.

Codes are unpacked 16 rows at a time in the cache, once for all rows of x that fit it, so that their cost does not grow
with the batch. With `activations=32`, they become fp32 weights there and are multiplied as such; with `activations=8`,
x is rounded to int8 in runs of 64 columns and bytes are multiplied: AMX, AVX-512 VNNI, or AVX2 (up to 6 bits).
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.kernels import native
from hasten.kernels.lowbit_weights import statistics
from hasten.math import packing

_KINDS = {torch.float32: 0, torch.float16: 1, torch.uint8: 2, torch.int32: 3}


class _Product(ctypes.Structure):
    """The kernel's `struct Product`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "bias", "tables", "x", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_bytes", "groups", "group", "count")),
        *((name, ctypes.c_int64) for name in ("scale_kind", "zero_kind", "one_zero", "threads")),
    ]


@functools.cache
def kernel(bits: int, isa: str | None = None) -> Callable[..., int] | None:
    """The native kernel, for the best instruction set here where `isa` is None; None where it can't be built."""
    sets = native.sets() if isa is None else (isa,)
    for one in sets:
        library = native.library("lowbit_gemm.cpp", (f"BITS={bits}",), isa=one)
        if library is not None and library.hasten_lowbit_gemm_allowed():
            function: Any = library.hasten_lowbit_gemm
            function.restype = ctypes.c_int
            function.argtypes = [ctypes.POINTER(_Product), ctypes.c_int]
            return function  # type: ignore[no-any-return]
    return None


def gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    activations: int,
    tables: Tensor | None = None,
    levels: Tensor | None = None,
    *,
    run: Callable[..., int] | None = None,
) -> Tensor | None:
    """The product, or None where another way must be taken: no compiler, a group that does not fit, no instructions.

    The arguments are those of `lowbit.linear`, checked already. Groups: 16, 32 or a multiple of 64.
    """
    run = run or kernel(bits)
    if run is None or not (group in (16, 32) or group % 64 == 0) or (tables is not None and activations != 32):
        return None
    if levels is not None:
        scales, zeros = statistics(scales, zeros, levels)
    (*outer, columns), rows, dtype = x.shape, packed.shape[0], x.dtype
    x, packed, scales, zeros = x.float().contiguous(), packed.contiguous(), scales.contiguous(), zeros.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty((*outer, rows))
    where = (None if part is None else part.data_ptr() for part in (packed, scales, zeros, bias, tables, x, y))
    product = _Product(*where, rows, columns,
                       packing.row_bytes(columns, bits), scales.shape[1], group, math.prod(outer), _KINDS[scales.dtype],
                       _KINDS[zeros.dtype], zeros.numel() == 1, torch.get_num_threads())  # fmt: skip
    if not run(ctypes.byref(product), activations):
        return None
    return y if dtype is torch.float32 else y.to(dtype)
