"""Trained weights that come with the package: safetensors beside the command and the seed that made them.

Tensors are bfloat16, or (`save_rows`) matrices of 8-bit integers with one scale a row under NAME.scale.
"""

import json
import pathlib

import torch
from torch import nn

from hasten.core.errors import UsageError

HOME = pathlib.Path(__file__).parent / "weights"


def load_weights(model: nn.Module, name: str) -> nn.Module:
    """Loads the bundled weights into a model built by `workloads.models`, in the model's own dtype; eval mode.

    Raises:
        UsageError: they are missing from this installation.
    """
    from safetensors.torch import load_file

    file = HOME / f"{name}.safetensors"
    if not file.exists():
        raise UsageError(f"the trained weights {name} are not installed; one of scripts/make_*weights.py makes them")
    missing, unexpected = model.load_state_dict(_widened(load_file(file)), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return model.eval()


def _widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scales = {name.removesuffix(".scale") for name in state if name.endswith(".scale")}
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(".scale")}
    return plain | {name: state[name] * state[f"{name}.scale"] for name in scales}


def save_rows(model: nn.Module, file: pathlib.Path) -> None:
    """Writes a model's weights with matrices rounded to 8 bits, and rounds the model's own to what was written."""
    from safetensors.torch import save_file

    state: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a tied weight comes once
            if weight.ndim < 2:
                state[name] = weight.detach().clone()
                continue
            scale = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            scale = scale.view(-1, *[1] * (weight.ndim - 1))
            state[name], state[f"{name}.scale"] = (weight / scale).round().to(torch.int8), scale
            weight.copy_(state[name] * scale)
    save_file(state, file, metadata={"format": "pt"})


def record(name: str) -> dict:
    """The command, seed, versions and quality of bundled weights."""
    return json.loads((HOME / f"{name}.json").read_text())
