"""Double Sparsity: a few channels of the keys tell which few tokens matter (arXiv 2408.07092, section 3).

Which channels C carry the scores is found once, on calibration text. Their part of every key is kept a second time,
side by side (the label cache); a step scores all tokens by it, and attends exactly to the best ones.

    C = TopK_c(mean |q_c k_c|),   s = q[C] L^T with L = K[:, C],   O = Attention(q, K[I], V[I]) with I = TopK(s)

Departures: channels and tokens are chosen for a key head, whose query heads share them (scores: the largest of the
group; the paper's models have one query head each, where it is the same). Labels have the keys' precision, not 4 bits.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.attention._reading import Chosen, Look, Reading, hide
from hasten.attention._reading_cache import ReadLayer, watched
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.kernels.top_rows import top_rows

CARD = Card(
    title="Post-Training Sparse Attention with Double Sparsity",
    paper="2408.07092",
    seams=("cache.read", "cache.keep"),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="14.1x faster attention and 1.9x faster decoding end to end (Llama-2-7B, 1/16 of tokens and channels)",
    claimed=1.9,
    identity={"keep": 1.0},
    needs=("calibration",),
    experiment=("stdlib-lm(prompt=3584, new=256, examples=12)", "attention/double_sparsity(keep=0.125, channels=0.5)"),
    when="Long contexts of which each step needs a small, changing part; heads of 64 channels and more.",
    when_not="Short contexts; small heads, of which a sixteenth is too few channels; memory that is full already.",
    hosts=("decoder",),
)


def naive_double_sparsity(query: Tensor, labels: Tensor, channels: Tensor, begin: Tensor, budget: int) -> Tensor:
    """The tokens with the best scores in the labels.

    Args:
        query: [batch, heads, dim]; channels: int64 [kv heads, c], the labels' channels.
        labels: [batch, kv heads, c, tokens], these channels of the keys.
        begin: int64 [batch], tokens of padding in front of each row.
        budget: tokens to read, at most `tokens`.

    Returns:
        int32 [batch, kv heads, budget], the best first; where a row has fewer tokens, its last one behind them.
    """
    batch, heads, _ = query.shape
    kv_heads, tokens = labels.shape[1], labels.shape[3]
    rows = torch.zeros(batch, kv_heads, budget, dtype=torch.int32)
    for b in range(batch):
        for g in range(kv_heads):
            worth = []
            for k in range(tokens):
                label = labels[b, g, :, k].float()
                group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
                worth.append(max(float(query[b, h].float()[channels[g]] @ label) for h in group))
            best = sorted(range(int(begin[b]), tokens), key=lambda k: -worth[k]) + [tokens - 1] * budget
            rows[b, g] = torch.tensor(best[:budget], dtype=torch.int32)
    return rows


def double_sparsity(query: Tensor, labels: Tensor, channels: Tensor, begin: Tensor | None, budget: int) -> Tensor:
    """`naive_double_sparsity` without loops; without padding `begin` may be None, and the order is any."""
    batch, heads, dim = query.shape
    kv_heads, number = channels.shape
    grouped = query.view(batch, kv_heads, heads // kv_heads, dim)
    few = grouped.gather(3, channels[None, :, None].expand(batch, -1, heads // kv_heads, number))
    scores = torch.matmul(few, labels).float().amax(dim=2)  # [batch, kv heads, tokens]
    if begin is None:
        return top_rows(scores, budget)
    best = hide(scores, begin).topk(budget, dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, labels.shape[3] - 1).int()


@dataclasses.dataclass(frozen=True)
class DoubleSparsity(Reading):
    keep: float = option(1 / 16, "fraction of the tokens that a step reads; 1 reads everything", above=0, most=1)
    budget: int | None = option(None, "tokens that a step reads; replaces keep", least=1)
    channels: float = option(1 / 16, "fraction of a key's channels in the label cache", above=0, most=1)
    by: str = option("qk", "whose size ranks the channels: of queries, keys or products", choices=("q", "k", "qk"))
    full: int = option(2, "first layers, which read everything, as in the authors' code", least=0)

    @property
    def idle(self) -> bool:
        return self.keep == 1 and self.budget is None

    def calibrate(self, host: Host, context: Context) -> dict[str, Any]:
        """Ranks every layer's channels by their mean size over the calibration text, and keeps the largest."""
        sizes: dict[int, Tensor] = {}

        def see(layer: int, query: Tensor, key: Tensor, real: Tensor) -> None:
            new, groups = query.shape[2], query.shape[1] // key.shape[1]
            key = key[:, :, -new:].float()
            query = query.float().unflatten(1, (-1, groups))  # [batch, kv heads, groups, new, dim]
            size = {"q": query, "k": key[:, :, None], "qk": query * key[:, :, None]}[self.by].abs().mean(dim=2)
            total = (size * real[:, None, :, None]).sum(dim=(0, 2))
            sizes[layer] = sizes.get(layer, 0) + total.cpu()

        watched(host, context.calibration or [], see)
        number = {layer: max(1, round(self.channels * size.shape[-1])) for layer, size in sizes.items()}
        best = {layer: size.topk(number[layer], dim=-1).indices.sort(dim=-1).values for layer, size in sizes.items()}
        return {"channels": [best[layer].tolist() for layer in sorted(best)]}

    def store(self, held: ReadLayer, keys: Tensor, record: dict[str, Any], index: int) -> None:
        if index < self.full:
            return
        if held.labels is None:
            held.channels = torch.tensor(record["channels"][index], device=keys.device)
        batch, kv_heads, new, _ = keys.shape
        which = held.channels[None, :, None].expand(batch, -1, new, -1)
        held.label(keys.gather(3, which).transpose(2, 3))

    def select(self, look: Look) -> Chosen | None:
        held = look.held
        if look.index < self.full or held.labels is None:
            return None
        budget = self.budget or max(1, round(self.keep * look.columns))
        if budget >= look.columns:
            return None
        labels = held.labels.narrow(3, 0, look.columns)
        rows = double_sparsity(look.query[:, :, 0], labels, held.channels, look.begin, budget)
        counts = None
        if look.begin is not None:
            real = look.columns - look.begin  # a row reads its own share, as if it were alone
            own = (self.keep * real).round().clamp(min=1) if self.budget is None else real.clamp(max=budget)
            counts = own.int()[:, None].expand(-1, rows.shape[1])
        return Chosen(rows, counts, cost=labels.shape[2] / look.query.shape[3] / 2)


METHOD = DoubleSparsity
