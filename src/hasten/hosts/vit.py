"""Vision transformers (transformers' ViT and DeiT, timm's VisionTransformer): a stream of tokens through blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.hosts import mixing
from hasten.hosts.base import Layer
from hasten.hosts.structure import is_projection
from hasten.hosts.sublayers import SublayerHost

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
Rows = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """A block as two functions; the block itself is `x = x + attend(x)[0]; x = x + feed(x)`.

    Attributes:
        attend: `attend(x, bias=None, probs=False)` of x [B, N, D] and an additive bias of the attention logits that
            broadcasts to [B, H, N, N]; returns what the attention adds to x [B, N, D], the keys [B, H, N, d], and the
            attention probabilities [B, H, N, N] where `probs`, else None. With `probs` the attention is computed
            unfused, so it agrees with the block up to rounding only.
        feed: `feed(x)`: what the feed-forward part adds to x [B, N, D].
        weigh: `weigh(x, bias=None)`: the attention probabilities [B, H, N, N] alone; no values are computed.
        attend_by: `attend_by(x, weights, spread, pool)`: what attention with given probabilities [B, H, M, M] adds to
            other tokens x [B, N, D] than those which the probabilities are of: the values [B, N, H d] of x go through
            `spread` to [B, M, H d], the mixed ones [B, M, H d] through `pool` to [B, N, H d], before the output
            projection.
        num_heads: H. `head_dim`: d.
    """

    attend: Attend
    feed: Callable[[torch.Tensor], torch.Tensor]
    num_heads: int
    head_dim: int
    weigh: Callable[..., torch.Tensor]
    attend_by: Callable[..., torch.Tensor]


class ViTHost(SublayerHost):
    """A vision transformer: patch embedding, blocks with two-way attention, a head."""

    kind = "vit"

    @property
    def patch_embedding(self) -> nn.Conv2d:
        """The convolution that turns patches into tokens."""
        return next(part for part in self.model.modules() if isinstance(part, nn.Conv2d))

    @property
    def head(self) -> nn.Module | None:
        """The classifier, the last linear layer outside the blocks."""
        inside = {id(part) for part in self.blocks.modules()}
        outside = [part for part in self.model.modules() if isinstance(part, nn.Linear) and id(part) not in inside]
        return outside[-1] if outside else None

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches that are never merged or dropped: class, distillation and register tokens."""
        if hasattr(self.model, "num_prefix_tokens"):
            return int(self.model.num_prefix_tokens)  # type: ignore[arg-type]
        named = {name.rpartition(".")[2]: p for name, p in self.model.named_parameters()}
        single = sum(name in named for name in ("cls_token", "distillation_token", "dist_token"))
        return single + sum(named[name].shape[1] for name in ("register_tokens", "reg_token") if name in named)

    @property
    def has_class_token(self) -> bool:
        return "cls_token" in self._parameter_names()

    @property
    def has_distillation_token(self) -> bool:
        return bool(self._parameter_names() & {"distillation_token", "dist_token"})

    def _parameter_names(self) -> set[str]:
        return {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}

    def _example(self) -> dict[str, Any]:
        config, channels = getattr(self.model, "config", None), self.patch_embedding.in_channels
        size = getattr(config, "image_size", None) or getattr(
            getattr(self.model, "patch_embed", None), "img_size", None
        )
        high, wide = size if isinstance(size, tuple | list) else (size, size)
        if not isinstance(high, int):
            high = wide = 4 * self.patch_embedding.kernel_size[0]
        noise = torch.randn(1, channels, high, wide, generator=torch.Generator().manual_seed(0))
        return {self.first_input(): noise.to(self.device, next(self.model.parameters()).dtype)}

    def tokens(self, inputs: dict) -> torch.Tensor:
        """The embedded tokens [B, N, D] that enter the first block."""
        seen: list[torch.Tensor] = []
        self.capture([f"{self.blocks_path}.0"], [inputs], lambda _, x: seen.append(x))
        return seen[0]

    def split_block(self, layer: Layer | int) -> BlockParts:
        """One block as attention and feed-forward functions that a token-reducing forward puts together again.

        The functions look the block's modules up when they are called, so that layers replaced later take part.

        Raises:
            UsageError: the block is wired in a way that is not known (no pre-norms, unknown projections), or its
                attention is taken over.
        """
        index = layer if isinstance(layer, int) else layer.index
        block = self.blocks[index]
        if self.attention_name is None or len(self.mlp_names) != 1:
            raise self._unknown(block)
        if mixing.is_taken_over(self.layers[index]):
            raise UsageError(f"the attention of block {index} is taken over already, so that it can't be run in halves")
        attention = _Attention(block.get_submodule(self.attention_name))
        if attention.missing:
            raise self._unknown(block)
        norms = _named(block, _NORM1), _named(block, _NORM2)
        if None in norms:
            raise self._unknown(block)
        halves = _Halves(block, attention, norms, self.mlp_names[0])  # type: ignore[arg-type]
        functions = {name: getattr(halves, name) for name in ("attend", "feed", "weigh", "attend_by")}
        return BlockParts(num_heads=attention.num_heads, head_dim=attention.head_dim, **functions)

    def run_block(self, layer: Layer | int, x: torch.Tensor, *, bias: torch.Tensor | None = None) -> torch.Tensor:
        """One whole block, x [B, N, D] to [B, N, D]."""
        parts = self.split_block(layer)
        x = x + parts.attend(x, bias)[0]
        return x + parts.feed(x)

    def set_forward(self, layer: Layer | int, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces a block's forward by a function of the tokens [B, N, D]; undone with the rest.

        The function may return fewer tokens. Further arguments that the model hands to its blocks (a mask of None) are
        left out. Give an object with `__call__` that holds its `BlockParts` rather than a closure: `copy.deepcopy` of
        the model then copies it too, and the copy runs on its own weights.
        """
        block = self.blocks[layer if isinstance(layer, int) else layer.index]
        self.changes.set(block, "forward", _TokensOnly(forward))

    def attend_with(self, layer: int, run: mixing.Run) -> None:
        """Puts `run(call) -> [B, H, N, e]` in the place of one layer's softmax attention (`hosts.attention.Call`).

        Raises:
            UsageError: an unknown layer, attention that is taken over already or not computed by PyTorch's SDPA, or a
                block that no longer runs it, as its forward is replaced.
        """
        if 0 <= layer < len(self.blocks) and isinstance(self.blocks[layer].__dict__.get("forward"), _TokensOnly):
            raise UsageError(
                f"block {layer} has a forward that does not run its attention module, as methods that reduce tokens "
                "give it: leave those methods out"
            )
        mixing.attend_with(self, layer, run, self.patch_embedding, self.num_prefix_tokens)

    def _unknown(self, block: nn.Module) -> UsageError:
        return UsageError(
            f"{type(block).__name__} can't be run in two halves: it needs a norm before attention and before the "
            "feed-forward part, and query, key and value projections, as in transformers' ViTForImageClassification or "
            "timm's VisionTransformer"
        )


_NORM1 = ("norm1", "layernorm_before", "layer_norm1")
_NORM2 = ("norm2", "layernorm_after", "layer_norm2")
_END1 = (("ls1", "layer_scale1"), ("drop_path1", "drop_path"), ("dropout",))
_END2 = (("ls2", "layer_scale2"), ("drop_path2", "drop_path"), ("dropout",))
_SEPARATE = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
_OUT = ("proj", "o_proj", "out_proj")


def _named(part: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(part, name, None), nn.Module)), None)


@dataclasses.dataclass
class _TokensOnly:
    forward: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward(x)


class _Halves:
    """The functions of `BlockParts` for one block."""

    def __init__(self, block: nn.Module, attention: "_Attention", norms: tuple[str, str], mlp: str) -> None:
        self.block, self.attention, self.mlp = block, attention, mlp
        self.norm1, self.norm2 = norms
        self.end1 = [name for names in _END1 if (name := _named(block, names))]
        self.end2 = [name for names in _END2 if (name := _named(block, names))]

    def attend(self, x: torch.Tensor, bias: torch.Tensor | None = None, probs: bool = False):  # type: ignore[no-untyped-def]
        out, keys, weights = self.attention(self._run([self.norm1], x), bias, probs)
        return self._run(self.end1, out), keys, weights

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self._run([self.norm2, self.mlp, *self.end2], x)

    def weigh(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.attention.weigh(*self.attention.queries_and_keys(self._run([self.norm1], x)), bias)

    def attend_by(self, x: torch.Tensor, weights: torch.Tensor, spread: Rows, pool: Rows) -> torch.Tensor:
        return self._run(self.end1, self.attention.by(self._run([self.norm1], x), weights, spread, pool))

    def _run(self, names: list[str], x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = getattr(self.block, name)(x)
        return x


class _Attention:
    """Runs an attention module's own projections around softmax attention; looks them up at each call."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.fused = "qkv" if isinstance(getattr(part, "qkv", None), nn.Module) else None
        self.separate = [_named(part, names) for names in _SEPARATE]
        self.out = _named(part, _OUT)
        self.missing = self.out is None or (self.fused is None and None in self.separate)
        heads = getattr(part, "num_heads", None) or getattr(part, "num_attention_heads", None)
        self.missing = self.missing or not isinstance(heads, int)
        if not self.missing:
            self.num_heads: int = heads  # type: ignore[assignment]
            first = getattr(part, self.fused or self.separate[0])  # type: ignore[arg-type]
            width = first.out_features // (3 if self.fused else 1) if is_projection(first) else None
            self.head_dim: int = getattr(part, "head_dim", None) or width // heads  # type: ignore[operator]
            scale: Any = getattr(part, "scale", None) or getattr(part, "scaling", None) or self.head_dim**-0.5
            rate: Any = getattr(part, "attn_drop", None) or getattr(part, "attention_dropout", 0.0)
            self.scale: float = scale
            self.dropout: float = rate.p if isinstance(rate, nn.Dropout) else rate

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, probs: bool):  # type: ignore[no-untyped-def]
        part, (B, N, _) = self.part, x.shape
        if self.fused:
            qkv = getattr(part, self.fused)(x).reshape(B, N, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            projected = (getattr(part, str(name))(x) for name in self.separate)
            q, k, v = (each.view(B, N, -1, self.head_dim).transpose(1, 2) for each in projected)
        q, k = self._normed(q, k)
        rate = self.dropout if part.training else 0.0
        weights = None
        if probs:
            weights = self.weigh(q, k, bias)
            out = F.dropout(weights, rate, part.training) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=self.scale)
        return self._project(out.transpose(1, 2).reshape(B, N, -1), x), k, weights

    def queries_and_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each [B, H, N, d]."""
        B, N, _ = x.shape
        if self.fused:
            pair = self._part_of_fused(x, slice(0, 2)).view(B, N, 2, self.num_heads, self.head_dim)
            q, k = pair.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            projected = (getattr(self.part, str(name))(x) for name in self.separate[:2])
            q, k = (each.view(B, N, -1, self.head_dim).transpose(1, 2) for each in projected)
        return self._normed(q, k)

    def weigh(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = (q * self.scale) @ k.transpose(-2, -1)
        return (logits if bias is None else logits.add_(bias)).softmax(-1)

    def by(self, x: torch.Tensor, weights: torch.Tensor, spread: Rows, pool: Rows) -> torch.Tensor:
        part, B = self.part, x.shape[0]
        values = self._part_of_fused(x, slice(2, 3)) if self.fused else getattr(part, str(self.separate[2]))(x)
        v = spread(values).view(B, weights.shape[-1], -1, self.head_dim).transpose(1, 2)
        out = F.dropout(weights, self.dropout, part.training) @ v
        return self._project(pool(out.transpose(1, 2).flatten(2)), x)

    def _part_of_fused(self, x: torch.Tensor, thirds: slice) -> torch.Tensor:
        """Of queries, keys and values, those asked for; of a replaced projection all are computed."""
        layer, size = getattr(self.part, str(self.fused)), self.num_heads * self.head_dim
        rows = slice(thirds.start * size, thirds.stop * size)
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return layer(x)[..., rows]
        return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])

    def _normed(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.part
        return tuple(getattr(part, name)(t) if hasattr(part, name) else t for name, t in (("q_norm", q), ("k_norm", k)))  # type: ignore[return-value]

    def _project(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From mixed values [B, N, H d] and the attention's input x to the attention's output."""
        part = self.part
        if isinstance(getattr(part, "norm", None), nn.Module):
            out = part.norm(out)  # type: ignore[operator]
        if isinstance(getattr(part, "gate", None), nn.Module):
            out = out * part.gate(x).sigmoid()  # type: ignore[operator]
        out = getattr(part, str(self.out))(out)
        if isinstance(getattr(part, "proj_drop", None), nn.Module):
            out = part.proj_drop(out)  # type: ignore[operator]
        return out
