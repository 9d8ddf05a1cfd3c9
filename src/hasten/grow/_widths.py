"""What methods that change a model's width and depth share: maps of channels, tensors of the new model, the moves.

A move replaces the model's weights within the run: the optimizer's groups follow, its state starts anew, and what was
there before is freed, unless the run could still fail.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.hosts.axes import KINDS, mapped, places
from hasten.hosts.changes import Changes
from hasten.hosts.widths import Sizes, Widths

Weights = dict[str, Tensor]


def means(sizes: Sizes, wanted: Sizes) -> dict[str, Tensor]:
    """F of each kind that shrinks, [m, n]: new channel i is the mean of the channels i, i + m, i + 2m, ..."""
    pairs = {kind: (getattr(wanted, kind), getattr(sizes, kind)) for kind in KINDS}
    return {kind: torch.eye(m).repeat(1, n // m) * (m / n) for kind, (m, n) in pairs.items() if m != n}


def copies(sizes: Sizes, wanted: Sizes) -> dict[str, Tensor]:
    """T of each kind that grows, [m, n]: all channels, then all of them again."""
    pairs = {kind: (getattr(wanted, kind), getattr(sizes, kind)) for kind in KINDS}
    return {kind: torch.eye(n).repeat(m // n, 1) for kind, (m, n) in pairs.items() if m != n}


def leading(sizes: Sizes, wanted: Sizes) -> dict[str, Tensor]:
    """The first channels, heads and neurons."""
    return {kind: torch.eye(getattr(sizes, kind))[: getattr(wanted, kind)] for kind in KINDS}


def remade(
    widths: Widths, tensors: Mapping[str, Tensor], maps: Mapping[str, Tensor], layers: Sequence[Sequence[int]]
) -> Weights:
    """The weights of a model of other widths, whose layer j is the mean of the given model's layers `layers[j]`.

    Args:
        tensors: of a model that the widths' model is now, or was; by name.
        maps: {kind: [new, old]}; kinds that are not there stay.
    """
    path = widths.tower.path + "."
    out = {n: mapped(t, widths.axes_of(n, t.ndim), maps) for n, t in tensors.items() if not n.startswith(path)}
    for place, group in enumerate(layers):
        for rest, axes in widths.tower.block.items():
            mean = torch.stack([tensors[f"{path}{layer}.{rest}"].detach() for layer in group]).mean(0)
            out[f"{path}{place}.{rest}"] = mapped(mean, axes, maps)
    return out


def overlaid(
    widths: Widths, large: Mapping[str, Tensor], small: Mapping[str, Tensor], layers: Sequence[int]
) -> Weights:
    """The large weights with the small ones in their leading channels; large layer j takes small layer `layers[j]`.

    Layers beyond the list stay as they are.
    """
    path, out = widths.tower.path + ".", {}
    for name, tensor in large.items():
        source: str | None = name
        if name.startswith(path):
            place, _, rest = name[len(path) :].partition(".")
            source = f"{path}{layers[int(place)]}.{rest}" if int(place) < len(layers) else None
        new = tensor.detach().clone()
        if source is not None:
            old, axes = small[source], widths.axes_of(name, tensor.ndim)
            at = [places(a, n, m).to(new.device) for a, n, m in zip(axes, new.shape, old.shape, strict=True)]
            new[torch.meshgrid(*at, indexing="ij") if at else ...] = old.to(new)
        out[name] = new
    return out


def move(run: Any, widths: Widths, weights: Mapping[str, Tensor], layers: Sequence[int], keep: bool = False) -> None:
    """Gives the run's model other weights; `layers` as `Widths.put` takes them. `keep`: it can still be undone."""
    before = len(run.host.changes)
    run.resize(lambda run: widths.put(weights, layers))
    run.optimizer.state.clear()
    if not keep:
        run.host.changes.forget(before)


def stretched(depth: int, wanted: int) -> list[int]:
    """The layers of a model that is to have more or fewer: adjacent copies, or every so manieth."""
    return [place * depth // wanted for place in range(wanted)]


def check_fresh(name: str, stage: int) -> None:
    """Raises `UsageError` where a checkpoint is to be loaded into a run that has changed the model's size already."""
    if stage:
        raise UsageError(
            f"{name} has changed the model's size in this run: resume in a new run with the model as it was"
        )


def rising(since: int, steps: int) -> float:
    """The factor of a linear rise in `steps`, after `since` steps were made in it."""
    return min(1.0, (since + 1) / steps) if steps else 1.0


def twin(host: Any) -> Any:
    """A host like another over a copy of its model, without its hooks; in eval mode, without gradients."""
    new = copy.copy(host)
    new.__dict__.pop("anatomy", None)
    new.model, new.changes = copy.deepcopy(host.model).eval().requires_grad_(False), Changes()
    for part in new.model.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return new


def head_of(host: Any) -> Any:
    """What turns the last features into scores: a language-model head, a classifier; None where there is none."""
    return getattr(host, "lm_head", None) or getattr(host, "head", None)
