"""A text of which some tokens pass through the model again while the others bring their keys and values along."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hasten.hosts.attention import Call, hand_over
from hasten.kv._contexts import ComposedCache, columns, fill

BLOCK, BLOCKS = 128, 16  # chosen tokens whose attention is computed together, at least; such blocks, at most
See = Callable[[int, Tensor, Tensor, float], None]


class Held(NamedTuple):
    """What is known of a stretch of the text: where it begins, and [layers, kv heads, tokens, dim] each."""

    start: int
    keys: Tensor
    values: Tensor


class Patch(Cache):
    """The cache of one forward over chosen tokens of a text, [1, chosen].

    Args:
        length: tokens of the text.
        pieces: what is known of it; where tokens are chosen too, theirs is replaced layer by layer.
        slots: places of the chosen tokens, int64 [chosen], or None for the whole text.
        see: called after each layer's attention as see(layer, query [heads, chosen, dim], keys [kv heads, length, dim],
            scaling).
    """

    def __init__(self, length: int, pieces: Sequence[Held], slots: Tensor | None, see: See) -> None:
        super().__init__(layers=[])
        self.length, self.pieces, self.slots, self.see = length, pieces, slots, see
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.blocks: list[tuple[Tensor, int]] = []
        if slots is not None:
            some = slots.split(max(BLOCK, -(-len(slots) // BLOCKS)))
            self.blocks = [(block, int(block[-1]) + 1) for block in some]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        for held, new, name in ((self.keys, key_states, "keys"), (self.values, value_states, "values")):
            assert len(held) == layer_idx, "layers run in order, each once"
            if self.slots is None:
                held.append(new)
                continue
            whole = new.new_empty(1, new.shape[1], self.length, new.shape[3])
            for piece in self.pieces:
                part = getattr(piece, name)[layer_idx]
                whole[0, :, piece.start : piece.start + part.shape[1]] = part
            whole[:, :, self.slots] = new
            held.append(whole)
        return hand_over(self.keys[-1], self, layer_idx), self.values[-1]

    def attend(self, layer: int, call: Call) -> Tensor | None:
        """Attention of the chosen tokens, in blocks that each look no further than their last token."""
        if self.slots is None:
            return None
        keys, values = self.keys[layer], self.values[layer]
        self.see(layer, call.query[0], keys[0], call.scaling)
        groups = call.query.shape[1] // keys.shape[1]
        if groups > 1:  # fused kernels take masks or grouped heads, not both
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        outs, begin = [], 0
        for slots, end in self.blocks:
            query = call.query[:, :, begin : begin + len(slots)]
            mask = torch.arange(end, device=slots.device) <= slots[:, None]
            outs.append(
                nn.functional.scaled_dot_product_attention(
                    query, keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=call.scaling
                )
            )
            begin += len(slots)
        return torch.cat(outs, 2)

    def mask(self, layer: int, query: Tensor, given: Tensor | None) -> Tensor | None:
        return given

    def observe(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float,
    ) -> None:  # fmt: skip
        self.see(layer, query[0], key[0], scaling)

    @staticmethod
    def sees(slots: Tensor, length: int) -> Tensor:
        """Which columns each chosen token sees: those up to its own, bool [1, 1, chosen, length]."""
        return (torch.arange(length, device=slots.device) <= slots[:, None])[None, None]


def join(texts: list[Tensor], rows: list[list[list[Tensor]]]) -> ComposedCache:
    """One cache from rows' keys and values, one [1, kv heads, tokens, dim] a layer; shorter rows padded on the left."""
    cache = ComposedCache()
    cache.text, cache.mask = columns(texts)
    if len(rows) == 1:
        fill(cache, *rows[0])
        return cache
    width = cache.text.shape[1]

    def together(layers: tuple[Tensor, ...]) -> Tensor:
        first = layers[0]
        out = first.new_zeros(len(layers), first.shape[1], width, first.shape[3])
        for row, one in enumerate(layers):
            out[row, :, width - one.shape[2] :] = one[0]
        return out

    fill(cache, *([together(layers) for layers in zip(*kind, strict=True)] for kind in zip(*rows, strict=True)))
    return cache
