"""augmented-digits: few digits, and an augmentation that costs more than the step.

360 of scikit-learn's digits train a small convolutional network, each warped anew whenever it is read: turned, scaled,
moved and bent (`hasten.data._augment.warp`), at `finer` times the resolution, so that 32 warps take some five times as
long as a training step on them. The held-out digits are warped too, each by the same numbers always, and a network that
never saw a warped one falls behind: without augmentation it stays at a cross-entropy of 1.1. The data set has
`plain(index)` and `augment(example, generator)`, for methods that augment some examples only.

The baseline's rate was tuned: of 0.003, 0.006 and 0.01 (on held-out digits as they are) 0.006 fell fastest.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.options import option
from hasten.data._augment import warp
from hasten.workloads.base import Supervised
from hasten.workloads.digits import CLASSES, digits
from hasten.workloads.transfer import GlyphNet

HELD_OUT = 8  # times the resolution at which held-out digits are warped


def warped(image: Tensor, generator: torch.Generator, finer: int) -> Tensor:
    """The image [C, H, W] enlarged `finer` times, warped and brought back to its size."""
    large = nn.functional.interpolate(image[None], scale_factor=finer, mode="bicubic")[0]
    return nn.functional.avg_pool2d(warp(large, generator), finer)


class Warped(torch.utils.data.Dataset):
    """Every fourth digit for training, warped when it is read."""

    def __init__(self, finer: int = 16) -> None:
        self.finer = finer
        images, labels = digits(False)
        self.images, self.labels = images[::4].contiguous(), labels[::4].contiguous()

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def augment(self, example: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return warped(example[0], generator, self.finer), example[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, ()))  # of the run's own random state
        return self.augment(self.plain(index), torch.Generator().manual_seed(seed))


@functools.cache
def held_out() -> tuple[Tensor, Tensor]:
    """The held-out digits, warped by the same numbers always."""
    images, labels = digits(True)
    generator = torch.Generator().manual_seed(0)
    return torch.stack([warped(image, generator, HELD_OUT) for image in images]), labels


@dataclasses.dataclass(frozen=True)
class AugmentedDigits(Supervised):
    width: int = option(16, "channels of the network", least=4, most=512)
    finer: int = option(16, "times the resolution at which a digit is warped; what that costs", least=1, most=64)
    rows: int = option(32, "images of a training batch", least=1, most=360)
    steps: int = option(300, "steps of the baseline's schedule", least=10)
    target: float = option(0.6, "held-out cross-entropy in nats at which training stops", above=0)

    @classmethod
    def title(cls) -> str:
        return "augmented-digits"

    def build(self, seed: int) -> nn.Module:
        return self.seeded(seed, lambda: GlyphNet(CLASSES, self.width))

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        return self.shuffled(seed, Warped(self.finer), collate_fn=self._collate)

    def _collate(self, examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*examples, strict=True)
        return torch.stack(images).to(self.device()), torch.stack(labels).to(self.device())

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        images, labels = (part.to(self.device()) for part in held_out())
        return self.losses(model, (images, labels)).cpu().numpy()


WORKLOAD = AugmentedDigits
