"""Block-sparse attention beside PyTorch's dense one: the share of what skipping blocks could give at most.

Ideal is the time of dense causal attention times the density of the chosen blocks; choosing them is not timed. A share
above 1 says that the sparse kernel computes a pair of a query and a key faster than the dense one does.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.bench.figures import Figure, Reading, figure, race
from hasten.core.errors import HastenError
from hasten.kernels.block_attention import attention, path
from hasten.kernels.gather_attention import gather_attention
from hasten.math.blocks import Blocks, top_blocks, visible_blocks

HEADS, DIM, BLOCK = 4, 64, 128


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, fp32 [1, 4, tokens, 64]."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=make) for _ in range(3))
    return q, k, v


def chosen(tokens: int, keep: float) -> Blocks:
    """Random blocks of 128 x 128, of each head its own, the diagonal always: about `keep` of all causal pairs."""
    many = tokens // BLOCK
    scores = torch.rand(1, HEADS, many, many, generator=torch.Generator().manual_seed(1))
    diagonal = torch.eye(many, dtype=torch.bool)
    count = round(keep * many / 2 + 0.25)  # rows near the beginning have fewer
    return Blocks.of(top_blocks(scores, count, visible_blocks(tokens, tokens, BLOCK, BLOCK), diagonal), BLOCK, BLOCK)


def sparse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Callable[[], Tensor]:
    if path(q, blocks) != "native":
        raise HastenError("the native kernel can't be built here: install a C++ compiler")
    return lambda: attention(q, k, v, blocks)


def prefill(tokens: int, keep: float, seconds: float) -> Reading:
    q, k, v = inputs(tokens)
    blocks = chosen(tokens, keep)
    density = blocks.density(tokens, tokens, causal=True)
    whole = Blocks.causal(tokens // 8, tokens // 8, BLOCK, BLOCK)
    some = [x[:, :, : tokens // 8] for x in (q, k, v)]
    check(attention(*some, whole), F.scaled_dot_product_attention(*some, is_causal=True))
    dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    found = race(dense, sparse(q, k, v, blocks), seconds=seconds)
    flops = 4 * HEADS * DIM * density * tokens * (tokens + 1) / 2
    return share(found, density).but(
        density=density, times_as_fast=found.value, gigaflops=flops / found.facts["seconds"] / 1e9
    )


def share(found: Reading, density: float) -> Reading:
    """Dense over sparse time, times the density."""
    ends = {end: None if (x := getattr(found, end)) is None else x * density for end in ("low", "high")}
    return dataclasses.replace(found, value=found.value * density, **ends)


def check(found: Tensor, wanted: Tensor) -> None:
    """Arms that compute different things are not compared."""
    error = float((found - wanted).norm() / wanted.norm())
    if not error < 1e-5:
        raise HastenError(f"the two outputs differ by {error:.1e}")


def against_flex(tokens: int, keep: float, seconds: float) -> Reading:
    """PyTorch's FlexAttention, compiled, with the same blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = inputs(tokens)
    blocks = chosen(tokens, keep)
    table = blocks.where(tokens // BLOCK)
    diagonal = torch.eye(tokens // BLOCK, dtype=torch.bool)
    lists = []
    for part in (table & diagonal, table & ~diagonal):  # tiles that causality cuts, tiles seen whole
        order = part.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        lists += [part.sum(-1, dtype=torch.int32), order.int().contiguous()]
    causal = lambda b, h, i, j: j <= i  # noqa: E731
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(tokens, tokens))
    compiled = torch.compile(flex_attention, dynamic=False)
    theirs = lambda: compiled(q, k, v, block_mask=mask)  # noqa: E731
    with torch.no_grad():
        check(attention(q, k, v, blocks), theirs())
        return race(theirs, sparse(q, k, v, blocks), seconds=seconds)


def decode(tokens: int, seconds: float) -> Reading:
    """One query of each of 8 heads over 2 heads' whole cache."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 128, generator=make) for h, n in ((8, 1), (2, tokens), (2, tokens)))
    dense = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    check(gather_attention(q, k, v), dense())
    found = race(dense, lambda: gather_attention(q, k, v), seconds=seconds)
    return found.but(gigabytes_per_second=(k.nbytes + v.nbytes) / found.facts["seconds"] / 1e9)


def figures(quick: bool) -> Iterator[Figure]:
    times = 1 if quick else 4
    for name, tokens, keep, seconds in (
        ("prefill_16k_eighth", 16384, 1 / 8, 40),
        ("prefill_16k_sixteenth", 16384, 1 / 16, 40),
        ("prefill_32k_sixteenth", 32768, 1 / 16, 60),
    ):
        yield figure(
            name, lambda tokens=tokens, keep=keep, seconds=seconds: prefill(tokens, keep, seconds * times),
            unit="share", against="dense causal attention of torch, times the density; 4 heads of 64", goal=0.55,
        )  # fmt: skip
    yield figure(
        "flex_16k_eighth",
        lambda: against_flex(16384, 1 / 8, 40 * times),
        against="torch's FlexAttention, compiled, the same blocks",
        goal=1.0,
    )
    yield figure(
        "decode_listed_32k",
        lambda: decode(32768, 20 * times),
        against="torch's attention of one query, 8 heads on 2 of 128, 32768 tokens",
    )
