"""How a model's attention is observed or taken over; SDPA as before where nobody does.

transformers asks two tables for the attention named by `config._attn_implementation`: one for the function, one for the
mask. Registering the first alone silently drops every mask, so `take_over` registers both. Two things may stand in for
SDPA: the function that `attend_with` gave to the attention module, and a cache that marks the keys which its `update`
returns (`hand_over`). A marked cache looks on, and may compute the attention itself; attention over unmarked keys in a
module of its own is SDPA with the model's mask.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.base import Host

NAME = "hasten"
_OBSERVER = "_hasten_observer"
_ATTEND = "_hasten_attend"
_CAUSAL = "_hasten_causal"
_RANGE = "_hasten_range"


@dataclasses.dataclass
class Call:
    """One call of one attention module.

    Attributes:
        module: the attention module; layer: its index in `host.layers`, or of the cache's layer for an observer.
        query: [B, H, Nq, d] with positions applied; key: [B, Hk, Nk, d]; value: [B, Hk, Nk, e].
        mask: the model's own, [B, 1 or H, Nq, Nk], over all tokens ever seen, or None.
        scaling: the factor on the scores.
        causal: whether a query sees no later key; queries are the last Nq of Nk positions.
        dropout: probability that training drops a weight; further: what else the model handed over.
        grid: of vision models, the patch tokens' grid (rows, columns) or (frames, rows, columns), else None.
        prefix: class and register tokens before the patches.
        inner: computes the dense output [B, H, Nq, e]; SDPA where None.
        ends: what `range` is to say, where somebody knows better than the mask.
    """

    module: nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    causal: bool
    dropout: float = 0.0
    further: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    inner: Callable[[], torch.Tensor] | None = None
    ends: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.key.shape[2] - self.query.shape[2]

    def range(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The real keys of each row, from `begin` to before `end`, int64 [B] each; None for both without padding.

        Raises:
            UsageError: a mask that is more than causal order and padding at the rows' ends, or a bias per position.
        """
        if self.further.get("position_bias") is not None:
            raise UsageError(f"{type(self.module).__name__} adds a bias per position: sparse attention can't follow it")
        if self.ends is not None:
            return self.ends
        if self.mask is None:
            return None, None
        if self.causal and self.query.shape[2] > 1 and not is_causal(self.mask):
            raise UsageError("sparse attention follows causal masks with padding, not a mask of the caller's own")
        if not is_causal(self.mask):
            return self._read(self.mask)
        kind = self.causal, self.query.shape[0], self.mask.shape  # a part of a mask takes over its marks
        known = vars(self.mask).get(_RANGE)
        if known is None or known[0] != kind:  # once a forward: all layers have one mask, which is made anew for each
            known = kind, self._read(self.mask)
            setattr(self.mask, _RANGE, known)
        return known[1]

    def _read(self, mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows = mask[:, 0, -1]
        sees = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        begin = sees.int().argmax(-1)
        end = begin + sees.sum(-1)
        place = torch.arange(sees.shape[-1], device=sees.device)
        if bool((sees != ((place >= begin[:, None]) & (place < end[:, None]))).any()):
            raise UsageError("sparse attention follows padding at the ends of rows, not holes between tokens")
        if not self.causal and bool((mask != mask[:, :, -1:]).any()):
            raise UsageError("sparse attention follows padding, not a mask that differs between queries")
        if bool(sees.all()):
            return None, None
        batch = self.query.shape[0]
        return begin.expand(batch), end.expand(batch)

    def dense(self) -> torch.Tensor:
        """What the model computes without anybody's doing."""
        if self.inner is not None:
            return self.inner()
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            self.module, self.query, self.key, self.value, self.mask,
            dropout=self.dropout, scaling=self.scaling, is_causal=self.causal, **self.further,
        )  # fmt: skip
        return output.transpose(1, 2)


class Observer(Protocol):
    """A cache that looks on. Masks that it is given span all tokens ever seen, [batch, 1, queries, seen].

    It may also have `attend(layer: int, call: Call) -> Tensor | None`, asked first: its output [B, H, Nq, e] stands
    for this call's attention, and neither `mask` nor `observe` is called; None goes on as without.
    """

    def mask(self, layer: int, query: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        """The mask over the stored keys, [batch, 1 or heads, queries, stored], from the one over all tokens."""

    def observe(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, scaling: float,
    ) -> None:  # fmt: skip
        """Called after the attention of a layer.

        Args:
            layer: index of the cache's layer.
            module: the attention module.
            query: [batch, heads, queries, dim] with positions applied; key, value: [batch, kv heads, stored, dim].
            mask: the model's own, over all tokens ever seen, or None for a plain causal one without padding.
            scaling: the factor on the scores.
        """


def hand_over(keys: torch.Tensor, observer: Observer, layer: int) -> torch.Tensor:
    """Marks the keys that a cache returns from `update`, so that their attention is shown to it."""
    setattr(keys, _OBSERVER, (observer, layer))
    return keys


def is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask is plain causal with padding; others (a tree of drafts, a prefix) hide keys in their own ways."""
    return hasattr(mask, _CAUSAL)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, or what the module's owner or the cache that marked the keys makes of it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found, own = getattr(key, _OBSERVER, None), module.__dict__.get(_ATTEND)
    if found is None:
        if own is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return own(_call(module, query, key, value, attention_mask, kwargs)).transpose(1, 2).contiguous(), None
    if kwargs.get("position_bias") is not None:
        name = type(module).__name__
        raise UsageError(f"{name} adds a bias per position to its attention, which a cache of a method can't follow")
    observer, layer = found
    ask = getattr(observer, "attend", None)
    if ask is not None:
        output = ask(layer, dataclasses.replace(_call(module, query, key, value, attention_mask, kwargs), layer=layer))
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    whole = attention_mask is None or attention_mask.shape[-1] == key.shape[2]
    if own is not None and whole:
        output = own(_call(module, query, key, value, attention_mask, kwargs)).transpose(1, 2).contiguous()
    else:
        mask = observer.mask(layer, query, attention_mask)
        output = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    observer.observe(layer, module, query, key, value, attention_mask, scaling)
    return output, None


def _call(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Call:  # fmt: skip
    further = dict(kwargs)
    scaling, dropout, causal = further.pop("scaling", None), further.pop("dropout", 0.0), further.pop("is_causal", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
    if causal and mask is None and 1 < query.shape[2] < key.shape[2]:  # a static cache before its first tokens
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    owner = module.__dict__.get(_ATTEND)
    return Call(module, getattr(owner, "layer", -1), query, key, value, mask, scaling, causal, dropout, further)


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The function that stands for SDPA in one attention module."""

    layer: int
    run: Callable[[Call], torch.Tensor]

    def __call__(self, call: Call) -> torch.Tensor:
        return self.run(call)


def attend_with(host: Host, layer: int, run: Callable[[Call], torch.Tensor]) -> None:
    """Puts `run(call) -> [B, H, Nq, e]` in the place of SDPA in one layer of a model that uses transformers' interface.

    Raises:
        UsageError: as `take_over`; an unknown layer, one without attention, or one that has such a function already.
    """
    layers = host.layers
    if not 0 <= layer < len(layers) or layers[layer].attention is None:
        raise UsageError(f"there is no attention in layer {layer}; the model has the layers 0 to {len(layers) - 1}")
    module = layers[layer].attention
    assert module is not None
    if _ATTEND in module.__dict__:
        raise UsageError(f"the attention of layer {layer} is taken over already")
    take_over(host)
    host.changes.set(module, _ATTEND, _Owner(layer, run))


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' SDPA mask, remembering whether it is plain causal."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask = sdpa_mask(*args, **kwargs)
    if mask is not None and kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        setattr(mask, _CAUSAL, True)
    return mask


def take_over(host: Host) -> None:
    """Shows the attention of a model to caches; `host.changes` undoes it.

    Raises:
        UsageError: the model's attention does not go through transformers' interface, or is not SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    model, name = host.model, type(host.model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise UsageError(f"a cache can't see the attention of {name}: it does not use transformers' AttentionInterface")
    configs: dict[int, Any] = {}
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_attn_implementation_internal", None) is not None:
            configs[id(config)] = config
    others = {config._attn_implementation_internal for config in configs.values()} - {"sdpa", NAME}
    if others or not configs:
        kinds = ", ".join(sorted(others)) or "none of transformers' kinds"
        raise UsageError(f'{name} runs its attention as {kinds}: call model.set_attn_implementation("sdpa") first')
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    for config in configs.values():
        host.changes.set(config, "_attn_implementation_internal", NAME)
