"""What each dimension of each weight counts: channels of the residual stream, heads, neurons of a feed-forward part.

A map M [new, old] says how each new channel is made of the old ones. Every parameter that writes the channels takes M
along that dimension; every one that reads them takes M with its columns divided by their sums, so that what is summed
over the channels stays what it was:

    copies   M = rows of the identity, some twice: the function stays, exactly up to rounding
    means    M = rows of 1/2 and 1/2: readers take the sum of what the two read
    choice   M = some rows of the identity: the others are dropped

Heads are taken whole, so that their width (and the rotation of positions) stays. Where the head is tied to the
embedding, which can't be divided, the last norm's gain and shift are the reader. Which dimension counts what is found
by the structure of the modules; `hosts.widths` then checks it on the model's output.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.head_sizes import head_sizes
from hasten.hosts.slicing import scale_of
from hasten.hosts.structure import attention_child, block_lists, feed_forward_children, is_norm, is_projection

KINDS = ("width", "heads", "kv_heads", "feed_forward")
_FUSED = re.compile(r"qkv|query_key_value|^c_attn$", re.IGNORECASE)
_ROLES = {"q": "heads", "query": "heads", "k": "kv_heads", "key": "kv_heads", "v": "kv_heads", "value": "kv_heads"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """A dimension of `outer` x n x `inner` entries, n being the number of channels, heads or neurons of its kind."""

    kind: str
    reads: bool = False
    outer: int = 1
    inner: int = 1


Axes = tuple[Axis | None, ...]


def reading(map: Tensor) -> Tensor:
    """The map of what reads the channels: M with each column divided by its sum; empty columns stay empty."""
    sums = map.sum(0)
    return map / torch.where(sums == 0, torch.ones_like(sums), sums)


def mapped(tensor: Tensor, axes: Axes, maps: Mapping[str, Tensor]) -> Tensor:
    """One parameter with the maps {kind: [new, old]} applied along the dimensions that count these kinds."""
    out = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    for place, axis in enumerate(axes):
        map = None if axis is None else maps.get(axis.kind)
        if axis is None or map is None:
            continue
        map = (reading(map) if axis.reads else map).to(out)
        rows = out.movedim(place, -1)
        split = rows.reshape(*rows.shape[:-1], axis.outer, map.shape[1], axis.inner)
        out = torch.einsum("...oni,mn->...omi", split, map).flatten(-3).movedim(-1, place)
    return out.to(tensor.dtype).contiguous()


def places(axis: Axis | None, size: int, new: int) -> Tensor:
    """Where the leading channels lie in a dimension that is to count more of them, or less.

    Args:
        size: length of the dimension now. new: its length at the other size.

    Returns:
        Indices into the longer of the two dimensions, as many as the shorter one is long.
    """
    short, long = min(size, new), max(size, new)
    if axis is None:
        return torch.arange(short)
    n = long // (axis.outer * axis.inner)
    whole = torch.arange(long).reshape(axis.outer, n, axis.inner)
    return whole[:, : short // (axis.outer * axis.inner)].flatten()


class Tower:
    """One list of blocks, and the axes of every parameter that shares its residual stream.

    Args:
        blocks: path of the list. attention, mlp: names of the blocks' children; found by structure where None.
        head, embedding: a decoder's, where it has them; final_norm: the norm before the head.
        inner: fused projections hold each head's queries, keys and values side by side (else all queries come first).

    Raises:
        UsageError: parts that are not dense layers, norms with other gains than their weights.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        attention: str | None = None,
        mlp: Sequence[str] | None = None,
        head: nn.Module | None = None,
        embedding: nn.Module | None = None,
        final_norm: nn.Module | None = None,
        inner: bool | None = None,
    ) -> None:
        self.model, self.path, self.name = model, blocks, type(model).__name__
        listed = model.get_submodule(blocks)
        block: nn.Module = next(iter(listed.children()))
        self._attention, self._mlp = attention or attention_child(block), tuple(mlp or feed_forward_children(block))
        if self._attention is None or not self._mlp:
            raise UsageError(f"{self.name}: a block of {blocks} has no attention or no feed-forward part")
        self.head, self.embedding, self.final_norm = head, embedding, final_norm
        sizes = head_sizes(block.get_submodule(self._attention))
        self.head_dim, self._heads, self._inner = sizes.dim, sizes.heads, inner
        self.width = self._stream(block)
        self.block: dict[str, Axes] = dict(self._in_block(block))
        for place, other in enumerate(listed.children()):
            shapes = {name: p.shape for name, p in other.named_parameters()}
            if shapes != {name: p.shape for name, p in block.named_parameters()}:
                raise UsageError(f"{self.name}: block {place} of {blocks} has other sizes than block 0")
        self.outside: dict[str, Axes] = {}

    def _stream(self, block: nn.Module) -> int:
        norms = [part for part in block.children() if is_norm(part)]
        if norms and isinstance(getattr(norms[0], "weight", None), Tensor):
            return int(norms[0].weight.numel())  # type: ignore[union-attr,operator,arg-type]
        first = next(p for p in block.get_submodule(str(self._attention)).modules() if is_projection(p))
        return _shape(first)[1]

    def _in_block(self, block: nn.Module) -> Iterator[tuple[str, Axes]]:
        """The axes of each parameter of a block, by its name in the block."""
        seen: set[str] = set()

        def linear(path: str, part: nn.Module, out: Axis | None, into: Axis | None) -> Iterator[tuple[str, Axes]]:
            seen.update(f"{path}.{name}" for name in part._parameters)
            yield f"{path}.weight", (out, into) if isinstance(part, nn.Linear) else (into, out)
            if part._parameters.get("bias") is not None:
                yield f"{path}.bias", (out,)

        width, reads = Axis("width"), Axis("width", reads=True)
        attention = block.get_submodule(str(self._attention))
        for path, part in attention.named_modules(prefix=str(self._attention)):
            if not is_projection(part):
                continue
            rows, columns = _shape(part)
            leaf = path.rpartition(".")[2]
            if _FUSED.search(leaf):
                inner = "query_key_value" in leaf if self._inner is None else self._inner
                fused = Axis("heads", inner=3 * self.head_dim) if inner else Axis("heads", False, 3, self.head_dim)
                if rows != 3 * self._heads * self.head_dim or columns != self.width:
                    raise UsageError(
                        f"{self.name}: {path} is not one product for queries, keys and values of equal size"
                    )
                yield from linear(path, part, fused, reads)
                continue
            words = [word.removeprefix("w") for word in leaf.lower().split("_")]
            kind = next((_ROLES[word] for word in words if word in _ROLES), None)
            if kind is None:
                if rows != self.width or columns != self._heads * self.head_dim:
                    raise UsageError(f"{self.name}: {path} is not a projection from the heads to the stream")
                yield from linear(path, part, width, Axis("heads", True, 1, self.head_dim))
            elif rows % self.head_dim or columns != self.width:
                raise UsageError(f"{self.name}: {path} is not a projection from the stream to heads")
            else:
                yield from linear(path, part, Axis(kind, inner=self.head_dim), reads)
        layers = [
            (path, part)
            for name in self._mlp
            for path, part in block.get_submodule(name).named_modules(prefix=name)
            if is_projection(part)
        ]
        if not layers:
            raise UsageError(f"{self.name}: {', '.join(self._mlp)} holds no linear layers (a mixture of experts?)")
        neurons = _shape(layers[-1][1])[1]
        for path, part in layers:
            last = path == layers[-1][0]
            if _shape(part) != ((self.width, neurons) if last else (neurons, self.width)):
                raise UsageError(
                    f"{self.name}: {path} is not part of a dense feed-forward part (a mixture of experts?)"
                )
            into, out = (Axis("feed_forward", reads=True), width) if last else (reads, Axis("feed_forward"))
            yield from linear(path, part, out, into)
        for path, parameter in block.named_parameters():
            if path in seen:
                continue
            inside = path.split(".")[0]
            if inside in self._mlp and parameter.shape == (neurons,):
                yield path, (Axis("feed_forward"),)
            elif inside == self._attention and parameter.shape == (self._heads * self.head_dim,) != (self.head_dim,):
                yield path, (Axis("heads", inner=self.head_dim),)
            elif inside == self._attention and parameter.shape == (self.head_dim,):
                yield path, (None,)
            elif parameter.shape == (self.width,):
                yield path, (width,)
            else:
                raise UsageError(f"{self.name}: what {self.path}.*.{path} {tuple(parameter.shape)} counts is not known")

    def take(self, path: str, part: nn.Module) -> None:
        """Names the axes of a module outside the blocks that reads or writes this tower's stream."""
        tied = self.head is not None and self.embedding is not None
        tied = tied and getattr(self.head, "weight", None) is getattr(self.embedding, "weight", 0)
        for name, p in part._parameters.items():
            if p is None:
                continue
            found: list[Axis | None] = [None] * p.ndim
            if is_projection(part) and p.ndim == 2:
                out, into = (0, 1) if isinstance(part, nn.Linear) else (1, 0)
                if p.shape[into] == self.width:
                    found[into] = Axis("width", reads=True)
                elif p.shape[out] == self.width:
                    found[out] = Axis("width")
            elif is_projection(part):
                written = self.outside.get(f"{path}.weight", (None,))
                found[0] = Axis("width") if Axis("width") in written else None
            elif isinstance(part, nn.Conv2d) and p.shape[0] == self.width:
                found[0] = Axis("width")
            elif p.ndim and p.shape[-1] == self.width and not isinstance(part, nn.Conv2d):
                found[-1] = Axis("width", reads=tied and part is self.final_norm)
            self.outside[f"{path}.{name}" if path else name] = tuple(found)

    def fits(self, part: nn.Module) -> bool:
        """Whether a module outside the blocks has a dimension as long as the stream is wide."""
        return any(self.width in p.shape for p in part._parameters.values() if p is not None)

    def axes(self, name: str) -> Axes | None:
        """Of a parameter by its name in the model; None where it does not belong to this tower."""
        if name.startswith(self.path + "."):
            return self.block[name[len(self.path) + 1 :].partition(".")[2]]
        return self.outside.get(name)


def towers(model: nn.Module, **given: Any) -> list[Tower]:
    """Every list of blocks of a model (two in CLIP), with the axes of all its parameters.

    Raises:
        UsageError: no blocks, or blocks whose sizes are not understood.
    """
    lists = [path for path, _ in block_lists(model)]
    lists = [path for path in lists if not any(path != other and path.startswith(other + ".") for other in lists)]
    found = [Tower(model, path, **given) for path in lists]
    if not found:
        raise UsageError(f"{type(model).__name__} shows no list of equal blocks, so its sizes are not known")
    for path, part in model.named_modules():
        if part._parameters and not any((path + ".").startswith(one.path + ".") for one in found):
            near = [one for one in found if one.fits(part)]
            if near:
                max(near, key=lambda one: _shared(path, one.path)).take(path, part)
    norms: dict[type, Tower] = {}
    for one in found:
        for part in one.model.get_submodule(one.path).modules():
            if is_norm(part) and type(part) not in norms and isinstance(getattr(part, "weight", None), nn.Parameter):
                norms[type(part)] = one
                if not torch.equal(scale_of(part, part.weight.numel()).gain, part.weight.detach().float()):  # type: ignore[operator,union-attr,arg-type]
                    raise UsageError(
                        f"{type(part).__name__} does not multiply by its weight alone: it can't be resized"
                    )
    return found


def _shape(part: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    rows, columns = part.weight.shape  # type: ignore[union-attr,misc]
    return (rows, columns) if isinstance(part, nn.Linear) else (columns, rows)


def _shared(one: str, other: str) -> int:
    """How many letters two paths have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
