"""REST: drafts are looked up in a store of text, by the longest end of the row's text that occurs in it.

With the text x_1..x_t, n going down from `match` to `least`, the first n whose x_{t-n+1..t} occurs in the store gives
matches; what follows each of them, at most k tokens, goes into a trie. A node weighs as many matches as pass it; the N
heaviest nodes, a tree, are checked by the target in one pass. A suffix array finds all matches of
one n by two binary searches; as a shorter end occurs wherever a longer one does, n is searched by halving too.

Shapes: store [S] token ids, -1 between texts; returns the nodes as (path, weight), at most N.

Departures: texts in the store are kept apart, and nothing is copied across their ends. Of more matches than `matches`
an even spread over the sorted ones is taken (the official code takes the first in order, which favours small ids); ties
of weight go to the shorter path. Without a match nothing is drafted (there: one arbitrary token). The rows of a batch
share one tree (the paper has one row): each row ranks its siblings by weight, and the union of the rows' trees by rank
is cut to the N places of the greatest share of matches, with filling where a row has no such node. Attention that takes
no tree mask gets the heaviest path.
"""

import bisect
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._proposals import Proposal, Proposer
from hasten.decode._rows import Tree
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="REST: Retrieval-Based Speculative Decoding",
    paper="2311.08252",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="1.62x to 2.36x over plain decoding on HumanEval and MT-Bench, CodeLlama and Vicuna 7B and 13B, "
    "one row, one A6000",
    claimed=2.36,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate, calibrate=4096)", "decode/rest(nodes=16, least=4)"),
    when="Text of the kind that will be written is at hand, such as a code base or past answers, and rows are few.",
    when_not="No such text, large batches, whose rows share one tree, or a machine on which checking `nodes` tokens "
    "costs much more than one.",
    needs=("calibration",),
    hosts=("decoder",),
)

Nodes = list[tuple[tuple[int, ...], int]]


def naive_rest(
    store: Sequence[int], text: list[int], match: int, least: int, matches: int, candidates: int, nodes: int
) -> Nodes:
    """Tries every length at every place of the store, and counts every continuation's beginnings.

    Args:
        store: token ids, -1 between texts; `text`: of one row.
        match, least: most and fewest tokens at the text's end that must occur.
        matches: most places that are followed; `candidates`: most tokens that are copied from one.
        nodes: most nodes that are kept.

    Returns:
        the nodes, heaviest first: the tokens from the root to it, and how many matches pass it.
    """
    flat = [int(token) for token in store]
    for n in range(min(match, len(text)), least - 1, -1):
        end = text[len(text) - n :]
        starts = [i for i in range(len(flat)) if flat[i : i + n] == end]
        if not starts:
            continue
        starts.sort(key=lambda i: [token % 2**32 for token in flat[i : i + match + candidates]])
        number = min(matches, len(starts))
        weights: dict[tuple[int, ...], int] = {}
        for pick in range(number):
            path: tuple[int, ...] = ()
            for token in flat[starts[pick * len(starts) // number] + n :][:candidates]:
                if token < 0:
                    break
                path = (*path, token)
                weights[path] = weights.get(path, 0) + 1
        return sorted(weights.items(), key=lambda one: (-one[1], len(one[0]), one[0]))[:nodes]
    return []


def rest(
    store: Sequence[int], text: list[int], match: int, least: int, matches: int, candidates: int, nodes: int
) -> Nodes:
    """As `naive_rest`, with a suffix array and a trie that is built level by level."""
    return Store.of(np.asarray(store, dtype=np.int32), match + candidates).find(
        text, match, least, matches, candidates, nodes
    )


def suffix_order(tokens: np.ndarray, depth: int) -> np.ndarray:
    """The places of a text sorted by the `depth` tokens from each on, at least, then by place; int32 [S]."""
    size, length = len(tokens), 1
    rank = np.unique(tokens.view(np.uint32), return_inverse=True)[1].astype(np.int64)
    while length < min(depth, size):
        following = np.zeros(size, dtype=np.int64)
        following[: size - length] = rank[length:] + 1
        pairs = rank * (size + 1) + following
        order = np.argsort(pairs, kind="stable")
        steps = np.diff(pairs[order], prepend=pairs[order[:1]]) != 0
        rank[order] = steps.cumsum()
        length *= 2
    return np.argsort(rank, kind="stable").astype(np.int32)


class Store(nn.Module):
    """Texts with their suffix array, in buffers that are saved with the model; sizes come with the state dict."""

    def __init__(self, tokens: torch.Tensor, order: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.register_buffer("order", order)
        self._seen: tuple[bytes, np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, tokens: np.ndarray, depth: int) -> "Store":
        if len(tokens) and tokens[-1] >= 0:
            tokens = np.append(tokens, np.int32(-1))
        return cls(torch.from_numpy(tokens.copy()), torch.from_numpy(suffix_order(tokens, depth)))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, held in list(self.named_buffers()):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name], device=held.device))
        self._seen = None
        super()._load_from_state_dict(state, prefix, *args)

    def _views(self) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Tokens as big-endian bytes, which compare as the tokens do, and both buffers on the host."""
        if self._seen is None:
            tokens, order = (held.cpu().numpy() for _, held in self.named_buffers())
            self._seen = (tokens.astype(">u4").tobytes(), tokens, order)
        return self._seen

    def _span(self, end: list[int]) -> tuple[int, int]:
        """Where in the suffix array the places are at which these tokens occur."""
        whole, _, order = self._views()
        wanted, width = np.asarray(end, dtype=">u4").tobytes(), 4 * len(end)

        def key(place: np.int32) -> bytes:
            return whole[4 * int(place) : 4 * int(place) + width]

        first = bisect.bisect_left(order, wanted, key=key)  # type: ignore[call-overload]
        return first, bisect.bisect_right(order, wanted, lo=first, key=key)  # type: ignore[call-overload]

    def find(self, text: list[int], match: int, least: int, matches: int, candidates: int, nodes: int) -> Nodes:
        low, high, found = least, min(match, len(text)), None
        while low <= high:  # a shorter end occurs wherever a longer one does
            middle = least if found is None else (low + high) // 2
            first, last = self._span(text[len(text) - middle :])
            if first < last:
                found, low = (middle, first, last), middle + 1
            else:
                high = middle - 1
        if found is None:
            return []
        length, first, last = found
        number = min(matches, last - first)
        _, tokens, order = self._views()
        starts = order[first + np.arange(number) * (last - first) // number].astype(np.int64) + length
        places = np.minimum(starts[:, None] + np.arange(candidates), len(tokens) - 1)
        return _heaviest(tokens[places], nodes)


def _heaviest(copies: np.ndarray, nodes: int) -> Nodes:
    """The heaviest nodes of the trie of these continuations [M, k], each of which ends before its first -1."""
    rows, at, made = np.arange(len(copies)), np.zeros(len(copies), dtype=np.int64), 1  # 0 is the root
    weights, tokens, parents = [], [], []
    for column in copies.astype(np.int64).T:
        rows = rows[column[rows] >= 0]
        pairs, place, number = np.unique(at[rows] << 32 | column[rows], return_inverse=True, return_counts=True)
        weights.append(number)
        tokens.append(pairs & 0xFFFFFFFF)
        parents.append(pairs >> 32)
        at[rows] = made + place
        made += len(pairs)
    weight, token, parent = (np.concatenate(part) for part in (weights, tokens, parents))
    paths: dict[int, tuple[int, ...]] = {0: ()}
    heaviest = []
    for node in np.argsort(-weight, kind="stable")[:nodes].tolist():  # a parent is as heavy, and made before
        paths[node + 1] = (*paths[int(parent[node])], int(token[node]))
        heaviest.append((paths[node + 1], int(weight[node])))
    return heaviest


def joined(rows: list[Nodes], nodes: int) -> tuple[list[int], list[list[int]]]:
    """One tree for all rows.

    Args:
        rows: the nodes of each row, as `rest` gives them.

    Returns:
        the place of each node's parent, -1 for none, and each row's tokens at the places, 0 where it has no such node.
    """
    shares: dict[tuple[int, ...], float] = {}  # by the ranks among siblings from the root on
    found: list[dict[tuple[int, ...], int]] = []
    for tree in rows:
        ranks: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        children: dict[tuple[int, ...], int] = {}
        found.append({})
        whole = sum(weight for path, weight in tree if len(path) == 1)
        for path, weight in tree:
            rank = children[path[:-1]] = children.get(path[:-1], -1) + 1
            ranks[path] = (*ranks[path[:-1]], rank)
            found[-1][ranks[path]] = path[-1]
            shares[ranks[path]] = shares.get(ranks[path], 0.0) + weight / whole
    kept = sorted(shares, key=lambda rank: (-round(shares[rank], 9), len(rank), rank))[:nodes]
    place = {rank: i for i, rank in enumerate(kept)} | {(): -1}
    return [place[rank[:-1]] for rank in kept], [[row.get(rank, 0) for rank in kept] for row in found]


@dataclasses.dataclass(frozen=True)
class Rest(Drafting):
    """Drafts trees from a store of text: the calibration inputs, or a file."""

    match: int = option(16, "most tokens at the text's end that are looked up", least=1, most=256)
    least: int = option(2, "fewest tokens that must be found; below that nothing is drafted", least=1)
    matches: int = option(5000, "most places of the store that are followed", least=1)
    candidates: int = option(10, "tokens that are copied from one place, the depth of the tree", least=1, most=64)
    nodes: int = option(64, "most candidates of a tree", least=1, most=512)
    store: str = option("", "a file to look up in: .npy with integer ids, a text a row, else bytes, each a token")

    def problems(self) -> list[str]:
        return [f"least={self.least} is above match={self.match}"] if self.least > self.match else []

    @property
    def card(self) -> Any:
        return dataclasses.replace(CARD, needs=()) if self.store else CARD

    @property
    def longest(self) -> int:
        return min(self.candidates, self.nodes)

    @property
    def widest(self) -> int:
        return self.nodes

    def proposer(self, run: Any) -> "Retriever":
        return Retriever(run)

    def blank(self, host: Any, draft: Any) -> Store:
        return Store(*(torch.zeros(0, dtype=torch.int32, device=host.device) for _ in range(2)))

    def learn(self, host: Any, draft: Any, context: Context) -> Store:
        """Sorts the texts.

        Raises:
            UsageError: the store can't be read, holds no text, or tokens that the model does not have.
        """
        texts = read_store(self.store) if self.store else _texts(context.calibration or [])
        words = host.embedding.weight.shape[0]
        largest = max((int(text.max()) for text in texts if len(text)), default=-1)
        if not 0 <= largest < words or min(int(text.min()) for text in texts if len(text)) < 0:
            where = self.store or "the calibration data"
            what = f"the token {largest}" if largest >= 0 else "no tokens"
            raise UsageError(f"{self.name}: {where} holds {what}, and the model has the tokens 0 to {words - 1}")
        parted = [part for text in texts for part in (text.astype(np.int32), np.full(1, -1, np.int32))]
        context.note(self.name, store_texts=len(texts), store_tokens=sum(map(len, texts)))
        return Store.of(np.concatenate(parted), self.match + self.candidates).to(host.device)


def read_store(file: str) -> list[np.ndarray]:
    """The texts of a file, each a vector of token ids.

    Raises:
        UsageError: no such file, or an array that holds no integers in one or two dimensions.
    """
    try:
        if not file.endswith(".npy"):
            return [np.frombuffer(pathlib.Path(file).read_bytes(), dtype=np.uint8)]
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"the store {file} can't be read: {error}") from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise UsageError(f"the store {file} holds {array.dtype} {list(array.shape)}: give whole numbers, a text a row")
    return list(np.atleast_2d(array))


def _texts(batches: list[dict[str, Any]]) -> list[np.ndarray]:
    texts = []
    for batch in batches:
        ids = batch["input_ids"].cpu()
        real = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        texts += [row[on].numpy() for row, on in zip(ids, real, strict=True)]
    return texts


class Retriever(Proposer):
    """Looks the end of every row up in the store."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        method, real = run.method, run.real
        ends = run.ids[:, -method.match :]
        kept = torch.ones_like(ends, dtype=torch.bool) if real is None else real[:, -method.match :]
        self.ends = [row[on].tolist() for row, on in zip(ends, kept, strict=True)]

    def propose(self, most: int) -> Proposal:
        run = self.run
        method, store = run.method, run.spec.drafter.learnt
        rows: list[Nodes] = []
        for row in run.rows if most else ():
            text = (self.ends[row] + run.stops.new[row][-method.match :])[-method.match :]
            depth = min(most, method.candidates)
            rows.append(store.find(text, method.match, method.least, method.matches, depth, method.nodes))
            if not run.target.takes_4d:
                rows[-1] = _main_path(rows[-1])
        parents, tokens = joined(rows, method.nodes)
        if not parents:
            return self.none()
        device = run.ids.device
        if parents == list(range(-1, len(parents) - 1)):  # a chain needs no mask of its own
            return Proposal(torch.tensor(tokens, device=device), lengths=[len(found) for found in rows])
        return Proposal(torch.tensor(tokens, device=device), Tree(torch.tensor(parents, device=device)))


def _main_path(tree: Nodes) -> Nodes:
    kept: Nodes = []
    path: tuple[int, ...] = ()
    for node, weight in tree:
        if node[:-1] == path:
            path = node
            kept.append((node, weight))
    return kept


METHOD = Rest
