"""A cache's layer that tokens may pass by: their keys and values are computed when a later token gets there."""

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hasten.core.errors import UsageError


@dataclasses.dataclass
class Skipped:
    """Tokens that passed a layer by: their states [B, T, D], and the positions that its keys will need."""

    x: torch.Tensor
    where: dict[str, Any]

    def over(self, change: Any) -> "Skipped":
        """`change(tensor)` of the states and of every position that is given."""

        def deep(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(deep(one) for one in value)
            return change(value) if isinstance(value, torch.Tensor) else value

        return Skipped(change(self.x), {name: deep(value) for name, value in self.where.items()})


class LaggingLayer(DynamicLayer):
    """Keys and values of a layer that tokens passed by: they are computed when a later token gets there.

    It counts, reorders and crops like any layer, with the tokens that wait.
    """

    def __init__(self, owner: int = -1) -> None:
        super().__init__()
        self.owner = owner
        self.waiting: list[Skipped] = []

    @classmethod
    def of(cls, layer: DynamicLayer) -> "LaggingLayer":
        new = cls()
        new.__dict__.update(vars(layer))
        return new

    def get_seq_length(self) -> int:
        return super().get_seq_length() + sum(one.x.shape[1] for one in self.waiting)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.waiting:
            raise UsageError(
                "this cache was filled by a model with exits, and its deeper layers lag behind: go on with that model, "
                "or start from an empty cache"
            )
        return super().update(key_states, value_states)

    def _each(self, change: Any) -> None:
        self.waiting = [one.over(lambda t: change(t) if t.shape[0] > 1 else t) for one in self.waiting]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.waiting = [one.over(lambda t: t.repeat_interleave(repeats, dim=0)) for one in self.waiting]

    def crop(self, tokens_to_remove: int) -> None:
        rest = abs(tokens_to_remove)
        while rest and self.waiting:
            last = self.waiting.pop()
            stay = last.x.shape[1] - rest
            rest = max(0, -stay)
            if stay > 0:
                self.waiting.append(last.over(lambda t, stay=stay: t[:, :stay] if t.ndim > 1 else t[:stay]))
        super().crop(-rest)

    def reset(self) -> None:
        self.waiting = []
        super().reset()


class Stored(Exception):
    """The keys and values are stored: nothing else of the block is wanted."""


class KeysOnly:
    """A cache that stops a block once its attention has handed over keys and values."""

    def __init__(self, cache: Any, layer: LaggingLayer) -> None:
        self._cache, self._layer = cache, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._layer.update(key_states, value_states)
        raise Stored


def together(tokens: list[Skipped]) -> Skipped:
    """Skipped tokens one after the other."""
    if len(tokens) == 1:
        return tokens[0]

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(join(list(one)) for one in zip(*values, strict=True))
        return torch.cat(values, min(1, values[0].ndim - 1)) if isinstance(values[0], torch.Tensor) else values[-1]

    where = {name: join([one.where[name] for one in tokens]) for name in tokens[0].where}
    return Skipped(torch.cat([one.x for one in tokens], 1), where)
