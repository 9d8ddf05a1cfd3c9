"""S2O: early stopping for sparse attention by an online permutation (arXiv 2602.22575).

For each segment of S queries the earlier keys are ranked by their score with the segment's mean query and read in that
order, as indices: nothing is moved in memory. A block of queries stops when one more tile of keys adds next to nothing.

    pass 1: the keys of the segment itself, causal, give each query m and l = sum e^(s-m)
    rank(j) by falling mean(Q_S) k_j;  queries of a segment by falling q g, with the guide vector g = mean(K)
    pass 2: tiles of B keys by rank; stop once  max_i  Delta l_i / l_i < tau,  Delta l: what the new tiles add to l

Departures: the rule is tried after 1, 2, 4, 8, ... tiles with the mean gain of the new ones, so that a few calls of the
kernel do (a block may read up to twice the tiles that it needs). The authors' code is not public and the paper's text
was not at hand: g and the defaults of S, B and tau are ours. Ranks on a CPU come from scores of 16 bits, which a radix
sort orders. Segments count from a row's first token, of later chunks of a prompt from their start.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.attention.base import SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.kernels.block_attention import attention
from hasten.math.blocks import Blocks, in_range, spread
from hasten.math.shapes import Float, Int

CARD = Card(
    title="S2O: Early Stopping for Sparse Attention via Online Permutation",
    paper="2602.22575",
    seams=("attention.mask",),
    effects=("time", "quality"),
    lossless=False,
    claim="7.51x attention and 3.81x end-to-end prefilling at 128K tokens (Llama-3.1-8B)",
    claimed=3.81,
    identity={"stop": 0.0},
    experiment=(
        "stdlib-lm(model=long, task=needle, prompt=8192, examples=16)",
        "attention/s2o(segment=128, tile=64, stop=0.01)",
    ),
    when="Prompts of many thousand tokens whose attention is peaked, and where lost attention must stay bounded.",
    when_not="Prompts of a few thousand tokens, where ranking and rounds cost as much as they save.",
    hosts=("decoder",),
)


def naive_s2o(
    q: Tensor, k: Tensor, v: Tensor, segment: int = 512, block: int = 128, tile: int = 128, stop: float = 0.01,
    queries: bool = True, scaling: float | None = None, begin: Tensor | None = None, end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention that stops early.

    Args:
        q: [B, H, Nq, d], the last Nq of Nk positions; k: [B, Hk, Nk, d]; v: [B, Hk, Nk, e].
        begin, end: the real keys of each row, int64 [B].

    Returns:
        [B, H, Nq, e], and the tiles of earlier keys that each block of queries has read, int64 [B, H, Tq].
    """
    (batch, heads, nq, dim), (hk, nk), past = q.shape, k.shape[1:3], k.shape[2] - q.shape[2]
    scaling = dim**-0.5 if scaling is None else scaling
    out, visited = torch.zeros(batch, heads, nq, v.shape[-1]), torch.zeros(batch, heads, -(-nq // block)).long()
    for b in range(batch):
        lo, hi = (0 if begin is None else int(begin[b])), (nk if end is None else int(end[b]))
        for h in range(heads):
            keys, values = k[b, h * hk // heads].float(), v[b, h * hk // heads].float()
            guide = keys[lo:hi].sum(0) / max(1, hi - lo)
            for s in range(0, nq, segment):
                rows = list(range(s, min(s + segment, nq)))
                mean = q[b, h, [i for i in rows if lo <= i + past < hi]].float().sum(0)
                early = sorted(range(lo, min(past + s, hi)), key=lambda j: -float(keys[j] @ mean))
                own = range(max(past + s, lo), min(past + rows[-1] + 1, hi))
                if queries:
                    rows = sorted(rows, key=lambda i: -float(q[b, h, i].float() @ guide))
                for t in range(0, len(rows), block):
                    seen, reading = list(own), 0
                    l_old: list[float] = []
                    while True:
                        l_new, o = _sums(q[b, h].float(), keys, values, rows[t : t + block], seen, past, scaling)
                        if reading:  # tiles of this round
                            gain = 1 - torch.tensor([a / c if c else 1.0 for a, c in zip(l_old, l_new, strict=True)])
                            if float(gain.max()) / reading < stop:
                                break
                        done = int(visited[b, h, (s + t) // block])
                        if done * tile >= len(early):
                            break
                        reading, l_old = min(max(1, done), -(-len(early) // tile) - done), l_new
                        visited[b, h, (s + t) // block] += reading
                        seen = [*own, *early[: (done + reading) * tile]]
                    out[b, h, rows[t : t + block]] = o
    return out.to(q.dtype), visited


def _sums(
    q: Tensor, k: Tensor, v: Tensor, rows: list[int], seen: list[int], past: int, scaling: float
) -> tuple[list[float], Tensor]:
    """l (not rescaled) of each row and its attention, over the keys of `seen` that it may see."""
    totals, outs = [], []
    for i in rows:
        at = [j for j in seen if j <= i + past]
        weights = (k[at].double() @ q[i].double() * scaling).exp()
        totals.append(float(weights.sum()))
        outs.append((weights[:, None] * v[at].double()).sum(0) / max(totals[-1], 1e-300))
    return totals, torch.stack(outs).float()


def s2o(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], v: Float[Tensor, "b hk nk e"], segment: int = 512,
    block: int = 128, tile: int = 128, stop: float = 0.01, queries: bool = True, scaling: float | None = None,
    begin: Int[Tensor, "b"] | None = None, end: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b h nq e"], Int[Tensor, "b h tq"]]:  # fmt: skip
    """`naive_s2o` by the block-sparse kernel, a round of tiles at a time."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    order, counts, q_order = ranking(q, k, segment, queries, begin, end)
    window = own_keys(q, k, segment, block, q_order)
    return read(q, k, v, window, order, counts, segment, tile, stop, scaling, begin, end)


@torch.no_grad()
def ranking(
    q: Tensor, k: Tensor, segment: int, queries: bool, begin: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each segment the earlier keys by falling score, int32 [B, H, segments, Nk], and their number; q_order."""
    (batch, heads, nq, _), nk, device = q.shape, k.shape[2], q.device
    past, segments = nk - nq, -(-nq // segment)
    shown = in_range(nk, begin, end, device)
    q_real = q if shown is None else q * shown.expand(batch, -1)[:, None, past:, None]
    rows = torch.nn.functional.pad(q_real, (0, 0, 0, segments * segment - nq)).unflatten(2, (segments, segment))
    mean = rows.sum(3, dtype=torch.float32)  # the length of the mean does not change an order
    grouped = mean.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hk, group * segments, d]
    scores = (grouped @ k.float().mT).unflatten(2, (-1, segments)).flatten(1, 2)  # [B, H, segments, Nk]
    starts = torch.arange(0, nq, segment, device=device) + past
    early = (torch.arange(nk, device=device) < starts[:, None])[None, None]
    if shown is not None:
        early = early & shown[:, None, None]
    order = descending(scores, early)
    if not queries:
        return order, early.sum(-1), None
    guide = (k.float() if shown is None else k.float() * shown[:, None, :, None]).sum(2)
    along = (q.float() @ spread(guide, heads)[..., None]).squeeze(-1)  # [B, H, Nq]
    q_order = along.sort(dim=-1, descending=True, stable=True).indices
    return order, early.sum(-1), q_order.gather(-1, (q_order // segment).sort(dim=-1, stable=True).indices)


def descending(scores: Tensor, valid: Tensor) -> Tensor:
    """Places by falling score, int32 [..., N], those that are not valid last.

    On a CPU to 1/65534 of the range of a row's valid scores: numpy sorts 16-bit numbers by their digits, 20 times as
    fast as PyTorch sorts floats.
    """
    if not scores.is_cpu:
        return scores.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True).indices.int()
    low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    steps = (high - scores) * (65534.0 / (high - low).clamp(min=1e-30)) - 32768.0
    digits = steps.masked_fill_(~valid, 32767.0).to(torch.int16)
    return torch.from_numpy(digits.numpy().argsort(axis=-1, kind="stable")).int()


def own_keys(q: Tensor, k: Tensor, segment: int, block: int, q_order: Tensor | None) -> Blocks:
    """Pass 1: single keys from the start of each block's segment to where its last query may sit."""
    nq, nk = q.shape[2], k.shape[2]
    start = torch.arange(0, nq, block, device=q.device)
    first = start // segment * segment
    counts = (start + block if q_order is None else first + segment).clamp(max=nq) - first
    places = first[:, None] + nk - nq + torch.arange(int(counts.max()), device=q.device)
    return Blocks(counts.int()[None, None], places.clamp(max=nk - 1).int()[None, None], block, 1, q_order)


def read(
    q: Tensor, k: Tensor, v: Tensor, window: Blocks, order: Tensor, counts: Tensor, segment: int, tile: int,
    stop: float, scaling: float, begin: Tensor | None, end: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both passes: the output and the tiles read. Blocks that have stopped are left out of later rounds."""
    out, log = attention(q, k, v, window, scaling=scaling, begin=begin, end=end, lse=True)
    (batch, heads, nq, _), block = q.shape, window.block_q
    q_cut, out_cut = (cut(x, window.q_order, block) for x in (q, out))  # [B, H, Tq, block, d]
    log_cut = cut(log[..., None], window.q_order, block, torch.inf)[..., 0]  # rows of padding gain nothing
    whose = torch.arange(0, nq, block, device=q.device) // segment  # [Tq], each block's segment
    counts = counts[..., whose].expand(batch, heads, -1)
    visited, active, done = torch.zeros_like(counts), counts > 0, 0
    row, head = torch.arange(batch, device=q.device)[:, None, None], torch.arange(heads, device=q.device)[:, None]
    while number := int(active.sum(-1).max()):
        ids = active.byte().sort(dim=-1, descending=True, stable=True).indices[..., :number]  # [B, H, number]
        at, reading = (row, head, ids), max(1, done)
        lists = order[row, head, whose[ids], done * tile : (done + reading) * tile]
        new = (counts[at] - done * tile).clamp(0, lists.shape[-1]) * active[at]
        more, log_more = attention(
            q_cut[at].flatten(2, 3), k, v, Blocks(new.int(), lists.contiguous(), block, 1), scaling=scaling,
            causal=False, begin=begin, end=end, lse=True,
        )  # fmt: skip
        old, log_more = log_cut[at], log_more.unflatten(-1, (number, block))
        total = torch.logaddexp(old, log_more)
        share = (log_more - total).exp().nan_to_num(0.0)  # of what was read now; 0 where a query sees nothing
        mixed = out_cut[at].lerp(more.unflatten(2, (number, block)), share.to(out.dtype)[..., None])
        put = Tensor.index_put if mixed.requires_grad else Tensor.index_put_
        out_cut, log_cut = put(out_cut, at, mixed), put(log_cut, at, total)
        tiles, done = -(-new // tile), done + reading
        visited[at] += tiles
        active[at] &= (counts[at] > done * tile) & ~(share.amax(-1) < stop * tiles)
    out = out_cut.flatten(2, 3)[:, :, :nq]
    if window.q_order is not None:
        out = torch.empty_like(out).scatter(2, window.q_order[..., None].expand_as(out), out)
    return out, visited


def cut(x: Tensor, order: Tensor | None, block: int, fill: float = 0.0) -> Tensor:
    """Rows [B, H, N, d] in a given order, cut into blocks: [B, H, T, block, d]."""
    if order is not None:
        x = x.gather(2, order[..., None].expand_as(x))
    blocks = -(-x.shape[2] // block)
    return torch.nn.functional.pad(x, (0, 0, 0, blocks * block - x.shape[2]), value=fill).unflatten(2, (blocks, block))


@dataclasses.dataclass(frozen=True)
class Read(Blocks):
    """What `read` has computed: how many single keys each block of queries saw (not which), and the output."""

    output: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class S2O(SparseAttention):
    segment: int = option(512, "queries that share a ranking, a multiple of block", least=1)
    block: int = option(128, "queries that stop together", least=1)
    tile: int = option(128, "keys after which the rule may stop", least=1)
    stop: float = option(
        0.01, "stop once a tile adds less than this share of what was seen, for every query", least=0, below=1
    )
    queries: bool = option(True, "sort a segment's queries by the guide vector, so that those of a block stop alike")

    from_first = True

    def problems(self) -> list[str]:
        if self.segment % self.block:
            return [f"segment must be a multiple of block ({self.block}), not {self.segment}"]
        return []

    @property
    def idle(self) -> bool:
        return self.stop == 0

    def select(self, call: Any, kept: Any) -> Blocks | None:
        """What was read, with the output: the rule needs the attention itself. None (dense) up to one segment."""
        if call.query.shape[2] <= self.segment and call.past == 0 or call.query.shape[2] < self.block:
            return None
        begin, end = call.range()
        order, counts, q_order = ranking(call.query, call.key, self.segment, self.queries, begin, end)
        window = own_keys(call.query, call.key, self.segment, self.block, q_order)
        output, tiles = read(
            call.query, call.key, call.value, window, order, counts, self.segment, self.tile, self.stop, call.scaling,
            begin, end,
        )  # fmt: skip
        return Read(window.counts + (tiles * self.tile).int(), window.indices, self.block, 1, output=output)

    def mix(self, call: Any, blocks: Any, kept: Any) -> Tensor:
        return blocks.output


METHOD = S2O
