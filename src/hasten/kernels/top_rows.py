"""The places of the k largest numbers of each row, in ascending order of place.

What a decoding step reads of a long cache is chosen by this. PyTorch's `topk` on CPU moves pairs of value and place
about (100 us for 16,384 numbers on one core, most of a step of selection); `top_rows.cpp` counts, and its places come
sorted, so that memory is read in order.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hasten.kernels import native
from hasten.math.shapes import Float, Int

SMALL = 32_768  # numbers in all, below which a second thread costs more than it gives


def naive_top_rows(scores: Float[Tensor, "*rows n"], count: int) -> Int[Tensor, "*rows count"]:
    """The equation: of equal numbers the earlier ones."""
    flat = scores.flatten(0, -2).tolist()
    best = [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:count]) for row in flat]  # noqa: B023
    return torch.tensor(best, dtype=torch.int32).view(*scores.shape[:-1], count)


def top_rows(scores: Float[Tensor, "*rows n"], count: int) -> Int[Tensor, "*rows count"]:
    """The places of the `count` largest numbers of each row, int32 in ascending order.

    Args:
        scores: float, without NaN; -inf is the smallest. Of equal numbers the native path takes the earlier ones.
        count: at most n.
    """
    n = scores.shape[-1]
    if count == n:
        return torch.arange(n, dtype=torch.int32, device=scores.device).expand(*scores.shape[:-1], n).contiguous()
    run = kernel() if scores.device.type == "cpu" else None
    if run is None:
        return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values.int()
    flat = scores.detach().float().reshape(-1, n).contiguous()
    out = torch.empty(len(flat), count, dtype=torch.int32)
    threads = 1 if flat.numel() < SMALL else min(torch.get_num_threads(), len(flat))
    run(flat.data_ptr(), len(flat), n, n, count, out.data_ptr(), threads)
    return out.view(*scores.shape[:-1], count)


@functools.cache
def kernel() -> Callable[..., None] | None:
    """The native kernel, built at the first call; None where it can't be built."""
    library = native.library("top_rows.cpp")
    if library is None:
        return None
    function = library.hasten_top_rows
    function.restype = None
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_int]
    return function
