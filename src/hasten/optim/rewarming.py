"""Re-warming: training that goes on with new data raises the learning rate again, and lets it fall once more.

A model whose first training ended at a small rate learns little from new data at that rate. At step t of 1..T the rate
is (linear warm-up of W steps to eta_max, then a cosine to eta_min)

    eta_max t / W                                                        for t <= W
    eta_min + (eta_max - eta_min) (1 + cos(pi (t - W) / (T - W))) / 2    for t > W

with eta_max = `peak` x the optimizer's own rate, eta_min = `floor` x eta_max and W = `warmup` T. Everything is [T].

The paper compares W of 0, 0.5%, 1% and 2% of the new data and finds little between them in the long run, and eta_max of
0.5, 1 and 2 times the first training's maximum: larger ones adapt better and forget more. At first the loss rises.

Departures: `start` is an addition, the part of eta_max that the warm-up begins above. The optimizer is the person's,
and so is its state, that of the first training or a fresh one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="Continual Pre-Training of Large Language Models: How to (re)warm your model?",
    paper="2308.04014",
    seams=("lr",),
    effects=("steps", "quality"),
    lossless=False,
    claim="Pythia-410M re-warmed on 297B tokens of SlimPajama ends below training from scratch; no speed is claimed",
    claimed=None,
    identity="it sets the learning rate of every step, so no option leaves the run as it was",
    experiment=("stdlib-continue", "optim/rewarming"),
    needs=("steps",),
    tune={"peak": (0.25, 4.0), "warmup": (0.002, 0.3)},
    when="A trained model goes on with much data of another kind, and the old data's loss may rise a little.",
    when_not="More of the same data, which re-warming harms, or a few steps, which end before the rise is made good.",
)


def naive_rewarming(steps: int, warmup: float, peak: float, floor: float, start: float) -> Tensor:
    """The equation with a loop.

    Args:
        steps: T.
        warmup: W / T.
        peak: eta_max as a factor on the optimizer's rate; floor, start: fractions of it.

    Returns:
        [T] float64 factors.
    """
    factors, warm = [], round(warmup * steps)
    for t in range(1, steps + 1):
        if t <= warm:
            factors.append(peak * (start + (1 - start) * t / warm))
        else:
            half = 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))
            factors.append(peak * (floor + (1 - floor) * half))
    return torch.tensor(factors, dtype=torch.float64)


def rewarming(steps: int, warmup: float, peak: float, floor: float, start: float) -> Tensor:
    """As `naive_rewarming`, without a loop."""
    t, warm = torch.arange(1, steps + 1, dtype=torch.float64), round(warmup * steps)
    rising = start + (1 - start) * t / max(1, warm)
    falling = floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * (t - warm) / max(1, steps - warm)))
    return peak * torch.where(t <= warm, rising, falling)


@dataclass(frozen=True)
class Rewarming(Method):
    """Linear re-warming, then a cosine."""

    warmup: float = option(
        0.01, "fraction of the run in which the rate rises; the paper's are 0 to 0.02", least=0, below=1
    )
    peak: float = option(1.0, "the largest rate, as a factor on the optimizer's: the first training's maximum", above=0)
    floor: float = option(0.1, "the last rate, as a fraction of the largest", least=0, most=1)
    start: float = option(0.0, "the rate before the first step, as a fraction of the largest", least=0, most=1)

    def schedule(self, steps: int) -> Tensor:
        """Factors [steps], float64."""
        return rewarming(steps, self.warmup, self.peak, self.floor, self.start)


METHOD = Rewarming
