"""tabular-mlp: a multilayer perceptron on a table that is made on the spot, a regression with interactions and noise.

The table is `make_friedman1` of scikit-learn: ten numbers x in [0, 1] a row, and

    y = 10 sin(pi x_1 x_2) + 20 (x_3 - 1/2)^2 + 10 x_4 + 5 x_5 + noise

so that five columns say nothing. Columns and y are standardised by the training part. 8,192 rows are for training and
2,048 are held out, without noise in their y, so that the mean squared error can fall to 0: it is a fraction of y's
variance.

The baseline was tuned for the fewest steps to the target, over three seeds: of 160, 200 and 240 steps, rates of 0.003,
0.004 and 0.006 and warm-ups of 0.05 and 0.15 (and of 300 steps, 0.002 to 0.008 and 0.05 to 0.4 on two seeds), 240 with
0.006 and 0.05 reached it on every seed, after 180 to 200 steps. 200 steps were as fast on two seeds and missed it, or
nearly so, on the third; 300 took 220 to 260.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.errors import MissingDependencyError
from hasten.core.options import option
from hasten.workloads.base import Metric, Supervised

ROWS, HELD_OUT, COLUMNS = 8192, 2048, 10
TABLE_SEED = 7


@functools.cache
def table(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table: columns [8192, 10] and y [8192] for training, and [2048, 10] and [2048] held out; fp32, standardised.

    Args:
        noise: standard deviation of the noise on the training part's y; y itself has one of about 4.9.
    """
    try:
        from sklearn.datasets import make_friedman1
    except ImportError:
        raise MissingDependencyError("scikit-learn") from None
    columns, clean = make_friedman1(ROWS + HELD_OUT, n_features=COLUMNS, noise=0.0, random_state=TABLE_SEED)
    noisy = clean[:ROWS] + noise * np.random.default_rng(TABLE_SEED).standard_normal(ROWS)
    columns = (columns - columns[:ROWS].mean(0)) / columns[:ROWS].std(0)
    center, scale = clean[:ROWS].mean(), clean[:ROWS].std()
    parts = (columns[:ROWS], (noisy - center) / scale, columns[ROWS:], (clean[ROWS:] - center) / scale)
    x, y, held_x, held_y = (torch.tensor(part, dtype=torch.float32) for part in parts)
    return x, y, held_x, held_y


def perceptron(width: int, depth: int, seed: int) -> nn.Sequential:
    """`depth` hidden layers of `width` with GELU, and one output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [COLUMNS] + [width] * depth
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(width, 1))


@dataclasses.dataclass(frozen=True)
class TabularMLP(Supervised):
    width: int = option(256, "width of the hidden layers", least=1)
    depth: int = option(3, "hidden layers", least=1, most=64)
    noise: float = option(1.0, "standard deviation of the noise on y, which has one of 4.9 without", least=0)
    rows: int = option(256, "rows of a training batch", least=1, most=ROWS)
    steps: int = option(240, "steps of the baseline's schedule", least=10)
    warmup: float = option(0.05, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(0.005, "held-out mean squared error, as a fraction of y's variance", above=0)

    tunable = {"lr": (1e-4, 1e-1), "warmup": (0.02, 0.5)}

    betas = (0.9, 0.99)
    decay = 0.01

    @classmethod
    def title(cls) -> str:
        return "tabular-mlp"

    @property
    def metric(self) -> Metric:
        return Metric("mean squared error", "lower")

    def build(self, seed: int) -> nn.Module:
        return perceptron(self.width, self.depth, seed).to(self.device())

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        return self.columns(seed, *table(self.noise)[:2])

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x)[:, 0] - y).square()

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        _, _, x, y = (part.to(self.device()) for part in table(self.noise))
        return (model(x)[:, 0] - y).square().double().cpu().numpy()


WORKLOAD = TabularMLP
