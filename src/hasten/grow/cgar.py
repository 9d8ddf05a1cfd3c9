"""CGAR: a recursive model recurses little at first and more later, and its first supervision steps count most.

Progressive Depth Curriculum: with n updates of the latent in a cycle and T cycles, training at progress rho uses

    (n, T) = (ceil(n/3), ceil(T/3))      rho < 0.3       (2, 1) of the paper's (6, 3); n at least 2
             (ceil(2n/3), ceil(2T/3))    rho < 0.6       (4, 2)
             (n, T)                      after that      (6, 3)

Hierarchical Supervision Weighting: of the losses l_t of the supervision steps t = 1 .. S, [S] or [S, examples],

    L = sum_t w_t l_t,   w_t = lambda^(t-1) / Z,   Z = sum_s lambda^(s-1).

A model takes part by two attributes, which its forward and its loss read and this method sets while it trains:
`recursion`, a pair (n, T); and `supervision_weights`, a sequence of S numbers (`workloads/sudoku.py` has both).
Evaluations, and the model after training, use its own recursion. The person's weights should sum to 1.

Departures: the authors' code leaves out Z and steps the optimizer after each supervision step with the weight of the
batch's mean step; here, as in the paper's equation, one loss holds all steps.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="Accelerating Training Speed of Tiny Recursive Models with Curriculum Guided Adaptive Recursion",
    paper="2511.08653",
    seams=("layers.keep", "loss"),
    effects=("time", "quality"),
    lossless=False,
    claim="Sudoku-Extreme: 10.93 h of training become 6.38 h (1.71x), 86.65% accuracy become 86.02%",
    claimed=1.71,
    identity={"shallow": 0.0, "middle": 0.0, "decay": 1.0},
    needs=("steps",),
    experiment=("sudoku(target=0.1)", "grow/cgar"),
    tune={"shallow": (0.05, 0.5), "decay": (0.3, 1.0)},
    when="A weight-shared model that recurses (TRM, HRM): most of a step's time goes into repeating one network.",
    when_not="Models without recursion, and runs that stop long before their last planned step.",
)


def naive_cgar(losses: Tensor, decay: float) -> Tensor:
    """L, supervision step by supervision step.

    Args:
        losses: [S, ...], l_t of each supervision step, the first one first.
        decay: lambda.

    Returns:
        [...], fp32 at least.
    """
    total, size = torch.zeros(losses.shape[1:], dtype=torch.promote_types(losses.dtype, torch.float32)), 0.0
    for t in range(1, len(losses) + 1):
        total = total + decay ** (t - 1) * losses[t - 1].to(total.dtype)
        size += decay ** (t - 1)
    return total / size


def cgar(losses: Tensor, decay: float) -> Tensor:
    """As `naive_cgar`, as one product."""
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    weights = torch.tensor(supervision_weights(len(losses), decay), dtype=losses.dtype, device=losses.device)
    return torch.einsum("s,s...->...", weights, losses)


def supervision_weights(steps: int, decay: float) -> tuple[float, ...]:
    """w_1 .. w_S for S supervision steps."""
    powers = [decay**t for t in range(steps)]
    return tuple(power / sum(powers) for power in powers)


def recursion_at(full: tuple[int, int], progress: float, shallow: float, middle: float) -> tuple[int, int]:
    """(n, T) at a progress of 0 to 1, for a model whose own recursion is `full`."""
    thirds = 1 if progress < shallow else 2 if progress < middle else 3
    updates, cycles = (math.ceil(thirds * size / 3) for size in full)
    return min(full[0], max(2, updates)), cycles


@dataclasses.dataclass(frozen=True)
class CGAR(Method):
    """The curriculum over recursion depth and the weights of the supervision steps."""

    shallow: float = option(0.3, "progress up to which a third of the recursion is used", least=0, most=1)
    middle: float = option(0.6, "progress up to which two thirds are used", least=0, most=1)
    decay: float = option(0.7, "lambda: weight of a supervision step relative to the one before it", above=0, most=1)

    def problems(self) -> list[str]:
        if self.shallow > self.middle:
            return [f"shallow ends at {self.shallow:g} and middle at {self.middle:g}: shallow must end first"]
        return []

    def attach(self, run: Any) -> None:
        """Sets the model's recursion before each batch and its supervision weights for the run.

        Raises:
            UsageError: the number of steps is not known, or the model has no such attributes.
        """
        if run.steps is None:
            raise UsageError(f"{self.name} needs the number of training steps: pass steps=N")
        model = run.host.model
        full = _pair(self.name, model)
        if self.decay != 1:
            given = getattr(model, "supervision_weights", None)
            if given is None or not len(given):
                raise UsageError(
                    f"{self.name} weights the losses of supervision steps: give the model an attribute "
                    "supervision_weights, one number a step, that its loss reads, or set decay=1"
                )
            run.changes.call(lambda: setattr(model, "supervision_weights", given))
            model.supervision_weights = supervision_weights(len(given), self.decay)
        if recursion_at(full, 0.0, self.shallow, self.middle) == full:
            return
        own = model.recursion
        run.changes.call(lambda: setattr(model, "recursion", own))

        def forward(run: Any, batch: Any) -> None:
            model.recursion = recursion_at(full, run.progress, self.shallow, self.middle)

        @contextlib.contextmanager
        def whole(run: Any) -> Iterator[None]:
            used, model.recursion = model.recursion, full
            try:
                yield
            finally:
                model.recursion = used

        run.on("forward", forward)
        run.on("evaluate", whole)


def _pair(name: str, model: Any) -> tuple[int, int]:
    """The model's own (n, T).

    Raises:
        UsageError: it has none, or something else of that name.
    """
    given: Any = getattr(model, "recursion", None)
    whole = isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(one, int) for one in given)
    if not whole or min(given) < 1:
        raise UsageError(
            f"{name} changes how often a recursive model recurses: give {type(model).__name__} an attribute recursion, "
            f"a pair (updates, cycles) of whole numbers that its forward reads; found {given!r}"
        )
    return given[0], given[1]


METHOD = CGAR
