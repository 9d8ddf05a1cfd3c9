"""Contexts that are read once: their keys and values are stored, and put together for each request.

A request is a shared prefix, some contexts (retrieved passages, examples) and a question. A method of this kind has one
verb, `compose`: from a request's contexts to a cache with which the question goes on as if all had just been read.

    handle.generate(question, contexts=[ids, ids, ...], prefix=ids, max_new_tokens=20)   # the question and what follows
    cache = handle.host.read([ids, ids, ...], prefix=ids)                                # the same in two steps
    handle.generate(question, past_key_values=cache, max_new_tokens=20)
    handle.host.shelf.nbytes                                                             # what is stored; .clear()

Contexts are 1-D token ids without padding; a list of lists gives each row of the batch its own. Questions of different
lengths are padded on the left and have an attention mask, as for transformers. What is stored belongs to the weights:
after training, `handle.host.shelf.clear()`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.attention import Call, hand_over, take_over
from hasten.hosts.base import Host
from hasten.hosts.caching import check_caching
from hasten.hosts.context import Context

MEGABYTE = 2**20
Request = tuple[Tensor, list[Tensor]]
"""A prefix and contexts, int64 [tokens] each; the prefix may be empty."""


@dataclasses.dataclass(eq=False)
class Entry:
    """Keys and values of one piece of text.

    Attributes:
        ids: its tokens, int64 [tokens].
        keys, values: [layers, kv heads, tokens, dim].
        start: position of the first token.
        facts: what the method knows of it.
        worth: tokens that its uses so far saved the model; rank: its place in the store.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    start: int
    facts: Any = None
    worth: float = 0.0
    rank: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Store:
    """Entries by name within a number of bytes; the ones that were worth least per byte leave first.

    An entry's rank is its worth per byte on top of the rank of what left last when it was used, so that what is used no
    more goes in the end, whatever it was worth (the rule of GreedyDual caches).

    Attributes:
        limit: bytes; nbytes: those in use; evicted: entries that had to leave.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.evicted = 0
        self._held: dict[Any, Entry] = {}
        self._age = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: Any) -> bool:
        return name in self._held

    def get(self, name: Any) -> Entry | None:
        return self._held.get(name)

    def put(self, name: Any, entry: Entry) -> None:
        """Keeps an entry, in the place of one of the same name; one that is larger than the whole store is not kept."""
        self.drop(name)
        if entry.nbytes > self.limit:
            return
        while self.nbytes + entry.nbytes > self.limit:
            last = min(self._held, key=lambda held: self._held[held].rank)
            self._age = self._held[last].rank
            self.drop(last)
            self.evicted += 1
        entry.rank = self._age
        self._held[name] = entry
        self.nbytes += entry.nbytes

    def used(self, entry: Entry, worth: float) -> None:
        """Adds what one use of an entry was worth."""
        entry.worth += worth
        entry.rank = self._age + entry.worth / entry.nbytes

    def drop(self, name: Any) -> None:
        gone = self._held.pop(name, None)
        if gone is not None:
            self.nbytes -= gone.nbytes

    def clear(self) -> None:
        self._held.clear()
        self.nbytes, self._age = 0, 0.0


class ComposedCache(DynamicCache):
    """A transformers cache that holds contexts, each row padded on the left.

    Attributes:
        text: the tokens of the cache's columns, int64 [batch, columns]; mask: which of them are real, the same shape.
    """

    text: Tensor
    mask: Tensor


class Shelf:
    """What the executor gives a method: the store, and forwards of the model.

    Attributes:
        host, store: of the model.
        read, reused, fixed: tokens of contexts so far that went through the model because they were new; that were
            taken from the store; how many of these went through the model again.
    """

    def __init__(self, host: Host, limit: int) -> None:
        self.host, self.store = host, Store(limit)
        self.read = self.reused = self.fixed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in store."""
        return self.store.nbytes

    def clear(self) -> None:
        """Forgets all contexts."""
        self.store.clear()
        self.read = self.reused = self.fixed = 0

    @torch.no_grad()
    def forward(self, ids: Tensor, places: Tensor, cache: Cache, mask: Tensor | None = None) -> None:
        """Runs token ids [batch, tokens] at positions of the same shape, for what they leave in the cache.

        Args:
            mask: bool [batch, 1, tokens, columns], or None for a causal one behind what the cache holds.
        """
        given: dict[str, Any] = {"input_ids": ids, "position_ids": places, "past_key_values": cache, "use_cache": True}
        if mask is not None:
            given["attention_mask"] = mask
        self.host.forward({**given, "logits_to_keep": 1})

    def encode(self, texts: Sequence[Tensor], past: Entry | None, rows: int = 8) -> list[Entry]:
        """Keys and values of texts [tokens], each read alone behind the same past, several in one forward.

        Args:
            rows: texts in one forward; those of like length go together.
        """
        start = 0 if past is None else past.start + len(past.ids)
        made: list[Entry | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for begin in range(0, len(order), rows):
            batch = order[begin : begin + rows]
            longest = max(len(texts[i]) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64, device=self.host.device)
            for row, i in enumerate(batch):
                ids[row, : len(texts[i])] = texts[i]  # what pads a row comes after all of it, so that nothing sees it
            cache = DynamicCache()
            if past is not None:
                fill(cache, past.keys[:, None].expand(-1, len(batch), -1, -1, -1),
                     past.values[:, None].expand(-1, len(batch), -1, -1, -1))  # fmt: skip
            self.forward(ids, torch.arange(start, start + longest, device=ids.device).expand(len(batch), -1), cache)
            held = [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
            keys, values = ([getattr(layer, name)[:, :, start:] for layer in held] for name in ("keys", "values"))
            for row, i in enumerate(batch):
                size = len(texts[i])
                made[i] = Entry(
                    texts[i],
                    torch.stack([one[row, :, :size] for one in keys]),
                    torch.stack([one[row, :, :size] for one in values]),
                    start,
                )
        return [one for one in made if one is not None]


@dataclasses.dataclass(frozen=True)
class ContextReuse(Method):
    """Base of methods that store contexts."""

    store: float = option(1024.0, "megabytes of keys and values that are stored between requests", above=0)

    def prepare(self, host: Host) -> Any:
        """Checks the model and returns what `compose` needs to know of it; changes nothing."""

    def compose(self, shelf: Shelf, known: Any, requests: list[Request]) -> Cache | None:
        """A cache that holds the contexts of each request, with `text` and `mask`; None to read all of it anew.

        Args:
            known: what `prepare` returned.
        """
        raise NotImplementedError


def fill(cache: DynamicCache, keys: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Puts keys and values, one [batch, kv heads, tokens, dim] a layer, into an empty cache without copying them."""
    for key, value in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)


def columns(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts [tokens] as rows padded on the left: ids and mask, int64 [batch, columns]."""
    width = max(len(text) for text in texts)
    ids = texts[0].new_zeros(len(texts), width)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = text
        mask[row, width - len(text) :] = 1
    return ids, mask


def _ids(given: Any, what: str, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(given)
    if tensor.ndim == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 1 or (tensor.is_floating_point() and tensor.numel()):
        raise UsageError(f"{what} is token ids of shape [tokens], not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.to(device=device, dtype=torch.int64)


def as_requests(contexts: Any, prefix: Any, rows: int | None, device: torch.device) -> list[Request]:
    """One request for each row; contexts that are given once are shared by all rows.

    Raises:
        UsageError: no contexts, an empty one, ids of a wrong shape, or not one list of contexts for each row.
    """
    shared = torch.zeros(0, dtype=torch.int64, device=device) if prefix is None else _ids(prefix, "the prefix", device)
    if isinstance(contexts, Tensor | str) or not isinstance(contexts, Sequence) or not len(contexts):
        raise UsageError("contexts is a list of token ids, one for each context: contexts=[ids, ids, ...]")
    first = contexts[0]
    own = isinstance(first, Sequence) and len(first) > 0 and isinstance(first[0], Tensor | Sequence)
    lists = list(contexts) if own else [contexts] * (rows or 1)
    if rows is not None and len(lists) != rows:
        raise UsageError(f"there are {rows} questions and {len(lists)} lists of contexts: give one list for each")
    requests = []
    for one in lists:
        texts = [_ids(text, "a context", device) for text in one]
        if not texts or any(len(text) == 0 for text in texts):
            raise UsageError("a request needs at least one context, and none may be empty")
        requests.append((shared, texts))
    return requests


def install(method: ContextReuse, host: Host, context: Context) -> dict[str, Any]:
    """Gives a decoder a store of contexts: `generate(contexts=..., prefix=...)`, `host.read` and `host.shelf`.

    Raises:
        UsageError: no transformers decoder, one whose layers see only a part of the text, an attention that can't be
            observed, or what the method refuses.
    """
    check_caching(host, method.name)
    known = method.prepare(host)
    take_over(host)
    _check_seen(host, method.name)
    shelf = Shelf(host, int(method.store * MEGABYTE))

    def compose(requests: list[Request]) -> Any:
        training = host.model.training
        host.model.eval()
        try:
            with torch.no_grad():
                cache = method.compose(shelf, known, requests)
        finally:
            host.model.train(training)
        tokens = {"tokens_read": shelf.read, "tokens_reused": shelf.reused, "tokens_recomputed": shelf.fixed}
        context.note(method.name, stored_bytes=shelf.nbytes, evicted=shelf.store.evicted, **tokens)
        return cache

    def read(contexts: Any, prefix: Any = None) -> Any:
        """A cache that holds a prefix and contexts; see `hasten.kv._contexts`."""
        requests = as_requests(contexts, prefix, None, host.device)
        cache = compose(requests)
        return cache if cache is not None else _whole(shelf, requests)

    def generate(inner: Callable[..., Any], *args: Any, contexts: Any = None, prefix: Any = None, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        if contexts is None and prefix is not None:
            raise UsageError("a prefix goes with contexts: pass contexts=[...] too, or put it before the prompt")
        if contexts is None and not hasattr(cache, "text"):
            return inner(*args, **kwargs)
        if contexts is not None and cache is not None:
            raise UsageError("give contexts or a cache that holds some (past_key_values), not both")
        question = args[0] if args else kwargs.pop("inputs", None)
        question = kwargs.pop("input_ids", None) if question is None else question
        if question is None or question.ndim != 2 or not question.shape[1]:
            raise UsageError("contexts go with a question: generate(ids of shape [batch, tokens], contexts=[...])")
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(question) if mask is None else mask
        if contexts is not None:
            requests = as_requests(contexts, prefix, len(question), question.device)
            cache = compose(requests)
            text, shown = columns([torch.cat([shared, *texts]) for shared, texts in requests]) if cache is None else (
                cache.text, cache.mask)  # fmt: skip
        else:
            text, shown = cache.text, cache.mask
        copies = len(question) * _copies(host, kwargs) // len(text)
        if cache is not None and copies > 1:
            cache.batch_repeat_interleave(copies)
        text, shown = (one.repeat_interleave(len(question) // len(one), 0) for one in (text, shown))
        ids = torch.cat([text, question], 1)
        # what is cached is cut off by its number of columns, so that all of them are handed over
        out = inner(input_ids=ids, attention_mask=torch.cat([shown, mask], 1), **{**kwargs, "past_key_values": cache})
        if isinstance(out, Tensor):
            return out[:, text.shape[1] :]
        out.sequences = out.sequences[:, text.shape[1] :]
        return out

    host.changes.set(host, "shelf", shelf)
    host.changes.set(host, "read", read)
    host.wrap_generate(generate)  # type: ignore[attr-defined]
    return {}


class _Seen(DynamicCache):
    """Learns whether attention shows itself to a cache."""

    seen = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return hand_over(keys, self, layer_idx), values  # type: ignore[arg-type]

    def attend(self, layer: int, call: Call) -> None:
        self.seen = True

    def mask(self, layer: int, query: Tensor, given: Tensor | None) -> Tensor | None:
        return given

    def observe(self, *given: Any) -> None:
        """The output is as it is."""


def _check_seen(host: Host, name: str) -> None:
    cache, training = _Seen(), host.model.training
    host.model.eval()
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.int64)
            host.forward({"input_ids": ids, "past_key_values": cache, "use_cache": True})
    finally:
        host.model.train(training)
    if not cache.seen:
        model = type(host.model).__name__
        raise UsageError(f"{name} can't see the attention of {model}: it changes the keys that a cache returns")


def _copies(host: Host, kwargs: dict[str, Any]) -> int:
    """Rows that generate makes of one: beams, or samples."""
    settings: Any = kwargs.get("generation_config") or host.model.generation_config
    found = [kwargs.get(name, getattr(settings, name, 1)) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(found)


def _whole(shelf: Shelf, requests: list[Request]) -> ComposedCache:
    """A cache from one forward over each whole text, padded on the left."""
    ids, mask = columns([torch.cat([shared, *texts]) for shared, texts in requests])
    cache = ComposedCache()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    shelf.host.forward({"input_ids": ids, "position_ids": places, "attention_mask": mask, "past_key_values": cache,
                        "use_cache": True, "logits_to_keep": 1})  # fmt: skip
    cache.text, cache.mask = ids, mask
    return cache
