"""Which examples a batch holds, and its shape: the protocols of this family, and what makes a run's data follow them.

A method that does not `attach` itself has one of these verbs:

    choose(examples, run) -> [n] int64       which examples the passes to come are made of; `every`: after how many
                                             passes it chooses anew, 0 for never
    shapes(steps) -> [steps, 4]              fractions of the length T and the side S of each step's batch, and again of
                                             the two as the learning rate follows them; with `batch_power` and
                                             `lr_power`: the batch grows by (1 / fraction)^batch_power, the rate by
                                             that figure^lr_power

Choices are made as a pass begins, on the clock, and kept in checkpoints; the order of a pass follows from the run's
seed and the pass; processes that train together share the examples out. Shapes follow from `run.step` alone, so a run
that is resumed goes on exactly; larger batches are taken from the run's own stream.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.data._batches import apply_to, tensors
from hasten.data._examples import Examples
from hasten.data._samplers import Chosen


class Selection(Protocol):
    """A method that chooses examples."""

    @property
    def name(self) -> str: ...
    @property
    def every(self) -> int: ...
    def choose(self, examples: Examples, run: Any) -> Tensor: ...


class Shape(Protocol):
    """A method that decides about the shape of each step's batch."""

    @property
    def name(self) -> str: ...
    @property
    def batch_power(self) -> float: ...
    @property
    def lr_power(self) -> float | None: ...
    def shapes(self, steps: int) -> Tensor: ...


def attach(method: Any, run: Any) -> None:
    """Makes the run's data follow a method.

    Raises:
        UsageError: the loader's data can't be chosen from; for shapes, the run's length is not known, or the model
            takes one image size only.
    """
    if hasattr(method, "choose"):
        _attach_selection(method, run)
    else:
        _attach_shape(method, run)


def _attach_selection(method: Selection, run: Any) -> None:
    examples = Examples(method.name, run.loader, run.device)
    sampler = Chosen(len(examples), run.seed, run.rank, run.processes)
    state = run.state.setdefault(method.name, {})

    def begin(run: Any) -> None:
        if "chosen" in state and not (method.every and run.stream.epoch % method.every == 0):
            return
        with run.evaluation():
            chosen = torch.as_tensor(_grad(method.choose, examples, run), dtype=torch.int64).cpu()
        if run.processes > 1:
            shared = [chosen]
            dist.broadcast_object_list(shared)
            chosen = shared[0]
        least = examples.batch_size * run.processes if examples.loader.drop_last else 1
        if len(chosen) < least:
            raise UsageError(f"{method.name} chose {len(chosen)} examples, fewer than a batch of {least}: choose more")
        sampler.choose(chosen)
        state["chosen"] = sampler.indices

    def restore(run: Any, _: Any) -> None:
        if "chosen" in state:
            sampler.choose(state["chosen"])

    run.replace_loader(examples.loader_over(sampler))
    run.on("pass", begin)
    run.on("restore", restore)


@torch.enable_grad()
def _grad(choose: Callable[[Examples, Any], Tensor], examples: Examples, run: Any) -> Tensor:
    """A choice may train a small model of its own."""
    return choose(examples, run)


def _attach_shape(method: Shape, run: Any) -> None:
    if not run.steps:
        raise UsageError(f"{method.name} needs the number of training steps: pass steps=N")
    from hasten.hosts.sizes import take_any_size

    shapes = method.shapes(run.steps).tolist()
    whole = all(s == 1 for _, s, _, _ in shapes)
    multiple = 1 if whole or run.host.kind == "decoder" else take_any_size(run.host)
    power = method.lr_power
    if power is None:
        power = 1.0 if isinstance(run.optimizer, torch.optim.SGD) else 0.5
    images: list[bool] = []  # whether the last batch had a side

    def shape(run: Any, batch: Any) -> Any:
        t, s, _, _ = shapes[min(run.step, len(shapes) - 1)]
        kind = kind_of(batch)
        images[:] = [kind != "tokens"]
        if kind == "tokens":
            return cut(batch, t, method.batch_power, run.step)
        t = t if kind == "video" else 1.0
        if t == s == 1:
            return batch
        count = max(1, round((t * s * s) ** -method.batch_power))
        return join([resize(one, t, s, multiple) for one in [batch, *run.more(count - 1)]])

    def scale(run: Any) -> float:
        _, _, t, s = shapes[min(run.step, len(shapes) - 1)]
        volume = t * s * s if images and images[0] else t
        return max(1, round(volume**-method.batch_power)) ** power

    run.on("batch_shaped", shape)
    if power:
        run.multiply_lr(scale)


def kind_of(batch: Any) -> str:
    """`tokens` (whole numbers [B, T]), `image` (real numbers [B, C, H, W]) or `video` ([B, T, C, H, W]).

    Raises:
        UsageError: none of them.
    """
    for part in tensors(batch):
        if part.is_floating_point() and part.dim() in (4, 5):
            return "image" if part.dim() == 4 else "video"
    for part in tensors(batch):
        if not part.is_floating_point() and part.dim() == 2:
            return "tokens"
    raise UsageError(
        "batches that change shape hold token ids [batch, length], images [batch, channels, height, width] or videos "
        "[batch, frames, channels, height, width]"
    )


def cut(batch: Any, fraction: float, power: float, turn: int) -> Any:
    """Token sequences [B, T] cut into pieces of `fraction` of their length: [about B (1/fraction)^power, fraction T].

    Of the pieces as many as the power asks for are kept, evenly spread and from another place each turn. Pieces that
    are padding only are left out.

    Raises:
        UsageError: a tensor without a length, such as one label a sequence, or position ids, which pieces would offset.
    """
    first = tensors(batch)[0]
    rows, full = first.shape[:2]
    length = max(1, round(full * fraction))
    if length >= full:
        return batch
    wrong = [part for part in tensors(batch) if part.dim() < 2 or part.shape[:2] != (rows, full)]
    if wrong or (isinstance(batch, Mapping) and "position_ids" in batch):
        raise UsageError(
            "sequences are cut into shorter ones, so each tensor of a batch must be [batch, length, ...] and "
            "position_ids must be left out"
        )
    pieces = full // length
    total = rows * pieces
    keep = max(1, min(total, round(rows * pieces**power)))
    chosen = (torch.arange(keep) * total // keep + turn) % total
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None:
        real = mask[:, : pieces * length].reshape(total, length).any(1).cpu()
        chosen = chosen[real[chosen]] if bool(real[chosen].any()) else real.nonzero()[:1, 0]
    chosen = chosen.to(first.device)
    return apply_to(
        batch,
        lambda part: part[:, : pieces * length].reshape(total, length, *part.shape[2:])[chosen.to(part.device)],
    )


def resize(batch: Any, t: float, s: float, multiple: int) -> Any:
    """Images and videos with sides of about `s` of theirs and every (1/t)-th frame; other tensors stay."""

    def change(part: Tensor) -> Tensor:
        if not part.is_floating_point() or part.dim() not in (4, 5):
            return part
        if part.dim() == 5 and t < 1:
            frames = part.shape[1]
            count = max(1, round(frames * t))
            part = part[:, torch.arange(count, device=part.device) * frames // count]
        sides = [max(multiple, round(side * s / multiple) * multiple) for side in part.shape[-2:]]
        if sides == list(part.shape[-2:]):
            return part
        small = F.interpolate(part.flatten(0, -4).float(), sides, mode="bilinear", align_corners=False, antialias=True)
        return small.to(part.dtype).view(*part.shape[:-2], *sides)

    return apply_to(batch, change)


def join(batches: Iterable[Any]) -> Any:
    """Batches of one kind as one, along the first dimension; a last one of fewer examples is fine."""
    found = list(batches)
    if len(found) == 1:
        return found[0]
    columns = iter([torch.cat(parts) for parts in zip(*(tensors(one) for one in found), strict=True)])
    return apply_to(found[0], lambda part: next(columns))
