"""How many heads an attention module has and how wide they are, for methods that add weights per head."""

import dataclasses
from typing import Any

from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.structure import is_projection

_HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "n_head")
_DIMS = ("head_dim", "attention_head_size", "head_size", "dim_head")
_QUERIES = ("q_proj", "to_q", "query", "q_lin", "q")


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """heads: query heads; dim: of queries and keys; value_dim: of values."""

    heads: int
    dim: int
    value_dim: int


def head_sizes(attention: nn.Module) -> HeadSizes:
    """Read off the module's own attributes, its config's, or the width of its query projection.

    Raises:
        UsageError: none of them says it.
    """
    places = [attention, getattr(attention, "config", None)]
    heads, dim = _first(places, _HEADS), _first(places, _DIMS)
    named = [getattr(attention, name, None) for name in _QUERIES]
    part: Any = next((one for one in (*named, *attention.children()) if one is not None and is_projection(one)), None)
    if heads is not None and dim is None and part is not None:
        width = part.out_features if hasattr(part, "out_features") else part.nf
        dim = width // (3 if width == 3 * getattr(part, "in_features", 0) else 1) // heads
    if heads is None or not dim:
        kind = type(attention).__name__
        raise UsageError(f"can't tell how many heads {kind} has: it names neither its heads nor their width")
    return HeadSizes(heads, dim, _first(places, ("v_head_dim",)) or dim)


def _first(places: list[Any], names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive whole number."""
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
