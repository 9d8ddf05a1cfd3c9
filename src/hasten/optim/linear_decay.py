"""Linear decay, and the schedule refined from the gradient norms of an earlier run.

The bound on the last iterate's error is smallest, when every gradient may be as large as any other, for a learning rate
that falls in a straight line to zero. Where the norms G_t of an earlier run are known, it is smallest for (Algorithm 1
for SGD, Algorithm 2 for Adam; t = 1..T)

    w_t = 1 / G_t^2  (SGD, G_t = |g_t|_2)   or   w_t = 1 / G_t  (Adam, G_t = |g_t|_1)
    eta_t = w_t (w_{t+1} + ... + w_T),      normalised by its maximum;  equal norms give eta_t ~ 1 - t / T.

G_t is smoothed first: a running median of width tau T, the series continued by its first value before the start and
mirrored after the end. Everything is [T].

Departures: norms of a run of another length are resampled to T by linear interpolation, as the authors' script does.
Without norms step t of 0..T-1 gets 1 - (t - W) / (T - W) after W steps of warm-up, so that the last step is still used.
`horizon` and `floor` are additions: the decay may end before the run does, and above zero. Past its horizon, and past
the planned steps for those who go on with the PyTorch scheduler, the rate is `floor` and never anything else.
"""

import json
import pathlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement",
    paper="2310.07831",
    seams=("lr",),
    effects=("steps", "quality"),
    lossless=False,
    claim="linear decay matches or beats every usual schedule, cosine included, on ten problems; no speed is claimed",
    claimed=None,
    identity="it sets the learning rate of every step, so no option leaves the run as it was",
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "optim/linear_decay(warmup=0.4)"),
    needs=("steps",),
    tune={"warmup": (0.02, 0.5), "horizon": (0.5, 1.0)},
    when="Any run of known length; `horizon` below 1 brings the fall of the loss that decay gives forward in time.",
    when_not="Runs of open length: after the horizon the learning rate is `floor` and nothing more is learned at 0.",
)


def naive_linear_decay(norms: Tensor, steps: int, power: float, smooth: float) -> Tensor:
    """The equation with loops.

    Args:
        norms: [R] gradient norms of an earlier run, all above 0.
        steps: T of the run to come.
        power: p in w = G^-p: 2 for l2 norms and SGD, 1 for l1 norms and Adam.
        smooth: tau, the width of the running median as a fraction of R.

    Returns:
        [T] float64 factors, the largest 1, the last 0.
    """
    g, half = norms.double().tolist(), int(smooth * len(norms)) // 2
    padded = [g[0]] * half + g
    for place in range(half):
        back = (place + 1) % max(1, 2 * len(g) - 2)  # mirrored about the last value, which is not repeated
        padded.append(g[len(g) - 1 - back] if back < len(g) else g[back - len(g) + 1])
    smoothed = [sorted(padded[t : t + 2 * half + 1])[half] for t in range(len(g))]
    weights = []
    for t in range(steps):
        at = t * (len(g) - 1) / max(1, steps - 1)
        low = min(int(at), max(0, len(g) - 2))
        value = smoothed[low] + (at - low) * (smoothed[min(low + 1, len(g) - 1)] - smoothed[low])
        weights.append(value**-power)
    eta = [weights[t] * sum(weights[t + 1 :]) for t in range(steps)]
    return torch.tensor([one / max(eta) for one in eta], dtype=torch.float64)


def linear_decay(norms: Tensor, steps: int, power: float, smooth: float) -> Tensor:
    """As `naive_linear_decay`, without loops."""
    g = norms.double().cpu().numpy()
    half = int(smooth * len(g)) // 2
    padded = np.concatenate([np.full(half, g[0]), np.pad(g, (0, half), mode="reflect")])
    smoothed = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)
    smoothed = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(g)), smoothed)
    weights = smoothed**-power
    tails = np.cumsum(weights[::-1])[::-1]
    eta = weights * np.append(tails[1:], 0.0)
    return torch.from_numpy(eta / eta.max())


@dataclass(frozen=True)
class LinearDecay(Method):
    """Warm-up and linear decay, or the refined schedule where `norms` names a file that an earlier run recorded."""

    warmup: float = option(0.05, "fraction of the horizon in which the rate rises; unused with norms", least=0, below=1)
    horizon: float = option(1.0, "fraction of the run's steps at which the decay ends", above=0, most=1)
    floor: float = option(0.0, "factor that the decay ends at and stays at", least=0, below=1)
    norms: str | None = option(None, "JSON file of an earlier run's gradient norms: refine the schedule by them")
    norm: str = option("l1", "norm to refine by: l1 for Adam and its like, l2 for SGD", choices=("l1", "l2"))
    smooth: float = option(0.1, "width of the running median as a fraction of the earlier run, tau", least=0, most=1)
    record: str | None = option(None, "JSON file to write this run's gradient norms to")

    def schedule(self, steps: int) -> Tensor:
        """Factors [steps], float64.

        Raises:
            UsageError: the file of norms can't be read or does not hold positive numbers.
        """
        until = max(2, round(self.horizon * steps))
        if self.norms:
            factors = linear_decay(read_norms(self.norms, self.norm), until, {"l1": 1, "l2": 2}[self.norm], self.smooth)
        else:
            t, warm = torch.arange(until, dtype=torch.float64), round(self.warmup * until)
            factors = torch.where(t < warm, (t + 1) / max(1, warm), 1 - (t - warm) / (until - warm))
        return torch.cat([self.floor + (1 - self.floor) * factors, torch.full((steps,), self.floor)])[:steps]


def read_norms(path: str, norm: str) -> Tensor:
    """The gradient norms [R] that a run recorded: a list, or a mapping with the lists `l1` and `l2`.

    Raises:
        UsageError: no such file, no such list, or values that are not positive and finite.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text())
        norms = torch.tensor(found[norm] if isinstance(found, dict) else found, dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} holds no gradient norms: record some with linear_decay(record='{path}')") from None
    if norms.dim() != 1 or len(norms) < 2 or not bool((norms.isfinite() & (norms > 0)).all()):
        raise UsageError(f"{path}: gradient norms are a list of two or more positive numbers")
    return norms


def linear_decay_scheduler(optimizer: Optimizer, steps: int, **options: object) -> LRScheduler:
    """The same schedule as PyTorch's own scheduler, for a loop without a `Run`; options are those of `LinearDecay`.

    After `steps` steps the factor is `floor`: at 0, the default, further steps change nothing.
    """
    method = LinearDecay.from_options(options)
    factors = method.schedule(steps).tolist()
    return LambdaLR(optimizer, lambda step: factors[step] if step < steps else method.floor)


METHOD = LinearDecay
