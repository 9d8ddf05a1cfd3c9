"""One layer's keys and values in storage of its own size: grows in chunks, shrinks for real, remembers positions.

A slot is a place in the storage, a column a place in the (padded) text. Slots are in the order of their columns. A row
that keeps fewer tokens than its neighbours, or is padded, has hidden slots in front, as many for each of its heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hasten.core.errors import UsageError
from hasten.hosts.attention import is_causal

CHUNK = 64


def room_for(length: int) -> int:
    """Slots to allocate so that `length` and some more fit: one copy per chunk of new tokens."""
    return length + max(CHUNK, length // 16)


class KeptLayer(CacheLayerMixin):
    """Keys and values of one layer, [batch, kv heads, slots, dim].

    Attributes:
        length: slots in use; seen: columns so far; tail: slots at the end that hold the last columns, none missing.
        lead: hidden slots in front of each row, int64 [batch] on the CPU, or None where nothing is hidden.
        visible: the same as a mask, bool [batch, room].
        kept: columns of the slots that the last eviction left, int64 [batch, kv heads, slots], or None before any.
        queries: the latest queries, each [batch, heads, some, dim], joined only when an eviction needs them.
        scores: of the slots in use, kept while later layers may still push them out.
        counts: tokens that each row may keep; recent: how many of them are its last ones; int64 [batch] on the CPU.
        limit: the length at which eviction is due.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.length = self.seen = self.tail = 0
        self.lead: torch.Tensor | None = None
        self.visible: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.queries: list[torch.Tensor] = []
        self.scores: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.limit: int | None = None
        self.scaling = 1.0
        self.settled = self.unseen = False
        self._keys: Any = None  # a tensor once there is something to store
        self._values: Any = None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._keys is None else self._keys.narrow(2, 0, self.length)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self._values is None else self._values.narrow(2, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, unused slots included."""
        stores = (self._keys, self._values)
        return sum(store.untyped_storage().nbytes() for store in stores if store is not None)

    @property
    def batch_size(self) -> int:
        return -1 if self._keys is None else self._keys.shape[0]

    def columns(self) -> torch.Tensor:
        """The column of each slot in use, int64 [batch, kv heads, slots]; without meaning for hidden slots."""
        batch, heads = self._keys.shape[:2]
        appended = self.length - (0 if self.kept is None else self.kept.shape[2])
        last = torch.arange(self.seen - appended, self.seen, device=self._keys.device).expand(batch, heads, appended)
        return last if self.kept is None else torch.cat([self.kept, last], dim=-1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._keys = key_states.new_empty(*key_states.shape[:2], key_states.shape[2], key_states.shape[3])
        self._values = value_states.new_empty(*value_states.shape[:2], key_states.shape[2], value_states.shape[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, kv heads, new, dim] and returns all that is stored, as views."""
        if self._keys is None:
            self.lazy_initialization(key_states, value_states)
        new, start = key_states.shape[2], self.length
        length = start + new
        if length > self._keys.shape[2]:
            self._keys, self._values = self._grown(self._keys, length), self._grown(self._values, length)
            self._show()
        keys, values = self._keys.narrow(2, 0, length), self._values.narrow(2, 0, length)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        self.length = length
        self.seen += new
        self.tail += new
        return keys, values

    def _grown(self, store: torch.Tensor, length: int) -> torch.Tensor:
        wider = store.new_empty(*store.shape[:2], room_for(length), store.shape[3])
        wider.narrow(2, 0, self.length).copy_(store.narrow(2, 0, self.length))
        return wider

    def _show(self) -> None:
        if self.lead is None or not self.lead.any():
            self.visible = None
        else:
            slots = torch.arange(self._keys.shape[2], device=self._keys.device)
            self.visible = slots >= self.lead.to(self._keys.device)[:, None]

    def hide(self, lead: torch.Tensor | None) -> None:
        """Hides the first slots of each row, int64 [batch] on the CPU."""
        self.lead = lead
        self._show()

    def real(self) -> torch.Tensor:
        """Slots of each row that hold a token, int64 [batch] on the CPU."""
        full = torch.full((self.batch_size,), self.length)
        return full if self.lead is None else full - self.lead

    def mask(self, query: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        """The mask over slots, [batch, 1 or heads, queries, slots], from the one over columns; None hides nothing."""
        if self.kept is None:
            return given
        batch, heads, new = query.shape[:3]
        old = self.length - new
        if given is not None and not is_causal(given):
            columns = self.columns().repeat_interleave(heads // self._keys.shape[1], dim=1)[:, :, None]
            given = given.expand(batch, heads, new, given.shape[-1])
            given = given.gather(-1, columns.expand(-1, -1, new, -1))
            if self.visible is None:
                return given
            hidden = ~self.visible[:, None, None, : self.length]
            return given.masked_fill(hidden, False if given.dtype == torch.bool else torch.finfo(given.dtype).min)
        shown = None if self.visible is None else self.visible[:, None, None, : self.length]
        if new == 1:
            return shown
        if given is None:
            among = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()
        else:
            among = given[..., -new:]
        before = among.new_ones(1, 1, 1, old) if shown is None else shown[..., :old]
        return torch.cat([before.expand(batch, 1, new, old), among.expand(batch, 1, new, new)], dim=-1)

    def remember(self, query: torch.Tensor, window: int) -> None:
        """Keeps the latest queries for a later eviction, and some before them in case tokens are taken back."""
        most = window + CHUNK
        self.queries.append(query if query.shape[2] <= most else query[:, :, -most:].clone())
        if len(self.queries) > 2 * most:
            self.queries = [self.latest(most).clone()]

    def latest(self, window: int) -> torch.Tensor:
        """The last `window` remembered queries, or as many as there are, [batch, heads, window, dim]."""
        return torch.cat(self.queries, dim=2)[:, :, -window:]

    def evict(self, scores: torch.Tensor, counts: torch.Tensor, tail: int, spare: int = 0) -> None:
        """Keeps the best slots of each row and frees the rest.

        Args:
            scores: [batch, kv heads, slots]: +inf is kept in any case, -inf never in preference to a token.
            counts: slots to keep in each row, int64 [batch] on the CPU.
            tail: how many of the last slots are among them in any case.
            spare: unused slots that may stay allocated; with 0 the storage holds exactly what is kept.
        """
        counts = torch.minimum(counts, self.real())
        keep = int(counts.max())
        if keep == self.length and torch.equal(counts, self.real()):
            return
        uneven = int(counts.min()) < keep
        slots = scores.topk(keep, dim=-1, sorted=uneven).indices
        if uneven:
            rank = torch.arange(keep, device=slots.device)
            slots = slots.masked_fill(rank >= counts.to(slots.device)[:, None, None], -1)
        slots = slots.sort(dim=-1).values.clamp_(min=0)
        self.kept = self.columns().gather(2, slots)
        if self.scores is not None:
            self.scores = scores.gather(2, slots)
            if uneven:
                hidden = rank < (keep - counts).to(slots.device)[:, None, None]
                self.scores = self.scores.masked_fill(hidden, -torch.inf)
        self._keys, self._values = self._chosen(self._keys, slots, spare), self._chosen(self._values, slots, spare)
        self.length, self.tail = keep, min(tail, self.tail)
        self.lead = keep - counts if uneven else None
        self._show()

    def _chosen(self, store: torch.Tensor, slots: torch.Tensor, spare: int) -> torch.Tensor:
        batch, heads, room, dim = store.shape
        row = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * room
        flat = store.view(-1, dim).index_select(0, (slots + row).view(-1)).view(batch, heads, -1, dim)
        if room > flat.shape[2] + spare:
            return flat
        store.narrow(2, 0, flat.shape[2]).copy_(flat)
        return store

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens.

        Raises:
            UsageError: it is positive, or reaches back over tokens of which some were evicted.
        """
        if tokens_to_remove > 0:
            raise UsageError("crop takes a negative number of tokens to remove, not the length that should be left")
        count = -tokens_to_remove
        if count == 0 or self._keys is None:
            return
        if count > self.tail:
            raise UsageError(
                f"the last {count} tokens can't be taken back: only the last {self.tail} are all still stored; "
                "keep more, or draft fewer tokens at a time"
            )
        self.length -= count
        self.seen -= count
        self.tail -= count
        if self.kept is not None and self.length < self.kept.shape[2]:
            self.kept = self.kept[:, :, : self.length]
        while count and self.queries:
            last = self.queries.pop()
            left = max(last.shape[2] - count, 0)
            count -= last.shape[2] - left
            if left:
                self.queries.append(last[:, :, :left])

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        raise UsageError("a cache that evicts stays on the model's device: leave offloading out")

    def _rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.queries = [pick(one) for one in self.queries]
        for name in ("_keys", "_values", "visible", "kept", "scores", "lead", "counts", "recent"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, pick(held))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda held: held[indices.to(held.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda held: held.repeat_interleave(repeats, dim=0))
