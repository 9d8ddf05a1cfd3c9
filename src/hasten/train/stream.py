"""The stream of raw batches: epochs over a loader, and a position that a checkpoint can hold.

A position is the random states at the epoch's start and the number of batches taken since. On resume the epoch is begun
again from those states, which gives the same order, and the batches taken are passed over.

- Exact for every sampler of torch, with workers too (they are seeded at the epoch's start), and for any loader whose
  order follows from the random states at its start.
- A loader with `state_dict` and `load_state_dict` keeps its own position; so does a sampler that has them, without
  workers (which read ahead of the loop).
- Not exact: a sampler that draws from the global random states while the epoch runs, as the model's draws come between.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hasten.core.errors import UsageError
from hasten.train.randomness import capture, restore

END = object()


class Stream:
    """Batches from a loader, epoch after epoch.

    Attributes:
        epoch: finished passes over the loader.
        taken: batches taken in this pass.

    Args:
        on_pass: called before each pass that is begun anew, not before one that a checkpoint goes on with.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, on_pass: Callable[[], None] = lambda: None) -> None:
        if not hasattr(loader, "__iter__"):
            raise UsageError(f"the loader must be a DataLoader or another iterable, not {type(loader).__name__}")
        self.loader = loader
        self.epoch = 0
        self.taken = 0
        self._device, self._on_pass = device, on_pass
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Any] | None = None

    def next(self, repeat: bool) -> Any:
        """The next batch; `END` at the end of a pass unless passes repeat.

        Raises:
            UsageError: the loader is empty, or can be read only once and is at its end.
        """
        if self._iterator is None:
            self._on_pass()
            self._begin()
        batch = next(self._iterator, END)  # type: ignore[arg-type]
        if batch is END:
            if self.taken == 0:
                raise UsageError("the loader gave no batch: it needs data, and with drop_last=True a whole batch of it")
            self._iterator, self._start = None, None
            self.epoch, self.taken = self.epoch + 1, 0
            return self.next(repeat) if repeat else END
        self.taken += 1
        return batch

    def replace(self, loader: Iterable[Any]) -> None:
        """Another loader, from the next pass on."""
        self.loader = loader

    def at_end(self) -> bool:
        """Whether the batch just taken was the last of its pass; False where the loader has no length."""
        return self.length() == self.taken

    def length(self) -> int | None:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return None

    def state(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        owner = self._stateful()
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "open": self._iterator is not None,
            "start": self._start,
            "generators": [generator.get_state() for generator in self._generators()],
            "stateful": owner.state_dict() if owner is not None and self._iterator is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position; leaves the global random states changed, so the caller restores them afterwards.

        Raises:
            UsageError: the loader has fewer batches, or other generators, than the one of the checkpoint.
        """
        self.epoch, self.taken = state["epoch"], 0
        self._iterator = self._start = None
        generators = self._generators()
        if len(generators) != len(state["generators"]):
            raise UsageError("the checkpoint's loader had other random generators: resume with the same loader")
        if state["open"]:
            owner = self._stateful()
            if owner is not None and state["stateful"] is not None:
                owner.load_state_dict(state["stateful"])
                self._begin(state["start"])
            else:
                self._begin(state["start"])
                self._skip(state["taken"])
            self.taken = state["taken"]
        for generator, value in zip(generators, state["generators"], strict=True):
            generator.set_state(value)

    def _begin(self, start: dict[str, Any] | None = None) -> None:
        generators = self._generators()
        if start is not None:
            restore(start["random"], self._device)
            for generator, value in zip(generators, start["generators"], strict=True):
                generator.set_state(value)
        self._start = {
            "random": capture(self._device),
            "generators": [generator.get_state() for generator in generators],
        }
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        iterator = iter(self.loader)
        if iterator is self.loader and self.epoch > 0:
            raise UsageError("the loader can be read only once and is at its end: give a DataLoader or fewer steps")
        self._iterator = iterator

    def _skip(self, count: int) -> None:
        """Passes over batches; where the loader has no workers and a dataset by index, without reading them."""
        plain = isinstance(self.loader, DataLoader) and self.loader.num_workers == 0
        by_index = plain and not isinstance(self.loader.dataset, IterableDataset)  # type: ignore[attr-defined]
        for _ in range(count):
            if by_index:
                self._iterator._next_index()  # type: ignore[union-attr]
            elif next(self._iterator, END) is END:  # type: ignore[arg-type]
                raise UsageError(f"the checkpoint is {count} batches into a pass, and this loader has fewer of them")

    def _samplers(self) -> list[Any]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        found = [getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
        unique = {id(sampler): sampler for sampler in found if sampler is not None}
        return list(unique.values())

    def _stateful(self) -> Any:
        """The loader or sampler that keeps its own position, or None."""
        workers = getattr(self.loader, "num_workers", 0)
        for owner in [self.loader, *(self._samplers() if workers == 0 else [])]:
            if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
                return owner
        return None

    def _generators(self) -> list[torch.Generator]:
        owners = [self.loader, *self._samplers()]
        found = [getattr(owner, "generator", None) for owner in owners]
        unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(unique.values())
