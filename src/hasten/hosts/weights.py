"""The matrices that compression decides about, wherever a model holds them: linear layers, Conv1D, convolutions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.hosts.structure import is_conv1d


@dataclasses.dataclass(frozen=True)
class Weight:
    """One matrix [out, in] of a model.

    Attributes:
        path: of the module that holds it.
        part: that module; a linear layer, Conv1D, convolution, or a sparse layer (`is_held`).
        columns, out: its sizes.
    """

    path: str
    part: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        if is_held(self.part):
            return self.part.out_features, self.part.in_features  # type: ignore[return-value]
        weight: Tensor = self.part.weight  # type: ignore[assignment]
        if is_conv1d(self.part):
            return weight.shape[1], weight.shape[0]
        return weight.shape[0], math.prod(weight.shape[1:])

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def matrix(self) -> Tensor:
        """The weight [out, in], detached; of dense layers it shares their storage."""
        if is_held(self.part):
            return self.part.dense_weight()  # type: ignore[operator]
        weight: Tensor = self.part.weight.detach()  # type: ignore[assignment,operator]
        return weight.t() if is_conv1d(self.part) else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        return self.part.bias  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        held = self.part.dtype if is_held(self.part) else self.part.weight.dtype  # type: ignore[union-attr]
        return held  # type: ignore[return-value]

    @property
    def plain(self) -> bool:
        """Whether the module's class is one whose forward is the product and nothing reads the weight around it."""
        return type(self.part) in (nn.Linear, nn.Conv2d) or is_conv1d(self.part) or is_held(self.part)

    def rows(self, x: Tensor) -> Tensor:
        """What the product multiplies, [..., in], for an input of the module; convolutions: their patches."""
        return patches(x, **geometry(self.part)) if isinstance(self.part, nn.Conv2d) else x

    def holding(self, layer: nn.Module) -> nn.Module:
        """The module to put at `path`, which runs `layer` ([..., in] to [..., out]) in the product's place."""
        return Unfolded(layer, **geometry(self.part)) if isinstance(self.part, nn.Conv2d) else layer

    def changed(self, matrix: Tensor) -> nn.Module:
        """A module of the same use with another dense weight [out, in]."""
        if isinstance(self.part, nn.Conv2d):
            return convolution(linear_of(matrix.to(self.dtype), self.bias), geometry(self.part), self.part.in_channels)
        if is_conv1d(self.part):
            made = type(self.part)(*self.shape)  # type: ignore[call-arg]
            made.weight = nn.Parameter(matrix.t().to(self.dtype).contiguous())
            made.bias = nn.Parameter(self.part.bias.detach().clone())  # type: ignore[union-attr,operator]
            return made.train(self.part.training)
        return linear_of(matrix.to(self.dtype), self.bias).train(self.part.training)

    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.part.parameters(), *self.part.buffers()))


def is_held(part: nn.Module) -> bool:
    """Whether a sparse layer holds the weight: it has `dense_weight()` and `quantized()`, which keep its zeros."""
    return getattr(part, "keeps_zeros", False) is True


def is_unfoldable(part: nn.Module) -> bool:
    """Whether a convolution is a product of patches with one matrix: one group, zero padding."""
    return isinstance(part, nn.Conv2d) and part.groups == 1 and part.padding_mode == "zeros"


def geometry(conv: nn.Module) -> dict[str, Any]:
    """What `patches` and `Unfolded` take of a convolution; JSON-able."""
    assert isinstance(conv, nn.Conv2d)
    padding = conv.padding
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = tuple(one // 2 for one in whole)
        assert all(one % 2 == 0 for one in whole), "padding='same' with an even kernel is not symmetric"
    return {"kernel": list(conv.kernel_size), "stride": list(conv.stride), "padding": list(padding),
            "dilation": list(conv.dilation)}  # fmt: skip


def patches(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """The patches of images [batch, channels, height, width], [batch, places, channels * kernel area]."""
    if kernel == [1, 1] and padding == [0, 0]:
        return x[:, :, :: stride[0], :: stride[1]].flatten(2).transpose(1, 2)
    return F.unfold(x, *map(tuple, (kernel, dilation, padding, stride))).transpose(1, 2)  # type: ignore[arg-type]


class Unfolded(nn.Module):
    """A convolution as the product of patches with a matrix.

    Args:
        layer: takes [batch, places, channels * kernel area] to [batch, places, out].
    """

    def __init__(
        self, layer: nn.Module, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
    ) -> None:
        super().__init__()
        self.layer = layer
        self.geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(input.shape[-2:], *self.geometry.values(), strict=True)
        ]
        return self.layer(patches(input, **self.geometry)).transpose(1, 2).unflatten(2, sizes)

    def dense(self) -> nn.Conv2d:
        """The plain convolution."""
        linear = self.layer.dense()  # type: ignore[operator]
        return convolution(linear, self.geometry, linear.in_features // math.prod(self.geometry["kernel"]))


def convolution(linear: nn.Linear, sizes: dict[str, Any], channels: int) -> nn.Conv2d:
    """The convolution whose patches a linear layer multiplies."""
    names = {"kernel": "kernel_size"}
    options: dict[str, Any] = {names.get(name, name): tuple(value) for name, value in sizes.items()}
    made = nn.Conv2d(channels, linear.out_features, bias=linear.bias is not None, device="meta", **options)
    made.weight = nn.Parameter(
        linear.weight.detach().view(linear.out_features, channels, *sizes["kernel"]).contiguous()
    )
    made.bias = linear.bias
    return made.train(linear.training)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with a given weight [out, in] and a copy of a bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    made.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
    return made


def layers_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The layers of some kind by the path at which `Host.replace` puts them (convolutions: around them)."""
    found: dict[str, nn.Module] = {}
    for path, part in model.named_modules():
        inner = part.layer if isinstance(part, Unfolded) else part
        if wanted(inner) and not (path.endswith(".layer") and path.removesuffix(".layer") in found):
            found[path] = part
    return found
