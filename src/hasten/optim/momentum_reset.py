"""Momentum reset: every T steps the optimizer forgets its moments, which belong to weights and gradients long gone.

With Adam's moments m and v of each parameter (section 4 of the paper), after step t

    m <- 0,  v <- 0   if t mod T = 0

The moments keep their shapes. It works with any optimizer that keeps moments, known by their names; whatever else it
keeps stays. By default the count of steps begins anew too, so that Adam's bias correction fits the new moments (as in
Stable-SPAM); without that the first step after a reset is (1 - beta1) / sqrt(1 - beta2), about 3, times too long.

Departures: `warmup` is an addition, off by default (SPAM, from which the reset comes, lets the rate rise).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking",
    paper="2505.22922",
    seams=("optim.state",),
    effects=("steps", "quality"),
    lossless=False,
    claim="low-rank LLaMA 1B on C4 with this and weight refactorization: lower perplexity than GaLore and Fira",
    claimed=None,
    identity={"every": 1000000000},
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "optim/momentum_reset(every=50)"),
    tune={"every": (20, 200)},
    when="With optim/weight_refactorization, and where spikes of the gradient spoil the moments for long.",
    when_not="Short runs, and second moments with a long memory (beta2 of 0.999): they are relearnt after each reset.",
)

MOMENTS = re.compile(r"exp_avg|exp_inf|momentum|moment|square_avg|grad_avg|acc_delta|^average$|^m$|^v$")


def naive_momentum_reset(moments: Sequence[Tensor], step: int, every: int) -> list[Tensor]:
    """The moments after a step, entry by entry.

    Args:
        moments: of any shapes.
        step: steps made, t; every: T.

    Returns:
        New tensors.
    """
    out = [moment.clone() for moment in moments]
    if step % every == 0:
        for moment in out:
            for place in range(moment.numel()):
                moment.view(-1)[place] = 0
    return out


def momentum_reset(moments: Sequence[Tensor], step: int, every: int) -> list[Tensor]:
    """As `naive_momentum_reset`, at once."""
    out = [moment.clone() for moment in moments]
    if step % every == 0 and out:
        torch._foreach_zero_(out)
    return out


@dataclass(frozen=True)
class MomentumReset(Method):
    """Momentum reset for whatever optimizer the run has."""

    every: int = option(200, "steps T between two resets", least=1)
    counts: bool = option(True, "the count of steps, and Adam's bias correction with it, begins anew too")
    warmup: int = option(0, "steps in which the learning rate rises again after a reset", least=0)

    def attach(self, run: Any) -> None:
        """Hooks the reset into a run.

        Raises:
            UsageError: the optimizer turns out, after the first step, to keep no moments.
        """
        seen: list[bool] = []

        def step(run: Any) -> None:
            if not seen:
                require_moments(self.name, run.optimizer)
                seen.append(True)
            if run.step % self.every == 0:
                reset(run.optimizer, self.counts)

        def rising(run: Any) -> float:
            since = run.step % self.every
            return 1.0 if run.step < self.every else min(1.0, (since + 1) / (self.warmup + 1))

        run.on("step", step)
        if self.warmup:
            run.multiply_lr(rising)


def moments_of(kept: dict[str, Any]) -> list[Tensor]:
    """The moments among what an optimizer keeps of a parameter, known by their names."""
    return [one for name, one in kept.items() if isinstance(one, Tensor) and one.dim() and MOMENTS.search(name)]


def require_moments(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises `UsageError` where an optimizer keeps no moments."""
    kept = [entry for entry in optimizer.state.values() if isinstance(entry, dict)]
    if not any(moments_of(entry) for entry in kept):
        names = sorted({key for entry in kept for key, one in entry.items() if isinstance(one, Tensor)})
        held = f"it keeps {', '.join(names)}" if names else "it keeps nothing"
        raise UsageError(f"{name}: {type(optimizer).__name__} keeps no moments that could be reset ({held})")


@torch.no_grad()
def reset(optimizer: torch.optim.Optimizer, counts: bool = True) -> None:
    """Sets an optimizer's moments to zero in place, and with `counts` its counts of steps (NAdam's product to 1)."""
    for kept in optimizer.state.values():
        if not isinstance(kept, dict) or not (moments := moments_of(kept)):
            continue
        for moment in moments:
            moment.zero_()
        for name, start in (("step", 0), ("mu_product", 1)):
            if counts and name in kept:
                kept[name] = torch.full_like(kept[name], start) if isinstance(kept[name], Tensor) else start


METHOD = MomentumReset
