"""Native Sparse Attention, executed as Flash Sparse Attention (arXiv 2502.11089, section 3; 2508.18224, section 3).

Three attentions over the past replace one: over compressed blocks, over the few blocks that the compressed attention
points at, and over a sliding window. A gate weighs them, and all is trained from the start.

    o_t = g_cmp Attn(q_t, K_cmp, V_cmp) + g_slc Attn(q_t, K_slc, V_slc) + g_win Attn(q_t, K_(t-w+1..t), V_(t-w+1..t))
    K_cmp = phi(k_(id+1..id+l)),  p_cmp = softmax(q_t K_cmp / sqrt dim),  p_slc[j] = sum_i overlap(i, j) p_cmp[i]

The heads that share keys add up their p_slc and take the same n blocks of l'. q [B, H, N, dim], k [B, Hk, N, dim].

Departures: one key and value per token for the three branches, as in the open implementations (the paper: three); phi
and the gates see keys and queries with their positions, and gates see the query, not the layer's input; phi adds its
MLP to the block's mean, starting from the mean. Blocks are counted from column 0: of padded rows those that touch
padding are not compressed. While decoding a step compresses the new blocks only, after it checked that the cache still
holds the keys that it compressed before.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.attention._nsa_parts import Branches, choose, coarse, window_blocks
from hasten.attention._routed import naive_routed, routed
from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.head_sizes import head_sizes
from hasten.kernels import block_attention
from hasten.math.blocks import Blocks
from hasten.math.shapes import Float, Int

CARD = Card(
    title="FSA: Flash Sparse Attention: An Alternative Efficient Implementation of Native Sparse Attention Kernel",
    paper="2508.18224",
    seams=("attention.mask", "cache.read"),
    effects=("time", "quality"),
    lossless=False,
    claim="up to 1.25x (1.09x on average) end-to-end training over NSA's own kernel, groups of 1 to 8 heads per key",
    claimed=1.25,
    identity="its output is a gated sum of three attentions, so no option leaves a dense model as it was",
    experiment=(
        "stdlib-lm(task=train, length=4096, rows=1, steps=60, target=4.4)",
        "attention/nsa(count=4, window=128)",
    ),
    when="Training a decoder, from scratch or further, on texts of many thousand tokens.",
    when_not="Trained models that can't be trained further; texts shorter than count * block tokens.",
    hosts=("decoder",),
)


def naive_nsa(
    q: Tensor, k: Tensor, v: Tensor, compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, length: int = 32,
    stride: int = 16, block: int = 64, count: int = 16, initial: int = 1, local: int = 2, window: int = 512,
    scaling: float | None = None, begin: Tensor | None = None, end: Tensor | None = None, order: str = "tiles",
) -> Tensor:  # fmt: skip
    """Query by query; see `nsa`."""
    (batch, heads, nq, d), (hk, nk) = q.shape, k.shape[1:3]
    scaling, group = d**-0.5 if scaling is None else scaling, heads // hk
    tk, nc, past = -(-nk // block), compressed_k.shape[2], nk - nq
    chosen = torch.zeros(batch, hk, nq, tk, dtype=torch.bool)
    near = torch.zeros(batch, hk, nq, nk, dtype=torch.bool)
    coarse_out = torch.zeros(batch, heads, nq, v.shape[-1])
    for b in range(batch):
        low, high = 0 if begin is None else int(begin[b]), nk if end is None else int(end[b])
        for i in range(nq):
            at = i + past
            near[b, :, i, max(0, at - window + 1) : at + 1] = True
            whole = [c for c in range(nc) if c * stride >= low and c * stride + length <= min(high, at + 1)]
            for g in range(hk):
                worth = [0.0] * tk
                for h in range(g * group, (g + 1) * group):
                    p = (compressed_k[b, g, whole].float() @ q[b, h, i].float() * scaling).softmax(0)
                    coarse_out[b, h, i] = p @ compressed_v[b, g, whole].float()
                    for c, weight in zip(whole, p.tolist(), strict=True):
                        for token in range(c * stride, c * stride + length):
                            worth[token // block] += weight / stride
                own, first = at // block, low // block
                open_to = range(first, own + 1)
                always = [j for j in open_to if j < first + initial or j > own - local]
                others = sorted((j for j in open_to if j not in always), key=lambda j: -worth[j])
                chosen[b, g, i, (always + others)[:count]] = True
    fine, _ = naive_routed(q, k, v, chosen, block, scaling, True, begin, end)
    local_out, _ = naive_routed(q, k, v, near, 1, scaling, True, begin, end)
    parts = torch.stack([coarse_out, fine.float(), local_out.float()], -1)
    return (parts * gates.float()[..., None, :]).sum(-1).to(q.dtype)


def nsa(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nk d"], v: Float[Tensor, "b hk nk e"],
    compressed_k: Float[Tensor, "b hk nc d"], compressed_v: Float[Tensor, "b hk nc e"],
    gates: Float[Tensor, "b h nq 3"], length: int = 32, stride: int = 16, block: int = 64, count: int = 16,
    initial: int = 1, local: int = 2, window: int = 512, scaling: float | None = None,
    begin: Int[Tensor, "b"] | None = None, end: Int[Tensor, "b"] | None = None, order: str = "tiles",
) -> Float[Tensor, "b h nq e"]:  # fmt: skip
    """The gated sum of the three branches.

    Args:
        compressed_k, compressed_v: phi of every whole block of `length` tokens, one each `stride` tokens.
        gates: shares of the compressed, the chosen and the window's attention.
        count: chosen blocks of `block` tokens; `initial` first ones and the `local` last ones are among them.
        window: keys that the sliding window holds, the query's own among them.
        begin, end: the keys of each row from `begin` to before `end` are real.
        order: `tiles`, `keys` or `queries`, how the chosen blocks' attention is computed (`_routed`).
    """
    nk, past = k.shape[2], k.shape[2] - q.shape[2]
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = length, stride, block, scaling, past
    rough, scores = coarse(q, compressed_k, compressed_v, -(-nk // block), *sizes, begin, end)
    blocks = choose(scores, block, count, initial, local, past, begin)
    near = window_blocks(q.shape[2], nk, window, q.device) if q.shape[2] > 1 else None
    return merged(q, k, v, rough, blocks, near, gates, window, scaling, begin, end, order)


def merged(
    q: Tensor, k: Tensor, v: Tensor, rough: Tensor, blocks: Blocks, near: Blocks | None, gates: Tensor, window: int,
    scaling: float, begin: Tensor | None, end: Tensor | None, order: str,
) -> Tensor:  # fmt: skip
    """The compressed branch's output, the chosen blocks' and the window's, by their gates; `near` is None for a single
    query, which sees the last keys."""
    nq, nk = q.shape[2], k.shape[2]
    table = blocks.where(-(-nk // blocks.block_k))
    few = nq * 8 < blocks.indices.shape[-1] * blocks.block_k  # a step of decoding
    fine, _ = routed(q, k, v, table, blocks.block_k, scaling, True, begin, end, "queries" if few else order)
    if near is None:
        cut = max(0, nk - window)
        k, v = k[:, :, cut:], v[:, :, cut:]
        begin, end = (None if one is None else (one - cut).clamp(min=0) for one in (begin, end))
        near = window_blocks(1, nk - cut, window, q.device)
    local = block_attention.attention(q, k, v, near, scaling=scaling, causal=True, begin=begin, end=end)
    return gates[..., :1] * rough + gates[..., 1:2] * fine + gates[..., 2:] * local


@dataclasses.dataclass(frozen=True)
class Routes(Blocks):
    """The chosen blocks of single queries, with the compressed branch's output, from which they were chosen."""

    rough: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class NSA(SparseAttention):
    """The density in the report is that of the chosen blocks; the window and the compressed tokens come on top."""

    length: int = option(32, "tokens of a compression block", least=2)
    stride: int = option(16, "tokens from one compression block to the next", least=1)
    block: int = option(64, "tokens of a selection block", least=1)
    count: int = option(16, "selection blocks that a query sees", least=1)
    initial: int = option(1, "first blocks that are always among them", least=0)
    local: int = option(2, "last blocks that are always among them, the query's own first", least=1)
    window: int = option(512, "tokens of the sliding window", least=1)
    order: str = option(
        "tiles",
        "how the chosen blocks are computed: tiles of queries (where the native kernel runs, else as keys), by keys "
        "(Flash Sparse Attention) or by queries (NSA's own)",
        choices=("tiles", "keys", "queries"),
    )

    decodes = True

    def problems(self) -> list[str]:
        found = []
        if self.length % self.stride or self.block % self.stride:
            found.append(f"length and block must be multiples of stride, not {self.length} and {self.block}")
        if self.count < self.initial + self.local:
            found.append(f"count must hold the initial and local blocks, at least {self.initial + self.local}")
        return found

    def modules(self, attention: nn.Module, layer: int, host: Host) -> nn.Module:
        sizes = head_sizes(attention)
        return Branches(sizes.heads, sizes.dim, sizes.value_dim, self.length, seed=layer)

    def select(self, call: Call, kept: Kept) -> Blocks:
        begin, end = call.range()
        compressed_k, compressed_v = self.compressed(call, kept)
        nk = call.key.shape[2]
        sizes = self.length, self.stride, self.block, call.scaling, call.past
        rough, scores = coarse(call.query, compressed_k, compressed_v, -(-nk // self.block), *sizes, begin, end)
        blocks = choose(scores, self.block, self.count, self.initial, self.local, call.past, begin)
        return Routes(blocks.counts, blocks.indices, 1, self.block, rough=rough)

    def mix(self, call: Call, blocks: Blocks, kept: Kept) -> Tensor:
        assert isinstance(blocks, Routes) and blocks.rough is not None
        nq, nk, device = call.query.shape[2], call.key.shape[2], call.query.device
        near = None if nq == 1 else kept.once(("window", nq, nk), lambda: window_blocks(nq, nk, self.window, device))
        return merged(
            call.query, call.key, call.value, blocks.rough, blocks, near, kept.module.gates(call.query), self.window,
            call.scaling, *call.range(), self.order,
        )  # fmt: skip

    def compressed(self, call: Call, kept: Kept) -> tuple[Tensor, Tensor]:
        """Compressed keys and values of all whole blocks; while decoding, of the new ones, after those of before."""
        module: Any = kept.module
        keeps = not torch.is_grad_enabled()
        before = kept.memo.get(_COMPRESSED) if keeps and call.past else None
        if before is None or not before.holds(module, call):
            before = None
        elif before.k.shape[2] == (call.key.shape[2] - self.length) // self.stride + 1:
            return before.k, before.v
        tail = slice(0 if before is None else before.k.shape[2] * self.stride, None)
        k, v = module.keys(call.key[:, :, tail], self.stride), module.values(call.value[:, :, tail], self.stride)
        if before is not None:
            k, v = torch.cat([before.k, k], 2), torch.cat([before.v, v], 2)
        if keeps and k.shape[2]:
            last = (k.shape[2] - 1) * self.stride + self.length
            source = call.key[:, :, :last].clone(), call.value[:, :, : last : self.length].clone()
            kept.memo[_COMPRESSED] = Compressed(module, versions(module), self.length, *source, k, v)
        return k, v


_COMPRESSED = "compressed"


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Compressed keys `k` and values `v`, and from what they were made.

    All keys of the cache are compared before these are used again, and every `step`th value: the same tokens in one
    layer have both.
    """

    module: nn.Module
    versions: tuple[int, ...]
    step: int
    keys: Tensor
    values: Tensor
    k: Tensor
    v: Tensor

    def holds(self, module: nn.Module, call: Call) -> bool:
        n = self.keys.shape[2]
        if module is not self.module or call.key.shape[2] < n or self.keys.shape[:2] != call.key.shape[:2]:
            return False
        if self.versions != versions(module) or not torch.equal(self.keys, call.key[:, :, :n]):
            return False
        return torch.equal(self.values, call.value[:, :, : n : self.step])


def versions(module: nn.Module) -> tuple[int, ...]:
    """Changes with every change of the weights in place; tensors made in inference mode can't change."""
    return tuple(0 if weight.is_inference() else weight._version for weight in module.parameters())


METHOD = NSA
