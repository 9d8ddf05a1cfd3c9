"""S2-Attention: each head sees its nearest blocks and a shard of the rest; the shards add up to the context.

The query block i of head h sees the key block j <= i (arXiv 2407.17678; the pattern is that of the authors' library
DKernel and of Phi-3-small, which was trained with it and whose options are the defaults here) where

    i - j < local,   or   (j + h max(1, floor(stride / H))) mod stride = 0,   or   j < sink

Dense layers in between (hybrid), dense heads at the end. q [B, H, N, d], k and v [B, Hk, N, d]; heads that share keys
share a shard, and H above counts kv heads. While decoding, a head's cache keeps its shard, sinks and local blocks only.

Departures: `sink` is an extra, 0 by default; blocks are counted from a row's first real token, so that padding on the
left changes nothing; with fewer kv heads than the stride the shards do not cover the context, as in DKernel.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.attention._shards import Shards, follow
from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.kernels.block_attention import attention
from hasten.math.blocks import Blocks
from hasten.math.shapes import Float, Int

CARD = Card(
    title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
    paper="2407.17678",
    seams=("attention.mask", "cache.read", "cache.keep"),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="25.3x attention over FlashAttention-2, 6x training time and 10x inference latency (7B, 128K tokens, A100)",
    claimed=25.3,
    identity={"local": 1000000},
    experiment=(
        "stdlib-lm(task=generate, prompt=3840, new=64, examples=8)",
        "attention/s2(local=4, stride=3, dense_every=4)",
    ),
    when="Training from scratch or at length on thousands of tokens: time and cache shrink from the first step on.",
    when_not="Models trained dense and left as they are: every head loses most of the far context at once.",
    hosts=("decoder",),
)


def naive_s2(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    block: int,
    local: int,
    stride: int,
    sink: int = 0,
    dense_heads: int = 0,
    begin: Int[Tensor, "b"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Query by query, each over the tokens that it sees.

    Args:
        dense_heads: how many of the last kv heads see everything.
        begin: the first real token of each row; earlier queries give 0.
    """
    batch, heads, n, _ = q.shape
    kv_heads = k.shape[1]
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    step = max(1, stride // kv_heads)
    out = []
    for b in range(batch):
        first = 0 if begin is None else int(begin[b])
        for h in range(heads):
            g = h // (heads // kv_heads)
            for at in range(n):
                i = (at - first) // block
                keys = []
                for key in range(first, at + 1):
                    j = (key - first) // block
                    shard = (j + g * step) % stride == 0
                    if i - j < local or shard or j < sink or g >= kv_heads - dense_heads:
                        keys.append(key)
                weights = (k[b, g, keys].float() @ q[b, h, at].float() * scaling).softmax(0)
                out.append(weights @ v[b, g, keys].float())
    return torch.stack(out).view(batch, heads, n, -1).to(q.dtype)


def s2(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    block: int,
    local: int,
    stride: int,
    sink: int = 0,
    dense_heads: int = 0,
    begin: Int[Tensor, "b"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """As `naive_s2`, over blocks; differentiable."""
    pattern = Shards(block, local, sink, stride, offsets(k.shape[1], stride, dense_heads))
    blocks = pattern.blocks(q.shape[2], k.shape[2], begin, q.device)
    return attention(q, k, v, blocks, scaling=scaling, begin=begin)


def offsets(kv_heads: int, stride: int, dense_heads: int = 0, homogeneous: bool = False) -> tuple[int | None, ...]:
    """Where each kv head's shard lies; None for dense ones."""
    step = 0 if homogeneous else max(1, stride // kv_heads)
    return tuple(None if h >= kv_heads - dense_heads else h * step for h in range(kv_heads))


@dataclasses.dataclass(frozen=True)
class S2Attention(SparseAttention):
    """Local blocks and one shard per kv head, with dense layers in between."""

    block: int = option(64, "tokens of a block", least=1)
    local: int = option(16, "blocks up to its own that a query sees", least=1)
    stride: int = option(8, "one block in so many is in a head's shard", least=1)
    sink: int = option(0, "first blocks that every head sees", least=0)
    dense_every: int = option(2, "one layer in so many, the last of each, stays dense; 0 leaves none", least=0)
    dense_heads: int = option(0, "how many of the last kv heads see everything", least=0)
    homogeneous: bool = option(False, "all heads have the same shard")
    cache: bool = option(True, "while decoding, drop what no later token sees")

    decodes = True

    @property
    def idle(self) -> bool:
        return self.stride == 1 or self.dense_every == 1

    def layers(self, depth: int) -> list[int]:
        return [i for i in range(depth) if not self.dense_every or (i + 1) % self.dense_every]

    def pattern(self, kv_heads: int) -> Shards:
        """The blocks that each kv head sees."""
        shards = offsets(kv_heads, self.stride, self.dense_heads, self.homogeneous)
        return Shards(self.block, self.local, self.sink, self.stride, shards)

    def prepare(self, host: Any, record: dict[str, Any]) -> None:
        if self.cache:
            follow(host, self.name, self.pattern, self.layers(len(host.layers)))

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        return self.pattern(call.key.shape[1]).select(call, kept)


METHOD = S2Attention
