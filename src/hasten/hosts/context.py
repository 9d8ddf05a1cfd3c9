"""What a person hands over beside the model, and what methods report back."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


@dataclasses.dataclass
class Context:
    """Passed to every family's `install`.

    Attributes:
        calibration: model inputs, each a dict of tensors with a batch dimension (`input_ids`, `pixel_values`, ...).
        draft: a smaller model for drafting; `teacher`: a model to learn from (or several, in a list).
        proxy: a fresh small model that a selection of data may train; `downstream`: batches of the task that comes
            after; `losses`: (model, batch) -> the loss of each example, [B].
        seed: for every random choice of a method, through a `torch.Generator` of its own.
        report: what the methods want shown, by method name. A method that gives no real speed sets
            `report[name]["simulated"]` to a sentence that says why.
    """

    calibration: list[dict[str, Any]] | None = None
    draft: nn.Module | None = None
    teacher: nn.Module | None = None
    proxy: nn.Module | None = None
    downstream: Iterable[Any] | None = None
    losses: Callable[[nn.Module, Any], Any] | None = None
    seed: int = 0
    report: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def have(self) -> set[str]:
        """The needs (`core.cards.NEEDS`) that this context meets, and `cuda` where a GPU is there."""
        import torch

        given = ("calibration", "draft", "teacher", "proxy", "downstream", "losses")
        have = {need for need in given if getattr(self, need) is not None}
        return have | {"cuda"} if torch.cuda.is_available() else have

    def note(self, method: str, **facts: Any) -> None:
        self.report.setdefault(method, {}).update(facts)
