"""What it takes to build a model's architecture again without its weights: a class and its config."""

import importlib
import json
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError


def record_of(model: nn.Module) -> dict[str, Any]:
    """A JSON-able record for `rebuild`: library, class and config; for a class of one's own only its name."""
    library = type(model).__module__.partition(".")[0]
    record: dict[str, Any] = {"library": library, "class": type(model).__name__, "module": type(model).__module__}
    record["num_weights"] = sum(parameter.numel() for parameter in model.parameters())
    config: Any = getattr(model, "config", None)
    if library == "transformers" and hasattr(config, "to_dict"):
        record["config"] = json.loads(config.to_json_string(use_diff=False))
        record["config_class"] = type(config).__name__
        record["attention"] = config._attn_implementation
        record["dtype"] = str(model.dtype).removeprefix("torch.")
    elif library == "diffusers" and config is not None:
        record["config"] = json.loads(json.dumps(dict(config), default=str))
    elif library == "timm" and hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        record["arguments"] = _vit_arguments(model)
    elif library == "timm" and getattr(model, "pretrained_cfg", None):
        record["architecture"] = model.pretrained_cfg["architecture"]  # type: ignore[index]
        record["arguments"] = {"num_classes": model.num_classes}
    else:
        record["library"] = "other"
    return record


def rebuild(record: dict[str, Any]) -> nn.Module:
    """Builds the architecture of a `record_of`, in eval mode; weights are random.

    Raises:
        UsageError: the class is not one of transformers, diffusers or timm, or its record does not say all about it.
    """
    library, module = record["library"], record["module"]
    layer = record.get("arguments", {}).get("act_layer", "torch.nn:GELU") if isinstance(record, dict) else ""
    known = library in ("transformers", "diffusers", "timm") and module.partition(".")[0] == library
    if library != "other" and (not known or layer.partition(".")[0] not in ("torch", "timm")):
        raise UsageError(
            f"the record names {module}, {layer}: only classes of transformers, diffusers and timm are built"
        )
    model: nn.Module | None = None
    if library == "transformers":
        package = importlib.import_module(module)
        config_class = getattr(importlib.import_module("transformers"), record["config_class"])
        config = config_class.from_dict(record["config"])
        config._attn_implementation = record["attention"]
        model = getattr(package, record["class"])._from_config(config, dtype=getattr(torch, record["dtype"]))
    elif library == "diffusers":
        model = getattr(importlib.import_module(module), record["class"]).from_config(record["config"])
    elif library == "timm" and "architecture" in record:
        model = importlib.import_module("timm").create_model(record["architecture"], **record["arguments"])
    elif library == "timm":
        model = getattr(importlib.import_module(module), record["class"])(**_layers_from(record["arguments"]))
    if model is None or sum(parameter.numel() for parameter in model.parameters()) != record["num_weights"]:
        raise UsageError(
            f"{record['class']} ({module}) can't be built from its record: build the model yourself and hand it over "
            "with model=MODEL"
        )
    return model.eval()


def _vit_arguments(model: Any) -> dict[str, Any]:
    """The constructor arguments of a timm vision transformer, read back from its parts."""
    block, embed = model.blocks[0], model.patch_embed
    scale = getattr(block.ls1, "gamma", None) if hasattr(block, "ls1") else None
    arguments = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": None if scale is None else 1e-5,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "act_layer": f"{type(block.mlp.act).__module__}:{type(block.mlp.act).__name__}",
    }
    if type(model).__name__ == "VisionTransformer":
        arguments |= {
            "global_pool": model.global_pool,
            "class_token": model.cls_token is not None,
            "reg_tokens": model.num_reg_tokens,
            "no_embed_class": model.no_embed_class,
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        }
    return arguments


def _layers_from(arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = arguments["act_layer"].partition(":")
    return arguments | {"act_layer": getattr(importlib.import_module(module), name)}
