"""Which keys and values stay in the cache: the family's protocol and its executor.

A method has two verbs: `rate` (how much each stored token is worth, and how much a layer wants) and `share` (how many
tokens each layer gets). The executor watches the attention of the prompt's last queries, asks, then does the top-k, the
gathering and the bookkeeping. Layers are settled while the prompt runs through them, each as soon as its attention is
done, so that never more than the budget and one full layer is stored.

Positions stay those of the text: tokens after an eviction are numbered as if nothing had gone. Every row of a batch has
a budget of its own, so that its result does not depend on its neighbours; where rows keep different numbers of tokens,
the slots that are left over are hidden.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.attention import Call, hand_over
from hasten.hosts.base import Host
from hasten.hosts.caching import check_owners, use_cache
from hasten.hosts.context import Context
from hasten.hosts.kept import KeptLayer, room_for
from hasten.hosts.padding import Padding
from hasten.kv import _contexts
from hasten.kv._heads import spread


@dataclasses.dataclass(frozen=True)
class Eviction(Method):
    """Base of methods that evict tokens from the cache."""

    keep: float = option(0.25, "fraction of the prompt's tokens that stay, on average over the layers", above=0, most=1)
    budget: int | None = option(None, "tokens that stay, on average over the layers; replaces keep", least=1)
    window: int = option(32, "last queries whose attention is looked at; as many last tokens always stay", least=1)
    decode: bool = option(True, "evict while decoding too, so that the cache stays as small as after the prompt")
    every: int = option(32, "while decoding, evict once this many tokens have come, by their attention", least=1)
    heads: bool = option(False, "heads share their layer's budget: the best tokens of all of them together stay")
    floor: float = option(0.2, "with heads: the part of an even share that each head gets in any case", least=0, most=1)

    def rate(
        self, weights: torch.Tensor, recent: torch.Tensor, lead: torch.Tensor, groups: int, decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the stored tokens of one layer are worth.

        Args:
            weights: attention of the last queries, float32 [batch, heads, queries, slots]; query j sits at slot
                `slots - queries + j`, and what it can't see has weight 0.
            recent: int64 [batch], how many of the last slots stay in any case; as many of a prompt's queries count.
            lead: int64 [batch], how many of the first slots hold nothing.
            groups: query heads per kv head.
            decoding: whether this is an eviction after the prompt.

        Returns:
            scores [batch, kv heads, slots], and how much the layer wants, [batch], or None while decoding.
        """
        raise NotImplementedError

    def share(self, wants: torch.Tensor, total: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        """Tokens for each layer beside the recent ones.

        Args:
            wants: float64 [layers so far, batch].
            total: int64 [batch], to be shared by all layers; most: int64 [batch], what one layer has.

        Returns:
            real numbers, [layers so far, batch]; each column adds up to the smaller of its total and layers * most.
        """
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.keep == 1 and self.budget is None

    def sizes(self, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens per layer, on average, for prompts of these lengths; int64 [batch]."""
        if self.budget is not None:
            return torch.full_like(lengths, self.budget)
        return (lengths * self.keep).round().long().clamp(min=1)


def whole(shares: torch.Tensor) -> torch.Tensor:
    """Whole numbers with the sums of the real ones: [layers, batch]; the largest fractions are rounded up."""
    shares = shares.double()
    floor = (shares + 1e-9).floor()
    missing = (shares.sum(0) - floor.sum(0)).round().long()
    rank = (floor - shares).argsort(dim=0, stable=True).argsort(dim=0)
    return floor.long() + (rank < missing).long()


def window_attention(query: torch.Tensor, key: torch.Tensor, scaling: float, lead: torch.Tensor | None) -> torch.Tensor:
    """Attention weights of the last queries over all stored keys, float32 [batch, heads, queries, slots].

    Args:
        query: [batch, heads, queries, dim], the last slots' own; key: [batch, kv heads, slots, dim].
        lead: hidden slots in front, int64, of each row [batch] or of each kv head [batch, kv heads].
    """
    batch, heads, queries, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float().mul_(scaling).view(batch, heads, queries, slots)
    low = torch.finfo(torch.float32).min
    if queries > 1:
        later = torch.ones(queries, queries, dtype=torch.bool, device=key.device).triu(1)
        scores[..., slots - queries :].masked_fill_(later, low)
    if lead is not None:
        lead = lead.to(key.device).view(batch, -1, 1, 1, 1)
        hidden = torch.arange(slots, device=key.device) < lead
        scores.view(batch, kv_heads, -1, queries, slots).masked_fill_(hidden, low)
    return scores.softmax(dim=-1)


class KeptCache(Cache):
    """A transformers cache whose layers keep what an eviction method chooses.

    Args:
        method: what to keep.
        num_layers: attention layers of the model.
        prompt: columns of the prompt where it comes in several forwards; None takes the first forward as the prompt.
    """

    layers: list[KeptLayer]

    def __init__(self, method: Eviction, num_layers: int, prompt: int | None = None) -> None:
        super().__init__(layers=[])
        self.method, self.num_layers, self.prompt = method, num_layers, prompt
        self._wants: list[torch.Tensor] = []
        self._padding, self._runs = Padding(), _Runs(self)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, evicted ones included: what the next token's position follows from."""
        return self.layers[0].seen if self.layers else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        while len(self.layers) <= layer_idx:
            self.layers.append(KeptLayer())
        layer = self.layers[layer_idx]
        if self.method.idle:
            return layer.update(key_states, value_states)
        if layer.unseen:
            raise UsageError(
                "this model's attention can't be observed, because it changes the keys that the cache returns: "
                f"leave {self.method.name} out"
            )
        if layer.limit is not None and layer.length >= layer.limit:
            self._decode_evict(layer)
        keys, values = layer.update(key_states, value_states)
        layer.unseen = True
        return hand_over(keys, self._runs if layer.gathers(key_states.shape[2]) else self, layer_idx), values

    def mask(self, layer: int, query: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        held = self.layers[layer]
        return given if held.kept is None else held.mask(query, given, self._padding.plain(given, held.seen))

    def observe(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, scaling: float,
    ) -> None:  # fmt: skip
        """Settles a layer at the end of the prompt; afterwards remembers queries for the next eviction."""
        held = self.layers[layer]
        held.unseen = False
        if held.settled:
            if self.method.decode:
                held.remember(query, self.method.window)
            return
        if self.prompt is None:
            self.prompt = held.seen
        if held.seen < self.prompt:
            held.remember(query, self.method.window)
            return
        window = min(self.method.window, held.length)
        if query.shape[2] < window:
            held.remember(query, window)
            query = held.latest(window)
        held.scaling, held.queries, held.settled = scaling, [], True
        held.hide(self._padding.lead(mask, held.seen, held.batch_size))
        self._settle(held, query[:, :, -window:], query.shape[1] // key.shape[1])

    def _settle(self, layer: KeptLayer, query: torch.Tensor, groups: int) -> None:
        """Rates a layer whose prompt is complete, then cuts it and those before it to their shares."""
        method, real = self.method, layer.real()
        sizes = method.sizes(real)
        layer.recent = ((sizes + 1) // 2).clamp(max=method.window)  # half of a budget below twice the window
        recent = torch.minimum(layer.recent, real)
        layer.counts = sizes
        if bool((sizes >= real).all()):
            self._wants.append(torch.zeros(len(sizes), dtype=torch.float64))
            self._set_limit(layer)
            return
        weights = window_attention(query, layer.keys, layer.scaling, layer.lead)
        lead = layer.length - real
        scores, wants = method.rate(weights, recent, lead, groups, False)
        layer.scores = fence(scores, recent, lead)
        self._wants.append(wants.double().cpu())
        last = len(self._wants) == self.num_layers
        most = real - recent
        shares = method.share(torch.stack(self._wants), (sizes - recent).clamp(min=0) * self.num_layers, most)
        # shares only shrink as layers come, so a slot more than the floor keeps all that the last round may choose
        counts = whole(shares) if last else torch.minimum(shares.floor().long() + 1, most)
        settled = [one for one in self.layers if one.scores is not None]
        for one, count in zip(settled, counts + recent, strict=True):
            one.evict(one.scores, self._shares(one.scores, count, recent), int(recent.min()))
            one.counts = torch.where(sizes < real, count, sizes)
            self._set_limit(one)
            if last:
                one.scores = None

    def _shares(self, scores: torch.Tensor, counts: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """Slots to keep in each row or head, from those of a head on average, int64 [batch]."""
        return spread(scores, counts, recent, self.method.floor) if self.method.heads else counts

    def _set_limit(self, layer: KeptLayer) -> None:
        if self.method.decode:
            real = layer.real()
            free = layer.counts - (real if real.ndim == 1 else real.sum(1) // real.shape[1])
            layer.limit = layer.length + int(free.min()) + self.method.every

    def _decode_evict(self, layer: KeptLayer) -> None:
        if not layer.queries:
            return
        real = layer.real()
        least, most = (real, real) if real.ndim == 1 else (real.amin(1), real.amax(1))
        recent = torch.minimum(layer.recent, least)
        queries = layer.latest(self.method.window)
        groups = queries.shape[1] // layer.shape[1]
        weights = window_attention(queries, layer.keys, layer.scaling, layer.lead)
        scores, _ = self.method.rate(weights, recent, layer.length - most, groups, True)
        scores = fence(scores, recent, layer.length - real)
        spare = self.method.every  # else every step would allocate anew
        if layer.ragged is None:
            spare = 2 * room_for(layer.length) - 2 * layer.length
        layer.evict(scores, self._shares(scores, layer.counts, recent), int(recent.min()), spare)
        layer.queries = []
        self._set_limit(layer)

    def reset(self) -> None:
        super().reset()
        self.prompt, self._wants, self._padding = None, [], Padding()


class _Runs:
    """What a layer marks its keys with if it attends by itself."""

    def __init__(self, cache: KeptCache) -> None:
        self.cache = cache

    def attend(self, layer: int, call: Call) -> torch.Tensor:
        cache, held = self.cache, self.cache.layers[layer]
        output = held.attend(call, cache._padding.plain(call.mask, held.seen))
        cache.observe(layer, call.module, call.query, call.key, call.value, call.mask, call.scaling)
        return output


def fence(scores: torch.Tensor, recent: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
    """Scores [batch, kv heads, slots] with +inf at the last `recent` and -inf at the first `lead` slots.

    Args:
        recent: int64 [batch]; lead: int64 [batch] or [batch, kv heads].
    """
    slots = torch.arange(scores.shape[-1], device=scores.device)
    recent, lead = (one.to(scores.device).view(len(scores), -1, 1) for one in (recent, lead))
    scores = scores.masked_fill(slots >= scores.shape[-1] - recent, torch.inf)
    return scores.masked_fill(slots < lead, -torch.inf)


def install(method: Eviction | _contexts.ContextReuse, host: Host, context: Context) -> dict[str, Any]:
    """Gives a decoder caches that evict, in `generate` and from `host.new_cache()`.

    Raises:
        UsageError: no transformers decoder, one whose layers already see only a part of the text (sliding or chunked
            windows, recurrent states), an encoder-decoder, an attention that can't be observed, or one that was taken
            over by a method which decodes with the whole cache.
    """
    if isinstance(method, _contexts.ContextReuse):
        return _contexts.install(method, host, context)
    check_owners(host, method.name)
    use_cache(host, method.name, lambda prompt: KeptCache(method, len(host.cache_layers), prompt))
    return {}


def restore(method: Eviction | _contexts.ContextReuse, host: Host, record: dict[str, Any]) -> None:
    """The same change on a model that is loaded; the weights are untouched by it."""
    install(method, host, Context())
