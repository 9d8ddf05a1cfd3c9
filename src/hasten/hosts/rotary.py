"""Moving stored keys to other positions: a rotary embedding turns a key by an angle proportional to its position.

A key at position p is R(p) k, so R(d) R(p) k = R(p + d) k: keys of a text that moves by d are turned by d, values stay.
That holds where the angles per position are fixed and all layers share them. Whether a model is like that, and which
pairs of entries it turns, is found by running it on the same tokens at two places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.base import Host

CHANGING = ("dynamic", "longrope")  # their angles depend on how long the text is
Turn = Callable[[Tensor], Tensor]


def _halves(keys: Tensor) -> Tensor:
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _neighbours(keys: Tensor) -> Tensor:
    return torch.stack([-keys[..., 1::2], keys[..., ::2]], dim=-1).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotation of a model's keys.

    Attributes:
        module: the model's own rotary embedding, which gives cosines and sines.
        turn: how the entries are paired: the first half with the second, or neighbours.
        spread: whether the module lists each angle for two halves although neighbours are paired.
    """

    module: nn.Module
    turn: Turn
    spread: bool = False

    def move(self, keys: Tensor, by: int) -> Tensor:
        """Keys [..., dim] as they would be `by` positions further on; the same object where `by` is 0.

        Computed in float32 and rounded to the keys' dtype once. Entries beyond the rotated ones pass unchanged.
        """
        if by == 0:
            return keys
        cos, sin = self._angles(by, keys.device)
        width = cos.shape[-1]
        turned = keys[..., :width].float()
        moved = (turned * cos + self.turn(turned) * sin).to(keys.dtype)
        return moved if width == keys.shape[-1] else torch.cat([moved, keys[..., width:]], dim=-1)

    def _angles(self, by: int, device: torch.device) -> tuple[Tensor, Tensor]:
        places = torch.tensor([[0, abs(by)]], device=device)
        cos, sin = self.module(torch.zeros(1, device=device), places)
        if self.spread:
            cos, sin = (one[..., : one.shape[-1] // 2].repeat_interleave(2, -1) for one in (cos, sin))
        scale = cos[0, 0]  # the factor that some variants put on cosine and sine; the keys have it already
        return cos[0, 1] / scale, sin[0, 1] / scale * (1 if by > 0 else -1)


def rotary_of(host: Host, name: str) -> Rotary:
    """The rotation of a decoder's keys, checked on the model itself.

    Args:
        name: of the method that asks, for messages.

    Raises:
        UsageError: no rotary positions, angles that change with the length of the text, or keys that do not turn as
            a whole when their text moves.
    """
    model = type(host.model).__name__
    found = [part for part in host.model.modules() if hasattr(part, "inv_freq") and hasattr(part, "attention_scaling")]
    if not found:
        raise UsageError(
            f"{name} moves stored keys to other positions, which needs a rotary embedding: {model} has none"
        )
    module = found[0]
    kinds = getattr(module, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if any(word in kind for word in CHANGING):
            raise UsageError(
                f"{name} moves stored keys to other positions, and the {kind!r} positions of {model} change all angles "
                "when the text gets longer: use a model with fixed angles (default, linear, llama3, yarn)"
            )
    here, there = _keys_at(host, 0), _keys_at(host, 5)
    for turn, spread in ((_halves, False), (_neighbours, False), (_neighbours, True)):
        rotary = Rotary(module, turn, spread)
        try:
            moved = rotary.move(here, 5)
        except (RuntimeError, TypeError, ValueError):
            continue
        if torch.allclose(moved.double(), there.double(), rtol=0, atol=_slack(there)):
            return rotary
    raise UsageError(
        f"{name} moves stored keys to other positions: in {model} the rotary embedding does not turn them as a whole"
    )


def _slack(keys: Tensor) -> float:
    return float(keys.abs().max()) * (1e-4 + 8 * torch.finfo(keys.dtype).eps)


@torch.no_grad()
def _keys_at(host: Host, start: int) -> Tensor:
    """Keys of four tokens that begin at a position, all layers, [layers, kv heads, 4, dim].

    Raises:
        UsageError: the layers' keys differ in shape.
    """
    model: Any = host.model
    training = model.training
    model.eval()
    try:
        cache = type(host).new_cache(host)  # type: ignore[attr-defined]
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(4, device=host.device)[None] * 7 + 1) % vocabulary
        places = torch.arange(start, start + 4, device=host.device)[None]
        model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    keys = [layer.keys[0] for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if len({one.shape for one in keys}) > 1:
        raise UsageError(f"the layers of {type(model).__name__} store keys of different shapes, which is not supported")
    return torch.stack(keys)
