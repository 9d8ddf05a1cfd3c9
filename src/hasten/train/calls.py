"""The forwards that the person's loop makes of the model, as methods that add to the loss need to see them."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hasten.core.errors import UsageError

Enter = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """One forward of the model.

    Attributes:
        inputs: by the names of forward's parameters; what was handed over for `**kwargs` stands among them.
        output: what forward returned.
    """

    inputs: dict[str, Any]
    output: Any

    @property
    def logits(self) -> Tensor:
        """The output's `logits`, a tuple's first tensor, or the output itself.

        Raises:
            UsageError: none of them is a tensor.
        """
        found = getattr(self.output, "logits", self.output)
        if isinstance(found, tuple | list) and found:
            found = found[0]
        if not isinstance(found, Tensor):
            raise UsageError(f"the model's output, a {type(self.output).__name__}, holds no tensor of logits")
        return found


class Calls:
    """The forwards of the batch in hand, in order; emptied at each pass and undone by `run.finish()`.

    Args:
        enter: changes the inputs before the model sees them, in place or by returning others.
    """

    def __init__(self, run: Any, enter: Enter | None = None) -> None:
        self._calls: list[Call] = []
        self._entered: list[dict[str, Any]] = []
        self._run, self._enter = run, enter
        self._signature = inspect.signature(run.host.model.forward)
        keep = run.changes.hook
        keep(run.host.model.register_forward_pre_hook(self._before, with_kwargs=True))
        keep(run.host.model.register_forward_hook(self._after, with_kwargs=True))
        run.on("forward", lambda run, batch: self.clear())

    def of(self, name: str) -> list[Call]:
        """The calls, of which there is at least one; `name` is the method's, for the message.

        Raises:
            UsageError: the loss was made without a forward of the run's model.
        """
        if not self._calls:
            raise UsageError(f"{name}: the loss was made without a forward of the run's model: call run.model")
        return self._calls

    def clear(self) -> None:
        self._calls.clear()
        self._entered.clear()

    def _before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._run.in_hand:
            return None
        bound = self._signature.bind(*args, **kwargs)
        inputs = self._flat(bound.arguments)
        if self._enter is not None:
            changed = self._enter(inputs)
            inputs = inputs if changed is None else changed
            more, named = self._more(), set(self._signature.parameters) - {self._more()}
            bound.arguments.update({name: value for name, value in inputs.items() if name in named})
            if more is not None:
                bound.arguments[more] = {name: value for name, value in inputs.items() if name not in named}
        self._entered.append(inputs)
        return (bound.args, bound.kwargs) if self._enter is not None else None

    def _after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._entered:
            self._calls.append(Call(self._entered.pop(), output))

    def _more(self) -> str | None:
        kinds = self._signature.parameters.values()
        return next((one.name for one in kinds if one.kind is inspect.Parameter.VAR_KEYWORD), None)

    def _flat(self, arguments: dict[str, Any]) -> dict[str, Any]:
        more = self._more()
        return {k: v for k, v in arguments.items() if k != more} | dict(arguments.get(more, {}) if more else {})
