"""One batch as several passes of the person's loop: what zeroth-order steps and adversarial training are made of.

A method hands `run.in_passes` a function (run, batch) -> generator. The generator yields a batch, which the loop runs
the model on as it does with any other, and receives the loss that the loop hands to `run.backward`; it may yield
again. What it returns is the loss to propagate, or None where nothing is: the optimizer then steps without gradients.

    def passes(run, batch):                    # one step of FGSM
        x = batch[0].clone().requires_grad_()
        loss = yield x, batch[1]
        (g,) = torch.autograd.grad(loss, x)
        return (yield (batch[0] + eps * g.sign()).detach(), batch[1])

A loop that is left between two passes closes the generator: what it changed on the model belongs into a `finally`.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch

from hasten.core.errors import UsageError

Turns = Generator[Any, torch.Tensor, torch.Tensor | None]
Make = Callable[[Any, Any], Turns]


class Passes:
    """The passes of the batch in hand.

    Attributes:
        open: whether a batch is under way, of which another pass waits or is in the loop's hands.
    """

    def __init__(self) -> None:
        self._make: Make | None = None
        self._turns: Turns | None = None
        self._next: Any = None
        self._seen: list[torch.Tensor] = []

    def claim(self, make: Make) -> None:
        """Makes several passes of each batch.

        Raises:
            UsageError: another method has claimed it.
        """
        if self._make is not None:
            raise UsageError("two methods make several passes a step: a plan can hold only one of them")
        self._make = make

    @property
    def claimed(self) -> bool:
        return self._make is not None

    @property
    def open(self) -> bool:
        return self._turns is not None

    def begin(self, run: Any, batch: Any) -> None:
        """Starts the passes of a new batch.

        Raises:
            UsageError: the generator yields nothing.
        """
        assert self._make is not None
        self._turns, self._seen = self._make(run, batch), []
        try:
            self._next = next(self._turns)
        except StopIteration:
            self._turns = None
            raise UsageError("a step in passes yields at least one batch") from None

    def take(self) -> Any:
        """The batch of the pass that waits."""
        batch, self._next = self._next, None
        return batch

    def send(self, loss: torch.Tensor) -> tuple[bool, torch.Tensor | None, torch.Tensor]:
        """Hands over a pass's loss.

        Returns:
            Whether the batch is done, the loss to propagate (None: none), and the loss to report: that one, or the mean
            of all passes' losses.
        """
        assert self._turns is not None
        self._seen.append(loss.detach().float().reshape(()))
        try:
            self._next = self._turns.send(loss)
        except StopIteration as end:
            self._turns = None
            shown = torch.stack(self._seen).mean() if end.value is None else end.value.detach().float().reshape(())
            return True, end.value, shown
        return False, None, self._seen[-1]

    def close(self) -> None:
        """Ends the batch before its last pass."""
        turns, self._turns, self._next = self._turns, None, None
        if turns is not None:
            turns.close()
