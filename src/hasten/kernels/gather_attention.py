"""Attention of a few queries over listed tokens: decoding, where all time goes into reading keys and values.

A list names tokens of a key/value head; heads may have lists of different lengths, and lie side by side in a buffer of
tokens [B, Hk, N, d] or one behind the other in flat storage [slots, d]. Each listed row is read once for all queries of
the heads that share the list, where it lies and in its own dtype; nothing is copied. The last n listed tokens are the
queries' own, so that query i of n sees all but the last n - 1 - i of them.

One signature, three ways to compute it:

- `native`: the C++ kernel `gather_attention.cpp`, on a CPU, without gradients. Long lists are split over threads.
- `torch`: gathers, then multiplies. Any device, differentiable.
- `naive`: the equation, head by head.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from hasten.kernels import _block_native, native
from hasten.math.blocks import spread
from hasten.math.shapes import Float, Int

_HALF = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Lists(ctypes.Structure):
    """The kernel's `struct Lists`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "starts", "lengths")),
        *((name, ctypes.c_int64) for name in ("rows_b", "rows_h", "M", "longest")),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("gather_attention.cpp", isa=isa)
    if found is not None:
        found.hasten_gather_attention.restype = None
        found.hasten_gather_attention.argtypes = [ctypes.POINTER(_block_native._Call), ctypes.POINTER(_Lists)]
    return found


def path(q: Tensor, keys: Tensor, values: Tensor) -> str:
    """How `gather_attention` computes this call: native or torch."""
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    plain = q.is_cpu and keys.dtype == values.dtype and keys.dtype in _HALF
    return "native" if plain and not graph and library() is not None else "torch"


@torch.compiler.disable
def gather_attention(
    q: Float[Tensor, "b h n d"],
    keys: Float[Tensor, "*where d"],
    values: Float[Tensor, "*where e"],
    rows: Int[Tensor, "b hs m"] | None = None,
    counts: Int[Tensor, "b hs"] | None = None,
    *,
    starts: Int[Tensor, "b hk"] | None = None,
    lengths: Int[Tensor, "b hk"] | None = None,
    scaling: float | None = None,
    lse: bool = False,
) -> Any:
    """softmax(scaling q k^T) v over the listed tokens, causal among the last n.

    Args:
        keys, values: [B, Hk, N, d] and [B, Hk, N, e], views of longer buffers as they are; or flat [slots, d] and
            [slots, e] with `starts` and `lengths` int64 [B, Hk].
        rows: int32 [B, Hs, M], tokens of each head (of flat storage: counted from its start), Hs of 1, Hk or H; all of
            the head's tokens where None.
        counts: int32 [B, Hs], how many entries of a list are valid; all where None.
        scaling: d**-0.5 where None.
        lse: also return the log-sum-exp of the scaled scores, float32 [B, H, n].

    Returns:
        [B, H, n, e] in q's dtype; zero (log-sum-exp -inf) where a query sees nothing.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    run = native_gather if path(q, keys, values) == "native" else torch_gather
    out, log = run(q, keys, values, rows, counts, starts, lengths, scaling)
    return (out, log) if lse else out


def naive_gather_attention(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None = None, counts: Tensor | None = None, *,
    starts: Tensor | None = None, lengths: Tensor | None = None, scaling: float | None = None, lse: bool = False,
) -> Any:  # fmt: skip
    """`gather_attention` head by head in float32."""
    batch, heads, n, dim = q.shape
    scaling = dim**-0.5 if scaling is None else scaling
    number = _lengths(q, keys, rows, counts, lengths)
    outs, logs = [], []
    for b in range(batch):
        for h in range(heads):
            hk = h * (keys.shape[1] if starts is None else starts.shape[1]) // heads
            k, v = (x[b, hk] if starts is None else x[int(starts[b, hk]) :] for x in (keys, values))
            length = int(number[b, h * number.shape[1] // heads])
            at = torch.arange(length) if rows is None else rows[b, h * rows.shape[1] // heads, :length].long()
            for i in range(n):
                seen = at[: max(0, length - n + 1 + i)]
                s = k[seen].float() @ q[b, h, i].float() * scaling
                outs.append(s.softmax(0) @ v[seen].float())
                logs.append(s.logsumexp(0) if len(seen) else torch.tensor(-torch.inf))
    out = torch.stack(outs).view(batch, heads, n, -1).to(q.dtype)
    return (out, torch.stack(logs).view(batch, heads, n)) if lse else out


def torch_gather(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None, counts: Tensor | None, starts: Tensor | None,
    lengths: Tensor | None, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp by PyTorch's operators."""
    batch, heads, n, _ = q.shape
    number = _lengths(q, keys, rows, counts, lengths)  # [B, Hs]
    longest = max(1, int(number.max())) if number.numel() else 1
    kv_heads = keys.shape[1] if starts is None else starts.shape[1]
    lists = max(kv_heads, number.shape[1])
    if rows is not None or starts is not None:
        at = torch.arange(longest, device=q.device).expand(batch, 1, -1) if rows is None else rows[..., :longest].long()
        valid = torch.arange(at.shape[-1], device=q.device) < spread(number, lists)[..., None]
        at = torch.where(valid, spread(at, lists), 0)  # [B, lists, M]
        where = torch.arange(batch, device=q.device)[:, None, None], torch.arange(lists, device=q.device)[:, None]
        pick = where[0], where[1] * kv_heads // lists, at
        if starts is not None:
            flat = (starts.to(q.device)[pick[0], pick[1]] + at).clamp(max=len(keys) - 1)
            keys, values = keys[flat], values[flat]
        else:
            keys, values = keys[pick], values[pick]
    else:
        keys, values = spread(keys[:, :, :longest], lists), spread(values[:, :, :longest], lists)
    limit = spread(number, heads)[..., None] - n + 1 + torch.arange(n, device=q.device)  # [B, H, n]
    grouped = q.float().unflatten(1, (lists, -1))  # [B, lists, G, n, d]
    s = grouped.flatten(2, 3) @ keys.float().mT * scaling
    s = s.unflatten(2, (-1, n)).flatten(1, 2)  # [B, H, n, M]
    s = s.masked_fill(torch.arange(s.shape[-1], device=q.device) >= limit[..., None], -torch.inf)
    log = s.logsumexp(-1)
    p = (s - log.masked_fill(log == -torch.inf, 0.0)[..., None]).exp()
    out = p.unflatten(1, (lists, -1)).flatten(2, 3) @ values.float()
    return out.unflatten(2, (-1, n)).flatten(1, 2).to(q.dtype), log


def native_gather(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None, counts: Tensor | None, starts: Tensor | None,
    lengths: Tensor | None, scaling: float, *, isa: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp by the kernel; CPU tensors, keys and values of one dtype."""
    run = library(isa)
    assert run is not None, "ask path() first"
    batch, heads, n, dim = q.shape
    out, log = torch.empty(batch, heads, n, values.shape[-1]), torch.empty(batch, heads, n)
    if out.numel() == 0:
        return out.to(q.dtype), log
    number = _lengths(q, keys, rows, counts, lengths).expand(batch, -1).long().contiguous()
    query = q.detach().float()
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (keys, values))
    call = _block_native._Call(q=query.data_ptr(), k=keys.data_ptr(), v=values.data_ptr(), out=out.data_ptr())
    call.lse, call.half, call.stop, call.scaling = log.data_ptr(), _HALF[keys.dtype], -1.0, scaling
    call.B, call.H, call.Nq, call.d, call.e = batch, heads, n, dim, values.shape[-1]
    call.Hk = keys.shape[1] if starts is None else starts.shape[1]
    call.q_strides[:] = query.stride()[:3]
    for name, x in (("k_strides", keys), ("v_strides", values)):
        getattr(call, name)[:] = x.stride()[:3] if starts is None else (0, 0, x.stride(0))
    call.lists_b, call.lists_h, call.block_q, call.block_k = batch, number.shape[1], n, 1
    call.causal, call.threads, call.Nk, call.Tq = 1, torch.get_num_threads(), keys.shape[-2], 1
    lists = _Lists(lengths=number.data_ptr(), rows_h=number.shape[1], rows_b=1, longest=int(number.max()))
    if rows is not None:
        rows = rows.int().contiguous()
        lists.rows, lists.rows_b, lists.M = rows.data_ptr(), rows.shape[0], rows.shape[2]
    if starts is not None:
        starts = starts.long().contiguous()
        lists.starts = starts.data_ptr()
    run.hasten_gather_attention(ctypes.byref(call), ctypes.byref(lists))
    return out.to(q.dtype), log


def _lengths(
    q: Tensor, keys: Tensor, rows: Tensor | None, counts: Tensor | None, lengths: Tensor | None
) -> Int[Tensor, "b hs"]:
    """How many tokens each list names."""
    if counts is not None:
        return counts.to(q.device)
    if rows is not None:
        return torch.full(rows.shape[:2], rows.shape[2], device=q.device)
    if lengths is not None:
        return lengths.to(q.device)
    return torch.full(keys.shape[:2], keys.shape[2], device=q.device)
