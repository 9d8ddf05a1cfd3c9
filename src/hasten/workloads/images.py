"""images: a small plain convolutional network learns to tell images apart, from scratch.

    data       training   held out  size     files
    digits     1,438      359       1x16x16  scikit-learn's digits, enlarged; nothing to fetch
    mnist      60,000     10,000    1x28x28  mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz of HASTEN_DATA
    cifar10    15,000     10,000    3x32x32  cifar10_jpeg/{train,test}.zip of HASTEN_DATA

Pixels are in 0..1. Three times convolution, batch norm, ReLU and pooling to half the side, then the mean over
the places and a linear layer. The target is a held-out cross-entropy, which moves smoothly where accuracy jumps.

With `attack` above 0 quality is the cross-entropy under an attack: each held-out image is moved by PGD within +-attack
for each pixel (ten steps of attack / 4 along the gradient's sign, from a random start that is the same always). With
`train_on=adversarial` the baseline's own loop trains against it, from scratch: `loss` moves the batch by `iterations`
steps of PGD first, with batch norm as in evaluation. A method that makes the examples itself marks its
batches as `Prepared`; `loss` takes those as they are, so that no example is perturbed twice.

The baseline was tuned on the digits, in runs of 100 to 200 steps: AdamW at 0.005, 0.01 and 0.02 and SGD with momentum
at 0.05 to 0.5, warm-ups of 0.2 and 0.4. AdamW at 0.01 came to the lowest loss (0.014 after 200 steps; SGD at 0.1
to 0.023).
The target is that of the digits without an attack; an attack and other data need a target of their own.
"""

import dataclasses
import functools
import gzip
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import cifar
from hasten.workloads.base import Metric, Workload, warm_cosine
from hasten.workloads.data_folder import data_file
from hasten.workloads.digits import digits

CLASSES = 10
SHAPES = {"digits": (1, 16), "mnist": (1, 28), "cifar10": (3, 32)}  # channels, side
JUDGE_STEPS = 10


class ConvNet(nn.Module):
    """Images [batch, channels, side, side] to scores [batch, 10]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(sizes[-1], CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values
        for stage in self.stages:
            x = self.pool(stage(x))
        return self.head(x.mean((2, 3)))


@dataclasses.dataclass(frozen=True)
class Images(Workload):
    task: str = option("train", "what is done", choices=("train",))
    data: str = option("digits", "the images", choices=tuple(SHAPES))
    width: int = option(16, "channels of the first convolution; each later one has twice as many", least=4, most=256)
    attack: float = option(0.0, "largest change of a pixel by the attack that quality is under", least=0, most=1)
    train_on: str = option("clean", "what the baseline's loop trains on", choices=("clean", "adversarial"))
    iterations: int = option(7, "steps of PGD for each training batch (train_on=adversarial)", least=1, most=100)
    train: int | None = option(None, "training images; none: all", least=64)
    examples: int = option(1000, "held-out images that quality is measured on; no more than there are", least=8)
    rows: int = option(64, "images of a training batch", least=2, most=4096)
    steps: int = option(200, "steps of the baseline's schedule", least=10)
    optim: str = option("adamw", "the baseline's optimizer", choices=("adamw", "sgd"))
    lr: float = option(0.01, "its peak learning rate", above=0)
    momentum: float = option(0.9, "momentum of sgd", least=0, below=1)
    decay: float = option(0.05, "weight decay", least=0)
    warmup: float = option(0.2, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(0.03, "held-out cross-entropy in nats at which training stops", above=0)

    tunable = {"lr": (1e-3, 0.3), "warmup": (0.02, 0.5)}

    @classmethod
    def title(cls) -> str:
        return "images"

    def problems(self) -> list[str]:
        if self.train_on == "adversarial" and not self.attack:
            return ["train_on=adversarial needs an attack to train against: attack=0.1"]
        return []

    @property
    def metric(self) -> Metric:
        return Metric("cross-entropy under attack" if self.attack else "cross-entropy", "lower", "nat")

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def part(self, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [count, channels, side, side] in 0..1 and labels [count], int64, on the workload's device."""
        images, labels = _read(self.data, held_out)
        count = len(images) if not held_out and self.train is None else (self.examples if held_out else self.train)
        assert count is not None
        if not held_out and count > len(images):
            raise UsageError(f"{self.data} has {len(images)} training images: train={count} asks for more")
        return images[:count].to(self.device()), labels[:count].to(self.device())

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ConvNet(SHAPES[self.data][0], self.width).to(self.device())

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        data = torch.utils.data.TensorDataset(*self.part(False))
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(
            data, batch_size=self.rows, shuffle=True, drop_last=True, generator=generator
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optim == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=self.decay)
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.decay)

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, self.warmup, floor=0.01)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Cross-entropy of each image, [rows]; under attack where the baseline trains against it."""
        from hasten.optim.adversarial_finetuning import Prepared

        images, labels = batch
        if self.train_on == "adversarial" and model.training and not isinstance(batch, Prepared):
            start = images + torch.empty_like(images).uniform_(-self.attack, self.attack)
            images = attacked(model, images, labels, self.attack, self.iterations, start)
        return F.cross_entropy(model(images), labels, reduction="none")

    def evaluate(self, model: nn.Module) -> np.ndarray:
        values = []
        for images, labels in zip(*(part.split(500) for part in self.part(True)), strict=True):
            if self.attack:
                noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(23)).to(images)
                start = images + self.attack * (2 * noise - 1)
                images = attacked(model, images, labels, self.attack, JUDGE_STEPS, start)
            with torch.no_grad():
                values.append(F.cross_entropy(model(images), labels, reduction="none"))
        return torch.cat(values).double().cpu().numpy()


def attacked(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float, steps: int, start: torch.Tensor
) -> torch.Tensor:
    """The images moved by PGD towards a larger loss, each pixel by at most epsilon and within 0..1.

    A step is 2.5 epsilon / steps along the gradient's sign. The model runs in eval mode and keeps its own afterwards;
    no gradient of a weight is made.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    low, high = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
    x = torch.minimum(torch.maximum(start, low), high).detach()
    with torch.enable_grad():
        for _ in range(steps):
            x.requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
            x = torch.minimum(torch.maximum(x.detach() + 2.5 * epsilon / steps * slope.sign(), low), high)
    for module, mode in modes:
        module.training = mode
    return x


@functools.cache
def _read(data: str, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if data == "digits":
        images, labels = digits(held_out, SHAPES[data][1])
        return (images + 1) / 2, labels
    if data == "mnist":
        part = "t10k" if held_out else "train"
        images = _idx(data_file(f"mnist/{part}-images-idx3-ubyte.gz"), 3)
        labels = _idx(data_file(f"mnist/{part}-labels-idx1-ubyte.gz"), 1)
        return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels).long()
    images, labels = cifar._images("test" if held_out else "train", 10_000 if held_out else 15_000)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (cifar.MEAN, cifar.DEVIATION))
    pixels = (images * deviation + mean).clamp(0, 1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))  # the files come class by class
    return pixels[order], labels[order]


def _idx(file: pathlib.Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file as an array.

    Raises:
        UsageError: it is no gzip file of unsigned bytes with so many dimensions.
    """
    try:
        content = gzip.decompress(file.read_bytes())
        assert content[:4] == bytes([0, 0, 8, dimensions])
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, AssertionError, ValueError) as error:
        raise UsageError(f"{file} is no gzipped IDX file of {dimensions} dimensions: {error or 'wrong head'}") from None


WORKLOAD = Images
