"""Attention in which every single query chose its own key blocks, in three loop orders with the same result.

`queries` (NSA, arXiv 2502.11089, section 3.4): outside the queries, inside the blocks that one chose; the heads that
share keys are the rows of one small product, its keys gathered query by query. `keys` (Flash Sparse Attention, arXiv
2508.18224, section 3): outside the key blocks, inside the queries that chose one; the products are as large as a block
is popular, whatever the number of heads per key, and every query's partial results are merged by the online softmax.
`tiles`: neighbours choose alike, so small tiles of queries see all blocks that any of them chose, and a mask takes back
what the single query did not; one pass of the native kernel (`kernels.block_attention`).

Forward and backward on one core (2,048 tokens, 8 blocks of 64 each, dim 64, 4 heads in groups of 1, 2 and 4): 33, 26
and 23 ms by tiles, 78, 71 and 63 by keys, 2,198, 1,319 and 526 by queries; dense attention takes 95 to 99.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hasten.kernels import block_attention
from hasten.math.blocks import Blocks, in_range, spread
from hasten.math.shapes import Bool, Float, Int

_TILE = 16  # queries of a tile in the order `tiles`
_GATHERED = 2**20  # numbers gathered at a time in the order `queries`: what a cache holds


def naive_routed(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], v: Float[Tensor, "b hk nk e"],
    chosen: Bool[Tensor, "b hc nq tk"], block: int, scaling: float | None = None, causal: bool = True,
    begin: Int[Tensor, "b"] | None = None, end: Int[Tensor, "b"] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax over the chosen keys, query by query, in float32.

    Args:
        chosen: the key blocks of `block` tokens that a query sees; its heads are 1, the kv heads or the heads.
        causal: queries are the last Nq of Nk positions and see no later key.
        begin, end: keys of each row that are no padding.

    Returns:
        [B, H, Nq, e], 0 where a query sees nothing, and the log-sum-exp [B, H, Nq].
    """
    batch, heads, nq, d = q.shape
    hk, nk = k.shape[1], k.shape[2]
    scaling = d**-0.5 if scaling is None else scaling
    out, logs = [], []
    for b in range(batch):
        low, high = 0 if begin is None else int(begin[b]), nk if end is None else int(end[b])
        for h in range(heads):
            table = chosen[b if chosen.shape[0] > 1 else 0, h * chosen.shape[1] // heads]
            for i in range(nq):
                at = i + nk - nq
                keys = [j for j in range(low, high) if table[i, j // block] and (j <= at or not causal)]
                rows = k[b, h * hk // heads, keys].float()
                s = rows @ q[b, h, i].float() * scaling
                out.append(s.softmax(0) @ v[b, h * hk // heads, keys].float())
                logs.append(s.logsumexp(0))
    shaped = torch.stack(out).view(batch, heads, nq, v.shape[-1])
    return shaped.to(q.dtype), torch.stack(logs).view(batch, heads, nq)


def routed(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], v: Float[Tensor, "b hk nk e"],
    chosen: Bool[Tensor, "b hc nq tk"], block: int, scaling: float | None = None, causal: bool = True,
    begin: Int[Tensor, "b"] | None = None, end: Int[Tensor, "b"] | None = None, order: str = "tiles",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`naive_routed` in one of the orders; differentiable in q, k, v through the output.

    Args:
        order: `tiles`, where the native kernel runs, else and by name `keys`; or `queries`.
    """
    if order == "tiles" and q.is_cpu:
        blocks = tiles(chosen, block)
        if block_attention.path(q, blocks) == "native":
            return block_attention.attention(
                q, k, v, blocks, scaling=scaling, causal=causal, begin=begin, end=end, lse=True
            )
    batch, heads, nq, d = q.shape
    hk, nk = k.shape[1], k.shape[2]
    scaling = d**-0.5 if scaling is None else scaling
    rows = chosen.shape[1] if hk <= chosen.shape[1] else hk  # heads with lists of their own
    if rows != hk:
        k, v = spread(k, rows), spread(v, rows)
    table = spread(chosen, rows).expand(batch, -1, -1, -1).flatten(0, 1)  # [R, Nq, Tk]
    group = heads // rows
    shown = in_range(nk, begin, end, q.device)
    if shown is not None:
        shown = shown.expand(batch, -1).repeat_interleave(rows, 0)  # [R, Nk]
    q_r = (q.float() * scaling).reshape(batch * rows, group, nq, d).transpose(1, 2)  # [R, Nq, G, d]
    k_r, v_r = k.float().flatten(0, 1), v.float().flatten(0, 1)  # [R, Nk, d]
    run = _by_queries if order == "queries" else _ByKeys.apply
    with torch.autocast(q.device.type, enabled=False):
        out, lse = run(q_r, k_r, v_r, table, shown, block, causal)
    out = out.transpose(1, 2).reshape(batch, heads, nq, v.shape[-1])
    return out.to(q.dtype), lse.transpose(1, 2).reshape(batch, heads, nq)


def tiles(chosen: Bool[Tensor, "b h nq tk"], block: int) -> Blocks:
    """Lists for tiles of queries: the blocks that any query of a tile chose, with masks where not all did."""
    nq = chosen.shape[2]
    rows = F.pad(chosen, (0, 0, 0, -nq % _TILE)).unflatten(2, (-1, _TILE))  # [B', H', Tq, tile, Tk]
    some, every = rows.any(3), rows.all(3)
    cut = some & ~every
    if not bool(cut.any()):
        return Blocks.of(some, _TILE, block)
    masks = rows.transpose(3, 4)[cut][..., None].expand(-1, -1, block).contiguous()  # [P, tile, block]
    which = torch.full(cut.shape, -1, dtype=torch.int32, device=chosen.device)
    which[cut] = torch.arange(len(masks), dtype=torch.int32, device=chosen.device)
    return Blocks.of(some, _TILE, block, masks=masks, mask_of=which)


# The order `keys`.


def _lists(table: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """For every key block that somebody chose: (block, queries [R, most], which of those are real).

    A row's queries ascend; behind them stands Nq, a place that is thrown away.
    """
    r, nq, tk = table.shape
    block, row, query = table.permute(2, 0, 1).nonzero(as_tuple=True)  # ascending by block, row, query
    counts = torch.bincount(block * r + row, minlength=tk * r).view(tk, r)
    starts = counts.flatten().cumsum(0).view(tk, r) - counts
    place = torch.arange(len(query), device=table.device) - starts[block, row]
    most = counts.amax(1).tolist()
    bounds = [0, *counts.sum(1).cumsum(0).tolist()]
    found = []
    for t in range(tk):
        if most[t]:
            part = slice(bounds[t], bounds[t + 1])
            padded = query.new_full((r, most[t]), nq)
            padded[row[part], place[part]] = query[part]
            found.append((t, padded, padded < nq))
    return found


def _hidden(queries: Tensor, first: int, end: int, past: int, shown: Tensor | None, causal: bool) -> Tensor | None:
    """Keys from `first` to before `end` that the listed queries don't see, [R, most or fewer, 1, keys]; None: no one.

    Only the first of ascending queries can stand before the block's last key.
    """
    place = torch.arange(first, end, device=queries.device)
    early = int((queries + past < end - 1).sum(1).max()) if causal else 0
    hidden = place > (queries[:, :early] + past)[..., None] if early else None
    if shown is not None and not bool(shown[:, first:end].all()):
        padding = ~shown[:, None, first:end].expand(-1, queries.shape[1], -1)
        if hidden is not None:
            padding = padding.clone()
            padding[:, :early] |= hidden
        hidden = padding
    return None if hidden is None else hidden[:, :, None]


class _ByKeys(torch.autograd.Function):
    """q [R, Nq, G, d] (scaled), k [R, Nk, d], v [R, Nk, e] -> [R, Nq, G, e], [R, Nq, G]; scores are computed twice."""

    @staticmethod
    def forward(ctx, q, k, v, table, shown, block, causal):
        r, nq, group, d = q.shape
        nk, e = v.shape[1:]
        lists = _lists(table)
        flat = q.reshape(r * nq, group, d)
        # One row behind every list's rows takes what the padding of a list writes.
        acc = q.new_zeros(r * nq + 1, group, e)
        top, total = q.new_full((r * nq + 1, group), -torch.inf), q.new_zeros(r * nq + 1, group)
        base = torch.arange(r, device=q.device)[:, None] * nq
        for t, queries, real in lists:
            first, end = t * block, min((t + 1) * block, nk)
            at = torch.where(real, base + queries, r * nq).flatten()  # [R * most]
            s = flat.index_select(0, at.clamp(max=r * nq - 1)).view(r, -1, d) @ k[:, first:end].transpose(1, 2)
            s = s.view(r, -1, group, end - first)
            hidden = _hidden(queries, first, end, nk - nq, shown, causal)
            if hidden is not None:
                s[:, : hidden.shape[1]].masked_fill_(hidden, -torch.inf)
            before = top.index_select(0, at).view(r, -1, group)
            now = torch.maximum(before, s.amax(-1))
            safe = now.masked_fill(now == -torch.inf, 0.0)
            p = s.sub_(safe[..., None]).exp_()
            shrink = (before - safe).exp_()
            part = (p.view(r, -1, end - first) @ v[:, first:end]).view(-1, group, e)
            acc.index_copy_(0, at, part.addcmul_(acc.index_select(0, at), shrink.view(-1, group, 1)))
            weight = p.sum(-1).addcmul_(total.index_select(0, at).view(r, -1, group), shrink)
            total.index_copy_(0, at, weight.view(-1, group))
            top.index_copy_(0, at, now.view(-1, group))
        out = acc[:-1].div_(total[:-1].clamp(min=1e-38)[..., None]).view(r, nq, group, e)
        lse = (top[:-1] + total[:-1].log()).view(r, nq, group)
        ctx.save_for_backward(q, k, v, out, lse, shown)
        ctx.lists, ctx.block, ctx.causal = lists, block, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, out, lse, shown = ctx.saved_tensors
        r, nq, group, d = q.shape
        nk, e = v.shape[1:]
        flat, grad = q.reshape(r * nq, group, d), grad.reshape(r * nq, group, e)
        delta = (grad * out.view_as(grad)).sum(-1)  # [R * Nq, G]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).view(r * nq, group)
        dq, dk, dv = q.new_zeros(r * nq + 1, group, d), torch.zeros_like(k), torch.zeros_like(v)
        base = torch.arange(r, device=q.device)[:, None] * nq
        for t, queries, real in ctx.lists:
            first, end = t * ctx.block, min((t + 1) * ctx.block, nk)
            at = torch.where(real, base + queries, r * nq).flatten()
            read = at.clamp(max=r * nq - 1)
            rows = flat.index_select(0, read).view(r, -1, d)  # [R, most * G, d]
            s = (rows @ k[:, first:end].transpose(1, 2)).view(r, -1, group, end - first)
            hidden = _hidden(queries, first, end, nk - nq, shown, ctx.causal)
            if hidden is not None:
                s[:, : hidden.shape[1]].masked_fill_(hidden, -torch.inf)
            s.masked_fill_(~real[..., None, None], -torch.inf)
            p = s.sub_(lse.index_select(0, read).view(r, -1, group, 1)).exp_().view(r, -1, end - first)
            towards = grad.index_select(0, read).view(r, -1, e)
            dv[:, first:end] = p.transpose(1, 2) @ towards
            ds = (towards @ v[:, first:end].transpose(1, 2)).sub_(delta.index_select(0, read).view(r, -1, 1)).mul_(p)
            dk[:, first:end] = ds.transpose(1, 2) @ rows
            dq.index_add_(0, at, (ds @ k[:, first:end]).view(-1, group, d))
        return dq[:-1].view_as(q), dk, dv, None, None, None, None


# The order `queries`.


def _by_queries(q, k, v, table, shown, block, causal):
    """As `_ByKeys`, in chunks of queries; a chunk is computed again in the backward pass."""
    most = max(1, int(table.sum(-1).max())) if table.numel() else 1
    parts = []
    step = max(1, _GATHERED // (len(k) * most * block * k.shape[2]))
    for start in range(0, q.shape[1], step):
        chunk = slice(start, start + step)
        given = (q[:, chunk], k, v, table[:, chunk], shown, block, causal, k.shape[1] - q.shape[1] + start, most)
        again = torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v))
        parts.append(checkpoint(_chunk, *given, use_reentrant=False) if again else _chunk(*given))
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _chunk(q, k, v, table, shown, block, causal, past, most):
    r, n, group, d = q.shape
    nk = k.shape[1]
    found = table.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]  # [R, n, most]
    place = (found[..., None] * block + torch.arange(block, device=q.device)).flatten(2)  # [R, n, most * block]
    fine = (torch.arange(most, device=q.device) < table.sum(-1, keepdim=True)).repeat_interleave(block, -1)
    fine = fine & (place < nk)
    flat = (place.clamp(max=nk - 1) + torch.arange(r, device=q.device)[:, None, None] * nk).flatten()

    def gather(x):  # [R, Nk, ...] to [R, n, most * block, ...]
        return x.flatten(0, 1).index_select(0, flat).view(r, n, most * block, *x.shape[2:])

    if shown is not None:
        fine = fine & gather(shown)
    if causal:
        fine = fine & (place <= torch.arange(past, past + n, device=q.device)[:, None])
    s = (gather(k) @ q.transpose(-1, -2)).transpose(-1, -2)  # [R, n, G, most * block]
    s = s.masked_fill(~fine[:, :, None], -torch.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return p @ gather(v), lse.detach()
