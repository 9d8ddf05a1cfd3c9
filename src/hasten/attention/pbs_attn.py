"""PBS-Attn: sparser block-sparse attention by permuting tokens (arXiv 2510.21270, sections 3.2-3.4).

Keys that matter are scattered, so blocks of the text's order waste work on their neighbours. Within segments of S
tokens the keys are sorted by what the last queries think of them, and few blocks then hold most of the attention.

    a_j = mean_i softmax_j(q_i k_j / sqrt d) over the last B queries i;  k_order: each whole segment by falling a_j
    P = softmax(mean(Q_t) mean(K_u)' / sqrt d) over the blocks u of earlier segments;  a query block t takes the largest
    P_tu until their sum reaches the threshold, all blocks of its own segment, and the block with the first token

Order inside a segment never breaks causality between segments; inside its own, a query sees keys by their positions.
The kernel permutes while it packs its tiles, and nothing is permuted back.

Departures: one order for the query heads that share a key (by their mean a); the authors repeat the keys instead. The
authors' code leaves queries in their order, and so do we; `queries=true` sorts those of a segment by q sum_j a_j k_j.
Blocks in which a query block sees nothing are left out. Padding is in no mean, and blocks of a whole prompt count from
a row's first token; in later chunks of a prompt from the first column.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.attention.base import SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.math.blocks import Blocks, in_range, spread
from hasten.math.shapes import Bool, Float, Int

CARD = Card(
    title="Sparser Block-Sparse Attention via Token Permutation",
    paper="2510.21270",
    seams=("attention.mask",),
    effects=("time", "quality"),
    lossless=False,
    claim="up to 2.75x end-to-end prefilling of long contexts (Llama-3.1-8B) near full attention's accuracy",
    claimed=2.75,
    identity={"threshold": 1.0},
    experiment=(
        "stdlib-lm(model=long, task=needle, prompt=8192, examples=16)",
        "attention/pbs_attn(block=64, threshold=0.97)",
    ),
    when="Prompts of many thousand tokens in which a few scattered tokens draw most of the attention.",
    when_not="Prompts of a few segments; attention that is spread evenly; models that must judge each token of a text "
    "without a look at later ones, since the last queries decide what earlier ones see.",
    hosts=("decoder",),
)


def naive_pbs_attn(
    q: Tensor, k: Tensor, block: int = 128, segment: int = 256, threshold: float = 0.9, queries: bool = False,
    scaling: float | None = None, begin: Tensor | None = None, end: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Orders and chosen blocks.

    Args:
        q: [B, H, Nq, d], the last Nq of Nk positions; k: [B, Hk, Nk, d].
        begin, end: the real keys of each row, int64 [B].

    Returns:
        q_order int64 [B, H, Nq], k_order int64 [B, Hk, Nk], chosen bool [B, H, Tq, Tk].
    """
    (batch, heads, nq, dim), (hk, nk) = q.shape, k.shape[1:3]
    scaling, group, past = dim**-0.5 if scaling is None else scaling, heads // hk, nk - nq
    tq, tk = -(-nq // block), -(-nk // block)
    q_order, k_order = torch.zeros(batch, heads, nq).long(), torch.zeros(batch, hk, nk).long()
    chosen = torch.zeros(batch, heads, tq, tk, dtype=torch.bool)
    for b in range(batch):
        lo, hi = (0 if begin is None else int(begin[b])), (nk if end is None else int(end[b]))
        for g in range(hk):
            keys, worth, whole = k[b, g].float(), torch.zeros(nk), hi // segment * segment
            after = min(nq, max(0, hi - past))  # behind the last real query
            for h in range(g * group, (g + 1) * group):
                for i in range(max(0, after - block), after):
                    worth[lo:whole] += (keys[lo:whole] @ q[b, h, i].float() * scaling).softmax(0)
            order = []
            for s in range(0, nk, segment):
                places = list(range(s, min(s + segment, nk)))
                order += sorted(places, key=lambda j: -float(worth[j])) if s < whole else places
            k_order[b, g] = torch.tensor(order)
            wanted = (worth[:, None] * keys).sum(0)
            for h in range(g * group, (g + 1) * group):
                order_q = list(range(nq))
                if queries:
                    along = [
                        -float(q[b, h, i].float() @ wanted) if lo <= i + past < hi else torch.inf for i in range(nq)
                    ]
                    order_q = sorted(order_q, key=lambda i: ((i + past) // segment, along[i]))
                q_order[b, h] = torch.tensor(order_q)
                for t in range(tq):
                    rows = order_q[t * block : (t + 1) * block]
                    first, last = min(rows) + past, max(rows) + past
                    real = [i for i in rows if lo <= i + past < hi]
                    mean_q, scores = q[b, h, real].float().sum(0) / max(1, len(real)), {}
                    for u in range(tk):
                        members = [j for j in order[u * block : (u + 1) * block] if lo <= j < hi]
                        if not members or min(members) > last:
                            continue
                        if u * block // segment < first // segment:
                            scores[u] = mean_q @ keys[members].mean(0) * scaling
                        else:
                            chosen[b, h, t, u] = True
                        chosen[b, h, t, u] |= lo in members
                    if scores:
                        shares, total = torch.stack(list(scores.values())).softmax(0), 0.0
                        for place in shares.argsort(descending=True).tolist():
                            if total < threshold:
                                chosen[b, h, t, list(scores)[place]] = True
                            total += float(shares[place])
    return q_order, k_order, chosen


def pbs_attn(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], block: int = 128, segment: int = 256,
    threshold: float = 0.9, queries: bool = False, scaling: float | None = None,
    begin: Int[Tensor, "b"] | None = None, end: Int[Tensor, "b"] | None = None,
) -> tuple[Int[Tensor, "b h nq"], Int[Tensor, "b hk nk"], Bool[Tensor, "b h tq tk"]]:  # fmt: skip
    """`naive_pbs_attn` without loops."""
    (batch, heads, nq, dim), nk, device = q.shape, k.shape[2], q.device
    scaling, past = dim**-0.5 if scaling is None else scaling, nk - nq
    shown = in_range(nk, begin, end, device)
    place = torch.arange(nk, device=device)
    judges, real = last_queries(q, block, past, end)
    in_segments = shown if end is None else in_range(nk, begin, end // segment * segment, device)
    worth = importance(judges, k[:, :, : nk // segment * segment], scaling, in_segments, real)  # [B, Hk, whole]
    k_order = within_segments(worth, segment, nk)
    at_q, q_order = place[past:][None, None], place[:nq].expand(batch, heads, nq)
    if queries:
        wanted = (worth[:, :, None] @ k[:, :, : worth.shape[2]].float()).squeeze(2)  # [B, Hk, d]
        along = (q.float() @ spread(wanted, heads)[..., None]).squeeze(-1)
        if shown is not None:
            along = along.masked_fill(~shown[:, None, past:], -torch.inf)
        q_order = along.sort(dim=-1, descending=True, stable=True).indices
        q_order = q_order.gather(-1, ((q_order + past) // segment).sort(dim=-1, stable=True).indices)
        at_q = q_order + past
    means_k, least = block_means(k, k_order, block, shown)
    means_q, _ = block_means(q, q_order, block, None if shown is None else shown[:, past:])
    tq, tk = means_q.shape[2], means_k.shape[2]
    cut = torch.nn.functional.pad(at_q, (0, tq * block - nq), mode="replicate").unflatten(-1, (tq, block))
    first, last = cut.amin(-1)[..., None], cut.amax(-1)[..., None]  # [b', h', Tq, 1], positions
    segment_k = torch.arange(tk, device=device) * block // segment
    visible = spread(least, heads)[:, :, None] <= last  # [B, H, Tq, Tk]
    earlier = (segment_k < first // segment) & visible
    scores = (means_q @ spread(means_k, heads).mT * scaling).masked_fill_(~earlier, -torch.inf)
    shares, best = scores.softmax(-1).nan_to_num_(0.0).sort(dim=-1, descending=True)
    taken = (shares.cumsum(-1) - shares < threshold) & (shares > 0)
    chosen = torch.zeros_like(earlier).scatter_(-1, best, taken) & earlier
    start = k_order == (0 if begin is None else begin.to(device)[:, None, None])
    holds = torch.nn.functional.pad(start, (0, tk * block - nk)).unflatten(-1, (tk, block)).any(-1)
    return q_order, k_order, chosen | (visible & (~earlier | spread(holds, heads)[:, :, None]))


def last_queries(q: Tensor, block: int, past: int, end: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The last `block` real queries of each row, [B, H, n, d], and which of them there are, bool [B, n] (None: all)."""
    n = min(block, q.shape[2])
    if end is None:
        return q[:, :, -n:], None
    after = (end.to(q.device) - past).clamp(0, q.shape[2])  # place behind a row's last real query
    place = after[:, None] - n + torch.arange(n, device=q.device)
    rows = place.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, rows), place >= 0


def importance(q: Tensor, k: Tensor, scaling: float, shown: Tensor | None, real: Tensor | None = None) -> Tensor:
    """What the real ones of the queries [B, H, n, d] give each key [B, Hk, N, d] on average: float32 [B, Hk, N]."""
    batch, heads, n, dim = q.shape
    rows = q.float().reshape(batch, k.shape[1], heads // k.shape[1] * n, dim) * scaling
    scores = rows @ k.float().mT
    if shown is None:
        return scores.softmax(-1).mean(2)
    weights = scores.masked_fill_(~shown[:, None, None, : k.shape[2]], -torch.inf).softmax(-1).nan_to_num_(0.0)
    if real is not None:
        weights = weights * real.repeat(1, rows.shape[2] // n)[:, None, :, None]
    return weights.mean(2)


def within_segments(worth: Tensor, segment: int, length: int) -> Tensor:
    """Places [B, Hk, length]: each whole segment's by falling worth [B, Hk, whole], then what is left in its order."""
    *outer, whole = worth.shape
    inside = worth.unflatten(-1, (-1, segment)).sort(dim=-1, descending=True, stable=True).indices
    start = torch.arange(0, whole, segment, device=worth.device)[:, None]
    rest = torch.arange(whole, length, device=worth.device).expand(*outer, -1)
    return torch.cat([(inside + start).flatten(-2), rest], dim=-1)


def block_means(x: Tensor, order: Tensor, block: int, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of each block's real rows, float32 [B, h, T, d], and its first real place, int64 [B, h, T] (2^62 for none).

    Rows are summed where they lie: nothing is put in order.

    Args:
        x: [B, h, N, d]; order: its rows in block order, int64 [B, h, N]; shown: which rows are real, bool [B', N].
    """
    batch, heads, number, dim = x.shape
    blocks, device = -(-number // block), x.device
    row, head = torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
    x = x.float()
    if x.transpose(1, 2).is_contiguous():
        table, at = x.transpose(1, 2).reshape(-1, dim), (row * number + order) * heads + head
    else:
        table, at = x.reshape(-1, dim), (row * heads + head) * number + order
    places, real = torch.nn.functional.pad(order, (0, blocks * block - number), value=1 << 62), None
    counts = torch.full((1, 1, blocks), block, device=device)
    counts[..., -1] -= blocks * block - number
    if shown is not None:
        real = shown.expand(batch, -1)[:, None].expand(-1, heads, -1).gather(2, order)
        there = torch.nn.functional.pad(real, (0, blocks * block - number))
        places, counts = places.masked_fill(~there, 1 << 62), there.unflatten(-1, (blocks, block)).sum(-1)
    starts = torch.arange(0, number, block, device=device)
    starts = (torch.arange(batch * heads, device=device)[:, None] * number + starts).flatten()
    weights = None if real is None else real.flatten().float()
    sums = torch.nn.functional.embedding_bag(at.flatten(), table, starts, mode="sum", per_sample_weights=weights)
    means = sums.view(batch, heads, blocks, dim) / counts.clamp(min=1)[..., None]
    return means, places.unflatten(-1, (blocks, block)).amin(-1)


@dataclasses.dataclass(frozen=True)
class PBSAttn(SparseAttention):
    block: int = option(128, "tokens of a block; as many last queries judge the keys", least=1)
    segment: int = option(256, "tokens among which keys change places, a multiple of block", least=1)
    threshold: float = option(0.9, "share of the pooled attention that the chosen blocks hold", above=0, most=1)
    queries: bool = option(False, "sort queries within segments too, by what the last queries look for")

    from_first = True

    def problems(self) -> list[str]:
        if self.segment % self.block:
            return [f"segment must be a multiple of block ({self.block}), not {self.segment}"]
        return []

    @property
    def idle(self) -> bool:
        return self.threshold == 1

    @torch.no_grad()
    def select(self, call: Any, kept: Any) -> Blocks | None:
        """Dense where nothing can be left out: up to one segment, or fewer queries than a block."""
        if call.key.shape[2] <= self.segment or call.query.shape[2] < self.block:
            return None
        begin, end = call.range()
        q_order, k_order, chosen = pbs_attn(
            call.query, call.key, self.block, self.segment, self.threshold, self.queries, call.scaling, begin, end
        )
        return Blocks.of(
            chosen, self.block, self.block, q_order=q_order if self.queries else None, k_order=k_order.contiguous()
        )


METHOD = PBSAttn
