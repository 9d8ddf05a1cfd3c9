"""Checkpoints of quantized models that other libraries write and read: compressed-tensors and GPTQ.

    format               tensors of a layer [out, in] with b bits, groups of g               zero points
    compressed-tensors   weight_packed int32 [out, in b / 32], weight_scale [out, in / g],    weight_zero_point int32
    (pack-quantized)     weight_shape                                                         [out b / 32, in / g]
    gptq                 qweight int32 [in b / 32, out], scales [in / g, out], g_idx [in]     qzeros int32
                                                                                              [in / g, out b / 32]

All pack codes densely, lowest bits first, across word borders. GPTQ's first format holds zero points less one, its
second (`gptq_v2`) as they are. Codes are unsigned here; compressed-tensors subtracts 2^(b-1) when it unpacks.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts import Host, recognise
from hasten.hosts.records import record_of
from hasten.math import packing
from hasten.quant._linear import Codes, QuantLinear

FORMATS = ("compressed-tensors", "gptq")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_GPTQ_BITS = (2, 3, 4, 8)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] packed along the columns, int32 [rows, ceil(columns * bits / 32)]."""
    values = codes.cpu().numpy().astype(np.uint8)
    spread = (values[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    flat = spread.reshape(len(values), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, uint8 [rows, columns], of `to_words`."""
    flat = np.unpackbits(words.contiguous().cpu().numpy().view(np.uint8), axis=1, bitorder="little")
    spread = flat[:, : columns * bits].reshape(len(flat), columns, bits)
    return torch.from_numpy((spread << np.arange(bits, dtype=np.uint8)).sum(2).astype(np.uint8))


def export(host: Host, path: str | pathlib.Path, kind: str) -> pathlib.Path:
    """Writes a transformers model with quantized layers so that other libraries read it.

    Args:
        kind: compressed-tensors or gptq.

    Raises:
        UsageError: an unknown format, a model of another library, nothing quantized, or layers that the format has no
            place for (look-up tables, outliers, quantized statistics, sparse layers, groups that end in the middle).
    """
    from safetensors.torch import save_file

    if kind not in FORMATS:
        raise UsageError(f"there is no format {kind!r}; there are {', '.join(FORMATS)}")
    config: Any = getattr(host.model, "config", None)
    if not type(host.model).__module__.startswith("transformers.") or config is None:
        raise UsageError(f"{type(host.model).__name__} is no transformers class: only Handle.save keeps it")
    layers = {path: part for path, part in host.model.named_modules() if isinstance(part, QuantLinear)}
    if not layers:
        raise UsageError("no layer of this model is quantized in codes: apply a quant method first")
    original = host.changes.replaced()
    for name, part in layers.items():
        _check_exportable(name, part, original.get(name), kind)
    folder = pathlib.Path(path)
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give a folder to export into")
    symmetric = all(bool((part.zeros == 2 ** (part.bits - 1)).all()) for part in layers.values())
    sizes = {(part.bits, _group(part)) for part in layers.values()}
    if len(sizes) > 1:
        raise UsageError(f"the layers have several bits or groups {sorted(sizes)}: export takes one for all")
    (bits, group), state = sizes.pop(), {}
    second = any(bool((part.zeros == 0).any()) for part in layers.values())
    for name, tensor in host.model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            state[name] = tensor.detach().cpu().contiguous().clone()
    tied = getattr(host.model, "_tied_weights_keys", None) or ()
    if getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False):
        for name in tied:
            state.pop(name, None)
    for name, part in layers.items():
        tensors = _compressed(part, symmetric) if kind == FORMATS[0] else _gptq(part, second)
        if part.bias is not None:
            tensors["bias"] = part.bias
        state |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in tensors.items()}
    others = [name for name, part in host.model.named_modules() if isinstance(part, nn.Linear)]
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(config.to_json_string(use_diff=False))
    content["quantization_config"] = _describe(kind, bits, group, symmetric, second, others)
    content["architectures"] = [type(host.model).__name__]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def _group(part: QuantLinear) -> int:
    """The group size as the formats say it, -1 for a scale a row."""
    return -1 if part.scales.shape[1] == 1 else part.group


def _check_exportable(name: str, part: QuantLinear, before: Any, kind: str) -> None:
    def refuse(why: str) -> UsageError:
        return UsageError(f"{name} {why}, for which {kind} has no place: keep this model with Handle.save")

    if part.tables is not None or part.levels is not None or part.outlier_values is not None:
        raise refuse("has look-up tables, quantized scales or outliers")
    if before is not None and not isinstance(before, nn.Linear):
        raise refuse(f"stands for a {type(before).__name__}")
    if part.scales.shape[1] > 1 and part.in_features % part.group:
        raise refuse(f"has {part.in_features} inputs, which groups of {part.group} don't divide")
    zeros = part.zeros.float()
    if bool((zeros != zeros.round()).any()) or bool((zeros < 0).any()):
        raise refuse("has zero points that are no whole numbers")
    if bool((zeros >= 2**part.bits).any()):
        raise refuse("has zero points outside of the codes")
    if kind == "gptq" and (part.bits not in _GPTQ_BITS or part.in_features % 32 or part.out_features % 32):
        raise refuse(f"is {part.out_features} x {part.in_features} of {part.bits} bits, no multiples of 32")
    if kind == FORMATS[0] and part.order is not None:
        raise refuse("has its columns in another order")


def _codes(part: QuantLinear) -> Tensor:
    codes = packing.unpack(part.packed, part.bits, part.in_features)
    return codes if part.order is None else torch.empty_like(codes).index_copy_(1, part.order, codes)


def _zeros(part: QuantLinear) -> Tensor:
    return part.zeros.float().expand(part.scales.shape)


def _compressed(part: QuantLinear, symmetric: bool) -> dict[str, Tensor]:
    found = {
        "weight_packed": to_words(_codes(part), part.bits),
        "weight_scale": part.scales.to(part.dtype),
        "weight_shape": torch.tensor([part.out_features, part.in_features]),
    }
    if not symmetric:
        found["weight_zero_point"] = to_words(_zeros(part).t().to(torch.uint8), part.bits).t()
    return found


def _gptq(part: QuantLinear, second: bool) -> dict[str, Tensor]:
    groups = torch.arange(part.in_features) // (part.group if part.scales.shape[1] > 1 else part.in_features)
    if part.order is not None:
        groups = torch.empty_like(groups).index_copy_(0, part.order.cpu(), groups)
    zeros = _zeros(part).t() if second else _zeros(part).t() - 1
    return {
        "qweight": to_words(_codes(part), part.bits).t(),
        "qzeros": to_words(zeros.to(torch.uint8), part.bits),
        "scales": part.scales.t().to(torch.float16 if part.dtype is torch.float32 else part.dtype),
        "g_idx": groups.int(),
    }


def _describe(kind: str, bits: int, group: int, symmetric: bool, second: bool, ignore: list[str]) -> dict[str, Any]:
    if kind == "gptq":
        return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
                "checkpoint_format": "gptq_v2" if second else "gptq"}  # fmt: skip
    grouped = {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **grouped}
    one = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": one}, "ignore": ignore}  # fmt: skip


def is_exchanged(folder: pathlib.Path) -> bool:
    """Whether a folder holds a model that another library quantized."""
    try:
        return "quantization_config" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False


def load(folder: pathlib.Path) -> tuple[Host, str, dict[str, Any], dict[str, Any]]:
    """Builds a transformers model whose layers hold what a compressed-tensors or GPTQ checkpoint says.

    Returns:
        the host, the plan that describes the layers, its record, and the record of the model without it.

    Raises:
        UsageError: a format, bits or a layout that is not read here, tensors that are missing or do not fit.
    """
    import transformers

    content = json.loads((folder / CONFIG).read_text())
    given = content.pop("quantization_config")
    kind, bits = _understood(given)
    names = content.get("architectures") or ["?"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise UsageError(f"{folder} holds a {names[0]}, which transformers {transformers.__version__} does not have")
    config = transformers.AutoConfig.for_model(**content)
    with torch.device("cpu"):
        model = cls(config).to(getattr(torch, str(content.get("dtype") or content.get("torch_dtype") or "float32")))
    state = _tensors(folder)
    host, original = recognise(model.eval()), record_of(model)
    weights, layers = host.weights(), {}
    key = "weight_packed" if kind == FORMATS[0] else "qweight"
    for name in sorted({name.removesuffix("." + key) for name in state if name.endswith("." + key)}):
        if name not in weights:
            raise UsageError(
                f"the checkpoint has a quantized {name}, which {names[0]} lacks or which is no hidden layer"
            )
        own = {part: state.pop(f"{name}.{part}") for part in _parts(kind) if f"{name}.{part}" in state}
        bias = state.pop(f"{name}.bias", None)
        reader = _read_compressed if kind == FORMATS[0] else _read_gptq
        codes = reader(name, own, bits, weights[name].shape, given)
        layer = codes.layer(bias, weights[name].dtype)
        host.replace(name, layer)
        layers[name] = {"layer": layer.kind, "shape": layer.shape()}
    if not layers:
        raise UsageError(f"{folder} says that it is quantized with {kind} but holds no such layer")
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())  # type: ignore[call-overload]
    absent = [name for name in missing if name not in tied and name.rpartition(".")[0] not in layers]
    if absent or unexpected:
        raise UsageError(f"the checkpoint does not fit {names[0]}: missing {absent[:3]}, not known {unexpected[:3]}")
    model.tie_weights()
    groups = {record["shape"]["group"] for record in layers.values()}
    plan = f"quant/{'gptq' if kind == 'gptq' else 'round_to_nearest'}(bits={bits}, group={min(groups)}, activations=32)"
    return host, plan, {"layers": layers}, original


def _understood(given: dict[str, Any]) -> tuple[str, int]:
    kind = given.get("quant_method")
    if kind == "gptq":
        if given.get("bits") not in _GPTQ_BITS:
            raise UsageError(f"GPTQ checkpoints of {given.get('bits')} bits are not read: {_GPTQ_BITS} are")
        return kind, given["bits"]
    if kind != FORMATS[0]:
        raise UsageError(f"checkpoints of {kind!r} are not read: {', '.join(FORMATS)} are")
    groups = list((given.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    if given.get("format") != "pack-quantized" or len(groups) != 1 or groups[0].get("input_activations"):
        raise UsageError("of compressed-tensors the format pack-quantized with one group of layers is read")
    if weights[0].get("type") != "int" or weights[0].get("num_bits") not in packing.BITS:
        raise UsageError(f"compressed-tensors of {weights[0].get('num_bits')} bits are not read: {packing.BITS} are")
    return FORMATS[0], weights[0]["num_bits"]


def _parts(kind: str) -> tuple[str, ...]:
    if kind == "gptq":
        return ("qweight", "qzeros", "scales", "g_idx")
    return ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def _tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no .safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} can't be read, it may be cut off: {error}") from None
    return found


def _fits(name: str, tensors: dict[str, Tensor], wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> None:
    for part, (dtype, shape) in wanted.items():
        if part not in tensors:
            raise UsageError(f"the checkpoint lacks {name}.{part}")
        found = tensors[part]
        if tuple(found.shape) != shape or (dtype is not None and found.dtype != dtype):
            raise UsageError(
                f"{name}.{part} is {found.dtype} {list(found.shape)}, where {dtype or 'floats'} {list(shape)} is due"
            )
        if found.is_floating_point() and not found.isfinite().all():
            raise UsageError(f"{name}.{part} holds NaN or infinity")


def _read_compressed(
    name: str, tensors: dict[str, Tensor], bits: int, shape: tuple[int, int], given: dict[str, Any]
) -> Codes:  # fmt: skip
    rows, columns = shape
    weights = next(iter(given["config_groups"].values()))["weights"]
    size = weights.get("group_size")
    group = columns if weights.get("strategy") != "group" else int(size or 0)
    if "weight_g_idx" in tensors or group < 1 or columns % group:
        raise UsageError(f"{name} has groups of {size} for {columns} inputs, or in another order: that is not read")
    groups, wide = columns // group, -(-columns * bits // 32)
    wanted: dict[str, Any] = {"weight_packed": (torch.int32, (rows, wide)), "weight_scale": (None, (rows, groups))}
    if not weights.get("symmetric", True):
        wanted["weight_zero_point"] = (torch.int32, (-(-rows * bits // 32), groups))
    _fits(name, tensors, wanted)
    zeros = torch.full((rows, groups), float(2 ** (bits - 1)))
    if "weight_zero_point" in wanted:
        zeros = from_words(tensors["weight_zero_point"].t(), bits, rows).t().float()
    codes = from_words(tensors["weight_packed"], bits, columns)
    return Codes(codes, tensors["weight_scale"].float(), zeros, _usable(group, groups), bits)


def _read_gptq(
    name: str, tensors: dict[str, Tensor], bits: int, shape: tuple[int, int], given: dict[str, Any]
) -> Codes:  # fmt: skip
    rows, columns = shape
    group = given.get("group_size", -1)
    group = columns if group == -1 else int(group)
    if group < 1 or columns % 32 or rows % 32:
        raise UsageError(f"{name} is {rows} x {columns} in groups of {group}: GPTQ packs multiples of 32")
    groups = -(-columns // group)
    wanted: dict[str, Any] = {"qweight": (torch.int32, (columns * bits // 32, rows))}
    wanted |= {"qzeros": (torch.int32, (groups, rows * bits // 32)), "scales": (None, (groups, rows))}
    _fits(name, tensors, wanted)
    codes = from_words(tensors["qweight"].t(), bits, columns)
    zeros = from_words(tensors["qzeros"], bits, rows).t().float()
    if given.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    order = None
    places = tensors.get("g_idx")
    if places is not None and not torch.equal(places.long(), torch.arange(columns) // group):
        _fits(name, tensors, {"g_idx": (torch.int32, (columns,))})
        if not torch.equal(places.long().bincount(minlength=groups), (torch.arange(columns) // group).bincount()):
            raise UsageError(f"{name}.g_idx does not give each group its {group} inputs")
        order = places.long().argsort(stable=True)
        codes = codes[:, order]
    return Codes(codes, tensors["scales"].t().float(), zeros, _usable(group, groups), bits, order)


def _usable(group: int, groups: int) -> int:
    """A group that the native kernel takes: where a row has one scale, a power of two that holds it."""
    return max(32, 1 << (group - 1).bit_length()) if groups == 1 else group
