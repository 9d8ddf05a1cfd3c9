"""The whole cache: storage that grows in chunks, with the state of a reading method beside it.

State follows its tokens: `crop` takes back what the tokens pushed that it removes, beams reorder it with the rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call, hand_over, is_causal, take_over
from hasten.hosts.base import Host
from hasten.hosts.kept import KeptLayer

LOOP = 16
"""New tokens of one forward that are attended to one by one; more go through one masked attention."""
HISTORY = 64
"""Tokens that can be taken back with exactly the state that was before them."""


class Tally:
    """Mean fraction that decoding steps have read, kept up to date in a report."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report, self._sum, self._number, self._first = report, 0.0, 0, 0

    def add(self, layer: int, part: float) -> None:
        self._sum += part
        self._number += 1
        self._first += layer == 0
        self.report["read"] = self._sum / self._number
        self.report["steps"] = self._first


class ReadLayer(KeptLayer):
    """Keys and values of one layer, none ever evicted, and what a method remembers of it.

    Attributes:
        labels: [batch, kv heads, c, room], a copy of some channels of the keys, or None.
        channels: which, int64 [kv heads, c].
        states: (column, tensors [batch, ...]) in the order of their columns.
    """

    def _clear(self) -> None:
        super()._clear()
        self.labels: Tensor | None = None
        self.channels: Any = None
        self.states: list[tuple[int, tuple[Tensor, ...]]] = []

    def push(self, column: int, tensors: tuple[Tensor, ...]) -> None:
        """Remembers tensors of a column; older ones go once no token that may be taken back needs them."""
        self.states.append((column, tensors))
        while len(self.states) > 1 and self.states[1][0] < column - HISTORY:
            self.states.pop(0)

    def label(self, new: Tensor) -> None:
        """Stores the labels [batch, kv heads, c, new] of the last columns."""
        room, start = self._keys.shape[2], self.length - new.shape[3]
        if self.labels is None or self.labels.shape[3] < self.length:
            wider = new.new_empty(*new.shape[:3], room)
            if self.labels is not None:
                wider.narrow(3, 0, start).copy_(self.labels.narrow(3, 0, start))
            self.labels = wider
        self.labels.narrow(3, start, new.shape[3]).copy_(new)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        while self.states and self.states[-1][0] >= self.seen:
            self.states.pop()

    def _rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        super()._rows(pick)
        self.states = [(column, tuple(pick(one) for one in tensors)) for column, tensors in self.states]
        if self.labels is not None:
            self.labels = pick(self.labels)


class WholeCache(Cache):
    """A transformers cache that keeps everything and is shown each layer's attention.

    Args:
        prompt: columns of the prompt where it comes in several forwards; None takes the first forward as the prompt.
    """

    layers: list[ReadLayer]  # type: ignore[assignment]

    def __init__(self, prompt: int | None = None) -> None:
        super().__init__(layers=[])
        self.prompt = prompt
        self.begin: Tensor | None = None
        self.plain = True

    @property
    def nbytes(self) -> int:
        """Bytes held by keys, values and labels."""
        labels = sum(layer.labels.nbytes for layer in self.layers if layer.labels is not None)
        return sum(layer.nbytes for layer in self.layers) + labels

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0].seen if self.layers else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def stored(self, index: int, keys: Tensor) -> bool:
        """Called with a layer's new keys; returns whether its attention is to be shown."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(ReadLayer())
        layer = self.layers[layer_idx]
        if layer.unseen:
            raise UsageError(
                "this model's attention can't be observed, because it changes the keys that the cache returns: "
                "leave methods out that choose what is read of the cache"
            )
        keys, values = layer.update(key_states, value_states)
        if not self.stored(layer_idx, key_states):
            return keys, values
        layer.unseen = True
        return hand_over(keys, self, layer_idx), values

    def mask(self, layer: int, query: Tensor, given: Tensor | None) -> Tensor | None:
        return given

    def observe(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float,
    ) -> None:  # fmt: skip
        self.layers[layer].unseen = False

    def opened(self, layer: int, call: Call) -> bool:
        """Notes that a layer was shown; reads `begin` off the mask: padding before each row, int64 [batch] or None.

        Returns:
            Whether the mask is that and causal order, and nothing else: a tree of drafts, padding at a row's end and
            holes inside a row are not, and such a forward stays dense.
        """
        held = self.layers[layer]
        held.unseen = False
        if self.prompt is None:
            self.prompt = held.seen
        if layer == 0:  # one mask for all layers of a forward
            self.begin, self.plain = None, call.mask is None or is_causal(call.mask)
            if call.mask is not None and self.plain:
                sees = call.mask[:, 0, -1]
                sees = (sees if sees.dtype == torch.bool else sees > -1).expand(call.query.shape[0], -1)
                self.plain = not bool((sees[:, :-1] & ~sees[:, 1:]).any())
                self.begin = sees.to(torch.uint8).argmax(dim=-1)
        return self.plain

    def reset(self) -> None:
        super().reset()
        self.prompt, self.begin = None, None


def taken(store: Tensor, rows: Tensor, sets: int) -> Tensor:
    """Rows of a view [batch, kv heads, columns, dim] for each of `sets` groups of heads, [batch, sets, M, dim]."""
    batch, kv_heads, _, dim = store.shape
    if store.stride(3) != 1 or store.stride(2) != dim or store.stride(1) % dim or store.stride(0) % dim:
        store = store.contiguous()
    apart, heads = store.stride(0) // dim, store.stride(1) // dim
    flat = store.as_strided(((batch - 1) * apart + (kv_heads - 1) * heads + store.shape[2], dim), (dim, 1))
    of = torch.arange(sets, device=rows.device) // (sets // kv_heads) * heads
    base = torch.arange(batch, device=rows.device)[:, None] * apart + of
    return flat.index_select(0, (rows + base[..., None]).view(-1)).view(batch, sets, -1, dim)


class _Watcher(WholeCache):
    """Shows each layer's queries and keys of a forward."""

    def __init__(self, see: Callable[[int, Tensor, Tensor, Tensor], None], real: Tensor) -> None:
        super().__init__()
        self.see, self.real = see, real

    def stored(self, index: int, keys: Tensor) -> bool:
        return True

    def observe(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float,
    ) -> None:  # fmt: skip
        super().observe(layer, module, query, key, value, mask, scaling)
        self.see(layer, query, key, self.real)


@torch.no_grad()
def watched(host: Host, batches: Iterable[dict[str, Any]], see: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
    """Runs batches and hands over what each layer's attention is given.

    Args:
        see: called as `see(layer, query [batch, heads, tokens, dim], key [batch, kv heads, tokens, dim], real)`, with
            positions applied; real: bool [batch, tokens], no padding.

    Raises:
        UsageError: as `hosts.attention.take_over`.
    """
    mark, training = len(host.changes), host.model.training
    try:
        take_over(host)
        host.model.eval()
        for batch in batches:
            ids, given = batch["input_ids"], batch.get("attention_mask")
            real = (torch.ones_like(ids) if given is None else given).bool().to(host.device)
            wanted = {name: value for name, value in batch.items() if name != "labels"}
            host.forward(wanted | {"past_key_values": _Watcher(see, real), "use_cache": True})
    finally:
        host.model.train(training)
        host.changes.undo(mark)
