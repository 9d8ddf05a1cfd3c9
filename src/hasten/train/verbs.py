"""What methods do to a run: hooks, rates, passes, other data, other weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from hasten.core.errors import UsageError
from hasten.train import resize
from hasten.train.calls import Calls, Enter
from hasten.train.events import Hook
from hasten.train.passes import Make
from hasten.train.rates import Factor
from hasten.train.stream import END


class Verbs:
    """The part of `Run` that methods call."""

    model: Any
    optimizer: Optimizer
    loader: Iterable[Any]
    steps: int | None
    seed: int
    processes: int
    hooks: Any
    rates: Any
    stream: Any
    passes: Any
    generators: dict[str, torch.Generator]
    _micro: int
    _at_end: bool
    _held: Any

    def generator(self, name: str, device: str = "cpu") -> torch.Generator:
        """A random generator of a method's own, seeded by `seed` and the name, and kept in checkpoints."""
        if name not in self.generators:
            made = torch.Generator(device=device)
            made.manual_seed((self.seed * 1_000_003 + sum(b * 257**i for i, b in enumerate(name.encode()))) % 2**63)
            self.generators[name] = made
        return self.generators[name]

    def on(self, event: str, hook: Hook) -> None:
        """Calls `hook` at each event of that name (`hasten.train.events.EVENTS`)."""
        self.hooks.add(event, hook)

    def replace_optimizer(self, make: Callable[[Optimizer, Any], Optimizer]) -> None:
        """Puts `make(optimizer, run)` in the optimizer's place; its groups' `lr` are the base rates from then on."""
        made = make(self.optimizer, self)
        if not isinstance(made, Optimizer):
            raise UsageError(f"an optimizer is a torch.optim.Optimizer, not {type(made).__name__}")
        self.optimizer, self._held = made, None

    def scale_lr(self, factor: Factor) -> None:
        """Sets each step's rate to base rate x `factor(run)`, in place of the person's schedule."""
        self.rates.claim(factor)

    def multiply_lr(self, factor: Factor) -> None:
        """Multiplies each step's rate by `factor(run)`, on top of any schedule."""
        self.rates.multiply(factor)

    def in_passes(self, make: Make) -> None:
        """Makes each batch several passes of the loop; see `hasten.train.passes`.

        Raises:
            UsageError: another method does so, or several processes train.
        """
        if self.processes > 1:
            raise UsageError("several passes a step work in one process only: leave DDP and FSDP out")
        self.passes.claim(make)

    def watch_calls(self, enter: Enter | None = None) -> Calls:
        """The forwards of the batch in hand; `enter` may change their inputs. See `hasten.train.calls`."""
        return Calls(self, enter)

    def replace_loader(self, loader: Iterable[Any]) -> None:
        """Another loader, from the next pass over the data on."""
        self.loader = loader
        self.stream.replace(loader)

    def more(self, count: int) -> list[Any]:
        """The next `count` raw batches, taken out of the stream; fewer at the end of a pass that does not repeat."""
        found = []
        for _ in range(count):
            batch = self.stream.next(repeat=self.steps is not None)
            if batch is END:
                self._at_end = True
                break
            found.append(batch)
        return found

    def resize(self, change: Callable[[Any], Any]) -> None:
        """Swaps weights between two optimizer steps; the optimizer follows, then the event `resize` fires.

        Args:
            change: alters the model and returns {new parameter: old one, or None for a fresh one}; several may share an
                old one. Parameters that it does not name keep their place, are gone, or are fresh.

        Raises:
            UsageError: in the middle of an accumulation, or under DDP or FSDP, which hold on to the old weights.
        """
        if self._micro:
            raise UsageError("weights can be resized only between two optimizer steps: do it in a 'step' hook")
        before = dict(self.model.named_parameters())
        mapping = change(self)
        after = dict(self.model.named_parameters())
        self._held = None
        if self.processes > 1 and [*map(id, before.values())] != [*map(id, after.values())]:
            raise UsageError(
                "DDP and FSDP can't follow new weights: change the model before prepare(), or use one process"
            )
        if mapping or {id(p) for p in before.values()} != {id(p) for p in after.values()}:
            resize.follow(self.optimizer, before, after, resize.checked(mapping, before))
            self.hooks.fire("resize", self)
