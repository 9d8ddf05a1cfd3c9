"""Cutting a smaller model's weights out of a larger one of the same classes: which layers, heads, channels, neurons."""

from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.axes import Axis, Tower, towers

Chosen = dict[str, Tensor]  # by kind, or kind and layer where layers choose for themselves


def inherit(name: str, run: Any, teacher: nn.Module, channels: str) -> None:
    """Puts weights cut out of the teacher in the place of the model's own; undone while the run could still fail.

    Raises:
        UsageError: parameters that the teacher lacks, or of which it has fewer channels or layers.
    """
    model = run.host.model
    new = cut(name, model, teacher, channels)
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(new[path])

    @torch.no_grad()
    def undo() -> None:
        for parameter, value in kept:
            parameter.copy_(value)

    changes = run.host.changes
    at = len(changes)
    changes.call(undo)
    waiting = [at]

    def begun(run: Any, batch: Any) -> None:
        if waiting:
            changes.forget(waiting[0], waiting.pop() + 1)

    run.on("forward", begun)


def cut(name: str, model: nn.Module, teacher: nn.Module, channels: str) -> dict[str, Tensor]:
    """The weights of a model of the given one's sizes, by parameter name.

    Args:
        channels: `leading` ones, or the `important` ones, of the largest sum of absolute weights.
    """
    small, large = ({tower.path: tower for tower in towers(one)} for one in (model, teacher))
    if small.keys() != large.keys():
        raise UsageError(
            f"{name} needs a teacher of the model's class: {type(teacher).__name__} holds its blocks in "
            f"{', '.join(large)}, {type(model).__name__} in {', '.join(small)}"
        )
    pairs = [(tower, large[path]) for path, tower in small.items()]
    chosen = {tower.path: _choice(name, tower, other, channels) for tower, other in pairs}
    theirs = dict(teacher.named_parameters())
    found = {}
    for path, mine in model.named_parameters():
        source, tower, layer = path, None, None
        for tower_path, one in small.items():
            if path.startswith(tower_path + "."):
                place, _, rest = path[len(tower_path) + 1 :].partition(".")
                layer = int(place) * (depth(large[tower_path]) // depth(one))
                source = f"{tower_path}.{layer}.{rest}"
            if large[tower_path].axes(source) is not None:
                tower = large[tower_path]
        if source not in theirs or theirs[source].ndim != mine.ndim:
            raise UsageError(f"{name}: the teacher has no {source} like the model's {path}: give one of the same class")
        tensor = theirs[source].detach()
        axes = (tower.axes(source) if tower is not None else None) or (None,) * mine.ndim
        for dim, (axis, size) in enumerate(zip(axes, mine.shape, strict=True)):
            if size > tensor.shape[dim]:
                raise UsageError(
                    f"{name}: the model's {path} has {size} entries in a dimension in which the teacher has "
                    f"{tensor.shape[dim]}: the teacher must be the larger one"
                )
            rows = torch.arange(size)
            if axis is not None and tower is not None:
                rows = _rows(axis, chosen[tower.path], layer, tensor.shape[dim])
            tensor = tensor.index_select(dim, rows.to(tensor.device))
        found[path] = tensor.reshape(mine.shape).to(mine)
    return found


def depth(tower: Tower) -> int:
    return len(list(tower.model.get_submodule(tower.path).children()))


def _rows(axis: Axis, chosen: Chosen, layer: int | None, size: int) -> Tensor:
    """Which entries of a dimension the chosen channels are."""
    picked = chosen.get(f"{axis.kind}.{layer}", chosen.get(axis.kind))
    assert picked is not None
    whole = torch.arange(size).reshape(axis.outer, -1, axis.inner)
    return whole[:, picked].flatten()


def _choice(name: str, small: Tower, large: Tower, channels: str) -> Chosen:
    """The channels that stay, for each kind, and for heads and neurons in each layer."""
    if small.head_dim != large.head_dim:
        raise UsageError(
            f"{name}: heads are inherited whole, and those of {small.path} are {small.head_dim} wide, the teacher's "
            f"{large.head_dim}: build the model with fewer heads of the teacher's width"
        )
    mine, theirs = _counts(small), _counts(large)
    short = [kind for kind in mine if mine[kind] > theirs[kind]]
    if short or depth(small) > depth(large):
        raise UsageError(f"{name}: the teacher's {small.path} has fewer {', '.join(short) or 'layers'} than the model")
    scores = _places if channels == "leading" else _sizes
    step, chosen = depth(large) // depth(small), {"width": _best(scores(large, "width", None), mine["width"])}
    for layer in range(0, depth(small) * step, step):
        neurons = scores(large, "feed_forward", layer)
        chosen[f"feed_forward.{layer}"] = _best(neurons, mine["feed_forward"])
        shared = "kv_heads" in theirs  # else one product for queries, keys and values: each head has its own
        groups = _best(scores(large, "kv_heads" if shared else "heads", layer), mine["kv_heads" if shared else "heads"])
        each = theirs["heads"] // theirs["kv_heads"] if shared else 1
        kept = mine["heads"] // mine["kv_heads"] if shared else 1
        heads = scores(large, "heads", layer).reshape(-1, each)
        chosen[f"kv_heads.{layer}"] = groups
        chosen[f"heads.{layer}"] = torch.cat([group * each + _best(heads[group], kept) for group in groups])
    return chosen


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, rising."""
    return scores.topk(count).indices.sort().values


def _places(tower: Tower, kind: str, layer: int | None) -> Tensor:
    """Scores by which the leading channels are chosen."""
    return -torch.arange(_counts(tower)[kind]).float()


def _counts(tower: Tower) -> dict[str, int]:
    """How many channels, heads and neurons a tower has."""
    block = next(iter(tower.model.get_submodule(tower.path).children()))
    found: dict[str, int] = {}
    for path, parameter in block.named_parameters():
        for axis, size in zip(tower.block[path], parameter.shape, strict=True):
            if axis is not None:
                found[axis.kind] = size // (axis.outer * axis.inner)
    return found


def _sizes(tower: Tower, kind: str, layer: int | None) -> Tensor:
    """The sum of absolute weights of each channel of a kind, over the tower or one of its layers."""
    total = torch.zeros(_counts(tower)[kind])
    prefix = tower.path + "." if layer is None else f"{tower.path}.{layer}."
    for path, parameter in tower.model.named_parameters():
        if parameter.ndim < 2 or (layer is not None and not path.startswith(prefix)):
            continue
        for place, axis in enumerate(tower.axes(path) or ()):
            if axis is not None and axis.kind == kind:
                rows = parameter.detach().float().abs().movedim(place, 0).flatten(1).sum(1).cpu()
                total += rows.reshape(axis.outer, -1, axis.inner).sum((0, 2))
    return total
