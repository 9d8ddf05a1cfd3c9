"""Softmax attention over the key blocks that `math.blocks.Blocks` lists, and over nothing else.

One signature, four ways to compute it:

- `native`: the C++ kernel `block_attention.cpp`, forward and backward, on a CPU.
- `flex`: PyTorch's FlexAttention, forward and backward, on a GPU; its block mask is made from the lists.
- `torch`: gathers the listed blocks and multiplies, some query blocks at a time. Any device; single tokens on a GPU.
- `naive`: FlashAttention-2's loop over each query block's list.

All compute pairs outside the lists at most where a listed block, a finer mask or causality cuts through a tile.
"""

from typing import Any

import torch
from torch import Tensor

from hasten.kernels import _block_flex
from hasten.math.blocks import Blocks, in_range, seen, spread
from hasten.math.shapes import Float, Int

SLAB = 64 * 2**20  # bytes of gathered keys, values and scores at a time on the `torch` path


def path(q: Tensor, blocks: Blocks, stop: float | None = None) -> str:
    """How `attention` computes this call: native, flex or torch."""
    if torch._C._len_torch_dispatch_stack():  # operations are being counted or traced: only PyTorch's own are seen
        return "torch"
    if q.is_cpu:
        return "native" if _native() is not None else "torch"
    return "flex" if q.is_cuda and blocks.block_k > 1 and stop is None else "torch"


def _native() -> Any:
    """The module of the C++ kernel, or None where it can't be built."""
    try:
        from hasten.kernels import _block_native
    except ImportError:
        return None

    return _block_native if _block_native.available() else None


@torch.compiler.disable
def attention(
    q: Float[Tensor, "b h nq d"],
    k: Float[Tensor, "b hk nk d"],
    v: Float[Tensor, "b hk nk e"],
    blocks: Blocks,
    *,
    scaling: float | None = None,
    causal: bool = True,
    begin: Int[Tensor, "b"] | None = None,
    end: Int[Tensor, "b"] | None = None,
    stop: float | None = None,
    lse: bool = False,
) -> Any:
    """softmax(scaling q k^T) v over the keys that each query sees (`math.blocks`), differentiable in q, k and v.

    Args:
        scaling: d**-0.5 where None.
        begin, end: the keys of each row from `begin` to before `end` are real.
        stop: a query block's list is left once a block's share of the softmax so far, the largest over the queries,
            falls below this; without gradients.
        lse: also return the log-sum-exp of the scaled scores, float32 [b, h, nq]; gradients flow through it too.

    Returns:
        [b, h, nq, e] in q's dtype, zero (log-sum-exp -inf) where a query sees nothing.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    how = path(q, blocks, stop)
    if how == "native":
        out, log = _Native.apply(q, k, v, blocks, scaling, causal, begin, end, stop)
    elif how == "flex":
        out, log = _block_flex.attention(q, k, v, blocks, scaling, causal, begin, end)
    else:
        out, log = torch_attention(q, k, v, blocks, scaling, causal, begin, end, stop)
    return (out, log) if lse else out


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scaling: float | None = None, causal: bool = True,
    begin: Tensor | None = None, end: Tensor | None = None, stop: float | None = None, lse: bool = False,
) -> Any:  # fmt: skip
    """`attention` block by block in float32."""
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    scaling = dim**-0.5 if scaling is None else scaling
    mask = spread(seen(blocks, queries, keys, causal, begin, end), heads).expand(batch, -1, -1, -1)
    k, v = spread(k, heads), spread(v, heads)

    def of(x: Tensor | None, b: int, h: int) -> Any:
        return None if x is None else x[b % x.shape[0], h * x.shape[1] // heads]

    outs, logs = [], []
    for b in range(batch):
        for h in range(heads):
            order_q, order_k = of(blocks.q_order, b, h), of(blocks.k_order, b, h)
            order_q = torch.arange(queries) if order_q is None else order_q
            order_k = torch.arange(keys) if order_k is None else order_k
            rows_out: list[Any] = [None] * queries
            rows_log: list[Any] = [None] * queries
            for t in range(-(-queries // blocks.block_q)):
                rows = order_q[t * blocks.block_q : (t + 1) * blocks.block_q]
                o, total = torch.zeros(len(rows), v.shape[-1]), torch.zeros(len(rows))
                m = torch.full((len(rows),), -torch.inf)
                for j in of(blocks.indices, b, h)[t][: int(of(blocks.counts, b, h)[t])].tolist():
                    at = order_k[j * blocks.block_k : (j + 1) * blocks.block_k]
                    s = q[b, h, rows].float() @ k[b, h, at].float().T * scaling
                    s = s.masked_fill(~mask[b, h][rows][:, at], -torch.inf)
                    m_new = torch.maximum(m, s.detach().amax(1))
                    safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
                    p, shrink = (s - safe[:, None]).exp(), (m - safe).exp()
                    total, o, m = shrink * total + p.sum(1), shrink[:, None] * o + p @ v[b, h, at].float(), m_new
                    if stop is not None and float((p.sum(1) / total).nan_to_num(0.0).max()) < stop:
                        break
                for i, row in enumerate(rows.tolist()):
                    empty = bool(m[i] == -torch.inf)
                    rows_out[row] = o[i] * 0 if empty else o[i] / total[i]
                    rows_log[row] = m[i] if empty else m[i] + total[i].log()
            outs.append(torch.stack(rows_out))
            logs.append(torch.stack(rows_log))
    out = torch.stack(outs).view(batch, heads, queries, -1).to(q.dtype)
    return (out, torch.stack(logs).view(batch, heads, queries)) if lse else out


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float, causal: bool,
    begin: Tensor | None = None, end: Tensor | None = None, stop: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp; differentiable by autograd."""
    (batch, heads, queries, dim), keys, bq, bk = q.shape, k.shape[2], blocks.block_q, blocks.block_k
    device, tq, tk = q.device, -(-queries // bq), -(-keys // bk)
    most = int(blocks.counts.max()) if blocks.counts.numel() else 0
    place_q = torch.arange(queries, device=device) + keys - queries
    at_q = _ordered(place_q, blocks.q_order, tq * bq, -1)  # [b', h', Tq * bq], positions; -1 sees nothing
    at_k = _ordered(torch.arange(keys, device=device), blocks.k_order, tk * bk, keys)  # `keys` is never seen
    q = _rows(q, blocks.q_order, tq * bq).unflatten(2, (tq, bq))  # [B, H, Tq, bq, d]
    k, v = (_rows(x, blocks.k_order, tk * bk).unflatten(2, (tk, bk)) for x in (k, v))  # [B, Hk, Tk, bk, d]
    at_q = spread(at_q, heads if at_q.shape[1] > 1 else 1).unflatten(2, (tq, bq))
    at_k = at_k.unflatten(2, (tk, bk))
    shown = in_range(keys + 1, begin, end if end is not None else torch.tensor([keys]), device)
    group, e = heads // k.shape[1], v.shape[-1]
    b_at, h_at = torch.arange(batch, device=device)[:, None], torch.arange(heads, device=device)[None] // group
    step = max(1, SLAB // max(1, batch * heads * most * bk * (dim + e + 3 * bq) * 4))
    outs, logs = [], []
    for t in range(0, tq, step):
        part = slice(t, min(t + step, tq))
        index = spread(blocks.indices[:, :, part, :most].long(), heads if blocks.indices.shape[1] > 1 else 1)
        index = index.expand(batch, heads, -1, -1)  # [B, H, t, M]
        counts = spread(blocks.counts[:, :, part], heads if blocks.counts.shape[1] > 1 else 1)
        pick = b_at[..., None, None], h_at[..., None, None], index
        k_t, v_t = (x[pick].flatten(3, 4) for x in (k, v))  # [B, H, t, M bk, d]
        pos = at_k[b_at[..., None, None] % at_k.shape[0], (h_at * at_k.shape[1] // k.shape[1])[..., None, None], index]
        listed = torch.arange(most, device=device) < counts[..., None]  # [b', h', t, M]
        ok = listed[..., None].expand(*listed.shape, bk).flatten(3, 4)[:, :, :, None]
        pos_k, pos_q = pos.flatten(3, 4)[:, :, :, None], at_q[:, :, part, :, None]
        ok = ok & (pos_q >= 0) & (pos_k <= pos_q if causal else True)
        row_shown = shown[torch.arange(batch, device=device)[:, None, None, None] % shown.shape[0], pos.flatten(3, 4)]
        ok = ok & row_shown[:, :, :, None]
        if blocks.masks is not None and blocks.mask_of is not None:
            which = spread(blocks.mask_of[:, :, part, :most].long(), heads if blocks.mask_of.shape[1] > 1 else 1)
            fine = blocks.masks[which.clamp(min=0)] | (which < 0)[..., None, None]  # [b', h', t, M, bq, bk]
            ok = ok & fine.transpose(3, 4).flatten(4, 5)
        s = (q[:, :, part].float() @ k_t.float().mT * scaling).masked_fill(~ok, -torch.inf)
        if stop is not None:
            s = _stopped(s.unflatten(4, (most, bk)), stop).flatten(4, 5)
        log = s.logsumexp(-1)
        p = (s - log.masked_fill(log == -torch.inf, 0.0)[..., None]).exp()
        outs.append((p @ v_t.float()).to(q.dtype))
        logs.append(log)
    out, log = torch.cat(outs, 2).flatten(2, 3), torch.cat(logs, 2).flatten(2, 3)
    return _back(out, blocks.q_order, queries), _back(log[..., None], blocks.q_order, queries)[..., 0]


def _ordered(place: Tensor, order: Tensor | None, length: int, fill: int) -> Tensor:
    """Positions in block order, padded to whole blocks: [b', h', length]."""
    found = place[None, None] if order is None else place[order]
    return torch.nn.functional.pad(found, (0, length - found.shape[-1]), value=fill)


def _rows(x: Tensor, order: Tensor | None, length: int) -> Tensor:
    """Rows [B, h, N, d] in block order, padded with zeros to whole blocks."""
    if order is not None:
        order = spread(order, x.shape[1] if order.shape[1] > 1 else 1).expand(*x.shape[:2], -1)
        x = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))


def _back(x: Tensor, order: Tensor | None, queries: int) -> Tensor:
    """From block order to the text's."""
    x = x[:, :, :queries]
    if order is None:
        return x
    order = spread(order, x.shape[1] if order.shape[1] > 1 else 1).expand(*x.shape[:2], -1)
    return x.gather(2, order.argsort(-1)[..., None].expand(-1, -1, -1, x.shape[-1]))


def _stopped(s: Tensor, stop: float) -> Tensor:
    """Scores [..., bq, M, bk] without the blocks behind the first that no query gives a share of `stop`."""
    each = s.logsumexp(-1)  # [..., bq, M]
    share = (each - each.logcumsumexp(-1)).exp().nan_to_num(0.0).amax(-2)  # [..., M]
    after = torch.nn.functional.pad((share < stop).cumsum(-1)[..., :-1], (1, 0)) > 0
    return s.masked_fill(after[..., None, :, None], -torch.inf)


class _Native(torch.autograd.Function):
    """The C++ kernel with its backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float, causal: bool,
                begin: Tensor | None, end: Tensor | None, stop: float | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, log = _native().forward(q, k, v, blocks, scaling, causal, begin, end, stop)
        if any(ctx.needs_input_grad[:3]):
            assert stop is None, "early stopping has no gradient"
            ctx.save_for_backward(q, k, v, out, log)
            ctx.given = blocks, scaling, causal, begin, end
        return out.to(q.dtype), log

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log = ctx.saved_tensors
        return (*_native().backward(*grads, q, k, v, out, log, *ctx.given), *[None] * 6)
