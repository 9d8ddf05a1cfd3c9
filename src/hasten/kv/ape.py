"""APE: contexts are read in parallel behind one shared prefix, and what attention makes of that is corrected.

Each context is read alone, at the positions that follow the prefix; the positions are used again for every context, so
that its keys and values can be stored and serve any request. A query then sees all contexts at once, which spreads its
attention too far. With q, the keys k_j and values v_j of the contexts C and of all else X (prefix, question, answer):

    L_C = log sum_{j in C} e^(q k_j / (T sqrt d)),   o_C = sum_{j in C} e^(q k_j / (T sqrt d) - L_C) v_j
    L_X = log sum_{j in X} e^(q k_j / sqrt d),       o_X = likewise
    o = (e^(S T L_C) o_C + e^(L_X) o_X) / (e^(S T L_C) + e^(L_X))

T < 1 sharpens, S < 1 takes weight from the contexts. The question follows at the position after the longest context.

Shapes: q [B, H, n, d]; contexts' keys [B or 1, Hk, C, d]; other keys [B, Hk, X, d], their last n are the queries' own.
Departures: the factor on L_C is S T, as in the authors' code; contexts that a batch shares are stored once.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.base import Host
from hasten.kv._contexts import ContextReuse, Entry, Request, Shelf
from hasten.kv._parallel import ParallelCache, part
from hasten.math.online_softmax import merge

CARD = Card(
    title="APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
    paper="2502.05431",
    seams=("cache.keep",),
    effects=("time", "quality"),
    lossless=False,
    claim="4.5x end to end with a context of 128K tokens (28x less prefill), 98% and 93% of the quality of sequential "
    "encoding on retrieval and in-context learning",
    claimed=4.5,
    identity="none bit for bit: with one context, T = 1 and S = 1 only the order of the sums is another, because "
    "prefix, context and question go through the model one after the other",
    experiment=(
        "stdlib-rag(model=long, kind=needle, passages=8, passage=480, pool=16, examples=64)",
        "kv/ape",
    ),
    when="The same passages or examples are put before many questions, in changing order and number.",
    when_not="Passages that need each other to be understood, text that is used once, or answers that need the order.",
    hosts=("decoder",),
)


def naive_ape(
    q: Tensor, context_keys: Tensor, context_values: Tensor, keys: Tensor, values: Tensor,
    shown: Tensor, among: Tensor, temperature: float, scale: float,
) -> Tensor:  # fmt: skip
    """One query at a time.

    Args:
        q: [B, H, n, d]; context_keys, context_values: [B or 1, Hk, C, d]; keys, values: [B, Hk, X, d].
        shown: bool [B or 1, C], which of the context's slots hold a token.
        among: bool [B, n, X], which other keys a query sees.

    Returns:
        float32 [B, H, n, d].
    """
    batch, heads, n, dim = q.shape
    out = torch.zeros(batch, heads, n, values.shape[-1])
    for b in range(batch):
        c = b % len(context_keys)
        for h in range(heads):
            g = h // (heads // keys.shape[1])
            for i in range(n):
                query = q[b, h, i].float() / dim**0.5
                a_context = (context_keys[c, g][shown[c]].float() @ query / temperature).exp()
                a_other = (keys[b, g][among[b, i]].float() @ query).exp()
                weight = a_context.sum() ** (scale * temperature)
                o_context = (a_context / a_context.sum()) @ context_values[c, g][shown[c]].float()
                o_other = a_other @ values[b, g][among[b, i]].float()
                out[b, h, i] = (weight * o_context + o_other) / (weight + a_other.sum())
    return out


def ape(
    q: Tensor, context_keys: Tensor, context_values: Tensor, keys: Tensor, values: Tensor,
    shown: Tensor | None, among: Tensor | None, temperature: float, scale: float, scaling: float | None = None,
) -> Tensor:  # fmt: skip
    """The two parts by matrix products, then their exact merge; None shows all. Output in the queries' dtype."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    seen = None if shown is None else shown[:, None]
    o_context, l_context = part(q, context_keys, context_values, scaling / temperature, seen)
    o_other, l_other = part(q, keys, values, scaling, among)
    return merge([o_context, o_other], [l_context * (scale * temperature), l_other])[0]


@dataclasses.dataclass(frozen=True)
class APE(ContextReuse):
    """Contexts read in parallel, with a temperature and a scale on the attention that they get."""

    temperature: float = option(0.9, "T, the temperature of attention to contexts", above=0, most=1)
    scale: float = option(0.9, "S, the factor on the log-sum-exp of attention to contexts", above=0, most=1)

    def prepare(self, host: Host) -> None:
        """APE keeps every key where it was read, so that any positions will do."""

    def compose(self, shelf: Shelf, known: Any, requests: list[Request]) -> ParallelCache:
        shared = requests[0][0]
        past = self._stored(shelf, shared, [shared], None)[0] if len(shared) else None
        wanted = {text.cpu().numpy().tobytes(): text for _, texts in requests for text in texts}
        entries = dict(zip(wanted, self._stored(shelf, shared, list(wanted.values()), past), strict=True))
        rows = [[entries[text.cpu().numpy().tobytes()] for text in texts] for _, texts in requests]
        return ParallelCache(past, rows, self._attend)

    def _stored(self, shelf: Shelf, shared: Tensor, texts: list[Tensor], past: Entry | None) -> list[Entry]:
        """Entries from the store; what is missing is read, all of it side by side."""
        names = [(shared.cpu().numpy().tobytes(), text.cpu().numpy().tobytes(), past is None) for text in texts]
        held = {name: entry for name in names if (entry := shelf.store.get(name)) is not None}
        new = [i for i, name in enumerate(names) if name not in held]
        shelf.read += sum(len(texts[i]) for i in new)
        shelf.reused += sum(len(entry.ids) for entry in held.values())
        for i, entry in zip(new, shelf.encode([texts[i] for i in new], past), strict=True):
            held[names[i]] = entry
            shelf.store.put(names[i], entry)
        for entry in held.values():
            shelf.store.used(entry, len(entry.ids))
        return [held[name] for name in names]

    def _attend(
        self, query: Tensor, context_keys: Tensor, context_values: Tensor, keys: Tensor, values: Tensor,
        shown: Tensor | None, among: Tensor | None, scaling: float,
    ) -> Tensor:  # fmt: skip
        temperature, scale = self.temperature, self.scale
        return ape(query, context_keys, context_values, keys, values, shown, among, temperature, scale, scaling)


METHOD = APE
