"""Exact attention tile by tile: the softmax needs no second look at the scores, only a running maximum m and sum l.

    FlashAttention (arXiv 2205.14135, algorithm 1): after tile j of the keys, with its scores S_j,
        m' = max(m, max S_j),  l' = e^(m-m') l + sum e^(S_j-m'),  O' = (l e^(m-m') O + e^(S_j-m') V_j) / l'
    FlashAttention-2 (arXiv 2307.08691, algorithm 1) divides once, at the end: O' = e^(m-m') O + e^(S_j-m') V_j, O / l,
        and keeps L = m + log l alone.

Parts of one softmax over different keys are put together by their L, exactly. PyTorch's fused attention computes the
dense case; these are what block-sparse paths are held to.
"""

import torch
from torch import Tensor

from hasten.math.shapes import Float


def naive_flash(
    q: Float[Tensor, "nq d"], k: Float[Tensor, "nk d"], v: Float[Tensor, "nk e"], block_q: int, block_k: int,
    scaling: float, causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention's order: the keys' tiles outside, the queries' tiles inside, O always normalised.

    Returns:
        O [Nq, e] and L = m + log l [Nq].
    """
    nq, nk = len(q), len(k)
    o, total, m = torch.zeros(nq, v.shape[1]), torch.zeros(nq), torch.full((nq,), -torch.inf)
    for j in range(0, nk, block_k):
        for i in range(0, nq, block_q):
            rows = slice(i, min(i + block_q, nq))
            s = _scores(q, k, i, j, block_q, block_k, scaling, causal)
            m_new = torch.maximum(m[rows], s.amax(1))
            p = _exp(s - m_new[:, None])
            kept = _exp(m[rows] - m_new) * total[rows]
            new = kept + p.sum(1)
            o[rows] = (kept[:, None] * o[rows] + p @ v[j : j + block_k].float()) / new.clamp(min=1e-38)[:, None]
            total[rows], m[rows] = new, m_new
    return o, m + total.log()


def naive_flash2(
    q: Float[Tensor, "nq d"], k: Float[Tensor, "nk d"], v: Float[Tensor, "nk e"], block_q: int, block_k: int,
    scaling: float, causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention-2's order: the queries' tiles outside, O divided by l once."""
    outs, logs = [], []
    for i in range(0, len(q), block_q):
        rows = min(block_q, len(q) - i)
        o, total, m = torch.zeros(rows, v.shape[1]), torch.zeros(rows), torch.full((rows,), -torch.inf)
        for j in range(0, len(k), block_k):
            s = _scores(q, k, i, j, block_q, block_k, scaling, causal)
            m_new = torch.maximum(m, s.amax(1))
            p, shrink = _exp(s - m_new[:, None]), _exp(m - m_new)
            total, o = shrink * total + p.sum(1), shrink[:, None] * o + p @ v[j : j + block_k].float()
            m = m_new
        outs.append(o / total.clamp(min=1e-38)[:, None])
        logs.append(m + total.log())
    return torch.cat(outs), torch.cat(logs)


def _scores(q: Tensor, k: Tensor, i: int, j: int, block_q: int, block_k: int, scaling: float, causal: bool) -> Tensor:
    s = q[i : i + block_q].float() @ k[j : j + block_k].float().T * scaling
    if causal:
        at = torch.arange(i, i + len(s)) + len(k) - len(q)
        s = s.masked_fill(torch.arange(j, j + s.shape[1]) > at[:, None], -torch.inf)
    return s


def _exp(x: Tensor) -> Tensor:
    """e^x, where -inf - -inf (nothing seen yet) counts as nothing."""
    return x.exp().nan_to_num(0.0)


def merge(
    outs: list[Float[Tensor, "... n e"]], lses: list[Float[Tensor, "... n"]]
) -> tuple[Float[Tensor, "... n e"], Float[Tensor, "... n"]]:
    """Attention over the union of disjoint sets of keys, from the output and the log-sum-exp over each.

    Returns:
        the output in the first one's dtype, and its log-sum-exp in float32; 0 and -inf where no part sees a key.
    """
    logs = torch.stack([one.float() for one in lses])  # [parts, ..., n]
    total = logs.logsumexp(0)
    share = (logs - total.masked_fill(total == -torch.inf, 0.0)).exp()
    mixed = sum(part[..., None] * out.float() for part, out in zip(share, outs, strict=True))
    return mixed.to(outs[0].dtype), total  # type: ignore[union-attr]
