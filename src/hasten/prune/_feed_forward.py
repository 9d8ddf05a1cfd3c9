"""A feed-forward layer with ReLU that computes active neurons only, and putting it into a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.hosts import feed_forward
from hasten.hosts.base import Host
from hasten.hosts.feed_forward import FeedForward
from hasten.kernels import relu_ffn


class SparseFeedForward(nn.Module):
    """down(a * up(x)) with z = gate(x) - shift and a = z where z > threshold, else 0; without `up`: down(a).

    Its linear layers are those of the module that it replaces, under their names. For up to eight tokens, in evaluation
    and without gradients, inactive neurons are not computed (`hasten.kernels.relu_ffn`). While training the threshold
    is 0. Where other layers have taken the place of the linear ones (quantized ones, say) it calls them.
    """

    def __init__(self, part: nn.Module, form: FeedForward, shift: float, threshold: float) -> None:
        super().__init__()
        self.form, self.shift, self.threshold = form, shift, threshold
        for name in (form.gate, form.up, form.down):
            if name is not None:
                self.add_module(name, part.get_submodule(name))
        self.train(part.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        own = self._modules
        gate, down = own[self.form.gate], own[self.form.down]
        up = own[self.form.up] if self.form.up is not None else None
        assert gate is not None and down is not None
        if self.training or any(type(part) is not nn.Linear for part in (gate, down, up) if part is not None):
            z = gate(hidden_states) - self.shift
            a = torch.where(z <= (0.0 if self.training else self.threshold), 0, z)
            return down(a if up is None else a * up(hidden_states))  # type: ignore[no-any-return]
        bias: Any = gate.bias
        if self.shift:
            bias = -self.shift + (torch.zeros_like(gate.weight[:, 0]) if bias is None else bias)  # type: ignore[index]
        up_weight, up_bias = (None, None) if up is None else (up.weight, up.bias)
        return relu_ffn.relu_ffn(
            hidden_states, gate.weight, down.weight.t(), up_weight, bias, up_bias, down.bias, self.threshold  # type: ignore[arg-type,operator]
        )  # fmt: skip

    def inactive(self, hidden_states: Tensor) -> tuple[int, int]:
        """(neurons that are inactive for a token, all) summed over tokens."""
        z = getattr(self, self.form.gate)(hidden_states) - self.shift
        return int((z <= self.threshold).sum()), z.numel()

    def way(self) -> str:
        """How up to eight tokens are computed here: native or torch."""
        weight: Tensor = getattr(self, self.form.gate).weight
        return relu_ffn.path(1, weight.device, weight.dtype)

    def extra_repr(self) -> str:
        return f"shift={self.shift}, threshold={self.threshold}"


def layers_of(model: nn.Module) -> dict[str, SparseFeedForward]:
    return {path: part for path, part in model.named_modules() if isinstance(part, SparseFeedForward)}


def found_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, FeedForward, float | None]]:
    """(path, module, form, shift) of the feed-forward modules; the shift is None where the activation is no ReLU."""
    for path, part in model.named_modules():
        if path and (form := feed_forward.find(part)) is not None:
            like = part.get_submodule(form.gate).weight
            yield path, part, form, feed_forward.relu_shift(part.get_submodule(form.activation), like)  # type: ignore[arg-type]


def put(host: Host, path: str, form: FeedForward, shift: float, threshold: float) -> None:
    """Replaces a feed-forward module; a neuron's weights of `down` come to lie side by side in memory."""
    part = host.model.get_submodule(path)
    weight: Any = part.get_submodule(form.down).weight
    before = weight.data
    weight.data = before.t().contiguous().t()  # the same parameter, shape and values

    def undo() -> None:
        weight.data = before

    host.changes.call(undo)
    host.replace(path, SparseFeedForward(part, form, shift, threshold))
