"""TCA-Attention: each head keeps core tokens, for the prompt and in the cache (arXiv 2512.09238, section 4).

Offline, one pass over a few texts finds for each head how much of its keys it can lose. Online, blocks whose attention
hangs on a few tokens (they are redundant) keep few, spread-out ones many; what is not kept is neither read nor stored.

    s = softmax(q_L K' / sqrt d), q_L the last query;  redundancy of block j:  h_j = sum_i s_i^2 / (sum_i s_i)^2
    configuration:  p_k ~ exp(-(log2 k - mu)^2 / 2 sigma^2),  k in {1, 2, 4, ..., b}: the share of blocks that keep k
    by falling h_j the blocks get the smallest k first, as the p_k say; each keeps its k tokens of largest s
    offline, per head: the p that keeps least while the attention lost stays within `error`

A query sees the core tokens before it and at least the last `window` ones. Prefill and cache use the same tokens.

Departures: heads that share a key are averaged. Offline, the last queries of a text, not the last alone, say what is
lost, and on short texts the window is a quarter. While decoding, a block that leaves the window keeps what the
configuration keeps on average. The authors' code is not public; the defaults of b, window, error and sigma are ours.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hasten.attention.base import SparseAttention
from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.caching import use_cache
from hasten.hosts.context import Context
from hasten.hosts.following import FollowingCache
from hasten.math.blocks import Blocks, in_range
from hasten.math.shapes import Bool, Float, Int

CARD = Card(
    title="Training-free Context-adaptive Attention for Efficient Long Context Modeling",
    paper="2512.09238",
    seams=("attention.mask", "cache.read", "cache.keep"),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="2.8x speed of prefilling and 61% less KV cache at 128K tokens (Llama-3.1-8B, Qwen2.5-7B)",
    claimed=2.8,
    identity={"error": 0.0},
    experiment=(
        "stdlib-lm(model=long, task=needle, prompt=8192, examples=16)",
        "attention/tca(window=128, error=0.02)",
    ),
    when="Long prompts whose answer hangs on few tokens, where both prefilling and the cache are too large.",
    when_not="Prompts of a few windows; prompts that are questioned anew after their end, since their last query alone "
    "says what stays.",
    needs=("calibration",),
    hosts=("decoder",),
)

JUDGES = 64  # last queries of a calibration text that say what is lost


def naive_tca(
    q: Tensor, k: Tensor, shares: Tensor, block: int = 64, window: int = 256, scaling: float | None = None,
    begin: Tensor | None = None, end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which keys stay.

    Args:
        q: the last queries, [B, H, n, d]; k: [B, Hk, N, d].
        shares: p_k of each head, [Hk, 1 + log2(block)].
        begin, end: the real keys of each row, int64 [B].

    Returns:
        bool [B, Hk, N].
    """
    (batch, heads, n, dim), (hk, length) = q.shape, k.shape[1:3]
    scaling, edge = dim**-0.5 if scaling is None else scaling, max(0, length - window) // block * block
    keep = torch.zeros(batch, hk, length, dtype=torch.bool)
    for b in range(batch):
        lo, hi = (0 if begin is None else int(begin[b])), (length if end is None else int(end[b]))
        for g in range(hk):
            s = torch.zeros(length)
            for h in range(g * heads // hk, (g + 1) * heads // hk):
                for i in range(n):
                    last = min(hi, length - n + i + 1)
                    if last > lo:
                        s[lo:last] += (k[b, g, lo:last].float() @ q[b, h, i].float() * scaling).softmax(0)
            redundancy = {}
            for j in range(0, edge, block):
                if max(j, lo) < min(j + block, hi):
                    part = s[j : j + block]
                    redundancy[j] = float(part.square().sum() / part.sum().square()) if part.sum() > 0 else 1.0
            ranked = sorted(redundancy, key=lambda j: -redundancy[j])
            for rank, j in enumerate(ranked):
                number, total = 1, float(shares[g, 0])
                while total <= (rank + 0.5) / len(ranked) and number < block:
                    number *= 2
                    total += float(shares[g, int(math.log2(number))])
                best = sorted(range(j, j + block), key=lambda i: -float(s[i]))[:number]
                keep[b, g, best] = True
            keep[b, g, edge:] = True
            keep[b, g, :lo] = keep[b, g, hi:] = False
    return keep


@torch.no_grad()
def tca(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk nk d"], shares: Float[Tensor, "hk c"], block: int = 64,
    window: int = 256, scaling: float | None = None, begin: Int[Tensor, "b"] | None = None,
    end: Int[Tensor, "b"] | None = None,
) -> Bool[Tensor, "b hk nk"]:  # fmt: skip
    """`naive_tca` without loops."""
    batch, (hk, length), device = len(q), k.shape[1:3], q.device
    scaling, edge = q.shape[-1] ** -0.5 if scaling is None else scaling, max(0, length - window) // block * block
    shown = in_range(length, begin, end, device)
    real = torch.ones(1, 1, length, dtype=torch.bool, device=device) if shown is None else shown[:, None]
    if edge == 0:
        return real.expand(batch, hk, -1)
    order, choice = thinned(q, k, shares[None].to(device), block, edge, scaling, real)
    core = (order.argsort(-1) < 2 ** choice[0][..., None]).flatten(2)
    return torch.cat([core, core.new_ones(batch, hk, length - edge)], -1) & real


def thinned(
    q: Tensor, k: Tensor, shares: Tensor, block: int, edge: int, scaling: float, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Each block's tokens by falling s, [B, Hk, T, b], and which power of two of them stays, [C, B, Hk, T].

    Args:
        shares: of C configurations, [C, Hk or 1, 1 + log2(block)]; edge: the tokens before it are in blocks.
    """
    s = last_attention(q, k, scaling, real).sum((2, 3))[..., :edge].unflatten(-1, (-1, block))
    there = real[..., :edge].unflatten(-1, (-1, block)).any(-1)  # [B', 1, T]
    total = s.sum(-1)
    redundancy = torch.where(total > 0, s.square().sum(-1) / total.square().clamp(min=1e-38), 1.0)
    rank = redundancy.masked_fill(~there, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    middle = (rank + 0.5) / there.sum(-1, keepdim=True).clamp(min=1)
    choice = (shares.cumsum(-1)[:, None, :, None] <= middle[..., None]).sum(-1).clamp(max=shares.shape[-1] - 1)
    return s.argsort(dim=-1, descending=True, stable=True), choice


def last_attention(q: Tensor, k: Tensor, scaling: float, real: Tensor) -> Tensor:
    """Attention of the last queries over all keys, float32 [B, Hk, group, n, N]; `real` bool [B or 1, 1, N]."""
    n, length = q.shape[2], k.shape[2]
    scores = q.float().unflatten(1, (k.shape[1], -1)) @ k.float().mT[:, :, None] * scaling
    visible = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    return scores.masked_fill_(~(visible & real[:, :, None, None]), -torch.inf).softmax(-1).nan_to_num_(0.0)


def configurations(block: int, number: int, sigma: float) -> Tensor:
    """Candidate p_k, float64 [number + 1, 1 + log2(block)], from few tokens to all, which the last one keeps."""
    powers = sizes(block).log2()
    centres = torch.linspace(0, float(powers[-1]), number, dtype=torch.float64)
    weights = (-((powers - centres[:, None]) ** 2) / (2 * sigma**2)).exp()
    whole = torch.nn.functional.one_hot(powers[-1:].long(), len(powers)).double()
    return torch.cat([weights / weights.sum(-1, keepdim=True), whole])


def sizes(block: int) -> Tensor:
    """1, 2, 4, ..., block, float64."""
    return 2.0 ** torch.arange(round(math.log2(block)) + 1, dtype=torch.float64)


def token_lists(keep: Tensor, queries: int, block: int, window: int) -> Blocks:
    """For each block of queries single keys: the window before and among it, then the kept ones before that."""
    length, device = keep.shape[2], keep.device
    first = torch.arange(0, queries, block, device=device) + length - queries
    low = (first - window + 1).clamp(min=0)
    near = (first + block).clamp(max=length) - low  # [Tq]
    kept = keep.byte().sort(dim=-1, descending=True, stable=True).indices[..., : max(1, int(keep.sum(-1).max()))]
    before = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))[..., low]  # [B, Hk, Tq]
    place = torch.arange(int((near + before).max()), device=device)
    earlier = (place - near[:, None]).clamp(0, kept.shape[-1] - 1).expand(*keep.shape[:2], -1, -1)
    core = kept[:, :, None].expand(-1, -1, len(first), -1).gather(3, earlier)
    indices = torch.where(place < near[:, None], (low[:, None] + place).clamp(max=length - 1), core)
    return Blocks((near + before).int(), indices.int(), block, 1)


@dataclasses.dataclass(frozen=True)
class TCA(SparseAttention):
    error: float = option(0.05, "attention that a head may lose on the calibration texts", least=0, below=1)
    block: int = option(64, "tokens of a block that is thinned out, a power of two", least=2)
    window: int = option(256, "last tokens that are all kept and seen", least=1)
    probes: int = option(1, "last queries whose attention chooses the core tokens", least=1)
    candidates: int = option(32, "configurations among which a head's is chosen", least=2)
    sigma: float = option(1.0, "spread of a configuration around its centre, in powers of two", above=0)
    cache: bool = option(True, "free the other tokens from the cache")

    def problems(self) -> list[str]:
        if self.block & (self.block - 1):
            return [f"block must be a power of two, not {self.block}"]
        return []

    @property
    def idle(self) -> bool:
        return self.error == 0

    @torch.no_grad()
    def calibrate(self, host: Host, context: Context) -> dict[str, Any]:
        """One pass: what each candidate loses in each head, on average over the texts; then the smallest that may be.

        Raises:
            UsageError: no text is long enough for a block before its window.
        """
        candidates = configurations(self.block, self.candidates, self.sigma)
        lost: dict[int, Tensor] = {}
        texts: dict[int, int] = {}

        def look(call: Call) -> Tensor:
            (begin, end), keys, length = call.range(), call.key, call.key.shape[2]
            window = min(self.window, length // 4)
            if length < window + self.block:
                return call.dense()
            shown = in_range(length, begin, end, keys.device)
            real = torch.ones(1, 1, length, dtype=torch.bool, device=keys.device) if shown is None else shown[:, None]
            edge = (length - window) // self.block * self.block
            last, table = call.query[:, :, -self.probes :], candidates[:, None].to(keys.device)
            order, choice = thinned(last, keys, table, self.block, edge, call.scaling, real)
            weights = last_attention(call.query[:, :, -JUDGES:], keys, call.scaling, real).mean((2, 3))[..., :edge]
            held = weights.unflatten(-1, (-1, self.block)).gather(-1, order).cumsum(-1)  # by the first 1, 2, ... tokens
            held = held[..., sizes(self.block).long() - 1].expand(len(candidates), -1, -1, -1, -1)
            gone = (held[..., -1:] - held.gather(-1, choice[..., None])).sum((1, 3, 4)).double().cpu()  # [C, Hk]
            lost[call.layer] = lost.get(call.layer, 0) + gone
            texts[call.layer] = texts.get(call.layer, 0) + len(keys)
            return call.dense()

        layers: list[int] = host.cache_layers  # type: ignore[attr-defined]
        mark, training = len(host.changes), host.model.training
        try:
            for index in layers:
                host.attend_with(index, look)  # type: ignore[attr-defined]
            host.model.eval()
            for batch in context.calibration or []:
                host.forward({name: one for name, one in batch.items() if name != "labels"} | {"use_cache": False})
        finally:
            host.model.train(training)
            host.changes.undo(mark)
        if not texts:
            raise UsageError(
                f"{self.name} needs calibration texts of {self.block * 4 // 3 + 1} tokens or more, or a smaller block"
            )
        chosen = {i: candidates[(lost[i] / texts[i] <= self.error).int().argmax(0)] for i in layers}
        kept = torch.stack([shares @ sizes(self.block) for shares in chosen.values()]).mean() / self.block
        context.note(self.name, kept_before_window=round(float(kept), 4))
        return {"shares": {str(layer): shares.tolist() for layer, shares in chosen.items()}}

    def select(self, call: Call, kept: Any) -> Blocks | None:
        """None (dense) where the window covers all, or for fewer queries than a block."""
        queries, keys = call.query, call.key
        if keys.shape[2] < self.window + self.block or queries.shape[2] < self.block:
            return None
        begin, end = call.range()
        shares = torch.tensor(kept.record["shares"][str(kept.index)], dtype=torch.float64)
        keep = tca(queries[:, :, -self.probes :], keys, shares, self.block, self.window, call.scaling, begin, end)
        return token_lists(keep, queries.shape[2], self.block, self.window)

    def prepare(self, host: Host, record: dict[str, Any]) -> None:
        if not self.cache:
            return
        layers: list[int] = host.cache_layers  # type: ignore[attr-defined]
        shares = [torch.tensor(record["shares"][str(layer)], dtype=torch.float64) for layer in layers]

        def factory(prompt: int | None) -> FollowingCache:
            return FollowingCache(Core(self, shares, prompt), len(layers), prompt)

        use_cache(host, self.name, factory)


class Core:
    """A policy of `FollowingCache`: the core tokens of the prompt, then of every block that leaves the window.

    Args:
        shares: of each layer of the cache, [Hk, 1 + log2(block)].
        prompt: columns of the prompt; None takes the first forward as the prompt.
    """

    def __init__(self, method: TCA, shares: list[Tensor], prompt: int | None) -> None:
        self.method, self.shares, self.prompt = method, shares, prompt
        self.seen: dict[int, int] = {}  # columns seen when a layer was thinned out last

    def due(self, layer: int, seen: int) -> bool:
        last = self.seen.get(layer)
        if last is None or seen + self.method.block < last:  # a cache that was reset
            return seen >= (self.prompt or 0)
        return self._edge(seen) > self._edge(last)

    def _edge(self, seen: int) -> int:
        """The column before which tokens are thinned out."""
        return max(0, seen - self.method.window) // self.method.block * self.method.block

    def keep(self, layer: int, held: Any, query: Tensor | None) -> Tensor | None:
        method, last = self.method, self.seen.get(layer)
        self.seen[layer] = held.seen
        assert query is not None
        query, keys, columns = query[:, :, -method.probes :], held.keys, held.columns()
        if last is None or (held.kept is None and held.ragged is None):
            begin = None if held.padding is None else held.padding.to(keys.device)
            return tca(query, keys, self.shares[layer], method.block, method.window, held.scaling, begin)
        shown = held.shown()
        real = torch.ones(1, 1, held.length, dtype=torch.bool, device=keys.device) if shown is None else shown
        s = last_attention(query, keys, held.scaling, real).sum((2, 3))
        keep = (columns < self._edge(last)) | (columns >= self._edge(held.seen))
        number = (self.shares[layer] @ sizes(method.block)).round().to(keys.device)
        for start in range(self._edge(last), self._edge(held.seen), method.block):
            inside = (columns >= start) & (columns < start + method.block) & real
            rank = s.masked_fill(~inside, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            keep |= inside & (rank < number[None, :, None])
        return keep


METHOD = TCA
