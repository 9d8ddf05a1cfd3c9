"""Setting weights to zero and holding what remains: the base of such methods and their executor."""

import dataclasses
import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.hosts.sparse import BitmapLinear, BlockSparseLinear
from hasten.hosts.streaming import STATISTICS, gather
from hasten.hosts.weights import Weight, is_held, layers_of
from hasten.prune import _patterns

BITMAP_FROM = (
    0.5  # sparsity from which a bitmap and the remaining weights are less memory traffic than the dense weight
)
KINDS = {layer.kind: layer for layer in (BlockSparseLinear, BitmapLinear)}


@dataclasses.dataclass(frozen=True)
class WeightPruning(Method):
    """Base of methods that set weights to zero; `statistic` is norms, hessian, tokens (`hosts.streaming`) or none."""

    sparsity: float = option(
        0.5, "fraction of the weights that become zero; 0 leaves the model as it is", least=0, below=1
    )
    pattern: str = option(
        "unstructured", "which weights go together: unstructured, n:m such as 2:4, blocks such as 16x1 (rows x columns)"
    )
    layout: str = option(
        "auto", "auto: layers that hold what remains; dense: zeros in plain layers", choices=("auto", "dense")
    )
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    statistic: ClassVar[str] = "norms"

    def problems(self) -> list[str]:
        return _patterns.problems(self.pattern, self.sparsity)

    def prune(self, weight: Tensor, statistic: Any, sparsity: float) -> Tensor:
        """The weight with zeros.

        Args:
            weight: fp32 [out, in]; `statistic`: what `statistic` names, or None.
            sparsity: of this layer.
        """
        raise NotImplementedError

    def allocate(self, host: Host, context: Context, weights: dict[str, Weight]) -> dict[str, float]:
        """The sparsity of each layer, by path; the same for all where a method has nothing else to say."""
        return dict.fromkeys(weights, self.sparsity)

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        return install(self, host, context)

    def restore(self, host: Host, record: dict[str, Any]) -> None:
        restore(host, record)


def install(method: WeightPruning, host: Host, context: Context) -> dict[str, Any]:
    """Prunes the matrices of a host one block after another and holds them in the layer that their pattern has.

    Returns:
        {"layers": {path: record of a sparse layer}}; layers that stay dense are not among them.

    Raises:
        UsageError: nothing to prune, a weight with NaN or infinity, or no finite calibration input of a layer.
    """
    if method.sparsity == 0:
        return {"layers": {}}
    chosen = _choose(method, host)
    before = sum(weight.bytes() for weight in chosen.values())
    shares = method.allocate(host, context, chosen)
    layers: dict[str, Any] = {}
    left: list[str] = []
    kept = total = 0
    mark = len(host.changes)
    try:
        with torch.no_grad():
            for path, statistic in _inputs(method, host, context, chosen, left):
                weight = chosen[path]
                found = method.prune(weight.matrix.float(), statistic, shares[path])
                kept, total = kept + int(found.count_nonzero()), total + found.numel()
                new = held(weight, found, method.pattern, method.layout)
                host.replace(path, new.train(weight.part.training))
                inner = getattr(new, "layer", new)
                if is_held(inner):
                    layers[path] = {"layer": inner.kind, "shape": inner.shape()}  # type: ignore[operator]
    except BaseException:
        host.changes.undo(mark)
        raise
    if not total:
        raise UsageError(f"calibration reached none of the layers of {type(host.model).__name__}, so none is pruned")
    _note(method, host, context, chosen, layers, left, shares, before, 1 - kept / total)
    return {"layers": layers}


def restore(host: Host, record: dict[str, Any]) -> None:
    """Puts empty sparse layers where the record says; `load_state_dict` fills them.

    Raises:
        UsageError: the record names a layer or a kind that is not there, or sizes that do not fit the layer.
    """
    weights = host.weights()
    for path, one in record["layers"].items():
        if path not in weights or one["layer"] not in KINDS:
            raise UsageError(f"the saved plan has the sparse layer {path}, which is not here: is it the same model?")
        layer = KINDS[one["layer"]].empty(**one["shape"], device=host.device)
        if (layer.out_features, layer.in_features) != weights[path].shape:
            raise UsageError(
                f"the saved plan has {path} as {layer.out_features} x {layer.in_features}, the model as "
                f"{' x '.join(map(str, weights[path].shape))}: is it the same model?"
            )
        host.replace(path, weights[path].holding(layer.train(weights[path].part.training)))


def densify(host: Host) -> None:
    """Puts plain layers with zeros in the place of all sparse ones."""
    for path, part in layers_of(host.model, is_held).items():
        host.replace(path, part.dense())  # type: ignore[operator]


def held(weight: Weight, matrix: Tensor, pattern: str, layout: str) -> nn.Module:
    """The module for a pruned matrix [out, in]: sparse where that is faster for some use, else dense with zeros."""
    size = _patterns.block(pattern)
    if layout == "dense":
        return weight.changed(matrix)
    if size is not None:
        made = BlockSparseLinear.from_dense(matrix, weight.bias, block=size, dtype=weight.dtype)
        return weight.holding(made)
    if isinstance(weight.part, nn.Conv2d) or float((matrix == 0).float().mean()) < BITMAP_FROM:
        return weight.changed(matrix)
    return weight.holding(BitmapLinear.from_dense(matrix, weight.bias, dtype=weight.dtype))


def _choose(method: WeightPruning, host: Host) -> dict[str, Weight]:
    chosen = {
        path: weight
        for path, weight in host.weights().items()
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in method.ignore)
    }
    if not chosen:
        raise UsageError(
            f"{method.name} finds no layer to prune in {type(host.model).__name__}; "
            f"its option ignore is {list(method.ignore)}"
        )
    for path, weight in chosen.items():
        if not weight.matrix.isfinite().all():
            raise UsageError(f"the weight of {path} holds NaN or infinity: there is nothing sound to prune")
    return chosen


def _inputs(
    method: WeightPruning, host: Host, context: Context, chosen: dict[str, Weight], left: list[str]
) -> Any:  # fmt: skip
    """(path, statistic) of each layer, in an order in which they can be replaced at once."""
    if "calibration" not in method.card.needs or method.statistic == "none":
        for path, weight in chosen.items():
            if weight.plain:
                yield path, None
            else:
                left.append(path)
        return
    for inputs in gather(host, context.calibration or [], chosen, STATISTICS[method.statistic]):
        for paths, statistic in inputs.shared():
            yield from ((path, statistic) for path in paths)
        left += inputs.uncalled()


def _note(
    method: WeightPruning, host: Host, context: Context, chosen: dict[str, Weight], layers: dict[str, Any],
    left: list[str], shares: dict[str, float], before: int, sparsity: float,
) -> None:  # fmt: skip
    after, ways, dense = 0, set(), []
    for path, weight in chosen.items():
        part = host.model.get_submodule(path)
        inner = getattr(part, "layer", part)
        if path in layers:
            after += inner.bytes()  # type: ignore[operator]
            ways.add(inner.way())  # type: ignore[operator]
        else:
            after += weight.bytes()
            dense.append(path)
    facts: dict[str, Any] = {"sparsity": round(sparsity, 4), "left_dense": left, "weight_bytes_before": before,
                             "weight_bytes_after": after, "kernel": ", ".join(sorted(ways)) or "dense"}  # fmt: skip
    zeros_in_dense = len(set(dense) - set(left))
    if zeros_in_dense:
        facts["zeros_in_dense_layers"] = zeros_in_dense
    if len(set(shares.values())) > 1:
        facts["shares"] = {path: round(share, 4) for path, share in shares.items()}
    if len(dense) == len(chosen):
        facts["simulated"] = "the zeros are multiplied as any other weight: no time and no memory is saved"
    elif any(way.startswith("PyTorch") for way in ways):
        facts["simulated"] = "no native kernel here, so weights take less memory and products no less time"
    context.note(method.name, **facts)
