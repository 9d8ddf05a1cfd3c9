"""Trained weights that come with the package: bfloat16 safetensors beside the command and the seed that made them."""

import json
import pathlib

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
    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return model.eval()


def record(name: str) -> dict:
    """The command, seed, versions and quality of bundled weights."""
    return json.loads((HOME / f"{name}.json").read_text())
