"""Masked- and block-diffusion language models: a decoder that sees in both directions and fills in a mask token.

LLaDA, Dream and SDAR are such models, and so is any decoder of transformers whose config has `mask_token_id`, called
with two-way attention. A denoising step may compute some positions only: a `PlaceCache` holds keys and values of all
positions, writes those that a forward computes to their places, and lets attention read all of them.

Letters: B rows, T positions, Q positions that a forward computes, C of them whose scores are wanted, V vocabulary.
"""

import functools
import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from hasten.core.errors import UsageError
from hasten.hosts.decoders import DecoderHost

SHIFTED = ("dream", "dimple")  # their scores at a position are those of the next one, as in the models they began as
BLOCKWISE = ("sdar",)


class PlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, kv heads, T, d] each, which a forward writes at `cache.at`."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, places: "PlaceCache") -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.places.at
        if at is None:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        elif at.ndim == 1:
            self.keys.index_copy_(2, at, key_states)  # type: ignore[union-attr]
            self.values.index_copy_(2, at, value_states)  # type: ignore[union-attr]
        else:
            index = at[:, None, :, None]
            self.keys.scatter_(2, index.expand_as(key_states), key_states)  # type: ignore[union-attr]
            self.values.scatter_(2, index.expand_as(value_states), value_states)  # type: ignore[union-attr]
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.length, 0

    def get_seq_length(self) -> int:
        return self.places.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.places.length


class PlaceCache(Cache):
    """A cache of `length` positions, rewritten in place.

    Attributes:
        at: where the next forward writes: None for all positions in order (the first forward must be one such), [Q] for
            the same places in all rows, [B, Q] for places of each row; a place may be named twice.
    """

    def __init__(self, layers: int, length: int) -> None:
        super().__init__(layers=[PlaceLayer(self) for _ in range(layers)])
        self.length = length
        self.at: torch.Tensor | None = None


class DiffusionLMHost(DecoderHost):
    """A decoder that denoises.

    Attributes:
        mask_token: the token that stands for what is not known yet.
        shifted: whether the scores at position i are those of the token at i + 1 (Dream); else at i.
        block_length: of the blocks that the model was trained to fill in one after another, None where unknown.
        blockwise: whether a token sees its own block and those before it only (SDAR); else all tokens.
    """

    kind = "diffusion_lm"

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: str,
        attention: str | None = None,
        mlp: str | None = None,
        *,
        mask_token: int | None = None,
        shifted: bool | None = None,
        block_length: int | None = None,
    ) -> None:
        refuse_canvas(model)
        config: Any = getattr(model, "config", None)
        token = getattr(config, "mask_token_id", None) if mask_token is None else mask_token
        name = type(model).__name__
        if not isinstance(token, int):
            raise UsageError(f"{name} has no mask token: say which id it is with describe(..., mask_token=ID)")
        super().__init__(model, blocks, attention, mlp)
        words = self.embedding.weight.shape[0]  # type: ignore[union-attr,index]
        if not 0 <= token < words:
            raise UsageError(f"the mask token {token} is no token of {name}, which has {words}")
        told = {"mask_token_id": mask_token, "shifted": shifted, "block_length": block_length}
        for key, value in told.items():  # so that a model that is saved and loaded knows it too
            if value is not None and config is not None and getattr(config, key, None) != value:
                self.changes.set(config, key, value)
        self.mask_token = token
        usual = str(getattr(config, "model_type", "")).lower().startswith(SHIFTED)
        self.shifted = bool(getattr(config, "shifted", usual)) if shifted is None else shifted
        length = getattr(config, "block_length", None) or getattr(config, "block_size", None)
        self.block_length: int | None = length if block_length is None else block_length
        self.blockwise = str(getattr(config, "model_type", "")).lower().startswith(BLOCKWISE)
        self._native = any(one.__module__.startswith("transformers.models.") for one in type(model).__mro__)
        self._takes = inspect.signature(model.forward).parameters

    @property
    def context(self) -> int | None:
        """The most positions that the model has, None where it does not say."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_sequence_length", None)
        return found if isinstance(found, int) else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""
        for owner in (getattr(self.model, "generation_config", None), getattr(self.model, "config", None)):
            found = getattr(owner, "eos_token_id", None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (found,)
        return ()

    def forward(self, inputs: dict[str, Any]) -> Any:
        """As every host's, with attention in both directions."""
        return super().forward(({"is_causal": False} if self._native else {}) | inputs)

    @property
    def _takes_4d(self) -> bool:
        """Whether a mask of keys goes to SDPA as it is; else the model makes one from [B, T]."""
        if self._native:
            return self.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
        return hasattr(self.model, "diffusion_generate")  # Dream's own code

    def _explicit(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask of four dimensions as the model's attention takes it."""
        if self._takes_4d:
            return mask
        if not self._native or self.model.config._attn_implementation != "eager":  # type: ignore[union-attr]
            name = type(self.model).__name__
            raise UsageError(f"{name} takes no mask of its own making: load it with attn_implementation='sdpa'")
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)  # type: ignore[arg-type,call-overload]

    @functools.cached_property
    def sees_both_ways(self) -> bool:
        """Whether a token's scores depend on the token after it when the host calls the model."""
        other = (self.mask_token + 1) % self.embedding.weight.shape[0]  # type: ignore[union-attr,operator,index]
        ids = torch.tensor([[other, other], [other, self.mask_token]], device=self.device)
        with torch.no_grad():
            first = self.scores(ids)[:, 0]
        return not torch.equal(first[0], first[1])

    def check_cache(self, name: str) -> None:
        """Raises UsageError where positions can't be computed one by one with the keys of the others.

        Args:
            name: of the method that wants to, for messages.
        """
        model, config = type(self.model).__name__, getattr(self.model, "config", None)
        missing = [one for one in ("position_ids", "past_key_values") if one not in self._takes]
        if not self._native or missing:
            raise UsageError(
                f"{name} computes some positions only, and {model} has no cache of transformers: load the weights into "
                "the class of transformers with this architecture (Llama for LLaDA, Qwen2 for Dream, Qwen3 for SDAR)"
            )
        text: Any = config.get_text_config(decoder=True)  # type: ignore[union-attr]
        partial = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if partial:
            raise UsageError(f"{name} needs layers that see the whole text; {model} has others: {', '.join(partial)}")

    def place_cache(self, length: int) -> PlaceCache:
        """An empty cache for `scores`, for as many positions."""
        return PlaceCache(len(self.cache_layers), length)

    def scores(
        self,
        tokens_BT: torch.Tensor,
        *,
        real_BT: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        at: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        cache: PlaceCache | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One forward with attention in both directions: the model's logits, [B, C, V], not moved by `shifted`.

        Args:
            tokens_BT: all positions.
            real_BT: bool, False at padding; None where nothing is padded.
            positions: [T] or [B, T], each token's position for the model; counted from 0 where None.
            at: the positions that are computed, [Q] or [B, Q]; the others' keys are read from `cache`. All where None.
            keep: [C], which of the Q are given scores; all where None.
            cache: from `place_cache`, once filled by a forward of all positions.
            mask: which keys each computed position sees, bool [1 or B, 1, Q, T]; takes the place of `real_BT`.
        """
        given: dict[str, Any] = {"input_ids": tokens_BT}
        if positions is None and cache is not None:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        if positions is not None and "position_ids" in self._takes:
            given["position_ids"] = positions[None] if positions.ndim == 1 else positions
        if at is not None:
            for name, rows in given.items():
                given[name] = rows[:, at] if at.ndim == 1 else rows.expand(len(at), -1).gather(1, at)
        if mask is not None:
            given["attention_mask"] = self._explicit(mask)
        elif real_BT is not None:
            given["attention_mask"] = real_BT[:, None, None] if self._takes_4d else real_BT
        if cache is not None:
            cache.at = at
            given["past_key_values"] = cache
        if "use_cache" in self._takes:
            given["use_cache"] = cache is not None
        if self._native:
            given["is_causal"] = False
        if keep is None:
            return self.model(**given).logits
        if "logits_to_keep" in self._takes:
            return self.model(**given, logits_to_keep=keep).logits
        return self.model(**given).logits[:, keep]


def refuse_canvas(model: torch.nn.Module) -> None:
    """Raises UsageError for models that denoise random tokens instead of masks (DiffusionGemma)."""
    if "self_conditioning_logits" in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"{type(model).__name__} denoises a canvas of random tokens and has no mask token: methods that fill in "
            "masks don't work on it; use the model's own generate"
        )
