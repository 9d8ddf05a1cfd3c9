"""The learning rate of each step: base rate x schedule x what methods multiply on top.

The base rate of a parameter group is its `initial_lr`, torch's own key, which survives a resize of the weights. Where a
group has an `lr_factor`, its rate is multiplied by that as well.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hasten.core.errors import UsageError

Factor = Callable[[Any], float]


class Rates:
    """Sets the rate of every parameter group just before each optimizer step.

    Args:
        schedule: None (the groups' rates stay), an `LRScheduler` (stepped once per optimizer step), or a function
            (step, steps) -> factor on the base rate, where steps may be None.

    Attributes:
        used: the rate of each group at the last step.
    """

    def __init__(self, schedule: LRScheduler | Callable[[int, int | None], float] | None) -> None:
        if isinstance(schedule, ReduceLROnPlateau):
            raise UsageError("ReduceLROnPlateau needs a validation figure: leave schedule out and step it in your loop")
        if schedule is not None and not isinstance(schedule, LRScheduler):
            _check_takes_two(schedule)
        self._schedule = schedule
        self._scale: Factor | None = None
        self._multiply: list[Factor] = []
        self.used: list[float] = []

    def claim(self, scale: Factor) -> None:
        """Replaces the person's schedule by a method's.

        Raises:
            UsageError: another method has claimed it.
        """
        if self._scale is not None:
            raise UsageError("two methods set the learning rate: a plan can hold only one of them, so leave one out")
        self._scale = scale

    def multiply(self, factor: Factor) -> None:
        self._multiply.append(factor)

    def before_step(self, run: Any) -> list[float] | None:
        """Sets the groups' rates for this step; returns the rates to put back afterwards, None where they stay."""
        groups = run.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", float(group["lr"]))
        factors = self._factors(run)
        on_top = 1.0
        for factor in self._multiply:
            on_top *= float(factor(run))
        back = None
        if factors is None and (self._multiply or any("lr_factor" in group for group in groups)):
            back = [float(group["lr"]) for group in groups]
            for group, rate in zip(groups, back, strict=True):
                _set(group, rate * on_top * group.get("lr_factor", 1.0))
        elif factors is not None:
            for group, factor in zip(groups, factors, strict=True):
                _set(group, group["initial_lr"] * factor * on_top * group.get("lr_factor", 1.0))
        self.used = [group["lr"] for group in groups]
        return back

    def after_step(self, run: Any, back: list[float] | None, stepped: bool) -> None:
        """Puts the rates back and, where the optimizer stepped, advances an `LRScheduler`."""
        if back is not None:
            for group, rate in zip(run.optimizer.param_groups, back, strict=True):
                _set(group, rate)
        if stepped and isinstance(self._schedule, LRScheduler) and self._scale is None:
            if self._schedule.optimizer is run.optimizer:
                self._schedule.step()
            else:  # the optimizer was replaced: the old one only carries the schedule and never steps
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                    self._schedule.step()

    def state(self) -> dict[str, Any] | None:
        """The scheduler's state and the rates that it has set on an optimizer that was replaced."""
        if not isinstance(self._schedule, LRScheduler):
            return None
        rates = [float(group["lr"]) for group in self._schedule.optimizer.param_groups]
        return {"scheduler": self._schedule.state_dict(), "rates": rates}

    def restore(self, state: dict[str, Any] | None) -> None:
        if isinstance(self._schedule, LRScheduler):
            if state is None:
                raise UsageError("the checkpoint holds no LRScheduler: resume with the schedule that it was saved with")
            self._schedule.load_state_dict(state["scheduler"])
            for group, rate in zip(self._schedule.optimizer.param_groups, state["rates"], strict=True):
                _set(group, rate)

    def _factors(self, run: Any) -> list[float] | None:
        """A factor on each group's base rate; None where the groups' own rates hold."""
        count = len(run.optimizer.param_groups)
        if self._scale is not None:
            return [float(self._scale(run))] * count
        if isinstance(self._schedule, LRScheduler):
            scheduled = self._schedule.optimizer.param_groups
            if self._schedule.optimizer is run.optimizer:
                return None
            ratios = [float(group["lr"]) / max(float(group["initial_lr"]), 1e-30) for group in scheduled]
            return ratios if len(ratios) == count else [ratios[0]] * count
        if self._schedule is not None:
            return [float(self._schedule(run.step, run.steps))] * count
        return None


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _check_takes_two(schedule: Any) -> None:
    if not callable(schedule):
        raise UsageError(f"schedule must be None, an LRScheduler or (step, steps) -> factor, not {schedule!r}")
    try:
        inspect.signature(schedule).bind(0, 1)
    except (TypeError, ValueError):
        raise UsageError("schedule must take two arguments: (step, steps) -> factor on the learning rate") from None
