"""How many bits a weight or an activation has: the protocol of quantization, and what calibrates, packs and swaps.

A method of this family is one of two kinds.

1. It decides about one matrix at a time (`WeightQuantizer`); the rest is done for it:

       quantize(weight, statistic) -> Form     weight: fp32 [out, in]; statistic: what `method.statistic` names, or None

   `statistic` is one of
       hessian   fp32 [in, in], 2/tokens * sum of x x^T over the inputs x        (the default)
       norms     fp32 [in], the root mean square of each input
       tokens    fp32 [at most 2048, in], inputs themselves
       fisher    fp32 [out, in], the mean squared gradient of the loss
       none      None; so it is, too, where the card needs no calibration
   `bits` is what a weight has (16: leave everything as it is), `ignore` names layers (paths, with `*`) that stay.
   A `Form` (`Codes` below, or one of a file of its own) makes the layer that multiplies it. Layers that read one tensor
   (query, key and value) share a statistic and are handed over as one weight, so rows must be treated independently;
   `Form.split` takes them apart again. Where that is wrong, `together = False`.

2. It changes more than single matrices (`ModelQuantizer`): `install(host, context) -> record` and `restore(host,
   record)`; everything it changes goes through `host.changes`. `swap` and `layer_record` below serve it too.

What is quantized: linear layers, GPT-2's Conv1D, the convolutions of plain convolutional networks (as a product of
patches), and sparse layers, which keep their zeros and hold what remains in 8 bits. Heads, embeddings and shared
weights stay. Calibration streams (`hasten.hosts.streaming`).
"""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts import Context, Host
from hasten.hosts.gradients import fisher
from hasten.hosts.streaming import STATISTICS, gather
from hasten.hosts.weights import Unfolded, Weight, is_held, layers_of
from hasten.quant._layers import is_quantized, layer_class
from hasten.quant._linear import Codes, QuantLinear, Sparse

__all__ = ["Codes", "Form", "ModelQuantizer", "QuantLinear", "Sparse", "WeightQuantizer"]

FULL_BITS = 16


class Form(Protocol):
    """A quantized weight [out, in] that knows its layer."""

    def split(self, sizes: list[int]) -> Sequence["Form"]:
        """Parts with these numbers of rows."""
        ...

    def layer(self, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A layer of a class of `_layers.LAYERS`; `dtype`: of the weight that it replaces."""
        ...


@runtime_checkable
class WeightQuantizer(Protocol):
    """A method that decides about one matrix at a time."""

    @property
    def name(self) -> str: ...
    @property
    def card(self) -> Any: ...
    @property
    def bits(self) -> int: ...
    @property
    def ignore(self) -> tuple[str, ...]: ...
    def quantize(self, weight: Tensor, statistic: Any) -> Form: ...


@runtime_checkable
class ModelQuantizer(Protocol):
    """A method that changes a model itself."""

    @property
    def name(self) -> str: ...
    def install(self, host: Host, context: Context) -> dict[str, Any]: ...
    def restore(self, host: Host, record: dict[str, Any]) -> None: ...


def install(method: WeightQuantizer | ModelQuantizer, host: Host, context: Context) -> dict[str, Any]:
    """Quantizes the layers of a host and puts layers that multiply the codes in their place.

    Layers that calibration never reaches (an expert without a token, a layer whose weight another module reads) stay
    dense and are reported.

    Returns:
        {"layers": {path: record of the layer}}, or what the method's own `install` returns.

    Raises:
        UsageError: nothing to quantize, a weight with NaN or infinity, or no finite calibration input of a layer.
    """
    if isinstance(method, ModelQuantizer):
        return method.install(host, context)
    if method.bits >= FULL_BITS:
        return {"layers": {}}
    chosen = choose(method, host)
    before = sum(weight.bytes() for weight in chosen.values())
    layers: dict[str, Any] = {}
    facts: dict[str, Any] = {"left_dense": []}
    mark = len(host.changes)
    try:
        for paths, statistic in _inputs(method, host, context, chosen, facts):
            with torch.no_grad():
                layers |= _quantize(method, host, {path: chosen[path] for path in paths}, statistic, facts)
        if not layers:
            raise UsageError(
                f"calibration reached none of the linear layers of {type(host.model).__name__}, so none is quantized"
            )
    except BaseException:
        host.changes.undo(mark)
        raise
    note(method.name, host, context, layers, before, sum(chosen[p].bytes() for p in facts["left_dense"]), facts)
    return {"layers": layers}


def restore(method: WeightQuantizer | ModelQuantizer, host: Host, record: dict[str, Any]) -> None:
    """Puts empty quantized layers where the record says; `load_state_dict` fills them.

    Raises:
        UsageError: the record names a layer or a class that is not there, or sizes that do not fit it.
    """
    if isinstance(method, ModelQuantizer):
        method.restore(host, record)
    else:
        restore_layers(host, record["layers"])


def restore_layers(host: Host, layers: dict[str, Any]) -> None:
    """Puts empty layers where records of `layer_record` say."""
    weights = host.weights()
    for path, record in layers.items():
        if path not in weights:
            raise UsageError(f"the saved plan names the layer {path}, which this model lacks: is it the same model?")
        layer = layer_class(record["layer"]).empty(  # type: ignore[attr-defined]
            **record["shape"], device=host.device
        )
        if (layer.out_features, layer.in_features) != weights[path].shape:
            raise UsageError(
                f"the saved plan has {path} as {layer.out_features} x {layer.in_features}, the model as "
                f"{' x '.join(map(str, weights[path].shape))}: is it the same model?"
            )
        host.replace(path, weights[path].holding(layer.train(weights[path].part.training)))


def densify(host: Host) -> None:
    """Puts plain layers, with the weights that the codes stand for, in the place of all quantized ones."""
    for path, part in layers_of(host.model, is_quantized).items():
        host.replace(path, part.dense())  # type: ignore[operator]


def choose(method: Any, host: Host) -> dict[str, Weight]:
    """The matrices that a method decides about, by path: those of the host but what its option `ignore` names.

    Raises:
        UsageError: there are none, or one holds NaN or infinity.
    """
    chosen = {
        path: weight
        for path, weight in host.weights().items()
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in method.ignore)
    }
    if not chosen:
        raise UsageError(
            f"{method.name} finds no linear layer to quantize in {type(host.model).__name__}; "
            f"its option ignore is {list(method.ignore)}"
        )
    for path, weight in chosen.items():
        if not weight.matrix.isfinite().all():
            raise UsageError(f"the weight of {path} holds NaN or infinity: there is nothing sound to quantize")
    return chosen


def swap(host: Host, weight: Weight, layer: nn.Module) -> dict[str, Any]:
    """Puts a quantized layer in the place of one and returns its record."""
    host.replace(weight.path, weight.holding(layer.train(weight.part.training)))
    return layer_record(layer)


def layer_record(layer: nn.Module) -> dict[str, Any]:
    """What `restore_layers` takes; JSON-able."""
    return {"layer": layer.kind, "shape": layer.shape()}  # type: ignore[operator]


def note(
    name: str, host: Host, context: Context, layers: dict[str, Any], before: int, dense: int, facts: dict[str, Any]
) -> None:
    """Reports what a method did: layers, bytes, the kernel that multiplies. Builds it now, not at the first token."""
    inside = [_inner(host.model.get_submodule(path)) for path in layers]
    after = sum(one.bytes() for one in inside)  # type: ignore[operator]
    ways = sorted({one.way() for one in inside})  # type: ignore[operator]
    speed: dict[str, Any] = {"kernel": ", ".join(ways)}
    if any(way.startswith("PyTorch") for way in ways):
        why = "no native kernel for this device" if host.device.type != "cpu" else "no C++ compiler is there"
        speed["simulated"] = f"{why}, so weights take less memory and products no less time"
    context.note(name, quantized=len(layers), weight_bytes_before=before, weight_bytes_after=after + dense,
                 **facts, **speed)  # fmt: skip


def _inner(part: nn.Module) -> nn.Module:
    return part.layer if isinstance(part, Unfolded) else part


def _inputs(
    method: Any, host: Host, context: Context, chosen: dict[str, Weight], facts: dict[str, Any]
) -> Iterator[tuple[list[str], Any]]:
    """(paths of layers that share their input, its statistic), in an order in which they can be swapped at once."""
    statistic = getattr(method, "statistic", "hessian")
    if "calibration" not in method.card.needs or statistic == "none":
        for path, weight in chosen.items():
            if weight.plain:  # other classes' weights are read by the module around them
                yield [path], None
            else:
                facts["left_dense"].append(path)
        return
    batches = context.calibration or []
    if statistic == "fisher":
        plain = {path: weight for path, weight in chosen.items() if weight.plain and not is_held(weight.part)}
        facts["left_dense"] += [path for path in chosen if path not in plain]
        for path, squares in fisher(host, batches, plain, context.seed):
            yield [path], squares
        return
    with torch.no_grad():
        for inputs in gather(host, batches, chosen, STATISTICS[statistic]):
            for paths, value in inputs.shared():
                few = min(inputs.tokens(path) for path in paths)
                if statistic == "hessian" and few < chosen[paths[0]].columns:
                    facts["fewer_tokens_than_inputs"] = facts.get("fewer_tokens_than_inputs", 0) + len(paths)
                if getattr(method, "together", True):
                    yield paths, value
                else:
                    yield from (([path], value) for path in paths)
            facts["left_dense"] += inputs.uncalled()
            if inputs.dropped:
                facts["tokens_left_out"] = facts.get("tokens_left_out", 0) + inputs.dropped


def _quantize(
    method: WeightQuantizer, host: Host, weights: dict[str, Weight], statistic: Any, facts: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Quantizes layers that share their input as one weight and swaps them."""
    records = {}
    for path, weight in list(weights.items()):
        if is_held(weight.part):
            records[path] = swap(host, weight, weight.part.quantized())  # type: ignore[operator]
            facts["sparse_in_8_bits"] = facts.get("sparse_in_8_bits", 0) + 1
            del weights[path]
    if weights:
        form = method.quantize(torch.cat([weight.matrix.float() for weight in weights.values()]), statistic)
        forms = form.split([weight.shape[0] for weight in weights.values()])
        for (path, weight), one in zip(weights.items(), forms, strict=True):
            records[path] = swap(host, weight, one.layer(weight.bias, weight.dtype))
    return records


def group_problems(group: int) -> list[str]:
    """What is wrong with an option `group`, 0 being the whole row; for a method's `problems`."""
    if group and (group < 16 or group & (group - 1)):
        return [f"group must be 0 or a power of two from 16 up, not {group}"]
    return []


def whole_group(group: int, weight: Tensor) -> int:
    """The group of a product with a weight [out, in]: that of the option, for 0 a power of two that holds a row."""
    return group or max(32, 1 << (weight.shape[1] - 1).bit_length())


def form_values(form: Form, columns: int) -> Tensor:
    """The weight [out, in] that a form stands for, fp32."""
    return form.layer(None, torch.float32).dense_weight()[:, :columns]  # type: ignore[operator]
