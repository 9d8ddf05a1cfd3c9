"""Which key blocks each query block sees: one form for every pattern of sparse attention, static or chosen from data.

Positions: queries are the last Nq of Nk positions, so query i sits at key position i + Nk - Nq. A query sees a key if
its block is chosen, the finer mask (where there is one) allows it, the key is in the row's range (padding) and, in
causal attention, not after it.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from hasten.math.shapes import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block lists. Every leading dimension is 1 or whole: B' of 1 or batch, H' of 1, kv heads or heads.

    Attributes:
        counts: int32 [B', H', Tq], how many entries of each list are valid.
        indices: int32 [B', H', Tq, M], key blocks in the order in which they are visited, each once; entries behind
            `counts` are in range and ignored.
        block_q, block_k: tokens of a block; the last ones may be shorter. A `block_k` of 1 chooses single tokens.
        q_order: int64 [B', H', Nq]: place i of the block order holds the query q_order[i]; None keeps the text's order.
        k_order: int64 [B', H', Nk] with H' of 1 or kv heads: likewise for the keys.
        masks: bool [P, block_q, block_k], finer masks (in block order, rows are queries), where whole blocks are too
            coarse.
        mask_of: int32 like `indices`: the mask of each entry, -1 for none.
    """

    counts: Int[Tensor, "b h tq"]
    indices: Int[Tensor, "b h tq m"]
    block_q: int
    block_k: int
    q_order: Int[Tensor, "b h nq"] | None = None
    k_order: Int[Tensor, "b h nk"] | None = None
    masks: Bool[Tensor, "p bq bk"] | None = None
    mask_of: Int[Tensor, "b h tq m"] | None = None

    @classmethod
    def of(cls, chosen: Bool[Tensor, "b h tq tk"], block_q: int, block_k: int, **more: Tensor | None) -> Self:
        """From a table, each list in ascending order. `mask_of` may be given as a table too, [B', H', Tq, Tk]."""
        counts = chosen.sum(-1, dtype=torch.int32)
        longest = max(1, int(counts.max())) if counts.numel() else 1
        indices = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :longest]
        table = more.get("mask_of")
        if table is not None:
            more["mask_of"] = table.expand(chosen.shape).gather(-1, indices).int().contiguous()
        return cls(counts, indices.int().contiguous(), block_q, block_k, **more)

    @classmethod
    def causal(cls, queries: int, keys: int, block_q: int, block_k: int, device: torch.device | None = None) -> Self:
        """All blocks that causal attention reaches: dense attention, for reference."""
        return cls.of(visible_blocks(queries, keys, block_q, block_k, device)[None, None], block_q, block_k)

    @classmethod
    def full(cls, queries: int, keys: int, block_q: int, block_k: int, device: torch.device | None = None) -> Self:
        """All blocks."""
        shape = 1, 1, -(-queries // block_q), -(-keys // block_k)
        return cls.of(torch.ones(shape, dtype=torch.bool, device=device), block_q, block_k)

    def where(self, num_k_blocks: int) -> Bool[Tensor, "b h tq tk"]:
        """The lists as a table."""
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        table = torch.zeros(*self.counts.shape, num_k_blocks + 1, dtype=torch.bool, device=self.indices.device)
        places = self.indices.long().masked_fill(~valid, num_k_blocks)
        return table.scatter_(-1, places, True)[..., :num_k_blocks]

    def density(self, queries: int, keys: int, causal: bool) -> float:
        """Pairs that the chosen blocks hold over the pairs of dense attention; of a causal block its visible part.

        Finer masks count as whole blocks: what is computed counts, not what is used. With an order of its own a causal
        block counts whole where any of it is visible.
        """
        chosen = self.where(-(-keys // self.block_k))
        pairs = _pairs(queries, keys, self.block_q, self.block_k, causal and self.k_order is None, chosen.device)
        dense = _pairs(queries, keys, self.block_q, self.block_k, causal, chosen.device).sum()
        used = (chosen * pairs).sum((-1, -2)).double().mean()
        return float(used / dense)

    def to(self, device: torch.device | str) -> Self:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
        return dataclasses.replace(self, **moved)


def _pairs(queries: int, keys: int, block_q: int, block_k: int, causal: bool, device: torch.device | None) -> Tensor:
    """Query-key pairs of each block, float64 [Tq, Tk]."""
    ends = torch.arange(-(-keys // block_k), device=device, dtype=torch.float64) * block_k
    sizes_k = (keys - ends).clamp(max=block_k)
    starts = torch.arange(-(-queries // block_q), device=device, dtype=torch.float64) * block_q
    sizes_q = (queries - starts).clamp(max=block_q)
    if not causal:
        return sizes_q[:, None] * sizes_k

    def before(limit: Tensor) -> Tensor:
        """Sum over a block's queries of how many keys lie before `limit` [Tk + 1] and are visible."""
        first = starts[:, None] + keys - queries + 1  # keys that a block's first query sees
        grow = (limit - first).clamp(min=0).minimum(sizes_q[:, None])  # queries that see fewer than `limit`
        return grow * (first + (first + grow - 1)).clamp(min=0) / 2 + (sizes_q[:, None] - grow) * limit

    return before(torch.minimum(ends + block_k, torch.as_tensor(float(keys), device=device))) - before(ends)


def visible_blocks(
    queries: int, keys: int, block_q: int, block_k: int, device: torch.device | None = None
) -> Bool[Tensor, "tq tk"]:
    """Which key blocks hold a key that some query of the block sees in causal attention."""
    last = torch.arange(block_q - 1, queries + block_q - 1, block_q, device=device).clamp(max=queries - 1)
    first = torch.arange(0, keys, block_k, device=device)
    return first <= (last + keys - queries)[:, None]


def pool(x: Float[Tensor, "b h n d"], block: int) -> Float[Tensor, "b h t d"]:
    """Mean of each block's rows, the last one of what is there."""
    *outer, n, d = x.shape
    whole = n // block * block
    parts = [x[..., :whole, :].unflatten(-2, (-1, block)).mean(-2)] if whole else []
    if whole < n:
        parts.append(x[..., whole:, :].mean(-2, keepdim=True))
    return torch.cat(parts, dim=-2)


def top_blocks(
    scores: Float[Tensor, "*s tq tk"],
    count: int | Tensor,
    allowed: Bool[Tensor, "tq tk"] | None = None,
    always: Bool[Tensor, "tq tk"] | None = None,
) -> Bool[Tensor, "*s tq tk"]:
    """The `count` best blocks of each query block, those of `always` first, none that is not `allowed`.

    Args:
        count: a number, or an int tensor that broadcasts to [..., Tq].
    """
    ranked = scores.float()
    if always is not None:
        ranked = ranked.masked_fill(always, torch.inf)
    if allowed is not None:
        ranked = ranked.masked_fill(~allowed, -torch.inf)
    most = int(count.max()) if isinstance(count, Tensor) else count
    best = ranked.topk(min(max(most, 1), ranked.shape[-1]), dim=-1)
    taken = best.values > -torch.inf
    if isinstance(count, Tensor):
        taken = taken & (torch.arange(best.indices.shape[-1], device=scores.device) < count[..., None])
    elif count < 1:
        taken = torch.zeros_like(taken)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best.indices, taken)


def spread(x: Tensor, heads: int) -> Tensor:
    """[B, h, ...] to [B, heads, ...] by repeating each entry for its group; h divides heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def in_range(keys: int, begin: Tensor | None, end: Tensor | None, device: torch.device) -> Tensor | None:
    """Keys of each row that are no padding, bool [B, Nk]; None where all are."""
    if begin is None and end is None:
        return None
    place = torch.arange(keys, device=device)
    shown = torch.ones(1, keys, dtype=torch.bool, device=device)
    if begin is not None:
        shown = shown & (place >= begin.to(device)[:, None])
    if end is not None:
        shown = shown & (place < end.to(device)[:, None])
    return shown


def seen(
    blocks: Blocks,
    queries: int,
    keys: int,
    causal: bool = True,
    begin: Int[Tensor, "batch"] | None = None,
    end: Int[Tensor, "batch"] | None = None,
) -> Bool[Tensor, "b h nq nk"]:
    """The dense mask that every path of block-sparse attention equals; its leading dimensions are the largest given."""
    device = blocks.counts.device
    orders = [o for o in (blocks.q_order, blocks.k_order) if o is not None]
    batch = max(blocks.counts.shape[0], *(o.shape[0] for o in orders), 1)
    heads = max(blocks.counts.shape[1], *(o.shape[1] for o in orders), 1)

    def places(order: Tensor | None, length: int) -> Tensor:  # [batch, heads, length], each position's place
        place = torch.arange(length, device=device)
        if order is None:
            return place.expand(batch, heads, length)
        return spread(order.argsort(-1), heads).expand(batch, heads, length)

    place_q, place_k = places(blocks.q_order, queries), places(blocks.k_order, keys)
    tk = -(-keys // blocks.block_k)
    table = spread(blocks.where(tk), heads).expand(batch, -1, -1, -1)

    def pick(table: Tensor) -> Tensor:  # [batch, heads, Tq, Tk] to [batch, heads, Nq, Nk]
        rows = table.gather(2, (place_q // blocks.block_q)[..., None].expand(-1, -1, -1, tk))
        return rows.gather(3, (place_k // blocks.block_k)[:, :, None].expand(-1, -1, queries, -1))

    mask = pick(table)
    if blocks.masks is not None and blocks.mask_of is not None:
        valid = torch.arange(blocks.indices.shape[-1], device=device) < blocks.counts[..., None]
        which = torch.full((*blocks.counts.shape, tk + 1), -1, dtype=torch.int64, device=device)
        which.scatter_(-1, blocks.indices.long().masked_fill(~valid, tk), blocks.mask_of.long())
        which = pick(spread(which[..., :tk], heads).expand(batch, -1, -1, -1))
        fine = blocks.masks[
            which.clamp(min=0), (place_q % blocks.block_q)[..., None], (place_k % blocks.block_k)[:, :, None]
        ]
        mask = mask & (fine | (which < 0))
    if causal:
        place = torch.arange(keys, device=device)
        mask = mask & (place <= (torch.arange(queries, device=device) + keys - queries)[:, None])
    shown = in_range(keys, begin, end, device)
    return mask if shown is None else mask & shown[:, None, None]
