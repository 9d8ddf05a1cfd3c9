"""Batches of any kind people use: a tensor, a mapping, or a list or tuple of tensors and other things."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(batch: Any) -> list[Tensor]:
    """The batch's tensors, in order: of a tensor, a mapping, or a list or tuple."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    return [part for part in parts if isinstance(part, Tensor)]


def apply_to(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each tensor changed; its kind and its other entries stay."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {key: change(part) if isinstance(part, Tensor) else part for key, part in batch.items()}
        return changed if type(batch) is dict else _same_kind(batch, changed)
    changed_list = [change(part) if isinstance(part, Tensor) else part for part in batch]
    return type(batch)(*changed_list) if hasattr(batch, "_fields") else type(batch)(changed_list)


def _same_kind(batch: Any, changed: dict[str, Any]) -> Any:
    try:
        return type(batch)(changed)
    except TypeError:
        return changed


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return apply_to(batch, lambda part: part.to(device))
