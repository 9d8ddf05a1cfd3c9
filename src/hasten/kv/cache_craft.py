"""Cache-Craft: passages keep their keys and values; in a new place, the tokens that lean on other passages are redone.

While a passage C_i is read behind passages S_old, its attention a to them and to itself is summed up (section 3):
    inter(C_i, C_j) = sum_{k in C_i, l in C_j} a_kl,      intra(C_i) = sum_{k >= l in C_i} a_kl
    a = sum_j inter(C_i, C_j) / (|C_i| |C_j|),            b = intra(C_i) / |C_i|^2        means over layers and heads
    CCI  = 1 / (1 + e^(-a/b))                             how much it is made of its surroundings
    beta = sum_{j in S_old and S_new} inter / sum_{j in S_old} inter,    beta' = beta (1 - gamma)
    CFO  = min(1, alpha CCI (1 - beta'))                  the share of its tokens to redo behind S_new
gamma is the share of pairs of the common passages whose order differs (Kendall's tau distance). The CFO |C_i| tokens
with most attention to other passages go through all layers again, in one forward, at their new positions; the other
keys are turned there. Of the variants of a passage, read behind different S_old, the one of least CFO is taken.

Departures, the paper's text being known in part only: worth in the store is tokens saved (its score was not to be had);
no early end for passages that the question ignores; a passage that was read first of all has beta' = 0 elsewhere; one
tier, in the model's memory. What is read whole behind passages that were partly redone is stored as it came out.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.base import Host
from hasten.hosts.rotary import Rotary, rotary_of
from hasten.kv._contexts import ComposedCache, ContextReuse, Entry, Request, Shelf
from hasten.kv._leaning import Leaning
from hasten.kv._patch import Held, Patch, join

CARD = Card(
    title="Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation",
    paper="2502.15734",
    seams=("cache.keep",),
    effects=("time", "quality"),
    lossless=False,
    claim="1.6x throughput and half the latency of prefix caching with LLaMA-3 8B and 70B on a production workload, "
    "51% less computation than prefix caching, at 90% of the ROUGE F1 with 30% of tokens redone",
    claimed=1.6,
    identity={"recompute": 1.0},
    experiment=("stdlib-rag", "kv/cache_craft"),
    when="Passages come again and again before questions, in changing order, and lean on each other a little.",
    when_not="Text that is used once, passages of a few tokens, or prompts that share a long exact prefix anyway.",
    hosts=("decoder",),
)


SCORES = 2**25  # attention weights that are held at once while a passage is watched, in float32


def naive_cache_craft(
    weights: Tensor, bounds: Tensor, places: Tensor, before: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CCI, beta', CFO (scalars) and the tokens to redo, bool [n].

    Args:
        weights: attention of a passage's tokens over all up to its last, [layers, heads, n, N]; its own are the last n.
        bounds: begin and end of each passage of S_old among the N, int64 [J, 2].
        places: where each of them stands in S_new, -1 for nowhere, int64 [J].
        before: passages in S_new.
    """
    num_layers, heads, n, end = weights.shape
    w = weights.double()
    inter = torch.zeros(n, len(bounds), dtype=torch.float64)
    intra = torch.zeros(n, dtype=torch.float64)
    for k in range(n):
        for layer in range(num_layers):
            for head in range(heads):
                for j, (begin, stop) in enumerate(bounds.tolist()):
                    inter[k, j] += sum(w[layer, head, k, m] for m in range(begin, stop)) / (num_layers * heads)
                intra[k] += sum(w[layer, head, k, end - n + m] for m in range(k + 1)) / (num_layers * heads)
    a = sum((inter[:, j].sum() / (n * (bounds[j, 1] - bounds[j, 0])) for j in range(len(bounds))), torch.tensor(0.0))
    cci = 1 / (1 + torch.exp(-a / (intra.sum() / n**2)))
    kept = [j for j in range(len(bounds)) if places[j] >= 0]
    total = sum(float(inter[:, j].sum()) for j in range(len(bounds)))
    beta = sum(float(inter[:, j].sum()) for j in kept) / total if total else float(before == 0)
    pairs = [(i, j) for x, i in enumerate(kept) for j in kept[x + 1 :]]
    gamma = sum(float(places[i] > places[j]) for i, j in pairs) / len(pairs) if pairs else 0.0
    overlap = torch.tensor(beta * (1 - gamma), dtype=torch.float64)
    cfo = min(1.0, alpha * float(cci) * (1 - float(overlap)))
    ranked = sorted(range(n), key=lambda k: (-float(inter[k].sum()), k))[: math.ceil(cfo * n)]
    chosen = torch.tensor([k in ranked for k in range(n)])
    return cci, overlap, torch.tensor(cfo, dtype=torch.float64), chosen


def cache_craft(
    weights: Tensor, bounds: Tensor, places: Tensor, before: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from sums over layers and heads."""
    leaning = Leaning.of(bounds, weights.shape[2])
    for layer in weights:
        leaning.add(layer)
    cci, overlap, cfo = leaning.judge(places.tolist(), before, alpha)
    made = [torch.tensor(one, dtype=torch.float64) for one in (cci, overlap, cfo)]
    return made[0], made[1], made[2], leaning.choose(cfo)


@dataclasses.dataclass
class _Piece:
    """A stretch of a request's text: the entry it is taken from, and which of its tokens go through the model."""

    name: tuple[Any, ...]
    ids: Tensor
    start: int
    entry: Entry | None
    redo: Tensor  # bool [n]
    leaning: Leaning | None = None  # of a passage that is read whole


@dataclasses.dataclass(frozen=True)
class CacheCraft(ContextReuse):
    """Passages stored with what they leaned on, and partly redone in a new place."""

    alpha: float = option(1.0, "factor on the share of a passage's tokens that are redone", least=0)
    recompute: float | None = option(
        None, "one share for all passages in new company, in place of the estimate; 1 reuses nothing", least=0, most=1
    )
    renew: float = option(1.0, "a passage that needs this share redone is read whole, as a variant", above=0, most=1)
    variants: int = option(5, "variants stored of a passage, each read behind other passages", least=1, most=64)

    def prepare(self, host: Host) -> Rotary:
        return rotary_of(host, self.name)

    def compose(self, shelf: Shelf, known: Rotary, requests: list[Request]) -> ComposedCache | None:
        if self.recompute == 1:
            return None
        texts = [torch.cat([shared, *texts]) for shared, texts in requests]
        return join(texts, [self._one(shelf, known, *request) for request in requests])

    def _one(self, shelf: Shelf, rotary: Rotary, shared: Tensor, texts: list[Tensor]) -> list[list[Tensor]]:
        """Keys and values of one request, each [1, kv heads, tokens, dim] a layer."""
        pieces = self._plan(shelf, shared, texts)
        ids = torch.cat([piece.ids for piece in pieces])
        slots = torch.cat([piece.redo.nonzero()[:, 0] + piece.start for piece in pieces]).to(ids.device)
        known = []
        for piece in pieces:
            if piece.entry is not None:
                keys = rotary.move(piece.entry.keys, piece.start - piece.entry.start)
                known.append(Held(piece.start, keys, piece.entry.values))
        if not len(slots):
            keys, values = torch.cat([one.keys for one in known], 2), torch.cat([one.values for one in known], 2)
            return [list(keys[:, None]), list(values[:, None])]
        whole = len(slots) == len(ids)
        patch = Patch(len(ids), known, None if whole else slots, _watch(pieces, slots))
        shelf.forward(ids[slots][None], slots[None], patch, None if whole else Patch.sees(slots, len(ids)))
        for piece in pieces:
            if piece.entry is None:
                part = slice(piece.start, piece.start + len(piece.ids))
                keys, values = (torch.stack([one[0, :, part] for one in held]) for held in (patch.keys, patch.values))
                shelf.store.put(piece.name, Entry(piece.ids, keys, values, piece.start, piece.leaning))
        return [patch.keys, patch.values]

    def _plan(self, shelf: Shelf, shared: Tensor, texts: list[Tensor]) -> list[_Piece]:
        """Where each piece's keys and values come from."""
        head, pieces = _name(shared), []
        if len(shared):
            entry = shelf.store.get((head,))
            pieces.append(_Piece((head,), shared, 0, entry, torch.full((len(shared),), entry is None)))
        names: list[bytes] = []
        bounds: list[tuple[int, int]] = []
        for text in texts:
            name = _name(text)
            start = bounds[-1][1] if bounds else len(shared)
            stored = {(head, name, i): shelf.store.get((head, name, i)) for i in range(self.variants)}
            shares = {one: self._share(entry.facts, names) for one, entry in stored.items() if entry is not None}
            best = min(shares, key=shares.__getitem__, default=None)
            if best is not None and shares[best] < self.renew:
                entry = stored[best]
                assert entry is not None
                pieces.append(_Piece(best, text, start, entry, entry.facts.choose(shares[best])))
            else:
                ranks = {one: -1.0 if entry is None else entry.rank for one, entry in stored.items()}
                leaning = Leaning.of(list(bounds), len(text), list(names))
                whole = torch.ones(len(text), dtype=torch.bool)
                pieces.append(_Piece(min(ranks, key=ranks.__getitem__), text, start, None, whole, leaning))
            names.append(name)
            bounds.append((start, start + len(text)))
        for piece in pieces:
            redone = int(piece.redo.sum())
            shelf.read += redone if piece.entry is None else 0
            if piece.entry is not None:
                shelf.reused, shelf.fixed = shelf.reused + len(piece.ids), shelf.fixed + redone
                shelf.store.used(piece.entry, len(piece.ids) - redone)
        return pieces

    def _share(self, leaning: Leaning, names: list[bytes]) -> float:
        """How much of a stored passage is to be redone behind these."""
        if self.recompute is not None:
            return 0.0 if leaning.names == names else self.recompute
        places = [names.index(one) if one in names else -1 for one in leaning.names]
        return leaning.judge(places, len(names), self.alpha)[2]


def _watch(pieces: list[_Piece], slots: Tensor) -> Any:
    """What sums up, layer by layer, the attention of the passages that are read whole."""
    new = [(piece, piece.leaning, int((slots < piece.start).sum())) for piece in pieces if piece.leaning is not None]

    def see(layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        for piece, leaning, row in new:
            end, places = piece.start + len(piece.ids), torch.arange(piece.start + len(piece.ids), device=keys.device)
            size = max(1, SCORES // (len(query) * end))
            for first in range(0, len(piece.ids), size):
                own = query[:, row + first : row + min(first + size, len(piece.ids))]  # [heads, some, d]
                flat = own.unflatten(0, (len(keys), -1)).flatten(1, 2)  # [kv heads, groups some, d]
                scores = (
                    torch.matmul(flat, keys[:, :end].transpose(1, 2)).float().mul_(scaling).view(*own.shape[:2], end)
                )
                here = piece.start + first + torch.arange(own.shape[1], device=keys.device)
                leaning.add(scores.masked_fill_(places > here[:, None], -torch.inf).softmax(-1), first)

    return see


def _name(text: Tensor) -> bytes:
    return text.cpu().numpy().tobytes()


METHOD = CacheCraft
