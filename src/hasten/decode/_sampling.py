"""Distributions and the acceptance rule, shared by every method that drafts.

Letters: B rows, K candidates, V vocabulary; p is the target's distribution, q the draft's.
"""

from typing import Any

import torch
from torch import Tensor


def accept(p_BKV: Tensor, q_BKV: Tensor, drafts_BK: Tensor, u_BK: Tensor, e_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): x stays where u < p(x) / q(x), up to the first refusal.

    The token after the accepted ones is drawn from norm(max(p - q, 0)) at a refusal, from p after the last candidate;
    drawing is an exponential race, argmax of weight / e, which needs no normaliser and no host synchronisation.

    Args:
        p_BKV: [B, K + 1, V]; `q_BKV`: [B, K, V]; `drafts_BK`: [B, K].
        u_BK: uniform on [0, 1); `e_BV`: exponential with rate 1.

    Returns:
        tokens [B, K + 1], of which the first `accepted + 1` count, and accepted [B].
    """
    rows, most = drafts_BK.shape
    if most == 0:
        return (p_BKV[:, 0] / e_BV).argmax(-1, keepdim=True), drafts_BK.new_zeros(rows)
    index = drafts_BK[..., None]
    stays = u_BK * q_BKV.gather(2, index)[..., 0] < p_BKV[:, :most].gather(2, index)[..., 0]
    accepted = stays.long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, p_BKV.shape[-1])
    p_BV = p_BKV.gather(1, at)[:, 0]
    q_BV = q_BKV.gather(1, at.clamp(max=most - 1))[:, 0]
    rest = torch.where((accepted < most)[:, None], (p_BV - q_BV).clamp_(min=0), p_BV)
    # p equal to q up to rounding leaves nothing over, and is refused with a probability of the order of rounding
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_BV)
    last = (rest / e_BV).argmax(-1)
    tokens = torch.cat([drafts_BK, last[:, None]], 1)
    return tokens.scatter(1, accepted[:, None], last[:, None]), accepted


def accept_greedy(choice_BK: Tensor, drafts_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates that are the target's own choices, up to the first that is not.

    Args:
        choice_BK: the target's greedy tokens, [B, K + 1]; `drafts_BK`: [B, K].

    Returns:
        as `accept`.
    """
    same = choice_BK[:, :-1] == drafts_BK
    return choice_BK, same.long().cumprod(1).sum(1)


def accept_tree(choice_BN: Tensor, drafts_BN: Tensor, tree: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The path of candidates that are the target's own choices.

    The target chooses a token after the last token and after every candidate; from the root on, a candidate that is the
    choice made where it stands is accepted. With choices drawn from p at each place the tokens have p's law, whatever
    the candidates are, as a draw does not depend on them.

    Args:
        choice_BN: [B, N + 1], the first made at the root; `drafts_BN`: [B, N], siblings being different tokens.
        tree: who follows whom (`_rows.Tree`).

    Returns:
        tokens [B, D + 1], accepted [B] and path [B, D] with D the tree's depth: of the path the first `accepted` count,
        of the tokens one more.
    """
    rows, device = len(drafts_BN), drafts_BN.device
    at = torch.zeros(rows, dtype=torch.long, device=device)  # 0 the root, n + 1 candidate n
    going = torch.ones(rows, dtype=torch.bool, device=device)
    accepted = torch.zeros_like(at)
    wanted = choice_BN[:, 0]
    tokens, path = [wanted], []
    for level in tree.levels:
        fits = (tree.parents[level] + 1 == at[:, None]) & (drafts_BN[:, level] == wanted[:, None])
        place = fits.int().argmax(1)
        going = going & fits.any(1)
        at = torch.where(going, level[place] + 1, at)
        accepted = accepted + going
        wanted = choice_BN.gather(1, at[:, None])[:, 0]
        path.append((at - 1).clamp(min=0))
        tokens.append(wanted)
    return torch.stack(tokens, 1), accepted, torch.stack(path, 1) if path else at.new_empty(rows, 0)


def draw(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws an index along the last dimension with probability in proportion to `weight`."""
    return (weight / exponential(weight, generator)).argmax(-1)


def exponential(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator)
