"""Which weights, heads, sublayers or layers exist: the family's protocols.

A method has `install(host, context) -> record` and `restore(host, record)`, which change a model through
`host.changes`; a method that acts on training alone says `training_only = True` and has `attach(run)`. Two bases give
both, so that a method has to decide only:

- `LayerPruning` (layers and sublayers): `importance` of a part and which to `leave_out`;
- `WeightPruning` (single weights, blocks of them): `prune(weight, statistic, sparsity) -> weight with zeros`, and,
  where layers get different shares, `allocate(host, context, weights) -> {path: sparsity}`. What remains is held in the
  layer that is fast for the pattern: blocks run through the block-sparse product, single weights through bitmaps; where
  neither fits, the layer stays dense and the plan is labelled `simulated`.
"""

from typing import Any

from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.prune._layers import LayerPruning
from hasten.prune._weights import WeightPruning

__all__ = ["LayerPruning", "WeightPruning", "attach", "install", "restore"]


def install(method: Any, host: Host, context: Context) -> dict[str, Any]:
    """Applies a method and returns what `restore` needs."""
    return method.install(host, context)  # type: ignore[no-any-return]


def restore(method: Any, host: Host, record: dict[str, Any]) -> None:
    """Brings a model into the shape that a record describes; `load_state_dict` fills it."""
    method.restore(host, record)


def attach(method: Any, run: Any) -> None:
    """Hooks a method that acts on training into a run."""
    if hasattr(method, "attach"):
        method.attach(run)
