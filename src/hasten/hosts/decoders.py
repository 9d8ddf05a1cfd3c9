"""Causal language models: layers, sublayers that can be left out, the residual stream, the cache, generation."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import Anatomy, dissect
from hasten.hosts.attention import Call, attend_with
from hasten.hosts.blocks import BlockHost
from hasten.hosts.stream import See, SeeLayer, layer_hooks, sublayer_hooks
from hasten.hosts.structure import Dropped, is_norm

PARTS = ("attention", "mlp")


class DecoderHost(BlockHost):
    """A decoder: embedding, blocks with causal attention, a last norm, a language-model head.

    Attributes:
        mask: while `observe_sublayers` runs, which positions of the batch are real, bool [B, T].
    """

    kind = "decoder"
    mask: torch.Tensor | None = None
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

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The wiring of the blocks, found once with a forward of three tokens."""
        block = next((b for b in self.blocks if not any(isinstance(part, Dropped) for part in b.children())), None)
        if block is None or self.attention_name is None:
            raise UsageError("no block of this model has both its sublayers: start from the whole model")
        tokens = torch.arange(3, device=self.device)[None] % self.embedding.weight.shape[0]  # type: ignore[union-attr,index]
        training = self.model.training
        self.model.eval()
        try:
            return dissect(block, self.attention_name, self.mlp_names, lambda: self._run({"input_ids": tokens}))
        finally:
            self.model.train(training)

    def _run(self, batch: dict[str, Any]) -> Any:
        if hasattr(self.model, "config") and hasattr(self.model.config, "get_text_config"):
            return self.forward({"use_cache": False} | batch)
        if "input_ids" in inspect.signature(self.model.forward).parameters:
            return self.forward(batch)
        return self.model(batch["input_ids"].to(self.device))

    def has(self, index: int, part: str) -> bool:
        """Whether a layer still has its `attention` or `mlp`."""
        names = (self.attention_name,) if part == "attention" else self.mlp_names
        return not any(isinstance(self.blocks[index].get_submodule(n), Dropped) for n in names if n)

    def drop(self, index: int, part: str) -> None:
        """Removes one sublayer with its norms; the residual stream passes by, and attention leaves no cache entry.

        Args:
            part: `attention` or `mlp`.

        Raises:
            UsageError: an unknown layer or part, one that is gone already, the last attention, or a model whose
                sublayers do not add to a residual stream.
        """
        self._checked([index])
        if part not in PARTS:
            raise UsageError(f"a layer has the parts attention and mlp, not {part!r}")
        if not self.has(index, part):
            raise UsageError(f"the {part} of layer {index} is dropped already")
        if part == "attention" and sum(self.has(i, part) for i in range(len(self.blocks))) == 1:
            raise UsageError("at least one attention must stay: without any, a token can't see those before it")
        if not self.anatomy.additive:
            raise UsageError(
                f"{type(self.model).__name__} does not add its sublayers to a residual stream (a norm follows the sum, "
                "or the sum is inside the sublayer), so that none can be left out; whole layers can"
            )
        if part == "attention":
            self._check_sharing()
        other = PARTS[part == "attention"]
        block, own, path = self.blocks[index], self.anatomy[part], f"{self.blocks_path}.{index}."
        shared = set(self.anatomy[other].before) if self.has(index, other) else set()
        for name in (*own.modules[:-1], *own.before, *own.after):
            if name not in shared and not isinstance(block.get_submodule(name), nn.Identity):
                self.changes.module(self.model, path + name, nn.Identity())
        self.changes.module(self.model, path + own.modules[-1], Dropped(own.length))
        self._renumber()

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

    def observe_sublayers(self, batches: Iterable[dict[str, Any]], see: See) -> None:
        """Runs the batches and hands the residual stream before and after every sublayer to `see`.

        Args:
            see: called as `see(index, part, before, after)`, both [B, T, D], the parts of a block in order; `host.mask`
                [B, T] says which positions are real.
        """
        self._observe(batches, sublayer_hooks(self, see))

    def observe_layers(self, batches: Iterable[dict[str, Any]], see: SeeLayer) -> None:
        """The same around whole blocks: `see(index, before, after)`."""
        self._observe(batches, layer_hooks(self, see))

    @torch.no_grad()
    def _observe(self, batches: Iterable[dict[str, Any]], handles: list[Any]) -> None:
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                ids, mask = batch["input_ids"], batch.get("attention_mask")
                self.mask = (torch.ones_like(ids) if mask is None else mask).bool().to(self.device)
                self._run({name: value for name, value in batch.items() if name != "labels"})
        finally:
            self.mask = None
            for handle in handles:
                handle.remove()
            self.model.train(training)


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
