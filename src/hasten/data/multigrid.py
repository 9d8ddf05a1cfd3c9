"""Multigrid: train on short clips at low resolution in large batches first, and work up to the full shape.

A batch of b examples, t frames (or tokens) and side s keeps its volume, b t s^2 = B T S^2. The long cycle goes through

    (t, s) = (T/4, S/sqrt 2), (T/2, S/sqrt 2), (T/2, S), (T, S),    each for as many steps as the others,

and the short cycle puts S/2, S/sqrt 2 and the long cycle's s in turn, step by step. The last part of training has the
full base shape. The learning rate is multiplied by b / B of the long cycle's shape, not of the short one's.

Images [B, C, S, S] and videos [B, T, C, S, S] are resized, each n-fold batch made of n of the loader's batches, frames
taken with a stride. Token sequences [B, T] have no side; they are cut into pieces, so a batch n times as large needs no
further data, but a piece has less context.

Departures: resizing starts from the loaded images, so loading costs what it did. Sides are rounded to what the model
takes, b / B to a whole number. `cycles` is 1: the paper has one for each stage of a stepwise learning rate. The paper
scales the rate for SGD; with other optimizers the square root of b / B is taken unless `lr_power` is given.
`horizon` and `batch_power` are additions. The paper trains for 1.5 times the epochs, in far fewer steps: pass fewer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="A Multigrid Method for Efficiently Training Video Models",
    paper="1912.00998",
    seams=("batch.shape",),
    effects=("time", "steps"),
    lossless=False,
    claim="SlowFast-R50 on Kinetics-400 trains 4.5x faster in wall-clock time on the same hardware, accuracy +0.8%",
    claimed=4.5,
    identity={"time": (1.0,), "space": (1.0,), "short": ()},
    experiment=(
        "stdlib-lm(task=train, length=64, rows=8, target=3.3)",
        "data/multigrid(time=[0.5], space=[1.0], short=[], final=0.0, horizon=0.3, batch_power=0.0, lr_power=0.0)",
    ),
    needs=("steps",),
    when="Video or high-resolution images, or long sequences, trained for many epochs.",
    when_not="Small images or short sequences, whose steps are not dearer; data that can't be resized.",
    tune={"horizon": (0.3, 1.0), "batch_power": (0.1, 1.0)},
)

HALF = 0.5**0.5


def naive_multigrid(
    steps: int, time: tuple[float, ...], space: tuple[float, ...], short: tuple[float, ...], cycles: int, final: float
) -> Tensor:
    """The shape of each step, walking through the cycles.

    Args:
        steps: of the whole schedule.
        time, space: the long cycle's fractions of T and S, of equal length.
        short: the short cycle's fractions of S.
        cycles: long cycles.
        final: fraction of the steps after the last long cycle.

    Returns:
        [steps, 4]: the step's fractions of T and S, and those of the long cycle alone.
    """
    cycling, stages, rows = steps - round(final * steps), len(time) * cycles, []
    for step in range(steps):
        t = s = 1.0
        for stage in range(stages):
            if stage * cycling <= step * stages < (stage + 1) * cycling:
                t, s = time[stage % len(time)], space[stage % len(time)]
        turn = step % (len(short) + 1)
        rows.append([t, short[turn] if turn < len(short) else s, t, s])
    return torch.tensor(rows)


def multigrid(
    steps: int, time: tuple[float, ...], space: tuple[float, ...], short: tuple[float, ...], cycles: int, final: float
) -> Tensor:
    """As `naive_multigrid`, without loops."""
    step, cycling = torch.arange(steps), steps - round(final * steps)
    stage = (step * len(time) * cycles) // max(1, cycling) % len(time)
    long = torch.tensor([time, space]).T[stage]  # [steps, 2]
    long[step >= cycling] = 1.0
    turns = torch.tensor([*short, 0.0])[step % (len(short) + 1)]
    s = torch.where(step % (len(short) + 1) < len(short), turns, long[:, 1])
    return torch.stack([long[:, 0], s, long[:, 0], long[:, 1]], 1)


@dataclass(frozen=True)
class Multigrid(Method):
    """Batch shapes by the paper's long and short cycle."""

    time: tuple[float, ...] = option(
        (0.25, 0.5, 0.5, 1.0), "the long cycle's fractions of frames or of tokens", above=0, most=1
    )
    space: tuple[float, ...] = option((HALF, HALF, 1.0, 1.0), "the long cycle's fractions of the side", above=0, most=1)
    short: tuple[float, ...] = option((0.5, HALF), "the short cycle's further fractions of the side", above=0, most=1)
    cycles: int = option(1, "long cycles in the run", least=1, most=100)
    final: float = option(0.18, "fraction of the schedule at its end that has the full base shape", least=0, most=1)
    horizon: float = option(1.0, "fraction of the run that the schedule takes; full batches after it", above=0, most=1)
    batch_power: float = option(1.0, "the batch grows by (1/fraction)^power; 0: same examples", least=0, most=1)
    lr_power: float | None = option(None, "the rate grows by (b/B)^power; none: 1 for SGD, else 0.5", least=0, most=1)

    def problems(self) -> list[str]:
        if not self.time or len(self.time) != len(self.space):
            return [f"time and space list the same shapes: {len(self.time)} and {len(self.space)} entries do not match"]
        return []

    def shapes(self, steps: int) -> Tensor:
        """[steps, 4]: fractions of T and S for the batch, and the long cycle's, which the learning rate follows."""
        until = max(1, round(self.horizon * steps))
        return torch.cat(
            [
                multigrid(until, self.time, self.space, self.short, self.cycles, self.final),
                torch.ones(steps - until, 4),
            ]
        )


METHOD = Multigrid
