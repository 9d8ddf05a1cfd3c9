"""How a gradient becomes a step: the protocols of optimizers and schedules, and what puts them into a training run.

A method of this family has one of these verbs, all of them pure, or an `attach(run)` of its own:

    Update:     init(weights) -> state;   update(gradients, state) -> (steps, state)
                weights, gradients, steps: stacks [k, m, n] of k matrices of one shape; state: named stacks, k in front.
                weight <- weight - lr (step + weight_decay weight)  with the method's `lr` and `weight_decay`.
                `rest_lr` is the learning rate of all other parameters, or None to leave it to the person.
                Where there is a step_(weights, gradients, state, lr, decay) -> bool, for lists of matrices of any shape
                and a rate and a decay of each, it does all of that in place; False: it can't, and has changed nothing.
    Rule:       init(weights) -> state;   update(gradients, weights, state, lr, decay) -> (changes, state)
                lists of all parameters; a state's entry is a list, one tensor a parameter, or one tensor common to all.
                weight <- weight + change;  `lr` is the step's scheduled rate (the method's `lr` at its base), `decay`
                each parameter's weight decay: the method's `weight_decay`, or the person's where that is None.
    Made:       make(groups) -> an optimizer of a library; `takes`: all parameters, or the matrices.
    Schedule:   schedule(steps) -> [steps] factors on every group's initial learning rate, one for each optimizer step.

The host says which parameters are matrices of hidden layers. Everything that a method does not take over stays with the
person's own optimizer class and parameter groups.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.optim._optimizers import Parts, RuleOptimizer, StackOptimizer, stacks, taken, without

__all__ = ["Made", "MatrixOptimizer", "Rule", "RuleOptimizer", "Schedule", "Update", "attach", "stacks"]

State = dict[str, Any]


@runtime_checkable
class Update(Protocol):
    """A method that turns the gradients of matrices into steps."""

    @property
    def name(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def rest_lr(self) -> float | None: ...
    @property
    def weight_decay(self) -> float: ...
    def init(self, weights: Tensor) -> dict[str, Tensor]: ...
    def update(self, gradients: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...


@runtime_checkable
class Rule(Protocol):
    """A method that turns all gradients into changes, with scalars that all parameters share."""

    @property
    def name(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float | None: ...
    def init(self, weights: list[Tensor]) -> State: ...
    def update(
        self, gradients: list[Tensor], weights: list[Tensor], state: State, lr: float, decay: list[float]
    ) -> tuple[list[Tensor], State]: ...


@runtime_checkable
class Made(Protocol):
    """A method that is a library's optimizer. Its `weight_decay`, if it has one that is not None, is the groups'.

    One that has `train()` and `eval()`, as Schedule-Free does, is switched around evaluations. With
    `own_schedule = True` the person's schedule is left out.
    """

    @property
    def name(self) -> str: ...
    @property
    def takes(self) -> str: ...
    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer: ...


@runtime_checkable
class Schedule(Protocol):
    """A method that sets the learning rate of each step."""

    @property
    def name(self) -> str: ...
    def schedule(self, steps: int) -> Tensor: ...


class MatrixOptimizer(Parts):
    """Matrices go to a method, all other parameters to the person's own optimizer.

    Args:
        method: an update, or a library's optimizer that takes matrices.
        matrices: the parameters that it takes over; those that `rest` does not train are left out.
        rest: the person's optimizer, whose class, groups and state are taken over; the object itself stays as it is.

    Raises:
        UsageError: no matrix is left to take over.
    """

    def __init__(self, method: Any, matrices: Iterable[torch.nn.Parameter], rest: torch.optim.Optimizer) -> None:
        trained = {id(p) for group in rest.param_groups for p in group["params"]}
        mine = [p for p in matrices if id(p) in trained]
        if not mine:
            raise UsageError(f"{method.name} found no matrix of a hidden layer among the optimizer's parameters")
        own = method.make([{"params": mine}]) if hasattr(method, "make") else StackOptimizer(method, mine)
        others, rest_lr = without(rest, mine), getattr(method, "rest_lr", None)
        for group in others.param_groups:
            if rest_lr is not None:
                group["lr"] = group["initial_lr"] = rest_lr
        super().__init__([own, others])

    @property
    def rest(self) -> torch.optim.Optimizer:
        """The person's part."""
        return self.parts[-1]


def attach(method: Any, run: Any) -> None:
    """Puts a method of this family into a training run.

    Raises:
        UsageError: no matrix to take over, sharded weights where a rule needs whole ones, or a schedule without a
            planned number of steps.
    """
    if isinstance(method, Update):
        run.replace_optimizer(lambda old, run: MatrixOptimizer(method, _matrices(run), old))
    elif isinstance(method, Rule):
        run.replace_optimizer(lambda old, run: RuleOptimizer(method, old))
    elif isinstance(method, Made):
        _attach_made(method, run)
    else:
        _attach_schedule(method, run)


def _matrices(run: Any) -> list[torch.nn.Parameter]:
    return [weight for _, weight in run.host.matrices()]


def _attach_made(method: Made, run: Any) -> None:
    if method.takes == "matrices":
        run.replace_optimizer(lambda old, run: MatrixOptimizer(method, _matrices(run), old))
    else:
        decay = getattr(method, "weight_decay", None)
        run.replace_optimizer(lambda old, run: method.make(taken(old, decay)))
    if getattr(method, "own_schedule", False):
        run.scale_lr(lambda run: 1.0)
    switched = [one for one in getattr(run.optimizer, "parts", [run.optimizer]) if hasattr(one, "eval")]
    for one in switched:
        one.train()
        run.changes.call(one.eval)

    @contextlib.contextmanager
    def averaged(run: Any) -> Iterator[None]:
        for one in switched:
            one.eval()
        try:
            yield
        finally:
            for one in switched:
                one.train()

    if switched:
        run.on("evaluate", averaged)


def _attach_schedule(method: Any, run: Any) -> None:
    if not run.steps:
        raise UsageError(f"{method.name} needs the number of training steps: pass steps=N")
    factors = method.schedule(run.steps).tolist()
    run.scale_lr(lambda run: factors[min(run.step, len(factors) - 1)])
    if getattr(method, "record", None):
        record_norms(run, method.name, pathlib.Path(method.record))


def record_norms(run: Any, name: str, path: pathlib.Path) -> None:
    """Writes the l1 and l2 norm of each step's gradient to a JSON file, every 50 steps and at the planned end."""

    def gradients(run: Any) -> None:
        found = [p.grad.detach() for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
        pair = [torch.stack(torch._foreach_norm(found, 1)).sum(), torch.stack(torch._foreach_norm(found, 2)).norm()]
        run.state.setdefault(name, {}).setdefault("norms", []).append(torch.stack(pair))

    def step(run: Any) -> None:
        if run.step % 50 == 0 or run.step == run.steps:
            both = torch.stack(run.state[name]["norms"]).float().cpu()
            path.write_text(json.dumps({"l1": both[:, 0].tolist(), "l2": both[:, 1].tolist()}))

    run.on("gradients", gradients)
    run.on("step", step)
