"""Tokens leave a decoder after the block at which they are sure."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import output_tensor
from hasten.hosts.exits import PerThread
from hasten.hosts.lagging import KeysOnly, LaggingLayer, Skipped, Stored, together

_POSITIONS = ("position_ids", "position_embeddings", "cache_position")
_OWNERS = ("past_key_values", "layer_past")


@dataclasses.dataclass
class _TokenPass:
    """One forward with a cache.

    Attributes:
        decoding: whether the cache held tokens before; only then tokens leave.
        left: which tokens have left, bool [B, T], None for none; `whole`: all have.
        states: what the tokens that left hand to the last norm, [B, T, D].
        logits: where it is a single step that all rows have left, their logits [B, 1, V].
        seen: of a prompt, the stream at the exits that remember it.
    """

    cache: Any
    decoding: bool
    left: torch.Tensor | None = None
    whole: bool = False
    states: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    seen: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)


class TokenExits:
    """Exits of a decoder, in forwards on a cache that holds tokens already; a prompt runs whole.

    Rows do not see each other: a token that has left keeps its state from there on, of which the layers behind compute
    its keys and values (`LaggingLayer`). A layer is skipped where all tokens of the forward have left; otherwise it
    runs for all, and those that had left are put back. So several tokens at once come to what they would one by one.

    Attributes:
        norm, head: what turns the stream into logits. `head` is its own forward, without exits.
        counts: tokens that left, by the number of blocks that they ran.
    """

    def __init__(self, host: Any, counts: dict[str, int]) -> None:
        self.depth, self.counts = len(host.blocks), counts
        self.norm, self.head = host.final_norm, host.lm_head.forward
        self.place = {block: place for place, block in enumerate(host.cache_layers)}
        self.length = host.anatomy.length
        self.passes = PerThread()
        self.blocks: list[_TokenBlock] = []

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(states if self.norm is None else self.norm(states))

    def begin(self, cache: Any) -> _TokenPass:
        held = [layer for layer in cache.layers if layer.get_seq_length()]
        lags = bool(held) and isinstance(held[-1], LaggingLayer)
        if not lags and (
            held or type(cache) is not DynamicCache or any(type(one) is not DynamicLayer for one in cache.layers)
        ):
            raise UsageError(
                "exits need a plain DynamicCache, filled from its first token by this model: start from an empty one, "
                "and leave out cache_implementation and methods with a cache of their own"
            )
        return self.passes.put(_TokenPass(cache, bool(held)))

    def memory(self, cache: Any, index: int) -> LaggingLayer:
        return next(layer for layer in cache.layers if getattr(layer, "owner", -1) == index)

    def end_prompt(self, now: _TokenPass) -> None:
        """From here on layers may lag; exits that remember get a layer of the cache with the prompt in it."""
        first = next(one.index for one in self.blocks if one.exit is not None)
        for index, place in self.place.items():
            if index > first:
                now.cache.layers[place] = LaggingLayer.of(now.cache.layers[place])
        for index, x in now.seen.items():
            layer = LaggingLayer(index)
            layer.update(*self.blocks[index].exit.remember(x))  # type: ignore[union-attr]
            now.cache.layers.append(layer)

    def count(self, blocks: int, tokens: int) -> None:
        if tokens:
            self.counts[str(blocks)] = self.counts.get(str(blocks), 0) + tokens


def check_token_exits(host: Any) -> None:
    """Raises UsageError where tokens can't leave; changes nothing.

    Raises:
        UsageError: no transformers decoder with a language-model head, layers that see a part of the text only, a cache
            that a method took over, or exits that are there already.
    """
    name = type(host.model).__name__
    if host.kind != "decoder" or not hasattr(host, "new_cache"):
        raise UsageError(f"{name} is a {host.kind}, not a decoder")
    cache = host.new_cache()
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UsageError(
            f"exits need layers with a plain cache of the whole text; {name} has others (sliding windows, recurrent "
            "states, or the cache of a kv method)"
        )
    if host.lm_head is None:
        raise UsageError(f"{name} has no language-model head: use the class with one (a CausalLM)")
    if any(hasattr(block, "exit") for block in host.blocks) or "forward" in vars(host.lm_head):
        raise UsageError("this model has exits already: undo them first")


def put_token_exits(host: Any, exits: dict[int, nn.Module], counts: dict[str, int], threshold: float) -> None:
    """Lets tokens leave a decoder whose exit is surer than the threshold.

    Args:
        exits: block to its head, `head(x, memory, visible) -> [B, T, D]`, what it hands to the last norm in the place
            of the stream x [B, T, D]. `memory`: None, or where `head.memory` the keys and values of all tokens so far
            that `head.remember(x)` made, [B, 1, S, ...] each. `visible`: bool [B or 1, T, S] or None for all.
        counts: filled with the tokens that left after so many blocks; prompts do not count.

    Raises:
        UsageError: as `check_token_exits`; nothing is changed then.
    """
    check_token_exits(host)
    shared = TokenExits(host, counts)
    for index, block in enumerate(host.blocks):
        if index in exits:
            host.changes.set(block, "exit", exits[index])
        new = _TokenBlock(shared, index, block, block.forward, threshold)
        shared.blocks.append(new)
        host.changes.set(block, "forward", new)
    host.changes.set(host.lm_head, "forward", _LastHead(shared))


@dataclasses.dataclass
class _LastHead:
    shared: TokenExits

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        now = self.shared.passes.get()
        self.shared.passes.put(None)
        if now is not None and now.logits is not None and states.shape[:2] == now.logits.shape[:2]:
            return now.logits
        return self.shared.head(states)


class _TokenBlock:
    def __init__(self, shared: TokenExits, index: int, block: nn.Module, inner: Any, threshold: float) -> None:
        self.shared, self.index, self.block, self.inner, self.threshold = shared, index, block, inner, threshold
        self.exit: Any = getattr(block, "exit", None)
        self.names = list(inspect.signature(inner).parameters)
        self.owner = next((name for name in _OWNERS if name in self.names), "past_key_values")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared = self.shared
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache, x = given.get(self.owner), given["hidden_states"]
        if self.block.training or cache is None:
            shared.passes.put(None)
            return self.inner(**given)
        now = shared.begin(cache) if self.index == 0 else shared.passes.get()
        if now is None:
            raise UsageError("blocks with exits run one after the other from the first: run the model, not a block")
        if now.whole:
            out = x
            self._skip(now, x, given)
        else:
            self._catch_up(now, given)
            out = output_tensor(self.inner(**given))
            if now.left is not None:
                out = torch.where(now.left[..., None], x, out)
            if self.exit is not None and now.decoding:
                self._leave(now, out, given.get("attention_mask"))
            elif self.exit is not None and self.exit.memory:
                now.seen[self.index] = out
        if self.index == shared.depth - 1:
            out = self._end(now, out)
        return (out,) + (None,) * (shared.length - 1) if shared.length else out

    def _skip(self, now: _TokenPass, x: torch.Tensor, given: dict[str, Any]) -> None:
        token = Skipped(x, {name: given[name] for name in _POSITIONS if name in given})
        if self.index in self.shared.place:
            now.cache.layers[self.shared.place[self.index]].waiting.append(token)
        if self.exit is not None and self.exit.memory:
            self.shared.memory(now.cache, self.index).waiting.append(token)

    def _catch_up(self, now: _TokenPass, given: dict[str, Any]) -> None:
        """Keys and values of the tokens that passed this layer by."""
        place = self.shared.place.get(self.index)
        layer: Any = None if place is None or not now.decoding else now.cache.layers[place]
        if not getattr(layer, "waiting", None):
            return
        token = together(layer.waiting)
        layer.waiting = []
        given = given | token.where | {"hidden_states": token.x, "attention_mask": None}
        try:
            self.inner(**given | {self.owner: KeysOnly(now.cache, layer)})
        except Stored:
            return

    def _leave(self, now: _TokenPass, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        memory, visible = None, None
        if self.exit.memory:
            layer = self.shared.memory(now.cache, self.index)
            before, layer.waiting = layer.waiting, []
            if before:
                layer.update(*self.exit.remember(together(before).x))
            memory = layer.update(*self.exit.remember(x))
            visible = visible_to(mask, x.shape[1], memory[0].shape[2], x.device)
        states = self.exit(x, memory, visible)
        logits = self.shared.logits(states)
        sure = logits.detach().float().softmax(-1).amax(-1) > self.threshold
        new = sure if now.left is None else sure & ~now.left
        number = int(new.sum())
        if not number:
            return
        self.shared.count(self.index + 1, number)
        whole = number == new.numel()
        now.states = states if whole or now.states is None else torch.where(new[..., None], states, now.states)
        now.left = new if now.left is None else now.left | new
        now.whole = whole or bool(now.left.all())
        if whole and x.shape[1] == 1:
            now.logits = logits

    def _end(self, now: _TokenPass, x: torch.Tensor) -> torch.Tensor:
        if not now.decoding:
            self.shared.end_prompt(now)
        elif now.left is None:
            self.shared.count(self.shared.depth, x.shape[0] * x.shape[1])
        else:
            self.shared.count(self.shared.depth, int((~now.left).sum()))
            x = torch.where(now.left[..., None], now.states, x)  # type: ignore[arg-type]
        return x


def visible_to(mask: torch.Tensor | None, new: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Which of `length` tokens the last `new` see, bool [B or 1, new, length], None for all of them."""
    if mask is None or mask.ndim == 2:
        order = torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)[None]
        if mask is None:
            return None if new == 1 else order
        return order & mask[:, None, :length].bool()
    rows = mask[:, 0, :, :length]
    return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
