"""Block-sparse attention through PyTorch's FlexAttention: its block mask made from `Blocks`, whatever their size.

FlexAttention skips tiles of 128 x 128 that no listed pair falls into, tests no mask in tiles that are seen whole, and
looks the others up in the table of chosen blocks.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from hasten.math.blocks import Blocks, spread

TILE = 128


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scaling: float, causal: bool,
    begin: Tensor | None, end: Tensor | None, *, compile: bool = True, tile: int = TILE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp (`block_attention.attention`).

    Args:
        compile: run the fused kernel; without, FlexAttention's own reference, which is slow and runs on a CPU.
        tile: side of FlexAttention's tiles.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    q, k, v = _permuted(q, blocks.q_order), _permuted(k, blocks.k_order), _permuted(v, blocks.k_order)
    mask = _remembered(blocks, q.shape[0], heads, queries, keys, causal, begin, end, tile)
    run = _compiled() if compile else flex_attention
    aux = AuxRequest(lse=True)
    out, more = run(q, k, v, block_mask=mask, scale=scaling, enable_gqa=k.shape[1] != heads, return_aux=aux)
    log = more.lse
    if blocks.q_order is not None:
        back = spread(blocks.q_order, heads).expand(q.shape[0], heads, -1).argsort(-1)
        out, log = out.gather(2, back[..., None].expand_as(out)), log.gather(2, back)
    return out, log


def _remembered(blocks: Blocks, *given: Any) -> Any:
    """`block_mask`, made once for lists that are used again (a pattern's, in every layer); padding is made anew."""
    *shape, begin, end, tile = given
    if begin is not None or end is not None:
        return block_mask(blocks, *given)
    masks, key = blocks.__dict__.setdefault("_flex_masks", {}), (*shape, tile)
    if key not in masks:
        masks[key] = block_mask(blocks, *given)
    return masks[key]


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    order = spread(order, x.shape[1]).expand(*x.shape[:2], -1)
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))


def block_mask(
    blocks: Blocks, batch: int, heads: int, queries: int, keys: int, causal: bool,
    begin: Tensor | None, end: Tensor | None, tile: int = TILE,
) -> Any:  # fmt: skip
    """FlexAttention's mask in block order: tiles seen in part and seen whole, and a function for the former."""
    from torch.nn.attention.flex_attention import BlockMask

    device = blocks.counts.device
    table = blocks.where(-(-keys // blocks.block_k))  # [b', h', Tq, Tk]
    which = _mask_table(blocks, table.shape[-1])
    at_q = torch.arange(queries, device=device)[None, None] if blocks.q_order is None else blocks.q_order
    at_k = torch.arange(keys, device=device)[None, None] if blocks.k_order is None else blocks.k_order
    first = torch.zeros(1, dtype=torch.int64, device=device) if begin is None else begin.to(device)
    last = torch.full((1,), keys, device=device) if end is None else end.to(device)
    bq, bk, shift, masks = blocks.block_q, blocks.block_k, keys - queries, blocks.masks

    def entry(x: Tensor, b: Any, h: Any) -> tuple[Any, Any]:
        return b if x.shape[0] > 1 else b * 0, h * x.shape[1] // heads

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        ok = table[(*entry(table, b, h), i // bq, j // bk)]
        if masks is not None and which is not None:
            number = which[(*entry(which, b, h), i // bq, j // bk)]
            ok = ok & ((number < 0) | masks[number.clamp(min=0), i % bq, j % bk])
        place = at_k[(*entry(at_k, b, h), j)]
        if causal:
            ok = ok & (place <= at_q[(*entry(at_q, b, h), i)] + shift)
        row = b if first.shape[0] > 1 else b * 0
        row_end = b if last.shape[0] > 1 else b * 0
        return ok & (place >= first[row]) & (place < last[row_end])

    b_all = torch.arange(batch, device=device)[:, None, None, None]
    h_all = torch.arange(heads, device=device)[:, None, None]
    rows, columns = -(-queries // tile), -(-keys // tile)
    some = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    whole = torch.zeros_like(some)
    for row in range(rows):  # a strip of tiles at a time
        i = torch.arange(row * tile, min(queries, (row + 1) * tile), device=device)[:, None]
        strip = sees(b_all, h_all, i, torch.arange(keys, device=device)).expand(batch, heads, -1, -1)
        strip = torch.nn.functional.pad(strip, (0, columns * tile - keys)).unflatten(-1, (columns, tile))
        some[:, :, row] = strip.any(-1).any(2)
        whole[:, :, row] = strip.all(-1).all(2) & (len(i) == tile)
    part_counts, part_order = _lists(some & ~whole)
    full_counts, full_order = _lists(whole)
    return BlockMask.from_kv_blocks(
        part_counts, part_order, full_counts, full_order, BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(queries, keys)
    )


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    order = table.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return table.sum(-1, dtype=torch.int32), order.int().contiguous()


def _mask_table(blocks: Blocks, tk: int) -> Tensor | None:
    """The finer mask's number for each block, -1 for none: int64 [b', h', Tq, Tk]."""
    if blocks.masks is None or blocks.mask_of is None:
        return None
    device = blocks.counts.device
    valid = torch.arange(blocks.indices.shape[-1], device=device) < blocks.counts[..., None]
    table = torch.full((*blocks.counts.shape, tk + 1), -1, dtype=torch.int64, device=device)
    table.scatter_(-1, blocks.indices.long().masked_fill(~valid, tk), blocks.mask_of.long())
    return table[..., :tk]
