"""FlashAttention-2: exact attention in tiles, on the CPU, where PyTorch's own is further from the machine's peak.

Softmax needs no second look at the scores: a query block walks over the key blocks with a running maximum m and sum l,
and divides once, at the end (arXiv 2307.08691, algorithm 1; section 3.1 on what is left out beside matrix products).

    m' = max(m, max S_j),   l' = e^(m-m') l + sum e^(S_j-m'),   O' = e^(m-m') O + e^(S_j-m') V_j,   O / l

Every key that dense attention sees is seen; q [B, H, N, d], k and v [B, Hk, N, d]. Single queries (decoding) read each
key and value once for all heads that share it. This is also the yardstick of the sparse methods here: they run on the
same kernel, and what they gain over this plan is what their choice of blocks gains.

Departures: blocks are 128 x 128 and heads and query blocks go to the CPU's threads; the paper's kernel is for GPUs, on
which PyTorch's own attention is this algorithm already, so that nothing changes there, nor without a C++ compiler.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.hosts.attention import Call
from hasten.kernels import block_attention
from hasten.kernels.gather_attention import gather_attention, path
from hasten.math.blocks import Blocks
from hasten.math.online_softmax import naive_flash2
from hasten.math.shapes import Float

CARD = Card(
    title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    paper="2307.08691",
    seams=("attention.mask", "cache.read"),
    effects=("time",),
    lossless=False,
    claim="around 2x FlashAttention, 50 to 73% of the A100's peak",
    claimed=2.0,
    identity="exact, but not bit for bit: the sums are taken in another order than PyTorch's",
    experiment=("stdlib-lm(model=long, task=needle, prompt=8192, examples=16)", "attention/flash_attention2"),
    when="Thousands of tokens on a CPU: nothing is left out, so it costs no quality.",
    when_not="GPUs, where PyTorch runs this algorithm itself; short texts.",
    hosts=("decoder", "vit", "denoiser"),
)

BLOCK = 128


def naive_flash_attention2(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, block: int = BLOCK, scaling: float | None = None
) -> Tensor:
    """Tile by tile (`math.online_softmax.naive_flash2`), head by head."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    group = q.shape[1] // k.shape[1]
    rows = [
        naive_flash2(q[b, h], k[b, h // group], v[b, h // group], block, block, scaling, causal)[0]
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    return torch.stack(rows).view(*q.shape[:3], -1).to(q.dtype)


def flash_attention2(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], v: Float[Tensor, "b hk nk e"], causal: bool = True,
    block: int = BLOCK, scaling: float | None = None,
) -> Float[Tensor, "b h nq e"]:  # fmt: skip
    """Dense attention through the block-sparse kernel; queries are the last Nq of Nk positions; differentiable."""
    blocks = every(q.shape[2], k.shape[2], causal, block, q.device)
    return block_attention.attention(q, k, v, blocks, scaling=scaling, causal=causal)


def every(queries: int, keys: int, causal: bool, block: int, device: torch.device) -> Blocks:
    """All blocks that dense attention reaches."""
    make = Blocks.causal if causal else Blocks.full
    return make(queries, keys, block, block, device)


@dataclasses.dataclass(frozen=True)
class FlashAttention2(SparseAttention):
    decodes = True

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        queries, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
        if queries == 1 and call.causal:
            if call.range()[0] is not None or path(call.query, call.key, call.value) != "native":
                return None
            return kept.once("one", lambda: every(1, 1, True, 1 << 30, device))  # one block, however long
        blocks = kept.once((queries, keys, call.causal), lambda: every(queries, keys, call.causal, BLOCK, device))
        return blocks if block_attention.path(call.query, blocks) == "native" else None

    def mix(self, call: Call, blocks: Blocks, kept: Kept) -> Tensor:
        if call.query.shape[2] == 1 and call.causal:
            return gather_attention(call.query, call.key, call.value, scaling=call.scaling)
        return super().mix(call, blocks, kept)


METHOD = FlashAttention2
