"""Reading: the whole cache is kept, and a decoding step reads a few of its keys and values.

A method says which (`Reading.select`), for one query of one layer. Its state lives with the cache: `Look.push`
remembers tensors of a layer until they are taken back by `crop`, `Look.shared` is shared by the layers of one forward.
The prompt stays dense unless the method covers it (`Reading.prefill`). Tokens that come after the prompt are decoding
steps, however many come in one forward: a chunk of drafted or scored tokens sees what it would have seen one by one.
Forwards whose rows have holes (drafting for several rows at once) or another mask than causal order stay dense.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.attention._reading_cache import LOOP, ReadLayer, Tally, WholeCache, taken
from hasten.core.options import Method
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.caching import use_cache
from hasten.hosts.context import Context
from hasten.kernels.gather_attention import gather_attention


@dataclasses.dataclass
class Chosen:
    """What one query reads.

    Attributes:
        rows: int32 [batch, 1 or kv heads or heads, M], columns of the cache, each once.
        counts: int32 like `rows` without M: how many of the first are valid; None for all.
        weights: float32 [batch, heads, columns], where the query's whole attention was computed on the way; `rows` is
            not needed then.
        cost: fraction of the layer's cache that the choice itself has read (keys are one half of it).
        part: fraction that is read then, where the length of `rows` overstates it.
    """

    rows: Tensor | None = None
    counts: Tensor | None = None
    weights: Tensor | None = None
    cost: float = 0.0
    part: float | None = None


@dataclasses.dataclass
class Look:
    """One query of one layer and what it may look at.

    Attributes:
        query: [batch, heads, 1, dim], or for `prefill` [batch, heads, chunk, dim], the last columns' own.
        keys, values: [batch, kv heads, columns, dim], views of the cache up to and including the query's own column.
        begin: int64 [batch], columns of padding in front of each row, or None.
        index, depth: the layer's place among the layers with attention, and their number.
        prompt: columns of the prompt; scaling: the factor on the scores.
        held: the layer's storage; shared: a dict for all layers of this forward, for this query alone.
        record: what `calibrate` found.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    begin: Tensor | None
    index: int
    depth: int
    prompt: int
    scaling: float
    held: ReadLayer
    shared: dict[str, Any]
    record: dict[str, Any]

    @property
    def columns(self) -> int:
        return self.keys.shape[2]

    @property
    def state(self) -> tuple[int, tuple[Tensor, ...]] | None:
        """(column of the query that pushed it, its tensors): the last `push` of this layer that still holds."""
        return self.held.states[-1] if self.held.states else None

    def push(self, *tensors: Tensor) -> None:
        """Remembers tensors [batch, ...] for later queries of this layer."""
        self.held.push(self.columns - 1, tensors)

    def scores(self, scaling: float | None = None) -> Tensor:
        """Scaled scores of the (last) query, float32 [batch, heads, columns]; -inf at padding."""
        batch, heads, _, dim = self.query.shape
        kv_heads = self.keys.shape[1]
        query = self.query[:, :, -1].reshape(batch, kv_heads, heads // kv_heads, dim)
        query = query * (self.scaling if scaling is None else scaling)
        found = torch.matmul(query, self.keys.transpose(2, 3)).float().view(batch, heads, -1)
        return found if self.begin is None else hide(found, self.begin)

    def weights(self) -> Tensor:
        """The query's attention to all columns, float32 [batch, heads, columns]."""
        return self.scores().softmax(dim=-1)

    def causal(self, rows: Tensor | None, counts: Tensor | None) -> Tensor:
        """Attention of a chunk of queries to some columns (None: all), each to those up to its own.

        Args:
            rows: int32 [batch, 1 or kv heads, M]; counts: like it without M.

        Returns:
            [batch, heads, chunk, dim].
        """
        new, device = self.query.shape[2], self.query.device
        own = torch.arange(self.columns - new, self.columns, device=device)[:, None]
        if rows is None:
            key, value = self.keys, self.values
            rows = torch.arange(self.columns, device=device)[None, None]
        else:
            key, value = (taken(store, rows, self.keys.shape[1]) for store in (self.keys, self.values))
        sees = rows[:, :, None] <= own  # [batch or 1, 1 or kv heads, chunk, M]
        if counts is not None:
            sees = sees & (torch.arange(rows.shape[-1], device=device) < counts[..., None])[:, :, None]
        if self.begin is not None:
            sees = sees & (rows >= self.begin[:, None, None])[:, :, None]
        heads = self.query.shape[1]
        if sees.shape[1] > 1:
            sees = sees.repeat_interleave(heads // sees.shape[1], dim=1)
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, key, value, attn_mask=sees, scale=self.scaling, enable_gqa=heads != key.shape[1]
        )


def hide(scores: Tensor, begin: Tensor) -> Tensor:
    """Scores [batch, some, columns] with -inf before each row's `begin`."""
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((columns < begin[:, None])[:, None], -torch.inf)


@dataclasses.dataclass(frozen=True)
class Reading(Method):
    """Base of methods that choose what a decoding step reads of a whole cache."""

    def select(self, look: Look) -> Chosen | None:
        """What this query reads; None for all of it."""
        raise NotImplementedError

    def prefill(self, look: Look) -> Tensor | None:
        """Attention of a prompt's queries, [batch, heads, chunk, dim]; None for dense."""
        return None

    def store(self, held: ReadLayer, keys: Tensor, record: dict[str, Any], index: int) -> None:
        """Called with a layer's new keys [batch, kv heads, new, dim] once they are stored, the last of `held.keys`."""

    def calibrate(self, host: Host, context: Context) -> dict[str, Any]:
        """A decision per model, JSON-able, given back as `Look.record`."""
        return {}

    @property
    def idle(self) -> bool:
        """Whether everything is read always."""
        return False


class ReadingCache(WholeCache):
    """A transformers cache of which decoding steps read what a method chooses."""

    def __init__(
        self, method: Reading, num_layers: int, prompt: int | None, record: dict[str, Any], tally: Tally
    ) -> None:
        super().__init__(prompt)
        self.method, self.num_layers, self.record, self.tally = method, num_layers, record, tally
        self._shared: dict[int, dict[str, Any]] = {}

    def stored(self, index: int, keys: Tensor) -> bool:
        if self.method.idle:
            return False
        self.method.store(self.layers[index], keys, self.record, index)
        return True

    def attend(self, layer: int, call: Call) -> Tensor | None:
        """Attention of a layer's new tokens, [batch, heads, new, dim], or None for dense."""
        plain, begin = self.opened(layer, call), self.begin
        if layer == 0:
            self._shared = {}
        held, new = self.layers[layer], call.query.shape[2]
        prompt, start = int(self.prompt or 0), held.length - new
        if not plain:
            self.tally.add(layer, 1.0)
            return None
        if start < prompt:
            return self.method.prefill(self._look(layer, call, begin, held.length, call.query, {}))
        looks, choices = [], []
        for i in range(new):
            query = call.query if new == 1 else call.query[:, :, i : i + 1]
            shared = self._shared.setdefault(start + i, {})
            looks.append(self._look(layer, call, begin, start + i + 1, query, shared))
            choices.append(self.method.select(looks[-1]))
            self.tally.add(layer, part_read(choices[-1], looks[-1]))
        if all(choice is None for choice in choices):
            return None
        if new > LOOP:
            return masked(call, choices, begin)
        outs = [mixed(look, choice) for look, choice in zip(looks, choices, strict=True)]
        return outs[0] if new == 1 else torch.cat(outs, dim=2)

    def _look(
        self, layer: int, call: Call, begin: Tensor | None, columns: int, query: Tensor, shared: dict[str, Any]
    ) -> Look:
        held = self.layers[layer]
        keys, values = call.key, call.value
        if columns < keys.shape[2]:
            keys, values = keys.narrow(2, 0, columns), values.narrow(2, 0, columns)
        prompt = int(self.prompt or 0)
        return Look(query, keys, values, begin, layer, self.num_layers, prompt, call.scaling, held, shared, self.record)


def part_read(choice: Chosen | None, look: Look) -> float:
    """Fraction of a layer's keys and values that one query reads."""
    if choice is None or choice.weights is not None or choice.rows is None:
        return 1.0
    part = choice.rows.shape[-1] / look.columns if choice.part is None else choice.part
    return min(1.0, choice.cost + part)


def mixed(look: Look, choice: Chosen | None) -> Tensor:
    """Attention of one query to what was chosen, [batch, heads, 1, dim]."""
    if choice is not None and choice.weights is None and choice.rows is not None:
        return gather_attention(look.query, look.keys, look.values, choice.rows, choice.counts, scaling=look.scaling)
    weights = look.weights() if choice is None or choice.weights is None else choice.weights
    batch, heads, columns = weights.shape
    kv_heads = look.values.shape[1]
    grouped = weights.to(look.values.dtype).view(batch, kv_heads, heads // kv_heads, columns)
    return torch.matmul(grouped, look.values).view(batch, heads, 1, -1)


def masked(call: Call, choices: list[Chosen | None], begin: Tensor | None) -> Tensor:
    """The same for many queries at once: as each reads other columns, together they read nearly all."""
    batch, heads, new, _ = call.query.shape
    columns = call.key.shape[2]
    some = [choice.rows.shape[1] for choice in choices if choice is not None and choice.rows is not None]
    width = max(some, default=1)
    sees = torch.ones(batch, width, new, columns + 1, dtype=torch.bool, device=call.query.device)
    for i, choice in enumerate(choices):
        if choice is None or choice.rows is None or choice.weights is not None:
            continue
        rows = choice.rows.long()
        if choice.counts is not None:
            place = torch.arange(rows.shape[-1], device=rows.device)
            rows = rows.masked_fill(place >= choice.counts[..., None], columns)
        line = torch.zeros(batch, rows.shape[1], columns + 1, dtype=torch.bool, device=rows.device)
        line.scatter_(-1, rows.expand(batch, -1, -1), True)
        sees[:, :, i] = line.repeat_interleave(width // rows.shape[1], dim=1)
    sees = sees[..., :columns].tril(columns - new)
    if begin is not None:
        sees &= (torch.arange(columns, device=sees.device) >= begin[:, None])[:, None, None]
    if width > 1:
        sees = sees.repeat_interleave(heads // width, dim=1)
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=sees, scale=call.scaling, enable_gqa=heads != call.key.shape[1]
    )


def install(method: Reading, host: Host, context: Context) -> dict[str, Any]:
    """Gives a decoder whole caches that are read in parts, in `generate` and from `host.new_cache()`.

    Reports `read`: the mean fraction of keys and values that a layer reads per decoding step, what the choice reads
    included; and `steps`.

    Raises:
        UsageError: no transformers decoder, one whose layers see only a part of the text, an attention that can't be
            observed, or calibration data that does not fit.
    """
    record = {} if method.idle else method.calibrate(host, context)
    _put(method, host, record, Tally(context.report.setdefault(method.name, {})))
    return record


def restore(method: Reading, host: Host, record: dict[str, Any]) -> None:
    """The same change from its record; the weights are untouched by it."""
    _put(method, host, record, Tally({}))


def _put(method: Reading, host: Host, record: dict[str, Any], tally: Tally) -> None:
    def factory(prompt: int | None) -> ReadingCache:
        return ReadingCache(method, len(host.cache_layers), prompt, record, tally)  # type: ignore[attr-defined]

    use_cache(host, method.name, factory)
