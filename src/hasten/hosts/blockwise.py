"""Blocks run by themselves: the calls that enter one, which others' outputs stand before, and its attention maps."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.streaming import StopError, evaluating, returning, uncached
from hasten.hosts.structure import is_norm
from hasten.hosts.weights import Weight


@dataclasses.dataclass
class BlockCall:
    """What a model hands to a block; the mask [batch, tokens] of its batch, where there is one."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None

    def run(self) -> Any:
        """The block's output, as it comes."""
        return self.block(*self.args, **self.kwargs)

    def rows(self, output: Any) -> Tensor:
        """The hidden states [tokens, width] in an output of `run`, fp32, without padding."""
        hidden = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2).float()
        if self.mask is None or self.mask.numel() != len(hidden):
            return hidden
        return hidden[self.mask.flatten().to(hidden.device).bool()]


@torch.no_grad()
def entering(host: Host, index: int, batches: list[dict[str, Any]], outputs: list[Any]) -> list[BlockCall]:
    """The calls of one block, batch by batch.

    Args:
        outputs: what the block before gave for each batch, as it came; empty for the first block.

    Raises:
        UsageError: the model's forward does not reach the block.
    """
    blocks = [layer.block for layer in host.layers[: index + 1]]
    calls: list[BlockCall] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall(blocks[-1], args, kwargs, mask))
        raise StopError

    with contextlib.ExitStack() as undo:
        undo.enter_context(evaluating(host.model))
        undo.callback(blocks[-1].register_forward_pre_hook(stop, with_kwargs=True).remove)
        for number, batch in enumerate(batches):
            mask = batch.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            with contextlib.ExitStack() as passing, contextlib.suppress(StopError):
                for block in blocks[:-1]:
                    passing.enter_context(returning(block, outputs[number]))
                host.forward(uncached(host, batch))
            if len(calls) != number + 1:
                raise UsageError(f"the model's forward did not reach {host.layers[index].path}: it can't be calibrated")
    return calls


@contextlib.contextmanager
def running(weights: dict[str, Weight], forward: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """The modules that hold these matrices compute `forward(path, x)` instead."""
    before: dict[str, Any] = {path: vars(weight.part).get("forward") for path, weight in weights.items()}
    for path, weight in weights.items():
        weight.part.forward = lambda x, path=path: forward(path, x)
    try:
        yield
    finally:
        for path, weight in weights.items():
            del weight.part.forward
            if before[path] is not None:
                weight.part.forward = before[path]


@torch.no_grad()
def feeding(calls: list[BlockCall], weights: dict[str, Weight]) -> list[tuple[list[str], nn.Module | None, Tensor]]:
    """Who reads what in a block.

    Returns:
        (paths that read one and the same tensor, the norm that makes it or None, fp32 [width], the largest absolute
        value of each input), of the matrices that the calls reach.
    """
    seen: dict[str, tuple[Tensor, str]] = {}  # of this call: the input and who was first to read it
    owners: dict[str, str] = {}
    norms: dict[int, tuple[Tensor, nn.Module]] = {}
    makers: dict[str, nn.Module | None] = {}
    largest: dict[str, Tensor] = {}
    hooks = []

    def read(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            first = next((one for held, one in seen.values() if held is x), path)
            seen[path] = x, first
            if path in owners and owners[path] != first:
                first = path  # not always the same: by itself
            owners[path] = first
            maker = norms.get(id(x), (None, None))[1]
            makers[path] = maker if makers.get(path, maker) is maker else None
            values = x.detach().flatten(0, -2).float().abs()
            if values.numel():
                most = torch.nan_to_num(values.amax(0), posinf=0)
                largest[path] = torch.maximum(largest[path], most) if path in largest else most

        return hook

    def made(part: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            norms[id(output)] = output, part

    try:
        for path, weight in weights.items():
            hooks.append(weight.part.register_forward_pre_hook(read(path)))
        for part in calls[0].block.modules():
            if is_norm(part):
                hooks.append(part.register_forward_hook(made))
        for call in calls:
            seen.clear()
            norms.clear()
            call.run()
    finally:
        for one in hooks:
            one.remove()
    found = []
    for owner in dict.fromkeys(owners.values()):
        paths = [path for path, one in owners.items() if one == owner]
        maker = makers[paths[0]] if all(makers[path] is makers[paths[0]] for path in paths) else None
        found.append((paths, maker, torch.stack([largest[path] for path in paths]).amax(0)))
    return found


@contextlib.contextmanager
def attention_maps(host: Host, index: int, queries: int | None = None) -> Iterator[list[Tensor]]:
    """Within it, each attention of one layer adds its log probabilities [B, H, Nq, Nk] to the list that is given.

    The list stays empty where the model's attention does not go through transformers' interface.

    Args:
        queries: at most how many of the queries, evenly spaced; all where None.
    """
    maps: list[Tensor] = []

    def run(call: Call) -> Tensor:
        if call.further.get("position_bias") is None:
            maps.append(_log_probabilities(call, queries))
        return call.dense()

    mark = len(host.changes)
    if hasattr(host, "attend_with"):
        with contextlib.suppress(UsageError):
            host.attend_with(index, run)
    try:
        yield maps
    finally:
        host.changes.undo(mark)


def _log_probabilities(call: Call, queries: int | None) -> Tensor:
    count = call.query.shape[2]
    some = slice(None, None, max(1, -(-count // (queries or count))))
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1).float()
    scores = call.query[:, :, some].float() @ key.mT * call.scaling
    least = torch.finfo(scores.dtype).min / 2
    if call.mask is not None:
        mask = call.mask[..., some, : key.shape[2]] if call.mask.shape[2] == count else call.mask[..., : key.shape[2]]
        scores = (
            scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask.float().clamp(min=least)
        )
    elif call.causal and count > 1:
        later = torch.ones(count, key.shape[2], dtype=torch.bool, device=scores.device).triu(1 + call.past)
        scores = scores.masked_fill(later[some], least)
    return scores.log_softmax(-1)
