"""From a model to its host: by the structure of its modules and the arguments of its forward, not by class names."""

import inspect
from typing import Any

from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.base import Host
from hasten.hosts.blocks import BlockHost
from hasten.hosts.decoders import DecoderHost
from hasten.hosts.denoisers import DenoiserHost, denoiser_arguments
from hasten.hosts.diffusion_lm import DiffusionLMHost, refuse_canvas
from hasten.hosts.records import record_of
from hasten.hosts.structure import attention_child, is_conv1d, longest_list
from hasten.hosts.vit import ViTHost
from hasten.hosts.weights import is_held, is_unfoldable


class ModuleHost(Host):
    """The host of any module with linear layers or convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._record = record_of(model)

    def record(self) -> dict[str, Any]:
        """What `hosts.rebuild` needs to build the model's original architecture; JSON-able, without weights."""
        return self._record


def recognise(model: nn.Module | Host, kind: str | None = None) -> Host:
    """The host of a model; a host is handed back.

    Args:
        kind: decoder, vit, denoiser, diffusion_lm or module where a certain one is needed, None for whatever it is.

    Raises:
        UsageError: an encoder-decoder, a model without linear layers, or not the kind that is needed; the text shows
            how to describe a model of one's own.
    """
    if isinstance(model, Host):
        return model
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a model is a torch.nn.Module, not {type(model).__name__}; "
            "of a pipeline give the part, as pipeline.unet or pipeline.transformer"
        )
    if kind == DiffusionLMHost.kind:
        refuse_canvas(model)
    host = _find(model)
    if kind not in (None, "module", host.kind):
        found = f"{type(model).__name__} is not recognised as a {kind}, but as a {host.kind}"
        raise UsageError(f"{found}. {how_to_describe(model, kind)}")
    return host


def _find(model: nn.Module) -> Host:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) is True:
        raise UsageError(
            f"{type(model).__name__} is an encoder-decoder, whose two stacks no host covers: give one of them, such as "
            'model.get_decoder(), or describe one with hasten.hosts.describe(model, kind="decoder", '
            'layers="decoder.layers", attention="self_attn", mlp="mlp") and pass the host that it returns'
        )
    if denoiser_arguments(model) is not None:
        return DenoiserHost(model)
    blocks = longest_list(model)
    if blocks is not None:
        if _sees_images(model):
            return ViTHost(model, blocks)
        denoises = isinstance(getattr(config, "mask_token_id", None), int)
        if denoises and (hasattr(model, "diffusion_generate") or _is_causal(model, blocks)):
            return DiffusionLMHost(model, blocks)
        if _is_causal(model, blocks):
            return DecoderHost(model, blocks)
    kinds = (is_conv1d, is_unfoldable, is_held)
    if not any(isinstance(part, nn.Linear) or any(one(part) for one in kinds) for part in model.modules()):
        found = f"{type(model).__name__} has no linear layers or convolutions, so there is nothing to make faster"
        raise UsageError(f"{found}. {how_to_describe(model, 'decoder')}")
    return ModuleHost(model)


def describe(
    model: nn.Module,
    kind: str = "decoder",
    layers: str | None = None,
    attention: str | None = None,
    mlp: str | None = None,
    **more: Any,
) -> Host:
    """The host of a model of one's own, told where its parts are.

    Args:
        kind: decoder, vit or diffusion_lm (a decoder that fills in a mask token, with attention in both directions).
        layers: path of the list of blocks, such as `transformer.blocks`.
        attention, mlp: names of the blocks' children that are the attention and the feed-forward part. A block adds
            what each returns to its residual stream and may have norms before and after them.
        more: of a diffusion_lm, where its config does not say it: `mask_token`, the id; `shifted`, whether the scores
            at a position are those of the next one; `block_length`. The config is told, so that a saved model knows.

    Raises:
        UsageError: the path or a name is not there, or the kind is another one.
    """
    kinds: dict[str, type[BlockHost]] = {"decoder": DecoderHost, "vit": ViTHost, "diffusion_lm": DiffusionLMHost}
    if kind not in kinds:
        raise UsageError(
            f"a model is described as diffusion_lm, decoder or vit, not {kind!r}; hasten.hosts.recognise finds the rest"
        )
    unknown = sorted(set(more) - ({"mask_token", "shifted", "block_length"} if kind == "diffusion_lm" else set()))
    if unknown:
        raise UsageError(f"describe has no {', '.join(unknown)} for a model of the kind {kind}")
    layers = layers or longest_list(model)
    try:
        blocks = model.get_submodule(layers or "?")
    except AttributeError:
        raise UsageError(f"{type(model).__name__} has no part {layers!r}. {how_to_describe(model, kind)}") from None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise UsageError(f"{layers} is a {type(blocks).__name__}: layers= names the ModuleList of the blocks")
    for name in (attention, mlp):
        if name is not None and not hasattr(blocks[0], name):
            children = ", ".join(child for child, _ in blocks[0].named_children())
            raise UsageError(f"a block of {layers} has no part {name!r}; it has: {children}")
    return kinds[kind](model, layers, attention, mlp, **more)  # type: ignore[arg-type]


def how_to_describe(model: nn.Module, kind: str) -> str:
    """A sentence with a call of `describe`, filled with this model's names where they can be guessed."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    path = longest_list(model) or max(lists, key=lambda one: len(lists[one]), default="blocks")
    attention, mlp = "attn", "mlp"
    if path in lists:
        block = lists[path][0]
        names = [name for name, _ in block.named_children()]
        attention = attention_child(block) or next((name for name in names if "att" in name), attention)
        mlp = next((name for name in names if "mlp" in name or "ff" in name or "feed" in name), mlp)
    kind = kind if kind in ("decoder", "vit", "diffusion_lm") else "decoder"
    token = ", mask_token=ID" if kind == "diffusion_lm" else ""
    return (
        f'Describe a model of your own with hasten.hosts.describe(model, kind="{kind}", layers="{path}", '
        f'attention="{attention}", mlp="{mlp}"{token}) and pass the host that it returns'
    )


def _sees_images(model: nn.Module) -> bool:
    """Whether tokens are patches: a convolution whose stride is its kernel stands before the blocks."""
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    patches = any(conv.kernel_size == conv.stride and conv.stride[0] > 1 for conv in convolutions)
    return patches and "input_ids" not in inspect.signature(model.forward).parameters


def _is_causal(model: nn.Module, blocks: str) -> bool:
    """Whether the attention says that it is causal, or the model generates."""
    for block in model.get_submodule(blocks).children():
        name = attention_child(block)
        if name and any(getattr(part, "is_causal", False) is True for part in block.get_submodule(name).modules()):
            return True
    generates = getattr(model, "can_generate", None)
    return bool(generates and generates())
