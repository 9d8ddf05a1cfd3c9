"""LongGen: the middle third of the layers sees everything, the others the nearest blocks and first or strided ones.

In a sparse layer the query block i sees the key block j <= i (arXiv 2410.01485, section 3, figure 1) where

    window ("AttnSink"):    i - j < local   or   j < sink
    strided ("BlockSparse"): i - j < local   or   (j + h max(1, floor(stride / H))) mod stride = 0

and the caches of these layers hold no more than that. A model is finetuned into this shape while its context is
extended. q [B, H, N, d], k and v [B, Hk, N, d], H counts kv heads in the equation.

Departures: the authors published no code; the defaults keep 8192 + 64 tokens of 128K, or one block in 16, which comes
to their 62% less cache, and shards differ between heads as in the same authors' S2-Attention. Blocks are counted from a
row's first real token.
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
    title="A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts",
    paper="2410.01485",
    seams=("attention.mask", "cache.read", "cache.keep"),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="1.55x training at 128K tokens, 62% less cache, 1.67x prefill and 1.41x decoding (Llama-2 7B and 70B)",
    claimed=1.55,
    identity={"full": 1.0},
    experiment=(
        "stdlib-lm(task=generate, prompt=3840, new=64, examples=8)",
        "attention/longgen(local=4)",
    ),
    when="Finetuning to a longer context: cheaper steps, and a model whose cache is a third at the end.",
    when_not="Models that are not finetuned: two thirds of the layers lose the far context at once.",
    hosts=("decoder",),
)


def naive_longgen(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    block: int,
    local: int,
    sink: int,
    stride: int,
    begin: Int[Tensor, "b"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """A sparse layer's attention, query by query.

    Args:
        stride: one block in so many is in a head's shard, 0 for none.
        begin: the first real token of each row; earlier queries give 0.
    """
    batch, heads, n, _ = q.shape
    kv_heads = k.shape[1]
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = []
    for b in range(batch):
        first = 0 if begin is None else int(begin[b])
        for h in range(heads):
            g = h // (heads // kv_heads)
            for at in range(n):
                keys = []
                for key in range(first, at + 1):
                    i, j = (at - first) // block, (key - first) // block
                    shard = stride > 0 and (j + g * max(1, stride // kv_heads)) % stride == 0
                    if i - j < local or j < sink or shard:
                        keys.append(key)
                weights = (k[b, g, keys].float() @ q[b, h, at].float() * scaling).softmax(0)
                out.append(weights @ v[b, g, keys].float())
    return torch.stack(out).view(batch, heads, n, -1).to(q.dtype)


def longgen(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    block: int,
    local: int,
    sink: int,
    stride: int,
    begin: Int[Tensor, "b"] | None = None,
    scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """As `naive_longgen`, over blocks; differentiable."""
    blocks = shards(k.shape[1], block, local, sink, stride).blocks(q.shape[2], k.shape[2], begin, q.device)
    return attention(q, k, v, blocks, scaling=scaling, begin=begin)


def shards(kv_heads: int, block: int, local: int, sink: int, stride: int) -> Shards:
    """The pattern of a sparse layer; a stride of 0 has no shards."""
    step = max(1, stride // kv_heads)
    return Shards(block, local, sink, stride, tuple(h * step for h in range(kv_heads)) if stride else (0,))


def full_layers(depth: int, share: float = 1 / 3) -> range:
    """The middle layers that stay full, at least one unless the share is 0."""
    count = min(depth, max(round(depth * share), int(share > 0)))
    first = (depth - count + 1) // 2
    return range(first, first + count)


@dataclasses.dataclass(frozen=True)
class LongGen(SparseAttention):
    """Sparse layers at the bottom and the top, full ones in the middle."""

    full: float = option(1 / 3, "share of the layers, in the middle, that see everything", least=0, most=1)
    pattern: str = option("window", "what the others see beside the nearest blocks", choices=("window", "strided"))
    block: int = option(64, "tokens of a block", least=1)
    local: int = option(128, "blocks up to its own that a query sees (of pattern=strided 1 is usual)", least=1)
    sink: int = option(1, "first blocks that every query sees, of pattern=window", least=0)
    stride: int = option(16, "one block in so many is in a head's shard, of pattern=strided", least=1)
    cache: bool = option(True, "while decoding, drop what no later token sees")

    decodes = True

    @property
    def idle(self) -> bool:
        return self.full == 1 or (self.pattern == "strided" and self.stride == 1)

    def layers(self, depth: int) -> list[int]:
        full = full_layers(depth, self.full)
        return [i for i in range(depth) if i not in full]

    def shards(self, kv_heads: int) -> Shards:
        """The blocks that each kv head of a sparse layer sees."""
        strided = self.pattern == "strided"
        return shards(kv_heads, self.block, self.local, 0 if strided else self.sink, self.stride if strided else 0)

    def prepare(self, host: Any, record: dict[str, Any]) -> None:
        if self.cache:
            follow(host, self.name, self.shards, self.layers(len(host.layers)))

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        return self.shards(call.key.shape[1]).select(call, kept)


METHOD = LongGen
