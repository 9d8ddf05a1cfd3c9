"""CAKE: cascading and adaptive key-value cache eviction with layer preferences (arXiv 2503.12491, section 4).

A layer whose attention is spread out (entropy H) and restless (variance V) gets more of the cache; inside a layer a
token stays whose attention from the last queries is high, or changes much.

    H = -sum A log A,  V = sum_k Var_q(A[q, k]),  P = H^(1/tau1) V^(1/tau2),  B_l = P_l / sum(P) B_total
    I[k] = pool(Mean_q A[q, k] + gamma Var_q A[q, k]), mean over the query heads that share a key

A [heads, queries, keys]: attention of the last S_w queries; the S_w last keys stay and are left out of H, V and I.

Departures: rows of a batch are judged one by one, the authors' code adds them up; what a layer can't use goes to the
others in proportion to P, not in equal parts; a budget below 2 S_w protects half of itself; prompts longer than the
budget by less than S_w are cut too. While decoding, the mean alone decides, as in the authors' code; they drop one
token at each step by one query (every=1), here `every` tokens together by their queries; keys stay in the text's order.
`heads` is no part of CAKE: it shares B_l between a layer's heads by I, as AdaKV (2407.11550) does.
"""

import dataclasses
import math

import torch
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.kv.base import Eviction

CARD = Card(
    title="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
    paper="2503.12491",
    seams=("cache.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="over 10x faster decoding at 128K tokens than the full cache with FlashAttention-2",
    claimed=10.0,
    identity={"keep": 1.0},
    experiment=("stdlib-lm(prompt=1536, new=256)", "kv/cake(keep=0.25)"),
    when="Long prompts whose cache fills memory or whose attention dominates decoding.",
    when_not="Short prompts; answers that need every word of the prompt.",
    hosts=("decoder",),
)


def naive_cake(
    weights: torch.Tensor, recent: torch.Tensor, lead: torch.Tensor, groups: int,
    kernel: int = 5, gamma: float = 200.0, tau1: float = 1.0, tau2: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Indicator and preference of one layer.

    Args:
        weights: [batch, heads, queries, keys], attention of the last queries.
        recent: int64 [batch], how many of the last keys are left out, and how many of the last queries count at most.
        lead: int64 [batch], how many of the first keys are padding.
        groups: query heads per key.

    Returns:
        I [batch, heads / groups, keys], 0 where a key is left out, and P [batch].
    """
    batch, heads, queries, keys = weights.shape
    indicator = torch.zeros(batch, heads // groups, keys)
    preference = torch.zeros(batch)
    for b in range(batch):
        r, n, first = int(recent[b]), min(int(recent[b]), queries), int(lead[b])
        entropy = variance = 0.0
        for h in range(heads):
            worth = [0.0] * keys
            for k in range(first, keys - r):
                column = [float(weights[b, h, q, k]) for q in range(queries - n, queries)]
                mean = sum(column) / n
                var = sum((a - mean) ** 2 for a in column) / (n - 1) if n > 1 else 0.0
                entropy -= sum(a * math.log(a + 1e-10) for a in column)
                variance += var
                worth[k] = mean + gamma * var
            for k in range(first, keys - r):
                near = [worth[i] for i in range(k - kernel // 2, k + kernel // 2 + 1) if 0 <= i < keys]
                indicator[b, h // groups, k] += sum(near) / kernel / groups
        preference[b] = max(entropy, 0.0) ** (1 / tau1) * variance ** (1 / tau2)
    return indicator, preference


def cake(
    weights: torch.Tensor, recent: torch.Tensor, lead: torch.Tensor, groups: int,
    kernel: int = 5, gamma: float = 200.0, tau1: float = 1.0, tau2: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`naive_cake` without loops."""
    batch, heads, queries, keys = weights.shape
    weights, recent, lead = weights.float(), recent.to(weights.device), lead.to(weights.device)
    chosen = left_in(keys, recent, lead)
    counts = torch.arange(queries, device=weights.device) >= queries - recent[:, None]  # [batch, queries]
    weights = weights * (chosen[:, None, None] & counts[:, None, :, None])
    number = recent.clamp(max=queries)[:, None, None]
    mean = weights.sum(dim=2) / number  # [batch, heads, keys]
    apart = ((weights - mean[:, :, None]) * counts[:, None, :, None]).square_().sum(dim=2)
    variance = apart / (number - 1).clamp(min=1)
    entropy = -torch.special.xlogy(weights, weights + 1e-10).sum(dim=(1, 2, 3))
    preference = entropy.clamp(min=0).double() ** (1 / tau1) * variance.sum(dim=(1, 2)).double() ** (1 / tau2)
    return pooled(mean + gamma * variance, chosen, groups, kernel), preference.float()


def cake_decoding(weights: torch.Tensor, recent: torch.Tensor, lead: torch.Tensor, groups: int, kernel: int = 5):
    """The indicator of `cake` with gamma = 0, where all queries count: [batch, heads / groups, keys]."""
    chosen = left_in(weights.shape[-1], recent.to(weights.device), lead.to(weights.device))
    return pooled(weights.mean(dim=2) * chosen[:, None], chosen, groups, kernel)


def left_in(keys: int, recent: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
    """Which keys are neither recent nor padding, bool [batch, keys]."""
    slots = torch.arange(keys, device=recent.device)
    return (slots >= lead[:, None]) & (slots < keys - recent[:, None])


def pooled(worth: torch.Tensor, chosen: torch.Tensor, groups: int, kernel: int) -> torch.Tensor:
    """[batch, heads, keys] averaged over neighbours and over the heads of a group, 0 at keys that are left out."""
    near = F.avg_pool1d(worth, kernel, stride=1, padding=kernel // 2)
    return near.unflatten(1, (-1, groups)).mean(dim=2) * chosen[:, None]


def naive_share(wants: torch.Tensor, total: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """B_l in proportion to P_l, no layer above `most`: [layers, batch]. What a full layer leaves is shared again."""
    layers, batch = wants.shape
    shares = torch.zeros(layers, batch, dtype=torch.float64)
    for b in range(batch):
        left, cap = float(total[b]), float(most[b])
        peak = float(wants[:, b].max())
        appetite = {n: max(float(wants[n, b]) / peak, 1e-6) if peak > 0 else 1.0 for n in range(layers)}
        while appetite:
            unit = left / sum(appetite.values())
            full = [n for n in appetite if unit * appetite[n] >= cap]
            if not full:
                for n in appetite:
                    shares[n, b] = unit * appetite[n]
                break
            for n in full:
                shares[n, b] = cap
                left -= cap
                del appetite[n]
    return shares


def share(wants: torch.Tensor, total: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """`naive_share` by sorting: the layers that are full are those with the largest P."""
    peak = wants.double().amax(dim=0)
    appetite = torch.where(peak > 0, wants.double() / peak.clamp(min=1e-300), 1.0).clamp(min=1e-6)
    ranked, order = appetite.sort(dim=0, descending=True)
    rest = ranked.flip(0).cumsum(0).flip(0)  # appetite of a layer and all smaller ones
    full_before = torch.arange(len(wants), dtype=torch.float64)[:, None] * most
    unit = (total - full_before) / rest
    full = (unit * ranked >= most).long().cumprod(dim=0).bool()
    number = full.sum(dim=0, keepdim=True)
    level = unit.gather(0, number.clamp(max=len(wants) - 1))
    shares = torch.where(full, most.double().expand_as(ranked), level * ranked)
    return torch.empty_like(shares).scatter_(0, order, shares)


@dataclasses.dataclass(frozen=True)
class CAKE(Eviction):
    tau1: float = option(1.0, "temperature of the entropy in a layer's preference", above=0)
    tau2: float = option(1.0, "temperature of the variance in a layer's preference", above=0)
    gamma: float = option(200.0, "weight of the variance in a token's indicator", least=0)
    kernel: int = option(5, "tokens over which the indicator is averaged, an odd number", least=1)

    def problems(self) -> list[str]:
        return [] if self.kernel % 2 else [f"kernel must be odd, so that it has a middle, not {self.kernel}"]

    def rate(self, weights, recent, lead, groups, decoding):
        if decoding:
            return cake_decoding(weights, recent, lead, groups, self.kernel), None
        return cake(weights, recent, lead, groups, self.kernel, self.gamma, self.tau1, self.tau2)

    def share(self, wants, total, most):
        return share(wants, total, most)


METHOD = CAKE
