"""Which norm makes the input of which linear layers, found by watching a forward rather than by names."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hasten.hosts.base import Host
from hasten.hosts.streaming import evaluating, uncached
from hasten.hosts.structure import is_norm
from hasten.math.shapes import Float

_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_epsilon")
_HARMLESS = {"size", "dim", "numel", "shape", "ndim", "device", "__hash__", "data_ptr"}  # what only asks for sizes
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Affine:
    """What a norm computes: x / sqrt(mean(x^2) + eps) * gain + shift, with x - mean(x) for x where `centred`.

    Attributes:
        gain: fp32 [columns]; `shift`: fp32 [columns] or None.
    """

    gain: Float[Tensor, "columns"]
    shift: Float[Tensor, "columns"] | None
    eps: float
    centred: bool

    def __call__(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... columns"]:
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain
        return y if self.shift is None else y + self.shift


@dataclasses.dataclass(frozen=True)
class Feed:
    """A norm whose output goes to some layers and to nothing else.

    Attributes:
        path, norm: of the norm. affine: what it computes. readers: the paths of the layers, in the order of calls.
    """

    path: str
    norm: nn.Module
    affine: Affine
    readers: tuple[str, ...]


@torch.no_grad()
def norms_before(host: Host, batch: dict[str, Any], paths: Iterable[str]) -> list[Feed]:
    """The norms whose whole output is read by some of the layers `paths`, as one forward of `batch` shows.

    A norm is left out where any other function sees its output (a residual sum after the norm, a router), where one
    of its readers also reads something else, or where it computes something that is no `Affine`.
    """
    norms = {path: part for path, part in host.model.named_modules() if is_norm(part) and not list(part.children())}
    watch = _Watch()
    hooks = []
    for path, norm in norms.items():
        hooks.append(norm.register_forward_hook(watch.after_norm(path)))
    for path in paths:
        part = host.model.get_submodule(path)
        hooks.append(part.register_forward_pre_hook(watch.before_layer(path), with_kwargs=True))
        hooks.append(part.register_forward_hook(watch.after_layer, always_call=True))
    try:
        with evaluating(host.model), watch:
            host.forward(uncached(host, batch))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for path, readers in watch.readers.items():
        exclusive = all(watch.sources[reader] == {path} for reader in readers)
        affine = affine_of(norms[path], *watch.seen[path])
        if exclusive and path not in watch.leaks and affine is not None:
            found.append(Feed(path, norms[path], affine, tuple(readers)))
    return found


class _Watch(TorchFunctionMode):
    """Sees every function that is called with the output of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # first input and output of each norm
        self.readers: dict[str, dict[str, None]] = {}
        self.sources: dict[str, set[str | None]] = {}  # of each layer: the norms that its inputs came from
        self.leaks: set[str] = set()
        self._made: dict[int, tuple[str, Tensor]] = {}  # outputs, held so that no other tensor takes their place
        self._inside = 0

    def after_norm(self, path: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and output is not args[0]:
                self.seen.setdefault(path, (args[0].clone(), output.clone()))
                self._made[id(output)] = path, output
            else:
                self.leaks.add(path)

        return hook

    def before_layer(self, path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            source = self._made.get(id(x), (None, None))[0]
            self.sources.setdefault(path, set()).add(source)
            if source is not None:
                self.readers.setdefault(source, {})[path] = None
            self._inside += 1

        return hook

    def after_layer(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside and self._made and _name(func) not in _HARMLESS:
            for one in tree_leaves((args, kwargs or {})):
                if isinstance(one, Tensor) and (known := self._made.get(id(one))) is not None:
                    self.leaks.add(known[0])
        return func(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """A function's name; of the getter of an attribute, the attribute's."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


@torch.no_grad()
def affine_of(norm: nn.Module, x: Tensor, y: Tensor) -> Affine | None:
    """What a norm computes, told from one input and its output; None where it is none of the usual."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(norm, name, None), float)), 1e-6)
    ones = torch.ones(x.shape[-1], device=x.device)
    whole = [ones] if not isinstance(weight, Tensor) else [weight.detach().float(), 1 + weight.detach().float()]
    shift = bias.detach().float() if isinstance(bias, Tensor) else None
    for gain in whole:
        for centred in (False, True):
            if gain.shape != ones.shape or (shift is not None and shift.shape != ones.shape):
                continue
            tried = Affine(gain, shift, eps, centred)
            error = (tried(x) - y.float()).norm() / y.float().norm().clamp(min=1e-20)
            if float(error) < _TOLERANCE.get(y.dtype, 0.0):
                return tried
    return None
