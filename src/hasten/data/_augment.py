"""Augmentations of one image [C, H, W], each from a generator's numbers alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import UsageError

Augment = Callable[[Tensor, torch.Generator], Tensor]


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """In -1..1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to an eighth of the side; what comes in repeats the edge."""
    sides = image.shape[-2:]
    most = [max(1, side // 8) for side in sides]
    padded = F.pad(image[None], (most[1], most[1], most[0], most[0]), mode="replicate")[0]
    top, left = (int(torch.randint(2 * m + 1, (), generator=generator)) for m in most)
    return padded[:, top : top + sides[0], left : left + sides[1]]


def flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Left to right, half of the time."""
    return image.flip(-1) if float(torch.rand((), generator=generator)) < 0.5 else image


def cutout(image: Tensor, generator: torch.Generator) -> Tensor:
    """A square of half the side, or what of it lies inside, becomes the image's mean (arXiv 1708.04552)."""
    height, width = image.shape[-2:]
    row, column = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
    half = max(1, min(height, width) // 4)
    made = image.clone()
    made[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = image.mean()
    return made


def warp(image: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 15 degrees, scaled by up to a tenth, moved by up to a tenth, and bent.

    Bending adds smooth displacements of up to a tenth of the side, bicubic between 4x4 random ones (Simard et al. 2003
    smooth them with a Gaussian).
    """
    turn, scale, across, down = _uniform(generator, 4).tolist()
    angle, size = torch.tensor(turn * torch.pi / 12), 1 + 0.1 * scale
    cos, sin = float(angle.cos()) * size, float(angle.sin()) * size
    moves = torch.tensor([[cos, -sin, 0.2 * across], [sin, cos, 0.2 * down]])
    grid = F.affine_grid(moves[None], [1, 1, *image.shape[-2:]], align_corners=False)
    bends = F.interpolate(0.2 * _uniform(generator, 1, 2, 4, 4), image.shape[-2:], mode="bicubic")
    grid = (grid + bends.permute(0, 2, 3, 1)).to(image)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


_ALL: dict[str, Augment] = {"crop": crop, "flip": flip, "cutout": cutout, "warp": warp}
NAMES = tuple(_ALL)


def find(data: Any, name: str, method: str) -> Callable[[Any, torch.Generator], Any]:
    """(example, generator) -> example: the data set's own, or a named one of the image that stands first.

    Raises:
        UsageError: the data set has no `augment`, or its examples do not begin with an image.
    """
    if name == "dataset":
        if not callable(getattr(data, "augment", None)):
            raise UsageError(
                f"{method}: the data set has no augment(example, generator): give it one, or choose an augmentation "
                f"for images: {', '.join(NAMES)}"
            )
        return data.augment
    first = data[0] if len(data) else None
    image = first[0] if isinstance(first, tuple | list) else first
    if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
        raise UsageError(
            f"{method}: augmentation={name} takes examples that begin with an image [channels, height, width] of real "
            "numbers: give the data set an augment(example, generator) instead"
        )

    def augmented(example: Any, generator: torch.Generator) -> Any:
        if isinstance(example, Tensor):
            return _ALL[name](example, generator)
        return type(example)((_ALL[name](example[0], generator), *example[1:]))

    return augmented
