"""Taking over the attention of vision models: whichever way a module prepares it, one call of SDPA mixes the values.

While the module's own forward runs, its call of `scaled_dot_product_attention` is answered by a function; all before
and after it (projections, norms, rotary embeddings, gates) stays the module's. So transformers' ViT, timm's attention
and diffusers' processors need no copy of their code. The grid of the tokens is read off the patch embedding as it runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hasten.core.errors import UsageError
from hasten.hosts.attention import Call
from hasten.hosts.base import Host, Layer

Run = Callable[[Call], torch.Tensor]
_GRIDS = "_token_grids"


def attend_with(
    host: Host, index: int, run: Run, embedding: nn.Module | None, prefix: int = 0, sample: str | None = None
) -> None:
    """Puts `run(call) -> [B, H, Nq, e]` in the place of SDPA in one layer; `host.changes` undoes it.

    Args:
        embedding: the convolution that makes the tokens, None where patches are made otherwise.
        prefix: tokens before the patches.
        sample: name of the model's first argument where its sides tell the grid too (videos, U-Nets).

    Raises:
        UsageError: an unknown layer, one without attention or whose block runs without it, or one taken over already;
            later, when the module runs, an attention that does not go through SDPA.
    """
    layers = host.layers
    if not 0 <= index < len(layers) or layers[index].attention is None:
        raise UsageError(f"there is no attention in layer {index}; the model has the layers 0 to {len(layers) - 1}")
    layer = layers[index]
    module = layer.attention
    assert module is not None
    if isinstance(module.__dict__.get("forward"), Answered):
        raise UsageError(f"the attention of layer {index} is taken over already")
    if getattr(module, "fused_attn", True) is False:
        kind = type(module).__name__
        raise UsageError(
            f"{kind} computes its attention unfused: call timm.layers.set_fused_attn(True) before making it"
        )
    grids = getattr(host, _GRIDS, None)
    if grids is None:
        grids = Grids(embedding is not None, prefix)
        host.changes.set(host, _GRIDS, grids)
        if embedding is not None:
            host.changes.hook(embedding.register_forward_hook(grids.see_patches))
        if sample is not None:
            watch = _Sample(grids, sample)
            host.changes.hook(host.model.register_forward_pre_hook(watch, with_kwargs=True))
    host.changes.set(module, "forward", Answered(module, module.forward, layer.index, run, grids))


def is_taken_over(layer: Layer) -> bool:
    """Whether a layer's attention is answered by somebody's function."""
    return layer.attention is not None and isinstance(layer.attention.__dict__.get("forward"), Answered)


class Grids:
    """The grid of the tokens in a model's latest forward, read off its patch embedding, or off its input.

    Args:
        patches: whether there is a patch embedding to look at.
        prefix: tokens before the patches.
    """

    def __init__(self, patches: bool, prefix: int) -> None:
        self.patches, self.prefix = patches, prefix
        self.shape: tuple[int, ...] = ()
        self.sample: tuple[int, ...] = ()

    def see_patches(self, module: nn.Module, given: Any, output: torch.Tensor) -> None:
        """A hook of the patch embedding, whose output is [B, D, sides...]."""
        self.shape = tuple(output.shape[2:])

    def of(self, tokens: int) -> tuple[int, ...] | None:
        """The grid of so many tokens, prefix included, or None where none fits."""
        patches = tokens - self.prefix
        if self.patches:
            if math.prod(self.shape) == patches:
                return self.shape
            frames = patches // max(1, math.prod(self.shape))  # a video whose frames are embedded one by one
            found = len(self.sample) == 3 and frames * math.prod(self.shape) == patches
            return (frames, *self.shape) if found else None
        shape = self.sample
        while shape and math.prod(shape) > patches:  # a U-Net halves its picture from level to level
            shape = tuple(-(-side // 2) for side in shape) if any(side > 1 for side in shape) else ()
        return shape if shape and math.prod(shape) == patches else None


@dataclasses.dataclass
class _Sample:
    """Notes the sides of the model's input [B, C, sides...]."""

    grids: Grids
    name: str

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs.get(self.name)
        self.grids.sample = tuple(sample.shape[2:]) if isinstance(sample, torch.Tensor) else ()


@dataclasses.dataclass
class Answered:
    """An attention module's forward, in which `run` answers the call of SDPA."""

    module: nn.Module
    forward: Callable[..., Any]
    layer: int
    run: Run
    grids: Grids

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = _Answer(self)
        with answer:
            output = self.forward(*args, **kwargs)
        if not answer.asked:
            raise UsageError(
                f"{type(self.module).__name__} does not use PyTorch's scaled_dot_product_attention, so its attention "
                'can\'t be taken over: choose it with model.set_attn_implementation("sdpa") (transformers) or '
                "model.set_attn_processor(AttnProcessor2_0()) (diffusers)"
            )
        return output


class _Answer(TorchFunctionMode):
    """Answers SDPA while it is entered; inside `run` it is off."""

    def __init__(self, owner: Answered) -> None:
        super().__init__()
        self.owner, self.asked = owner, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.asked += 1
        return self.owner.run(_call(self.owner, *args, **kwargs))


def _call(
    owner: Answered, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Call:  # fmt: skip
    def inner() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    alone = query.shape[2] == key.shape[2]  # not attention to another text
    return Call(
        owner.module, owner.layer, query, key, value, attn_mask,
        scaling=query.shape[-1] ** -0.5 if scale is None else scale, causal=is_causal, dropout=dropout_p,
        grid=owner.grids.of(query.shape[2]) if alone else None, prefix=owner.grids.prefix, inner=inner,
    )  # fmt: skip
