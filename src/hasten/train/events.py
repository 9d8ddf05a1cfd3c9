"""The events of a training run: the places of the loop at which methods (and people) hook in."""

from collections.abc import Callable
from typing import Any

from hasten.core.errors import UsageError, nearest

EVENTS: dict[str, str] = {
    "attached": "(run) -> None: all methods of the plan are attached; a checkpoint is loaded afterwards",
    "pass": "(run) -> None: before a pass over the data begins",
    "batch_chosen": "(run, batch) -> batch: which examples this batch holds",
    "batch_shaped": "(run, batch) -> batch: the shape of the chosen batch",
    "forward": "(run, batch) -> None: just before the batch is handed to the loop that runs the model",
    "loss": "(run, loss) -> loss: what is minimised, before it is divided by `accumulate`",
    "backward": "(run) -> None: after the backward pass of each batch, accumulated or not",
    "gradients": "(run) -> None: gradients accumulated, unscaled and averaged over processes; not clipped yet",
    "step": "(run) -> None: after the optimizer step, the schedule and zero_grad; `run.step` counts it already",
    "resize": "(run) -> None: after the weights changed shape and the optimizer followed",
    "evaluate": "(run) -> context manager: inside it the model holds the weights to evaluate",
    "checkpoint": "(run, state) -> None: adds to `state` what a resume needs beside `run.state`",
    "restore": "(run, state) -> None: rebuilds the model's structure; weights are loaded afterwards",
}

Hook = Callable[..., Any]


class Hooks:
    """The hooks of one run by event, each list in the order of registration, which is the plan's order."""

    def __init__(self) -> None:
        self._hooks: dict[str, list[Hook]] = {event: [] for event in EVENTS}

    def add(self, event: str, hook: Hook) -> None:
        """Registers a hook.

        Raises:
            UsageError: no such event, or the hook can't be called.
        """
        if event not in EVENTS:
            raise UsageError(f"a run has no event {event!r}{nearest(event, EVENTS)} events: {', '.join(EVENTS)}")
        if not callable(hook):
            raise UsageError(f"a hook of the event {event!r} is a function {EVENTS[event]}, not {hook!r}")
        self._hooks[event].append(hook)

    def of(self, event: str) -> list[Hook]:
        return self._hooks[event]

    def fire(self, event: str, *given: Any) -> None:
        for hook in self._hooks[event]:
            hook(*given)

    def fold(self, event: str, run: Any, value: Any) -> Any:
        """Hands a value from hook to hook.

        Raises:
            UsageError: a hook returned nothing.
        """
        for hook in self._hooks[event]:
            value = hook(run, value)
            if value is None:
                name, what = getattr(hook, "__qualname__", repr(hook)), event.split("_")[0]
                raise UsageError(f"the hook {name} of the event {event!r} returned None: it must return the {what}")
        return value
