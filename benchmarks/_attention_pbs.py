"""Prefill of 16,384 tokens: PBS-Attn, choosing included, against dense causal SDPA."""

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from hasten.attention.pbs_attn import METHOD, pbs_attn
from hasten.bench.figures import Figure, Reading, figure, race
from hasten.hosts.attention import Call
from hasten.math.blocks import Blocks

TOKENS, HEADS, DIM = 16384, 4, 64
OPTIONS = {"block": 64, "segment": 512, "threshold": 0.9}
SHAPE = "dense causal SDPA, 16k tokens, 4 heads of 64, scattered heavy hitters"
PROBES = 61  # every so many queries are compared with dense attention


@functools.cache
def heads(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [1, heads, tokens, dim] as heads of language models have them.

    One key in a hundred, anywhere, is a heavy hitter of one of four kinds, which every query wants more or less; the
    first key is a sink; passages of some hundred tokens share a topic; the rest is noise. About two thirds of the
    attention go to the heavy hitters and the sink.
    """
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    kinds = F.normalize(noise(HEADS, 4, DIM), dim=-1)
    passage = (torch.rand(tokens, generator=g) < 1 / 600).cumsum(0)
    topic = F.normalize(noise(1, HEADS, int(passage[-1]) + 1, DIM), dim=-1)[:, :, passage]
    heavy = (torch.rand(1, HEADS, tokens, 4, generator=g) < 0.0025).float()
    heavy[:, :, 0] = 0.5
    wants = torch.rand(1, HEADS, tokens, 4, generator=g)
    key = 0.6 * noise(1, HEADS, tokens, DIM) + 4 * topic + 9 * heavy @ kinds
    query = 0.6 * noise(1, HEADS, tokens, DIM) + 4 * topic + 9 * wants @ kinds
    return query, key, noise(1, HEADS, tokens, DIM)


@torch.inference_mode()
def loss(options: dict) -> dict[str, float]:
    """What is lost, at some queries: the attention that is not seen, and the output's error relative to its size."""
    query, key, value = heads()
    rows = torch.arange(TOKENS - 1, 0, -PROBES)
    causal = torch.arange(TOKENS) <= rows[:, None]
    scores = (query[:, :, rows] @ key.mT * DIM**-0.5).masked_fill(~causal, -torch.inf)
    weights = scores.softmax(-1)
    _, order, chosen = pbs_attn(query, key, **options)
    block = options["block"]
    seen = chosen[:, :, rows // block].gather(3, (order.argsort(-1) // block)[:, :, None].expand_as(scores))
    dense, sparse = weights @ value, scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    lost = float((weights * ~seen).sum(-1).mean())
    return {"attention_lost": round(lost, 4), "relative_error": round(float((sparse - dense).norm() / dense.norm()), 4)}


def prefill(seconds: float, **options: float) -> Reading:
    """Dense over sparse time, choosing included; what was computed and lost, and what sparsity alone brings."""
    query, key, value = heads()
    method = METHOD(**{**OPTIONS, **options})
    call = Call(torch.nn.Identity(), 0, query, key, value, None, DIM**-0.5, True)
    blocks = method.select(call, None)
    assert blocks is not None

    @torch.inference_mode()
    def dense() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True)

    @torch.inference_mode()
    def sparse() -> None:
        method.mix(call, method.select(call, None), None)

    @torch.inference_mode()
    def choosing() -> None:
        method.select(call, None)

    every = Blocks.causal(TOKENS, TOKENS, method.block, method.block)

    @torch.inference_mode()
    def whole() -> None:
        method.mix(call, every, None)

    found = race(dense, sparse, seconds=seconds / 2)
    share = race(sparse, choosing, seconds=seconds / 4)
    sparsity = race(whole, sparse, seconds=seconds / 4)
    return found.but(
        density=round(blocks.density(TOKENS, TOKENS, True), 4), selection_share=round(1 / share.value, 4),
        against_the_same_kernel_dense=round(sparsity.value, 3), plan=str(method), **loss({**OPTIONS, **options}),
    )  # fmt: skip


def figures(quick: bool) -> Iterator[Figure]:
    yield figure("prefill_16k_pbs", lambda: prefill(40 if quick else 240), against=SHAPE)
