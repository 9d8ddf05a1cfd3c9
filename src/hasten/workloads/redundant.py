"""redundant: digits of which some common kinds are there many times over, near-duplicates, and all others only once.

Of scikit-learn's 1,438 digits for training, every `spacing`-th zero, one and two is there in `copies` copies that
differ by noise and brightness only; all others are there once. A ViT (2 blocks of width 48, patches of 2x2 pixels) is
trained from scratch and tested on digits of which all kinds count alike, so that most of an ordinary batch teaches it
little. For methods that choose data there is a proxy, a perceptron with one hidden layer of 32 units.

The baseline's rate was tuned: of 0.003 and 0.006 the latter came to a cross-entropy of 1.0 first (255 of 400 steps,
the other 330; one seed); a warm-up of 0.1 instead of 0.3 took 340 steps at 0.003.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.options import option
from hasten.workloads.base import Supervised
from hasten.workloads.digits import CLASSES, SIDE, digits
from hasten.workloads.digits_vit import digits_vit

COMMON = 3  # the kinds 0, 1 and 2


@functools.cache
def redundant_digits(spacing: int, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """The training data, the same always.

    Returns:
        images [n, 1, 8, 8], labels [n], and which of the 1,438 digits each is made of [n].
    """
    images, labels = digits(False)
    copied = torch.zeros(len(images), dtype=torch.bool)
    copied[(labels < COMMON).nonzero()[::spacing, 0]] = True
    once = torch.arange(len(images))
    source = torch.cat([once[~copied], once[copied].repeat(copies)])
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(len(source), *images.shape[1:], generator=generator)
    bright = 1 + 0.1 * torch.randn(len(source), 1, 1, 1, generator=generator)
    made = ((images[source] + 1) * bright - 1 + noise).clamp_(-1, 1)
    return made, labels[source], source


class Perceptron(nn.Module):
    """One hidden layer; called like the ViT."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(SIDE * SIDE, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.hidden(pixel_values.flatten(1)).relu())


@dataclasses.dataclass(frozen=True)
class Redundant(Supervised):
    spacing: int = option(18, "every how many zeros, ones and twos one has copies", least=2, most=1000)
    copies: int = option(100, "copies of such a digit", least=1, most=10_000)
    rows: int = option(32, "images of a training batch", least=1, most=1024)
    steps: int = option(400, "steps of the baseline's schedule", least=10)
    warmup: float = option(0.3, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(1.0, "held-out cross-entropy in nats at which training stops", above=0)

    tunable = {"lr": (5e-4, 2e-2), "warmup": (0.05, 0.5)}

    @classmethod
    def title(cls) -> str:
        return "redundant"

    def build(self, seed: int) -> nn.Module:
        return digits_vit(SIDE, layers=2, width=48, seed=seed).to(self.device())

    def proxy(self, seed: int) -> nn.Module:
        return self.seeded(seed, Perceptron)

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        return self.columns(seed, *redundant_digits(self.spacing, self.copies)[:2])

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        out = model(pixel_values=images)
        return nn.functional.cross_entropy(getattr(out, "logits", out), labels, reduction="none")

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        images, labels = (part.to(self.device()) for part in digits(True))
        return self.losses(model, (images, labels)).cpu().numpy()


WORKLOAD = Redundant
