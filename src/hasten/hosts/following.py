"""A cache that follows a pattern: keys that no later query can see are freed.

A policy says when and what. The cache looks on, frees the slots for real (heads may keep different numbers of tokens),
and keeps the books: positions stay those of the text, rows may be padded on the left, prompts may come in parts.
"""

from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call, hand_over
from hasten.hosts.kept import KeptLayer, room_for
from hasten.hosts.padding import Padding


class Policy(Protocol):
    """What stays in the cache. It may have two verbs more:

    layers() -> iterable of the cache's layers that follow the pattern; the others keep everything. Default: all.
    sees(layer, positions, query_positions) -> bool [batch or 1, 1 or kv heads, new, slots] or None: which stored keys
        the new queries see, beside causal order, from their places in the text, [batch, kv heads, slots] and [batch,
        new]; None for all of them, which is faster. Needed where a pattern hides keys before `keep` frees them: from
        queries of the same forward, or between two times at which it is due. With it, decoding equals attention under
        the pattern's mask over the whole text.
    """

    def due(self, layer: int, seen: int) -> bool:
        """Whether to ask `keep` now that `seen` columns were seen, padding included."""

    def keep(self, layer: int, held: KeptLayer, query: torch.Tensor | None) -> torch.Tensor | None:
        """Which slots later queries can see, bool [batch or 1, 1 or kv heads, slots]; None for all.

        Args:
            layer: index of the cache's layer.
            held: what is stored: `held.positions()` and `held.columns()` [batch, kv heads, slots], `held.shown()`,
                `held.keys`, `held.seen`, `held.padding` (int64 [batch] or None).
            query: of the forward that has just run, [batch, heads, new, dim].
        """


class FollowingCache(Cache):
    """A transformers cache whose layers keep what a policy says.

    After `crop`, what was freed stays gone: a policy whose queries may be taken back keeps what the earlier ones need
    (drafts are few, so a few tokens more than the pattern's window), or refuses nothing and is off by these tokens.

    Args:
        policy: see `Policy`.
        num_layers: attention layers of the model.
        prompt: columns of the prompt where it comes in several forwards, if known; a policy may read it off `prompt`.
    """

    layers: list[KeptLayer]  # type: ignore[assignment]

    def __init__(self, policy: Policy, num_layers: int, prompt: int | None = None) -> None:
        super().__init__(layers=[])
        self.policy, self.num_layers, self.prompt = policy, num_layers, prompt
        chosen = getattr(policy, "layers", None)
        self.follows = frozenset(range(num_layers) if chosen is None else chosen())
        self._sees = getattr(policy, "sees", None)
        self._padding = Padding()

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, freed ones included: what the next token's position follows from."""
        return self.layers[0].seen if self.layers else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        while len(self.layers) <= layer_idx:
            self.layers.append(KeptLayer())
        layer = self.layers[layer_idx]
        if layer_idx not in self.follows:
            return layer.update(key_states, value_states)
        if layer.unseen:
            raise UsageError(
                "this model's attention can't be observed, because it changes the keys that the cache returns: use the "
                "pattern without its own cache"
            )
        keys, values = layer.update(key_states, value_states)
        layer.unseen = True
        return hand_over(keys, self, layer_idx), values

    def mask(self, layer: int, query: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        held = self.layers[layer]
        mask, sees = held.mask(query, given, self._plain(held, given)), self._seen(layer, query)
        return mask if sees is None else self._hidden(held, sees, query, mask)

    def _plain(self, held: KeptLayer, mask: torch.Tensor | None) -> bool:
        """Whether a mask hides nothing but later columns and padding that is gone already."""
        if not self._padding.plain(mask, held.seen):
            return False
        return held.padding is None or int(held.padding.max()) <= held.cut

    def _seen(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """What the policy says of the new queries; None where it hides nothing that is stored."""
        if self._sees is None:
            return None
        held, new = self.layers[layer], query.shape[2]
        asked = torch.arange(held.seen - new, held.seen, device=query.device)[None]
        if held.padding is not None:
            asked = asked - held.padding.to(query.device)[:, None]
        return self._sees(layer, held.positions(), asked)

    @staticmethod
    def _hidden(held: KeptLayer, sees: torch.Tensor, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """A mask over slots without what the pattern hides from the new queries."""
        new = query.shape[2]
        if sees.shape[1] > 1:
            sees = sees.repeat_interleave(query.shape[1] // held.shape[1], dim=1)
        if mask is None:
            order = torch.ones(new, held.length, dtype=torch.bool, device=query.device).tril(held.length - new)
            return sees & order
        return sees & mask if mask.dtype == torch.bool else mask.masked_fill(~sees, torch.finfo(mask.dtype).min)

    def attend(self, layer: int, call: Call) -> torch.Tensor | None:
        held = self.layers[layer]
        self._pad(held, call.mask)
        if not held.cut:
            return None
        plain, sees = self._plain(held, call.mask), self._seen(layer, call.query)
        if held.ragged is not None and sees is None:
            output = held.attend(call, plain)
        else:
            mask = held.mask(call.query, call.mask, plain)
            output = held.dense(call, mask if sees is None else self._hidden(held, sees, call.query, mask))
        self.observe(layer, call.module, call.query, call.key, call.value, call.mask, call.scaling)
        return output

    def _pad(self, held: KeptLayer, mask: torch.Tensor | None) -> None:
        """Padding in front of each row, for as long as whole rows of it come."""
        if mask is not None and self._padding.plain(mask, held.seen):
            held.padding = self._padding.lead(mask, held.seen, held.batch_size)

    def observe(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, scaling: float,
    ) -> None:  # fmt: skip
        """Frees what the policy gives up, once the layer's attention is done."""
        held = self.layers[layer]
        held.unseen, held.scaling = False, scaling
        if not self.policy.due(layer, held.seen):
            return
        keep = self.policy.keep(layer, held, query)
        if keep is None:
            return
        if held.padding is not None:
            keep = keep & (held.positions() >= 0)
        held.retain(keep, spare=2 * room_for(held.length) - 2 * held.length)

    def reset(self) -> None:
        super().reset()
        self._padding = Padding()
