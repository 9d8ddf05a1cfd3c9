"""The native side of `kernels/block_attention.py`: `block_attention.cpp` through ctypes.

The kernel reads fp32; other dtypes are converted on the way in and out. All sums are fp32.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from hasten.kernels import native
from hasten.math.blocks import Blocks

_POINTERS = (
    "q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "counts", "indices", "mask_of", "masks", "q_order",
    "k_order", "begin", "end",
)  # fmt: skip
_SIZES = ("B", "H", "Hk", "Nq", "Nk", "d", "e")
_STRIDES = ("q_strides", "k_strides", "v_strides")
_LISTS = ("lists_b", "lists_h", "Tq", "M", "qo_b", "qo_h", "ko_b", "ko_h", "block_q", "block_k", "causal", "threads")


class _Call(ctypes.Structure):
    """The kernel's `struct Call`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64 * 3) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in _LISTS),
        ("scaling", ctypes.c_double),
        ("stop", ctypes.c_double),
        ("half", ctypes.c_int64),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("block_attention.cpp", isa=isa)
    if found is not None:
        for function in (found.hasten_block_attention, found.hasten_block_attention_backward):
            function.restype = None
            function.argtypes = [ctypes.POINTER(_Call)]
    return found


def available() -> bool:
    """Whether the kernel can be used here; builds it at the first call."""
    return library() is not None


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float, causal: bool,
    begin: Tensor | None = None, end: Tensor | None = None, stop: float | None = None, *, isa: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Nq, e] and log-sum-exp [B, H, Nq] of CPU tensors, both float32, as `backward` wants them."""
    out = torch.empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3])
    if out.numel() == 0:
        return out, lse
    call, kept = _call(q, k, v, blocks, scaling, causal, begin, end, stop)
    call.out, call.lse = out.data_ptr(), lse.data_ptr()
    _run("hasten_block_attention", call, isa)
    del kept
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks,
    scaling: float, causal: bool, begin: Tensor | None = None, end: Tensor | None = None, *, isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of `forward`'s output and (where it was used) log-sum-exp."""
    if out.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    (dq, dk, dv), more = [torch.empty(x.shape) for x in (q, k, v)], [x.float().contiguous() for x in (dout, out, lse)]
    call, kept = _call(q, k, v, blocks, scaling, causal, begin, end, None)
    call.dout, call.out, call.lse = (x.data_ptr() for x in more)
    if dlse is not None:
        kept.append(dlse := dlse.float().contiguous())
        call.dlse = dlse.data_ptr()
    call.dq, call.dk, call.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _run("hasten_block_attention_backward", call, isa)
    del kept, more
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _run(name: str, call: _Call, isa: str | None) -> None:
    found = library(isa)
    assert found is not None, "ask available() first"
    getattr(found, name)(ctypes.byref(call))


def _call(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float, causal: bool,
    begin: Tensor | None, end: Tensor | None, stop: float | None,
) -> tuple[_Call, list[Any]]:  # fmt: skip
    """The filled structure, and the tensors that it points into."""
    given: dict[str, Tensor] = {name: _rows(x) for name, x in (("q", q), ("k", k), ("v", v))}
    lists = {"counts": blocks.counts, "indices": blocks.indices, "mask_of": blocks.mask_of}
    given |= {name: _whole(x, torch.int32) for name, x in lists.items() if x is not None}
    orders = {"q_order": blocks.q_order, "k_order": blocks.k_order, "begin": begin, "end": end}
    given |= {name: _whole(x, torch.int64) for name, x in orders.items() if x is not None}
    for name in {"begin", "end"} & given.keys():
        given[name] = given[name].expand(q.shape[0]).contiguous()
    if blocks.masks is not None and blocks.mask_of is not None:
        given["masks"] = blocks.masks.contiguous().view(torch.uint8)
    lead = torch.broadcast_shapes(*(given[name].shape[:2] for name in lists if name in given))
    for name in lists.keys() & given.keys():
        given[name] = given[name].expand(*lead, *given[name].shape[2:]).contiguous()
    call = _Call(**{name: x.data_ptr() for name, x in given.items()})
    call.B, call.H, call.Nq, call.d = q.shape
    call.Hk, call.Nk, call.e = v.shape[1:]
    for name in "qkv":
        getattr(call, f"{name}_strides")[:] = given[name].stride()[:3]
    call.lists_b, call.lists_h, call.Tq, call.M = given["indices"].shape
    call.qo_b, call.qo_h = given["q_order"].shape[:2] if "q_order" in given else (1, 1)
    call.ko_b, call.ko_h = given["k_order"].shape[:2] if "k_order" in given else (1, 1)
    call.block_q, call.block_k, call.causal = blocks.block_q, blocks.block_k, causal
    call.scaling, call.stop, call.threads = scaling, -1.0 if stop is None else stop, torch.get_num_threads()
    return call, list(given.values())


def _rows(x: Tensor) -> Tensor:
    """fp32 with numbers of a row side by side; views of longer buffers stay views."""
    x = x.detach().float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, with expanded leading dimensions taken once."""
    for dim in (0, 1):
        if x.dim() > 1 and x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x.to(dtype).contiguous()
