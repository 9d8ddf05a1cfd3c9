"""Images leave a vision transformer after the block at which they are sure.

An exit is a module on its block (`block.exit`), so that it moves, saves and loads with the model. The rows of a batch
that go on are taken together, a block without any is not run, and the classifiers answer with the exit's logits for
those that have left. For tokens of a decoder see `hosts.token_exits`.
"""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import output_tensor
from hasten.hosts.mixing import Grids


@torch.no_grad()
def streams(
    host: Any, batches: list[dict[str, Any]], blocks: list[int]
) -> Iterator[tuple[list[torch.Tensor], Any, tuple[int, ...] | None]]:
    """Runs each batch without its labels; yields what the named blocks return [B, N, D], the model's output, and the
    grid of a vision model's patches."""
    seen: dict[int, torch.Tensor] = {}
    training, handles = host.model.training, []
    grids = Grids(True, host.num_prefix_tokens) if host.kind == "vit" else None
    host.model.eval()
    try:
        if grids is not None:
            handles.append(host.patch_embedding.register_forward_hook(grids.see_patches))
        for index in blocks:
            keep = lambda _, given, output, index=index: seen.__setitem__(index, output_tensor(output))  # noqa: E731
            handles.append(host.blocks[index].register_forward_hook(keep))
        for batch in batches:
            more = {"use_cache": False} if host.kind == "decoder" else {}
            output = host.forward(more | {name: value for name, value in batch.items() if name != "labels"})
            found = [seen[index] for index in blocks]
            yield found, output, None if grids is None else grids.of(found[0].shape[1])
    finally:
        for handle in handles:
            handle.remove()
        host.model.train(training)


class PerThread:
    """The forward pass that is under way, one in each thread; a copy of the model starts without any."""

    def __init__(self) -> None:
        self._passes: dict[int, Any] = {}

    def get(self) -> Any:
        return self._passes.get(threading.get_ident())

    def put(self, now: Any) -> Any:
        if now is None:
            self._passes.pop(threading.get_ident(), None)
        else:
            self._passes[threading.get_ident()] = now
        return now

    def __deepcopy__(self, memo: dict[int, Any]) -> "PerThread":
        return PerThread()


def classifiers(host: Any) -> list[nn.Linear]:
    """The classifier, and behind it that of the distillation token, where there is one.

    Raises:
        UsageError: no vision transformer with a linear classifier, or blocks whose forward is replaced.
    """
    if host.kind != "vit" or not hasattr(host, "blocks"):
        raise UsageError(f"{type(host.model).__name__} is a {host.kind}, not a vision transformer")
    inside = {id(part) for part in host.blocks.modules()}
    found = [p for p in host.model.modules() if isinstance(p, nn.Linear) and id(p) not in inside]
    found = found[-2:] if host.has_distillation_token else found[-1:]
    if len(found) < 1 + host.has_distillation_token or len({part.out_features for part in found}) > 1:
        raise UsageError(
            f"{type(host.model).__name__} ends in no linear classifier, so that an exit has no classes: use the class "
            "for image classification"
        )
    if any("forward" in vars(block) or hasattr(block, "exit") for block in host.blocks):
        raise UsageError(
            "a block's forward is replaced already: leave out methods that merge tokens, or undo the exits"
        )
    return found


class ImageExits:
    """What the blocks and classifiers of one model share.

    Attributes:
        counts: rows that left, by the number of blocks that they ran.
    """

    def __init__(self, prefix: int, depth: int, counts: dict[str, int]) -> None:
        self.grids, self.depth, self.counts = Grids(True, prefix), depth, counts
        self.passes = PerThread()

    def clear(self, *_: Any) -> None:
        """The forward is over."""
        now = self.passes.get()
        if now is not None:
            self.count(self.depth, now.batch if now.going is None else len(now.going))
        self.passes.put(None)

    def count(self, blocks: int, rows: int) -> None:
        if rows:
            self.counts[str(blocks)] = self.counts.get(str(blocks), 0) + rows


@dataclasses.dataclass
class _ImagePass:
    """One batch: the rows that go on (None for all), and the logits of the others for every classifier."""

    batch: int
    grid: tuple[int, ...]
    going: torch.Tensor | None = None
    left: list[torch.Tensor] = dataclasses.field(default_factory=list)
    logits: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)


def put_image_exits(host: Any, exits: dict[int, nn.Module], counts: dict[str, int]) -> None:
    """Lets rows leave a vision transformer.

    Args:
        exits: block to its head: `head.leave(x [b, N, D], grid) -> (logits [b, C] of each classifier, bool [b])`.
        counts: filled with the rows that left after so many blocks.

    Raises:
        UsageError: as `classifiers`; nothing is changed then.
    """
    ends = classifiers(host)
    shared = ImageExits(host.num_prefix_tokens, len(host.blocks), counts)
    changes = host.changes
    changes.hook(host.patch_embedding.register_forward_hook(shared.grids.see_patches))
    for index, block in enumerate(host.blocks):
        if index in exits:
            changes.set(block, "exit", exits[index])
        changes.set(block, "forward", _ImageBlock(shared, index, block, block.forward))
    for place, part in enumerate(ends):
        changes.set(part, "forward", _Classifier(shared, place, part.forward))
    changes.hook(host.model.register_forward_hook(shared.clear))


@dataclasses.dataclass
class _ImageBlock:
    shared: ImageExits
    index: int
    block: nn.Module
    inner: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared, passes = self.shared, self.shared.passes
        if self.block.training:
            passes.put(None)
            return self.inner(*args, **kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.index == 0:
            passes.put(_ImagePass(x.shape[0], shared.grids.of(x.shape[1]) or ()))
        now = passes.get()
        if now is None:
            raise UsageError("blocks with exits run one after the other from the first: run the model, not a block")
        going = now.going
        if going is None:
            part = out = self.inner(x, *rest, **kwargs)
        elif not len(going):
            return x
        else:
            rest, kwargs = _rows_of(rest, going, len(x)), _rows_of(kwargs, going, len(x))
            part = self.inner(x.index_select(0, going), *rest, **kwargs)
            out = x.index_copy(0, going, part)
        if hasattr(self.block, "exit"):
            self._leave(now, part)
        return out

    def _leave(self, now: _ImagePass, part: torch.Tensor) -> None:
        if not now.grid:
            raise UsageError("the tokens are no longer the grid of the patches, which an exit's head needs")
        logits, sure = self.block.exit.leave(part, now.grid)  # type: ignore[operator,union-attr]
        number = int(sure.sum())
        if not number:
            return
        rows = torch.arange(now.batch, device=part.device) if now.going is None else now.going
        now.left.append(rows[sure])
        now.logits.append([one[sure] for one in logits])
        now.going = rows[~sure]
        self.shared.count(self.index + 1, number)


def _rows_of(values: Any, rows: torch.Tensor, batch: int) -> Any:
    """Masks [B, ..., ..., ...] of the rows alone, among a block's further arguments."""

    def pick(value: Any) -> Any:
        wanted = isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[0] == batch
        return value.index_select(0, rows) if wanted else value

    return {k: pick(v) for k, v in values.items()} if isinstance(values, dict) else tuple(pick(v) for v in values)


@dataclasses.dataclass
class _Classifier:
    shared: ImageExits
    place: int
    inner: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        now = self.shared.passes.get()
        out = self.inner(x)
        if now is None or not now.left or out.shape[0] != now.batch:
            return out
        logits = torch.cat([one[self.place] for one in now.logits])
        return out.index_copy(0, torch.cat(now.left), logits.to(out.dtype))
