"""Calibration inputs as prompts, and what a model writes after them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.decode._rows import Rows
from hasten.decode._sampling import draw


def prompts(
    batches: list[dict[str, Any]], device: torch.device, rows: int | None = None, last: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The calibration inputs, left-padded: ids [B, T] and which are real, None where all are.

    Args:
        rows: at most so many rows in all; `last`: at most so many of each row's last tokens.

    Raises:
        UsageError: a row without a real token.
    """
    left = rows if rows is not None else sum(len(batch["input_ids"]) for batch in batches)
    for batch in batches:
        ids, mask = batch["input_ids"][:left].to(device), batch.get("attention_mask")
        left -= len(ids)
        if len(ids):
            yield _left_padded(ids, None if mask is None else mask[: len(ids)].to(device).bool(), last)


def _left_padded(ids: Tensor, real: Tensor | None, last: int | None) -> tuple[Tensor, Tensor | None]:
    last = ids.shape[1] if last is None else last
    if real is None or bool(real.all()):
        return ids[:, -last:], None
    if bool((real.sum(1) == 0).any()):
        raise UsageError("a calibration input holds no real token: its attention_mask is 0 everywhere")
    order = real.int().argsort(dim=1, stable=True)  # real tokens go to the right, in their order
    ids, real = ids.gather(1, order)[:, -last:], real.gather(1, order)[:, -last:]
    width = int(real.sum(1).max())
    ids, real = ids[:, -width:], real[:, -width:]
    return ids, None if bool(real.all()) else real


def extended(real: Tensor | None, count: int) -> Tensor | None:
    """The mask of prompts and `count` tokens after them."""
    return None if real is None else nn.functional.pad(real, (0, count), value=True)


def read(model: nn.Module, ids: Tensor, real: Tensor | None, count: int) -> Tensor:
    """The logits that stand before each of the last `count` tokens, [B, count, V], in one pass."""
    from transformers import DynamicCache

    config: Any = model.config
    rows = Rows(model, DynamicCache(config=config), limit=ids.shape[1], width=1)
    return rows.step(ids, real, logits=count + 1)[:, :-1]


@torch.no_grad()
def written(
    model: nn.Module,
    ids: Tensor,
    real: Tensor | None,
    count: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`count` tokens that the model writes after each prompt, [B, count]; greedy at temperature 0."""
    from transformers import DynamicCache

    config: Any = model.config
    rows = Rows(model, DynamicCache(config=config), limit=ids.shape[1] + count, width=1)
    tokens: list[Tensor] = []
    for _ in range(count):
        logits = rows.step(ids, real)[:, -1].float()
        token = logits.argmax(-1) if temperature == 0 else draw((logits / temperature).softmax(-1), generator)
        tokens.append(token)
        ids, real = token[:, None], None
    return torch.stack(tokens, 1)
