"""Every change to a model is recorded with its undo; undoing runs them backwards and restores bit for bit."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn

_MISSING = object()


class Changes:
    """A stack of undos. Objects that were replaced are kept alive until `undo` or `forget`."""

    def __init__(self) -> None:
        self._undos: list[Callable[[], None]] = []
        self._replaced: list[tuple[int, str, nn.Module]] = []  # place on the stack, path, module

    def __len__(self) -> int:
        return len(self._undos)

    def call(self, undo: Callable[[], None]) -> None:
        """Records an undo of the caller's own."""
        self._undos.append(undo)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of any object (a module, a config, an instance's method)."""
        if isinstance(owner, nn.Module) and isinstance(value, nn.Module | nn.Parameter):
            before = getattr(owner, name, _MISSING)
            setattr(owner, name, value)
        else:
            before = vars(owner).get(name, _MISSING) if hasattr(owner, "__dict__") else getattr(owner, name, _MISSING)
            setattr(owner, name, value)

        def undo() -> None:
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undos.append(undo)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Sets one entry of a mapping."""
        before = mapping.get(key, _MISSING)
        mapping[key] = value

        def undo() -> None:
            if before is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self._undos.append(undo)

    def module(self, root: nn.Module, path: str, new: nn.Module) -> None:
        """Replaces the submodule at a dotted path; the order of submodules (and so of the state dict) stays."""
        parent_path, _, name = path.rpartition(".")
        parent = root.get_submodule(parent_path)
        old = parent._modules[name]
        parent._modules[name] = new
        if old is not None:
            self._replaced.append((len(self._undos), path, old))
        self._undos.append(lambda: parent._modules.__setitem__(name, old))

    def hook(self, handle: Any) -> Any:
        """Records a hook's handle (anything with `remove`)."""
        self._undos.append(handle.remove)
        return handle

    def replaced(self) -> dict[str, nn.Module]:
        """The module that stood at each path before the first change that put another there."""
        found: dict[str, nn.Module] = {}
        for _, path, module in self._replaced:
            found.setdefault(path, module)
        return found

    def undo(self, to: int = 0) -> None:
        """Undoes the changes made after the stack had length `to`, latest first."""
        while len(self._undos) > to:
            self._undos.pop()()
        self._replaced = [one for one in self._replaced if one[0] < len(self._undos)]

    def forget(self, start: int = 0, end: int | None = None) -> None:
        """Makes the changes from place `start` to before `end` of the stack permanent and frees what they replaced."""
        end = len(self._undos) if end is None else end
        del self._undos[start:end]
        kept = [one for one in self._replaced if not start <= one[0] < end]
        self._replaced = [(place - (end - start) * (place >= end), *rest) for place, *rest in kept]  # type: ignore[misc]
