"""Trees of guesses: which nodes are worth checking, their tokens, and typical acceptance (arXiv 2401.10774).

A node is the path of ranks that leads to it: (0, 2) is the third guess of the second head after the first of the first.
Letters: B rows, N nodes, K heads, V vocabulary.
"""

import functools
import heapq

import torch
from torch import Tensor, nn

from hasten.decode._proposals import Verdict
from hasten.decode._rows import Tree

Choices = tuple[tuple[int, ...], ...]


def guesses(logits_KBV: Tensor, places_N: Tensor, ranks: int) -> Tensor:
    """Each node's token, [B, N]; `places_N` counts through the `ranks` likeliest tokens of each head."""
    best_KBR = logits_KBV.topk(ranks, -1).indices
    return best_KBR.transpose(0, 1).flatten(1)[:, places_N]


@functools.lru_cache(maxsize=64)
def planted(choices: Choices, device: torch.device) -> tuple[Tree, Tensor, int]:
    """Who follows whom, which guess each node is (head * ranks + rank), and how many ranks are needed."""
    place = {path: n for n, path in enumerate(choices)}
    ranks = 1 + max(path[-1] for path in choices)
    parents = [place[path[:-1]] if len(path) > 1 else -1 for path in choices]
    guess = [(len(path) - 1) * ranks + path[-1] for path in choices]
    return Tree(torch.tensor(parents, device=device)), torch.tensor(guess, device=device), ranks


def sparse_tree(accuracy: list[list[float]], nodes: int) -> Choices:
    """The paper's greedy tree: the neighbour of the largest product of accuracies joins, until there are `nodes`.

    Neighbours are the next guess after the same parent and the first guess after a node.

    Args:
        accuracy: how often the token of each rank of each head is right, [K][R].

    Returns:
        the nodes as paths of ranks, level after level; fewer where the heads have no more guesses.
    """
    frontier: list[tuple[float, int, tuple[int, ...], float]] = [(-accuracy[0][0], 1, (0,), 1.0)]
    chosen: list[tuple[int, ...]] = []
    while frontier and len(chosen) < nodes:
        value, depth, path, above = heapq.heappop(frontier)  # above: the parent's product
        chosen.append(path)
        rank = path[-1] + 1
        if rank < len(accuracy[depth - 1]):
            heapq.heappush(frontier, (-above * accuracy[depth - 1][rank], depth, (*path[:-1], rank), above))
        if depth < len(accuracy):
            heapq.heappush(frontier, (value * accuracy[depth][0], depth + 1, (*path, 0), -value))
    return tuple(sorted(chosen, key=lambda path: (len(path), path)))


def typical(scores: Tensor, tokens_BN: Tensor, tree: Tree, epsilon: float, delta: float) -> Verdict:
    """Typical acceptance (section 2.3.1): the longest path of candidates that are likely enough where they stand.

    Args:
        scores: the target's processed scores after the last token and after every candidate, [B, N + 1, V].
    """
    p = scores.softmax(-1)
    least_BN = (delta * torch.exp(-torch.special.entr(p).sum(-1))).clamp(max=epsilon)
    above = tree.parents + 1
    p_BN = p[:, above].gather(2, tokens_BN[..., None])[..., 0]
    stays, likely = p_BN > least_BN[:, above], p_BN.log()
    for level in tree.levels[1:]:
        stays[:, level] &= stays[:, tree.parents[level]]
        likely[:, level] += likely[:, tree.parents[level]]
    length = torch.where(stays, tree.depths + 1, 0)
    accepted = length.max(1).values
    node = torch.where(stays & (length == accepted[:, None]), likely, -torch.inf).argmax(1)
    path = (~tree.seen[node]).to(torch.int8).argsort(dim=1, stable=True)[:, : len(tree.levels)]
    own = scores[torch.arange(len(scores)), torch.where(accepted > 0, node + 1, 0)].argmax(-1, keepdim=True)
    tokens = nn.functional.pad(tokens_BN.gather(1, path), (0, 1)).scatter(1, accepted[:, None], own)
    return Verdict(tokens, accepted, path)
