"""One layer's keys and values in storage of its own size: grows in chunks, shrinks for real, remembers positions.

A slot is a place in the storage, a column a place in the (padded) text. Slots are in the order of their columns. A row
that keeps fewer tokens than its neighbours, or is padded, has hidden slots in front, as many for each of its heads.
Where heads, or rows on a CPU, keep different numbers of tokens the storage is `Ragged`; the layer then shows itself as
if each head had as many slots as the longest, with hidden ones in front, but these take no memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call
from hasten.hosts.ragged import Ragged, packed
from hasten.kernels.gather_attention import gather_attention, path

CHUNK = 64
LARGE = 1 << 17  # numbers in the keys from which the kernel pays in fp32: 4,096 tokens of 2 heads 0.11 ms, SDPA 0.28 ms


def room_for(length: int) -> int:
    """Slots to allocate so that `length` and some more fit: one copy per chunk of new tokens."""
    return length + max(CHUNK, length // 16)


class KeptLayer(CacheLayerMixin):
    """Keys and values of one layer, [batch, kv heads, slots, dim].

    Attributes:
        length: slots in use; seen: columns so far; tail: slots at the end that hold the last columns, none missing;
            cut: columns seen when tokens went last.
        lead: hidden slots in front, int64 on the CPU, of each row [batch], or with `ragged` of each head [batch, kv
            heads]; None where nothing is hidden.
        visible: the same as a mask, bool [batch, room]; None with `ragged`.
        ragged: the storage while heads keep different numbers of tokens, else None.
        padding: columns of padding in front of each row, int64 [batch] on the CPU, or None for none.
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
        self.length = self.seen = self.tail = self.cut = 0
        self.lead: torch.Tensor | None = None
        self.visible: torch.Tensor | None = None
        self.ragged: Ragged | None = None
        self.padding: torch.Tensor | None = None
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
        """[batch, kv heads, length, dim]: a view, or with `ragged` a copy."""
        if self.ragged is not None:
            return self.ragged.padded(self.ragged.keys)
        return None if self._keys is None else self._keys.narrow(2, 0, self.length)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        if self.ragged is not None:
            return self.ragged.padded(self.ragged.values)
        return None if self._values is None else self._values.narrow(2, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, unused slots included."""
        if self.ragged is not None:
            return self.ragged.nbytes
        stores = (self._keys, self._values)
        return sum(store.untyped_storage().nbytes() for store in stores if store is not None)

    @property
    def batch_size(self) -> int:
        return self.shape[0] if self.is_initialized else -1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and kv heads."""
        batch, heads = self._keys.shape[:2] if self.ragged is None else self.ragged.lengths.shape
        return batch, heads

    def columns(self) -> torch.Tensor:
        """The column of each slot in use, int64 [batch, kv heads, slots]; without meaning for hidden slots."""
        if self.ragged is not None:
            return self.ragged.text(self.seen)
        batch, heads = self.shape
        appended = self.length - (0 if self.kept is None else self.kept.shape[2])
        last = torch.arange(self.seen - appended, self.seen, device=self.device).expand(batch, heads, appended)
        return last if self.kept is None else torch.cat([self.kept, last], dim=-1)

    def positions(self) -> torch.Tensor:
        """The place in its own text of each slot in use, [batch, kv heads, slots]: its column without the padding."""
        columns = self.columns()
        return columns if self.padding is None else columns - self.padding.to(columns.device)[:, None, None]

    def shown(self) -> torch.Tensor | None:
        """Which slots in use hold a token, bool [batch, 1 or kv heads, slots]; None for all."""
        if self.ragged is None:
            return None if self.visible is None else self.visible[:, None, : self.length]
        return torch.arange(self.length, device=self.device) >= self.length - self.ragged.lengths[:, :, None]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._keys = key_states.new_empty(*key_states.shape[:2], key_states.shape[2], key_states.shape[3])
        self._values = value_states.new_empty(*value_states.shape[:2], key_states.shape[2], value_states.shape[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [batch, kv heads, new, dim]; returns views of all that is stored, or what is new with `ragged`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, start = key_states.shape[2], self.length
        length = start + new
        if self.ragged is not None:
            self.ragged.append(key_states, value_states, room_for(length) - length)
            self._passed(new)
            return key_states, value_states
        if length > self._keys.shape[2]:
            self._keys, self._values = self._grown(self._keys, length), self._grown(self._values, length)
            self._show()
        keys, values = self._keys.narrow(2, 0, length), self._values.narrow(2, 0, length)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        self._passed(new)
        return keys, values

    def _passed(self, new: int) -> None:
        self.length += new
        self.seen += new
        self.tail += new

    def _grown(self, store: torch.Tensor, length: int) -> torch.Tensor:
        wider = store.new_empty(*store.shape[:2], room_for(length), store.shape[3])
        wider.narrow(2, 0, self.length).copy_(store.narrow(2, 0, self.length))
        return wider

    def _show(self) -> None:
        if self.ragged is not None or self.lead is None or not self.lead.any():
            self.visible = None
        else:
            slots = torch.arange(self._keys.shape[2], device=self.device)
            self.visible = slots >= self.lead.to(self.device)[:, None]

    def hide(self, lead: torch.Tensor | None) -> None:
        """Hides the first slots of each row, int64 [batch] on the CPU."""
        self.lead = lead
        self._show()

    def real(self) -> torch.Tensor:
        """Slots that hold a token, int64 on the CPU, of each row [batch], or with `ragged` [batch, kv heads]."""
        full = torch.full(self.shape if self.ragged is not None else self.shape[:1], self.length)
        return full if self.lead is None else full - self.lead

    def mask(self, query: torch.Tensor, given: torch.Tensor | None, plain: bool) -> torch.Tensor | None:
        """The mask over slots, [batch, 1 or heads, queries, slots], from the one over columns; None hides nothing.

        Args:
            query: [batch, heads, queries, dim].
            given: the model's own; plain: whether it hides nothing but later columns and the padding.
        """
        if self.kept is None and self.ragged is None:
            return given
        batch, heads, new = query.shape[:3]
        kv_heads, old, shown = self.shape[1], self.length - new, self.shown()
        if shown is not None and shown.shape[1] > 1:
            shown = shown.repeat_interleave(heads // kv_heads, dim=1)
        shown = None if shown is None else shown[:, :, None]
        if given is not None and not plain:
            columns = self.columns().repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
            given = given.expand(batch, heads, new, given.shape[-1])
            given = given.gather(-1, columns.expand(-1, -1, new, -1))
            if shown is None:
                return given
            return given.masked_fill(~shown, False if given.dtype == torch.bool else torch.finfo(given.dtype).min)
        if new == 1:
            return shown
        if given is None:
            among = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()
        else:
            among = given[..., -new:]
        before = among.new_ones(1, 1, 1, old) if shown is None else shown[..., :old]
        among = among.expand(batch, before.shape[1], new, new)
        return torch.cat([before.expand(batch, -1, new, old), among], dim=-1)

    def gathers(self, new: int) -> bool:
        """Whether `attend` is the way to attend: heads differ, or PyTorch's attention to one token is the slower."""
        if self.ragged is not None:
            return True
        if new > 1 or self.kept is None or self.lead is not None:
            return False
        return (self._keys.itemsize < 4 or self._keys.numel() >= LARGE) and self._native()

    def _native(self) -> bool:
        return path(self._keys, self._keys, self._values) == "native"

    def attend(self, call: Call, plain: bool) -> torch.Tensor:
        """Attention over what is stored, [batch, heads, queries, dim]; `plain` as in `mask`."""
        runs = self.ragged
        if plain and runs is not None:
            return gather_attention(
                call.query, runs.keys, runs.values, starts=runs.starts, lengths=runs.lengths, scaling=call.scaling
            )
        if plain and self.gathers(call.query.shape[2]):
            return gather_attention(call.query, self.keys, self.values, scaling=call.scaling)
        return self.dense(call, self.mask(call.query, call.mask, plain))

    def dense(self, call: Call, mask: torch.Tensor | None) -> torch.Tensor:
        """SDPA over what is stored, [batch, heads, queries, dim], with a mask over slots."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return dataclasses.replace(call, key=keys, value=values, mask=mask).dense()

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
        """Keeps the best slots of each head and frees the rest.

        Args:
            scores: [batch, kv heads, slots]: +inf is kept in any case, -inf never in preference to a token.
            counts: slots to keep, int64 on the CPU, in each row [batch], or in each head [batch, kv heads].
            tail: how many of the last slots are among them in any case.
            spare: unused slots that may stay allocated; with 0 the storage holds exactly what is kept.
        """
        real = self.real()
        counts, real = (one if one.ndim == 2 else one[:, None].expand(self.shape) for one in (counts, real))
        counts = torch.minimum(counts, real)
        if torch.equal(counts, real):
            return
        keep, uneven = int(counts.max()), int(counts.min()) < int(counts.max())
        slots = scores.topk(keep, dim=-1, sorted=uneven).indices
        if uneven:
            rank = torch.arange(keep, device=slots.device)
            slots = slots.masked_fill(rank >= counts.to(slots.device)[:, :, None], -1).sort(dim=-1).values.clamp_(min=0)
        else:
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, slots, True)
            slots = chosen.nonzero()[:, 2].view(slots.shape)
        self._take(slots, counts, min(tail, self.tail), spare)

    def retain(self, keep: torch.Tensor, spare: int = 0) -> None:
        """Frees every slot where `keep`, bool [batch or 1, 1 or kv heads, slots], does not hold, and hidden ones."""
        keep = keep.expand(*self.shape, self.length)
        gone = (~keep).flatten(0, 1).any(dim=0).nonzero()
        tail = self.length - 1 - int(gone[-1]) if len(gone) else self.length
        shown = self.shown()
        keep = keep if shown is None else keep & shown
        counts = keep.sum(dim=-1)
        most = int(counts.max())
        if most == self.length and bool((counts == most).all()):
            return
        slots = keep.to(torch.int8).argsort(dim=-1, stable=True)[..., self.length - most :]
        self._take(slots, counts.cpu(), min(tail, self.tail), spare)

    def _take(self, slots: torch.Tensor, counts: torch.Tensor, tail: int, spare: int) -> None:
        """Keeps, of each head, the last `counts` (int64 [batch, kv heads]) of these ascending slots."""
        keep = slots.shape[2]
        hidden = keep - counts
        if self.scores is not None:
            places = torch.arange(keep, device=slots.device)
            self.scores = self.scores.gather(2, slots).masked_fill(
                places < hidden.to(slots.device)[:, :, None], -torch.inf
            )
        columns, runs = self.columns(), self.ragged
        even, same = bool((counts == counts[:, :1]).all()), bool((counts == keep).all())
        if same or (runs is None and even and not self._native()):
            if runs is not None:
                places = runs.places().gather(2, slots)
                self._keys, self._values, self.ragged = runs.keys[places], runs.values[places], None
            else:
                self._keys = self._chosen(self._keys, slots, spare)
                self._values = self._chosen(self._values, slots, spare)
            self.kept, hidden = columns.gather(2, slots), hidden[:, 0]
        else:
            lengths, spare = counts.to(slots.device), min(spare, CHUNK)
            if runs is not None:
                self.ragged = runs.select(slots, lengths, self.seen, spare)
            else:
                self.ragged = packed(self._keys, self._values, columns, slots, lengths, spare)
            self._keys = self._values = self.kept = None
        self.length, self.tail, self.cut = keep, tail, self.seen
        self.lead = hidden if bool(hidden.any()) else None
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
        if count == 0 or not self.is_initialized:
            return
        if count > self.tail:
            raise UsageError(
                f"the last {count} tokens can't be taken back: only the last {self.tail} are all still stored; "
                "keep more, or draft fewer tokens at a time"
            )
        self.length -= count
        self.seen -= count
        self.tail -= count
        if self.ragged is not None:
            self.ragged.crop(count)
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
        if self.ragged is not None:
            self.ragged.rows(pick)
            self._shorten(self.length - self.ragged.longest)
        for name in ("_keys", "_values", "visible", "kept", "scores", "lead", "padding", "counts", "recent"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, pick(held))

    def _shorten(self, count: int) -> None:
        """Leaves out the first slots, which are hidden in every head that is left."""
        if count:
            self.length -= count
            self.lead = None if self.lead is None else self.lead - count
            self.limit = None if self.limit is None else self.limit - count
            self.scores = None if self.scores is None else self.scores[..., count:]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda held: held[indices.to(held.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda held: held.repeat_interleave(repeats, dim=0))
