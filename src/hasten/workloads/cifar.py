"""cifar: published ResNets on CIFAR-10, a plain `nn.Module`; files of the folder HASTEN_DATA.

    model      weights  files
    resnet20   0.27M    resnet_cifar10/resnet20-12fca82f.th
    resnet32   0.46M    resnet_cifar10/resnet32-d509ac18.th
    resnet56   0.85M    resnet_cifar10/resnet56-4bfd9763.th

The networks of section 4.2 of "Deep Residual Learning for Image Recognition" (1512.03385) with option A, shortcuts
without weights. Images are cifar10_jpeg/{test,train}.zip, {split}/{class}/{nnnn}.jpg: packed anew as JPEG, so that the
models are right less often (81.0% for resnet20) than on the original pixels (91.8%).
"""

import dataclasses
import functools
import io
import pathlib
import zipfile
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import MissingDependencyError, UsageError
from hasten.core.options import option
from hasten.workloads.base import Metric, Workload
from hasten.workloads.data_folder import data_file

FILES = {
    "resnet20": "resnet_cifar10/resnet20-12fca82f.th",
    "resnet32": "resnet_cifar10/resnet32-d509ac18.th",
    "resnet56": "resnet_cifar10/resnet56-4bfd9763.th",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: every second pixel, and channels of zeros on both sides."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, (after - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(inner + x)


class ResNet(nn.Module):
    """Three stages of `depth` blocks, 16, 32 and 64 channels: images [batch, 3, 32, 32] to scores [batch, 10]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(before if n == 0 else after, after, stride if n == 0 else 1) for n in range(depth)))
            for before, after, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, len(CLASSES))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@dataclasses.dataclass(frozen=True)
class Cifar(Workload):
    model: str = option("resnet20", "the published model", choices=tuple(FILES))
    task: str = option("classify", "what is done", choices=("classify",))
    batch: int = option(16, "images in one request", least=1, most=1000)
    calibrate: int = option(256, "training images that methods are calibrated on", least=8, most=15000)
    examples: int = option(1000, "held-out images that quality is measured on, of all classes", least=10, most=10000)

    @classmethod
    def title(cls) -> str:
        return "cifar"

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "higher")

    def tasks(self) -> tuple[str, ...]:
        return ("classify",)

    def trained(self) -> nn.Module:
        file = data_file(FILES[self.model])
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            model = ResNet((int(self.model.removeprefix("resnet")) - 2) // 6)
            model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
        except Exception as error:  # unpickling raises anything
            raise UsageError(
                f"{file} does not hold the weights of {self.model}: {str(error).splitlines()[0][:160]}"
            ) from None
        return model.eval().to(self.device())

    def requests(self, seed: int) -> list[torch.Tensor]:
        pixels, _ = _images("test", max(16 * self.batch, len(CLASSES)))
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        return list(pixels[order[: 16 * self.batch]].to(self.device()).split(self.batch))

    @torch.inference_mode()
    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        return handle.model(request)

    @torch.inference_mode()
    def quality(self, handle: Any) -> np.ndarray:
        pixels, labels = (part.to(self.device()) for part in _images("test", self.examples))
        right = [handle.model(x).argmax(-1) == y for x, y in zip(pixels.split(100), labels.split(100), strict=True)]
        return torch.cat(right).double().cpu().numpy()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        pixels, _ = _images("train", self.calibrate)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(41))
        return [{"pixel_values": part} for part in pixels[order].to(self.device()).split(32)]


def _images(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _read(data_file(f"cifar10_jpeg/{split}.zip"), split, count)


@functools.lru_cache(maxsize=8)
def _read(file: pathlib.Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a part, evenly over its names and so over the classes.

    Returns:
        pixels [count, 3, 32, 32], normalised as in the models' training; labels [count], int64.

    Raises:
        UsageError: the file is no such archive, or holds fewer images.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("pillow", "diffusion") from None
    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(
                name
                for name in archive.namelist()
                if name.startswith(f"{split}/") and name.endswith(".jpg") and name.split("/")[1] in CLASSES
            )
            if len(names) < count:
                raise UsageError(f"{file} holds {len(names)} images, and {count} are asked for")
            chosen = [names[place * len(names) // count] for place in range(count)]
            images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in chosen]
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file} can't be read as a zip of JPEG images: {error}") from None
    if any(image.shape != (SIDE, SIDE, 3) for image in images):
        raise UsageError(f"{file} holds images of other sizes than {SIDE}x{SIDE}")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return pixels.contiguous(), torch.tensor([CLASSES.index(name.split("/")[1]) for name in chosen])


WORKLOAD = Cifar
