"""How the heads of a layer share its budget: the best tokens of all heads together stay (AdaKV, arXiv 2407.11550).

    R + floor(f (B - R)) tokens of each head stay in any case; the rest of Hk B goes to the best of all heads

B is the budget of one head on average, R of them recent tokens, f the floor. A larger budget keeps all that a smaller
one keeps, so that layers can be cut step by step. Departure: AdaKV's authors mix the counts, (1 - f) of the free choice
plus f (B - R); here, as in kvpress, the floor is part of the choice.
"""

import torch


def naive_spread(scores: torch.Tensor, counts: torch.Tensor, recent: torch.Tensor, floor: float) -> torch.Tensor:
    """Tokens for each head, int64 [batch, kv heads].

    Args:
        scores: [batch, kv heads, slots]; -inf marks slots that hold nothing, +inf the recent ones.
        counts: tokens per head on average, int64 [batch]; recent: how many of them stay anyway, int64 [batch].
        floor: the fraction of the others that every head gets, if it has as many.
    """
    batch, heads, slots = scores.shape
    shares = torch.zeros(batch, heads, dtype=torch.int64)
    for b in range(batch):
        last = min(int(recent[b]), int(counts[b]))
        least, free = last + int(floor * (int(counts[b]) - last) + 1e-9), []
        for h in range(heads):
            ranked = sorted((float(one) for one in scores[b, h] if one > -torch.inf), reverse=True)
            shares[b, h] = min(least, len(ranked))
            free += [(score, h) for score in ranked[least:]]
        free.sort(key=lambda pair: -pair[0])
        for _, h in free[: int(counts[b]) * heads - int(shares[b].sum())]:
            shares[b, h] += 1
    return shares


def spread(scores: torch.Tensor, counts: torch.Tensor, recent: torch.Tensor, floor: float) -> torch.Tensor:
    """`naive_spread` by one sort and one top-k."""
    heads, slots = scores.shape[1:]
    most = min(int(counts.max()), slots) * heads
    ranked = scores.sort(dim=-1, descending=True).values
    real = ranked > -torch.inf
    device = scores.device
    recent = torch.minimum(recent, counts)
    least = (recent + (floor * (counts - recent).double() + 1e-9).long()).to(device)
    ranked.masked_fill_((torch.arange(slots, device=device) < least[:, None, None]) & real, torch.inf)
    best = ranked.flatten(1).topk(most, dim=-1)
    counted = torch.arange(most, device=device) < (counts * heads).to(device)[:, None]
    counted &= best.values > -torch.inf
    shares = counts.new_zeros(len(counts), heads, device=device)
    return shares.scatter_add_(1, best.indices // slots, counted.long()).cpu()
