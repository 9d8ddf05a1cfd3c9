"""Causal language models: layers, sublayers that can be left out, the residual stream, the cache, generation."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call, attend_with
from hasten.hosts.structure import is_norm
from hasten.hosts.sublayers import SublayerHost


class DecoderHost(SublayerHost):
    """A decoder: embedding, blocks with causal attention, a last norm, a language-model head."""

    kind = "decoder"
    _prompt_only: frozenset[int] = frozenset()

    @property
    def lm_head(self) -> nn.Module | None:
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return head if head is not None else getattr(self.model, "lm_head", None)

    @property
    def embedding(self) -> nn.Module:
        find: Any = getattr(self.model, "get_input_embeddings", None)
        if find is not None:
            return find()
        return next(part for part in self.model.modules() if isinstance(part, nn.Embedding))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, the last of those that stand beside the list of blocks."""
        parent = self.model.get_submodule(self.blocks_path.rpartition(".")[0])
        norms = [part for part in parent.children() if is_norm(part)]
        return norms[-1] if norms else None

    @property
    def cache_layers(self) -> list[int]:
        """The layers that write to the cache: those with attention that also run while decoding."""
        return [i for i in range(len(self.blocks)) if self.has(i, "attention") and i not in self._prompt_only]

    def new_cache(self) -> Any:
        """An empty cache for one call of generate or forward, a transformers `Cache`.

        Raises:
            UsageError: the model is no transformers model.
        """
        from transformers import DynamicCache

        config = getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise UsageError(f"{type(self.model).__name__} has no transformers config, so no cache fits it")
        return DynamicCache(config=config)

    def wrap_generate(self, fn: Callable[..., Any]) -> None:
        """Puts `fn(inner_generate, *args, **kwargs)` in the place of `model.generate`; the last one is the outermost.

        Raises:
            UsageError: the model has no `generate`.
        """
        inner = getattr(self.model, "generate", None)
        if inner is None:
            raise UsageError(
                f"{type(self.model).__name__} has no generate: use the class with a language-model head (a CausalLM)"
            )
        self.changes.set(self.model, "generate", functools.partial(fn, inner))

    def attend_with(self, layer: int, run: Callable[[Call], torch.Tensor]) -> None:
        """Puts `run(call) -> [B, H, Nq, e]` in the place of one layer's softmax attention (`hosts.attention.Call`).

        Raises:
            UsageError: attention that does not go through transformers' interface or is not SDPA, an unknown layer, or
                one whose attention is taken over already.
        """
        attend_with(self, layer, run)

    def _example(self) -> dict[str, Any]:
        return {"input_ids": torch.arange(3, device=self.device)[None] % self.embedding.weight.shape[0]}  # type: ignore[union-attr,index]

    def _run(self, batch: dict[str, Any]) -> Any:
        if hasattr(self.model, "config") and hasattr(self.model.config, "get_text_config"):
            return self.forward({"use_cache": False} | batch)
        if "input_ids" in inspect.signature(self.model.forward).parameters:
            return self.forward(batch)
        return self.model(batch["input_ids"].to(self.device))

    def _check_drop(self, part: str) -> None:
        if part == "attention" and sum(self.has(i, part) for i in range(len(self.blocks))) == 1:
            raise UsageError("at least one attention must stay: without any, a token can't see those before it")
        if part == "attention" and self.anatomy.additive:
            self._check_sharing()

    def skip_while_decoding(self, indices: Iterable[int]) -> None:
        """Blocks that run for the prompt only: once the cache holds tokens, the residual stream passes them by.

        They store no keys and values. A forward without a cache runs them all. Whatever is run on a filled cache counts
        as decoding, further parts of a prompt too; a cache of fixed size (`StaticCache`) does not work.

        Raises:
            UsageError: no index or an unknown one, the first block (whose cache says how much is stored), or no
                transformers model.
        """
        chosen = sorted(set(self._checked(indices)))
        if chosen[0] == 0:
            raise UsageError("layer 0 can't be skipped while decoding: its cache says how many tokens are stored")
        if not hasattr(getattr(self.model, "config", None), "get_text_config"):
            raise UsageError(f"{type(self.model).__name__} has no transformers cache that says when decoding begins")
        self._check_sharing()
        for i in chosen:
            self.changes.set(self.blocks[i], "forward", _for_prompt_only(self.blocks[i].forward, self.anatomy.length))
        self.changes.set(self, "_prompt_only", self._prompt_only | set(chosen))
        self._renumber()

    def _put(self, blocks: list[nn.Module], chosen: list[int]) -> None:
        if self._prompt_only:
            raise UsageError("some layers are skipped while decoding: layers can't be removed or copied after that")
        super()._put(blocks, chosen)

    def _check_sharing(self) -> None:
        for config in self._configs():
            if isinstance(getattr(type(config), "kv_sharing_modes", None), property):
                name = type(self.model).__name__
                raise UsageError(f"{name} shares keys and values between layers: its attention can't be dropped")

    def _renumber(self) -> None:
        """Cache indices: consecutive over the attention that stays, unless layers differ in their kind of cache.

        Cache layers that nobody writes to are marked, so that a cache made from the config counts tokens rightly.
        """
        depth, configs = len(self.blocks), self._configs()
        with_attention = self.cache_layers
        mixed = any(len(set(getattr(config, "layer_types", None) or ())) > 1 for config in configs)
        for i, block in enumerate(self.blocks):
            place = with_attention.index(i) if i in with_attention and not mixed else i
            self._set_index(block, i if mixed else place)
        unused = set(range(depth)) - set(with_attention) if mixed else set(range(len(with_attention), depth))
        modes = ["reuse" if i in unused else None for i in range(depth)]
        for config in configs:
            if unused or "kv_sharing_modes" in vars(config):
                self.changes.set(config, "kv_sharing_modes", modes)


def _for_prompt_only(forward: Callable[..., Any], length: int) -> Callable[..., Any]:
    """A block's forward that does nothing once the cache holds more than the tokens at hand.

    Args:
        length: entries of the tuple that the block returns, 0 for a tensor.
    """
    names = list(inspect.signature(forward).parameters)
    name = "past_key_values" if "past_key_values" in names else "layer_past"
    place = names.index(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        cache = args[place] if len(args) > place else kwargs.get(name)
        if cache is not None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if cache.get_seq_length() > hidden_states.shape[1]:  # the first block has stored these tokens already
                return (hidden_states,) + (None,) * (length - 1) if length else hidden_states
            if len(args) > place:
                args = (*args[:place], None, *args[place + 1 :])
            else:
                kwargs[name] = None
        return forward(*args, **kwargs)

    return run
