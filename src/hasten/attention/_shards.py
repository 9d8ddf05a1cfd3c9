"""Static causal patterns in blocks, counted from each row's first real token: local blocks, sinks, strided shards.

The key block j <= i is seen from the query block i where i - j < local, or j < sink, or j is in the head's shard, those
blocks with (j + offset_h) mod stride = 0. A block that a query does not see is never seen again by a later one, so a
cache may drop it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hasten.attention.base import Kept
from hasten.hosts.attention import Call
from hasten.hosts.caching import use_cache
from hasten.hosts.following import FollowingCache
from hasten.hosts.kept import KeptLayer
from hasten.math.blocks import Blocks
from hasten.math.shapes import Bool, Int


@dataclasses.dataclass(frozen=True)
class Shards:
    """A pattern.

    Attributes:
        block: tokens of a block, of the queries as of the keys.
        local: blocks up to a query's own, this one included.
        sink: first blocks that every query sees.
        stride: one block in so many is in a head's shard; 0 for no shards.
        offsets: of each kv head's shard, or one for all heads; None marks a head that sees everything.
    """

    block: int
    local: int
    sink: int = 0
    stride: int = 0
    offsets: tuple[int | None, ...] = (0,)

    def table(self, first: int, rows: int, columns: int, device: torch.device | None = None) -> Bool[Tensor, "h i j"]:
        """What the query blocks from `first` on see of the key blocks; before the first token nothing is seen."""
        i = torch.arange(first, first + rows, device=device)[:, None]
        j = torch.arange(columns, device=device)
        near = (i - j < self.local) | (j < self.sink)
        heads = [near if offset is not None else torch.ones_like(near) for offset in self.offsets]
        if self.stride:
            heads = [
                one if offset is None else one | ((j + offset) % self.stride == 0)
                for one, offset in zip(heads, self.offsets, strict=True)
            ]
        return torch.stack(heads) & (j <= i) & (i >= 0)

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        """The lists of one call, remembered; None where every query sees all keys before it."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if -(-keys // self.block) <= self.local:
            return None
        begin, _ = call.range()
        rows = None if begin is None else tuple(begin.tolist())
        device = call.query.device
        return kept.once((queries, keys, rows, device), lambda: self.blocks(queries, keys, begin, device))

    def sees(self, places: Int[Tensor, "b h n"], asked: Int[Tensor, "b q"]) -> Bool[Tensor, "b h q n"]:
        """Which tokens the queries at `asked` see, or would if they came before them.

        Args:
            places: of tokens in their row, negative for padding; h is 1 or the kv heads.
        """
        j = places[:, :, None] // self.block
        seen = (asked[:, None, :, None] // self.block - j < self.local) | (j < self.sink)
        shard, full = (torch.tensor(one, device=places.device)[:, None, None] for one in self._heads())
        if self.stride:
            seen = seen | ((j + shard) % self.stride == 0)
        return (seen | full) & (j >= 0)

    def _heads(self) -> tuple[list[int], list[bool]]:
        """Of each kv head, where its shard lies, and whether it sees everything."""
        return [one or 0 for one in self.offsets], [one is None for one in self.offsets]

    def blocks(self, queries: int, keys: int, begin: Int[Tensor, "b"] | None, device: torch.device) -> Blocks:
        """The lists for queries that are the last of the keys; rows with padding in front have lists of their own.

        Where a row's tokens before the queries do not fill whole blocks, query blocks straddle two rows of the table,
        and masks part them. Padding is put behind the keys.
        """
        starts = [keys - queries] if begin is None else [keys - queries - b for b in begin.tolist()]
        rows, columns = -(-queries // self.block), -(-keys // self.block)
        line = torch.arange(self.block, device=device)[:, None].expand(self.block, self.block)
        chosen, which = [], []
        masks: list[Tensor] = []
        for start in starts:
            split = -start % self.block  # queries of each block that belong to the earlier row
            table = self.table(start // self.block, rows + 1, columns, device)
            lower, upper = table[:, :-1], table[:, 1:]
            if not split:
                chosen.append(lower)
                which.append(torch.full_like(lower, -1, dtype=torch.int32))
                continue
            reached = torch.arange(rows, device=device) * self.block + split < queries
            upper = upper & reached[:, None]
            chosen.append(lower | upper)
            parts = torch.where(lower == upper, -1, torch.where(lower, len(masks), len(masks) + 1))
            which.append(torch.where(reached[:, None], parts, -1).int())
            masks += [line < split, line >= split]
        more = {}
        if masks:
            more = {"masks": torch.stack(masks), "mask_of": torch.stack(which)}
        if begin is not None and bool(begin.any()):
            place = torch.arange(keys, device=device)
            more["k_order"] = ((place + begin.to(device)[:, None]) % keys)[:, None]
        return Blocks.of(torch.stack(chosen), self.block, self.block, **more)


@dataclasses.dataclass(frozen=True)
class Following:
    """What a `FollowingCache` keeps of a pattern: when a row enters a block, what it can't see any more goes.

    Attributes:
        pattern: from the number of kv heads.
        chosen: the cache's layers that follow it.
    """

    pattern: Callable[[int], Shards]
    chosen: frozenset[int]

    def layers(self) -> frozenset[int]:
        return self.chosen

    def due(self, layer: int, seen: int) -> bool:
        return True

    def keep(self, layer: int, held: KeptLayer, query: Tensor | None) -> Tensor | None:
        pattern, new = self.pattern(held.shape[1]), 1 if query is None else query.shape[2]
        pads = torch.zeros(1, dtype=torch.int64) if held.padding is None else held.padding
        now = held.seen - pads  # the place of each row's next token
        entered = now // pattern.block
        if bool((entered == (now - new) // pattern.block).all()) or bool((entered < pattern.local).all()):
            return None
        positions = held.positions()
        return pattern.sees(positions, now[:, None].to(positions.device))[:, :, 0]

    def sees(self, layer: int, positions: Tensor, asked: Tensor) -> Tensor | None:
        """One query sees all that `keep` left."""
        return None if asked.shape[1] == 1 else self.pattern(positions.shape[1]).sees(positions, asked)


def follow(host: Any, name: str, pattern: Callable[[int], Shards], layers: Iterable[int]) -> None:
    """Gives a model that generates a cache which keeps what the pattern sees in these layers; others keep everything.

    Args:
        name: of the method, for messages.
    """
    if not hasattr(host.model, "generate"):
        return
    places = {layer: place for place, layer in enumerate(host.cache_layers)}
    policy = Following(pattern, frozenset(places[layer] for layer in layers if layer in places))
    use_cache(host, name, lambda prompt: FollowingCache(policy, len(places), prompt))
