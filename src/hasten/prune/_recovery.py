"""Training a pruned model: what it and a teacher compute on the same inputs, and zeros that stay zero.

Everything is hooked through the run and undone by `run.finish()`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.anatomy import output_tensor
from hasten.hosts.base import Host
from hasten.hosts.weights import Weight, is_held


@dataclasses.dataclass
class Pair:
    """One forward of the student and the teacher's on the same inputs.

    Attributes:
        student, teacher: the residual stream after each block, [batch, tokens, width] each.
        logits, wanted: outputs of the student and of the teacher, [..., classes]; None where a model returns none.
        mask: bool [batch, tokens], False at padding; None where there is none.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    logits: Tensor | None
    wanted: Tensor | None
    mask: Tensor | None


Loss = Callable[[Tensor, Pair], Tensor]


class Watched:
    """The hidden states of one model's forward, for as long as a call of it runs."""

    def __init__(self, host: Host, keep: Callable[[Any], Any]) -> None:
        self.open, self.states = False, list[Tensor]()
        for layer in host.layers:
            keep(layer.block.register_forward_hook(self._see))

    def _see(self, _: nn.Module, given: Any, output: Any) -> None:
        if self.open:
            self.states.append(output_tensor(output))

    def begin(self) -> None:
        self.open, self.states = True, []

    def end(self) -> list[Tensor]:
        self.open = False
        return self.states


def distil(name: str, run: Any, combine: Loss) -> None:
    """Adds what `combine(loss, pair)` makes of each batch; with several forwards in a batch their mean.

    Raises:
        UsageError: no teacher, the model itself or parts of it, or one with another number of blocks.
    """
    teacher = check_teacher(name, run.host, run.context.teacher)
    keep = run.changes.hook
    student, other = Watched(run.host, keep), Watched(teacher, keep)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], list[Tensor], Any]] = []
    mode = teacher.model.training
    run.changes.call(lambda: teacher.model.train(mode))

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        if run.in_hand and torch.is_grad_enabled():
            student.begin()

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if student.open:
            calls.append((args, kwargs, student.end(), output))

    keep(run.host.model.register_forward_pre_hook(enter, with_kwargs=True))
    keep(run.host.model.register_forward_hook(leave, with_kwargs=True))

    def loss(run: Any, value: Tensor) -> Tensor:
        if not calls:
            raise UsageError(f"{name}: the loss was made without a forward of the run's model: call run.model")
        made = []
        for args, kwargs, states, output in calls:
            if not all(state.requires_grad for state in states):
                raise UsageError(f"{name} sees hidden states without gradients: checkpoint with use_reentrant=False")
            made.append(combine(value, _compared(name, run, teacher.model, other, args, kwargs, states, output)))
        calls.clear()
        return torch.stack(made).mean() if len(made) > 1 else made[0]

    run.on("forward", lambda run, batch: calls.clear())
    run.on("loss", loss)


def _compared(
    name: str, run: Any, teacher: nn.Module, watched: Watched, args: Any, kwargs: Any, states: list[Tensor], output: Any
) -> Pair:  # fmt: skip
    teacher.eval()
    watched.begin()
    with torch.no_grad(), run.autocast():
        wanted = teacher(*args, **{key: value for key, value in kwargs.items() if key != "labels"})
    theirs = watched.end()
    if [one.shape for one in states] != [one.shape for one in theirs]:
        raise UsageError(
            f"{name}: hidden states are {tuple(states[0].shape)} in the model and {tuple(theirs[0].shape)} in its "
            "teacher: use the dense model that was pruned"
        )
    mask = kwargs.get("attention_mask")
    fits = isinstance(mask, Tensor) and mask.shape == states[0].shape[:-1]
    return Pair(states, theirs, _logits(output), _logits(wanted), mask.bool() if fits else None)  # type: ignore[union-attr]


def _logits(output: Any) -> Tensor | None:
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else None


def check_teacher(name: str, host: Host, teacher: nn.Module | None) -> Host:
    """The teacher's host.

    Raises:
        UsageError: none, the model itself or one that shares weights with it, or another number of blocks.
    """
    if teacher is None:
        raise UsageError(f"{name} needs the dense model: pass teacher=")
    own = {id(parameter) for parameter in host.model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise UsageError(f"{name}: the teacher shares weights with the model: pass a copy made before pruning")
    found = recognise(teacher)
    if len(found.layers) != len(host.layers):
        raise UsageError(
            f"{name}: the model has {len(host.layers)} blocks and its teacher {len(found.layers)}: "
            "use the dense model that was pruned"
        )
    return found


class Gradual(Protocol):
    """A method that prunes while it trains."""

    @property
    def name(self) -> str: ...
    def target(self, step: int, steps: int | None) -> float | None:
        """The sparsity before a step; None: nothing is pruned."""
        ...

    def keep(self, weight: Tensor, sparsity: float) -> Tensor:
        """Which weights [out, in] stay, bool."""
        ...


def hold_zeros(method: Gradual, run: Any) -> None:
    """Weights that are zero stay zero; where the method's target grows, more become so, by `method.keep`.

    Gradients of such weights are zeroed before they are clipped, so that they count for nothing, and the weights after
    each step. Matrices that are all zero (adapters, say, at their start) are free.

    Raises:
        UsageError: a matrix is held in a sparse layer, which can't be trained, or is sharded and to be pruned.
    """
    weights: dict[str, Weight] = run.host.weights()
    wrong = [path for path, weight in weights.items() if is_held(weight.part)]
    if wrong:
        raise UsageError(
            f"{method.name}: {wrong[0]} is a sparse layer, which can't be trained: prune with layout=dense"
        )
    gone: dict[nn.Parameter, Tensor] = {}
    reached = [0.0]
    fresh = [True]

    def find() -> None:
        gone.clear()
        for weight in run.host.weights().values():
            zero = weight.part.weight == 0
            if bool(zero.any()) and not bool(zero.all()):
                gone[weight.part.weight] = zero

    def before(run: Any, batch: Any) -> None:
        target = method.target(run.step, run.steps)
        if not run.accumulated and target is not None and target > reached[0]:
            prune(target)
            reached[0], fresh[0] = target, True
        if fresh[0]:
            find()
            fresh[0] = False

    @torch.no_grad()
    def prune(target: float) -> None:
        for path, weight in run.host.weights().items():
            if hasattr(weight.part.weight, "device_mesh"):
                raise UsageError(f"{method.name} can't prune {path}, which is sharded: prune before, or use DDP")
            matrix = weight.matrix  # shares the parameter's memory
            matrix.masked_fill_(~method.keep(matrix.float(), target), 0)

    def gradients(run: Any) -> None:
        for parameter, zero in gone.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def step(run: Any) -> None:
        for parameter, zero in gone.items():
            parameter.masked_fill_(zero, 0)

    run.on("forward", before)
    run.on("gradients", gradients)
    run.on("step", step)
    run.on("resize", lambda run: fresh.__setitem__(0, True))
