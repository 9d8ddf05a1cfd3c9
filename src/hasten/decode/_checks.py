"""What drafting can't serve, said before a model runs."""

from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError

KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "synced_gpus"}


def check_request(model: Any, ids: Tensor, config: Any, streamer: Any, kwargs: dict[str, Any]) -> None:
    """Raises UsageError for what drafting can't serve, before a model runs."""
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        kind = mode.value.replace("_", " ")
        raise UsageError(f"drafting serves greedy and sampled generation, not {kind}: set num_beams=1, one assistant")
    if config.guidance_scale not in (None, 1):
        raise UsageError("guidance_scale runs the model a second way at every step, which drafting can't: leave it out")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name) and config.return_dict_in_generate:
            raise UsageError(f"{name} is not kept while drafting: leave it out, or undo the decode method")
    if not config.use_cache or kwargs.get("past_key_values") is None:
        raise UsageError("drafting needs the cache: leave out use_cache=False")
    more = sorted(name for name, value in kwargs.items() if name not in KNOWN and value is not None)
    if more:
        raise UsageError(f"drafting takes token ids and an attention mask only, not {', '.join(more)}")
    if not ids.shape[1]:
        raise UsageError("the prompt is empty: give at least one token, such as the one that begins a text")
    if kwargs.get("synced_gpus"):
        raise UsageError("drafting can't be synchronised across the ranks of a sharded model: gather the model first")
    if streamer is not None and len(ids) > 1:
        raise UsageError("a streamer shows one row: give a batch of one")
    if kwargs["past_key_values"].get_seq_length() and len(ids) > 1:
        raise UsageError("a cache that holds tokens already works with one row only while drafting: give an empty one")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if positions is not None:
        usual = torch.arange(ids.shape[1], device=ids.device)[None]
        if mask is not None:
            usual = ((mask.long().cumsum(-1) - 1) * mask).clamp(min=0)
            positions = positions * mask
        if positions.shape[-1] != ids.shape[1] or bool((positions != usual).any()):
            raise UsageError("drafting sets the positions itself, by counting real tokens: leave out position_ids")


def check_context(model: Any, limit: int, who: str) -> None:
    """Raises UsageError where the context of the model or of its draft (`who`) is too short for the request."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and limit > longest:
        other = "" if who == "model" else f" or give another {who}"
        raise UsageError(
            f"the {who} has a context of {longest} tokens and the request may reach {limit}: "
            f"lower max_new_tokens{other}"
        )


def check_cache(cache: Any, who: str) -> None:
    """Raises UsageError where a cache can't take back rejected tokens."""
    layers = getattr(cache, "layers", None)
    croppable = layers and all(getattr(layer, "is_croppable", False) for layer in layers)
    if layers == [] and hasattr(cache, "crop"):
        croppable = True  # layers are made lazily, all of the plain kind
    if not croppable:
        name = next((type(one).__name__ for one in layers or [] if not getattr(one, "is_croppable", False)), "")
        raise UsageError(
            f"{who} uses the cache {name or type(cache).__name__}, which can't take back tokens: speculative decoding "
            "has to when a draft is rejected; leave out the method that made the cache, or the decode method"
        )
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        raise UsageError(
            f"{who} has sliding-window attention, whose cache can't take back tokens once the window is full: "
            "speculative decoding needs full attention in every layer"
        )
