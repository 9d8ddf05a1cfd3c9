"""A cache whose contexts lie side by side at the same positions, apart from what comes before and after them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call, hand_over
from hasten.kv._contexts import Entry, columns

SCORES = 2**25  # attention scores that are held at once, in float32; eight times as many on a GPU


def part(query: Tensor, keys: Tensor, values: Tensor, scaling: float, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention to one part of the keys, with the log-sum-exp that merging needs.

    Args:
        query: [B, H, n, d]; keys, values: [B or 1, Hk, N, d]; those of one row serve the whole batch without a copy.
        seen: bool [B or 1, 1 or n, N], or None for all.

    Returns:
        output [B, H, n, d] in the queries' dtype, and its log-sum-exp, float32 [B, H, n]; 0 and -inf where a query sees
        nothing.
    """
    batch, heads, n, _ = query.shape
    kv_heads, slots = keys.shape[1:3]
    groups, shared = heads // kv_heads, len(keys) < batch
    most = SCORES if query.device.type == "cpu" else 8 * SCORES
    size = max(1, most // max(1, batch * heads * slots))
    outs: list[Tensor] = []
    logs: list[Tensor] = []
    for begin in range(0, n, size):
        some = query[:, :, begin : begin + size].unflatten(1, (kv_heads, groups))  # [B, Hk, G, m, d]
        if shared:
            some = some.transpose(0, 1)[None]  # [1, Hk, B, G, m, d]
        flat = some.flatten(2, -2)  # [B or 1, Hk, rows, d]
        scores = torch.matmul(flat, keys.transpose(2, 3)).float().mul_(scaling)
        if seen is not None:
            here = seen if seen.shape[1] == 1 else seen[:, begin : begin + size]
            here = here[None, None, :, None] if shared else here[:, None, None]
            scores.view(*some.shape[:-1], slots).masked_fill_(~here, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
        total = weights.sum(-1, keepdim=True)
        out = torch.matmul(weights.to(values.dtype), values) / total.clamp(min=1e-38).to(values.dtype)
        for parts, one in ((outs, out), (logs, top + total.log())):
            one = one.view(*some.shape[:-1], one.shape[-1])
            parts.append((one[0].transpose(0, 1) if shared else one).flatten(1, 2))  # [B, H, m, e]
    return torch.cat(outs, 2), torch.cat(logs, 2)[..., 0]


Attend = Callable[..., Tensor]


class ParallelCache(Cache):
    """Prefix, contexts side by side, and what follows them at the position after the longest.

    A column stands for a position, so that `get_seq_length` is what the next token's position follows from.

    Args:
        past: the prefix's keys and values, or None for no prefix.
        rows: the contexts of each request.
        attend: called as (query, context keys, context values, keys, values, shown, among, scaling) for the output; see
            `hasten.kv.ape.ape` for the shapes.

    Attributes:
        text, mask: of the columns, int64 [batch, columns]: the prefix and the longest context, padded on the left.
    """

    layers: list[Any]

    def __init__(self, past: Entry | None, rows: Sequence[Sequence[Entry]], attend: Attend) -> None:
        super().__init__(layers=[])
        self.attend_to = attend
        first = rows[0][0]
        before = first.ids.new_zeros(0) if past is None else past.ids
        longest = [max(row, key=lambda entry: len(entry.ids)).ids for row in rows]
        self.text, self.mask = columns([torch.cat([before, text]) for text in longest])
        self.width, self.lead = self.text.shape[1], len(before)
        distinct = list(rows[:1]) if all(list(row) == list(rows[0]) for row in rows) else list(rows)
        sizes = [sum(len(entry.ids) for entry in row) for row in distinct]
        most = max(sizes)
        self.shown: Tensor | None = None
        if min(sizes) < most:
            self.shown = (torch.arange(most) < torch.tensor(sizes)[:, None]).to(first.ids.device)
        self.keys = _side_by_side([[entry.keys for entry in row] for row in distinct], most)
        self.values = _side_by_side([[entry.values for entry in row] for row in distinct], most)
        for index in range(len(self.keys)):
            layer = DynamicLayer()
            keys, values = (
                one[index].new_zeros(len(rows), one.shape[2], 0, one.shape[4]) for one in (self.keys, self.values)
            )
            if past is not None:
                keys, values = (one[index].expand(len(rows), -1, -1, -1) for one in (past.keys, past.values))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            self.layers.append(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width + self.layers[layer_idx].keys.shape[2] - self.lead

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx >= len(self.layers):
            raise UsageError("this cache of contexts was composed for a model with fewer layers: compose it anew")
        layer = self.layers[layer_idx]
        layer.keys = torch.cat([layer.keys, key_states], 2)
        layer.values = torch.cat([layer.values, value_states], 2)
        return hand_over(layer.keys, self, layer_idx), layer.values  # type: ignore[arg-type]

    def attend(self, layer: int, call: Call) -> Tensor:
        """Attention to contexts and to all else, put together by the method."""
        held, new = self.layers[layer], call.query.shape[2]
        slots = held.keys.shape[2]
        return self.attend_to(
            call.query, self.keys[layer], self.values[layer], held.keys, held.values, self.shown,
            self._among(call.mask, new, slots), call.scaling,
        )  # fmt: skip

    def _among(self, given: Tensor | None, new: int, slots: int) -> Tensor | None:
        """Which prefix and later keys each query sees, bool [B, n, slots]; the prefix is seen by all."""
        following = slots - self.lead
        if given is None:
            if new == 1:
                return None
            place = torch.arange(slots, device=self.text.device)
            return (place <= place[slots - new :, None])[None]
        later = given[:, 0, :, given.shape[-1] - following :]
        later = later if later.dtype == torch.bool else later > torch.finfo(later.dtype).min / 2
        return torch.cat([later.new_ones(len(later), new, self.lead), later], -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens, none of a context."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.layers[0].keys.shape[2] - self.lead:
            raise UsageError("crop takes a negative number of tokens, at most those that came after the contexts")
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets what came after the contexts."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.lead], layer.values[:, :, : self.lead]

    def _pick(self, pick: Callable[[Tensor, int], Tensor]) -> None:
        self.text, self.mask = pick(self.text, 0), pick(self.mask, 0)
        if self.keys.shape[1] > 1:
            self.keys, self.values = pick(self.keys, 1), pick(self.values, 1)
            self.shown = None if self.shown is None else pick(self.shown, 0)
        for layer in self.layers:
            layer.keys, layer.values = pick(layer.keys, 0), pick(layer.values, 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(lambda held, dim: held.repeat_interleave(repeats, dim))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._pick(lambda held, dim: held.index_select(dim, indices.to(held.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


def _side_by_side(rows: list[list[Tensor]], most: int) -> Tensor:
    """[layers, kv heads, tokens, dim] each to [layers, rows, kv heads, most, dim], padded on the right."""
    joined = [torch.cat(row, 2) for row in rows]
    if len(joined) == 1:
        return joined[0][:, None]
    first = joined[0]
    out = first.new_zeros(first.shape[0], len(joined), first.shape[1], most, first.shape[3])
    for row, one in enumerate(joined):
        out[:, row, :, : one.shape[2]] = one
    return out
