"""A decoder or vision transformer at other sizes, in place: fewer or more channels, heads, neurons and layers.

Which dimension of each parameter counts what comes from `hosts.axes` and is checked: after a permutation of all
channels, heads and neurons the model must give the same output. Parameters are replaced by new ones, and whatever
modules and configs say about sizes is set; all of it is undone with the host's other changes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.axes import KINDS, Axes, Tower, mapped, towers
from hasten.hosts.streaming import evaluating
from hasten.hosts.structure import is_projection

_NAMES = {  # attributes of modules and configs that hold a size
    "width": (
        "hidden_size",
        "embed_dim",
        "n_embd",
        "d_model",
        "num_features",
        "head_hidden_size",
        "word_embed_proj_dim",
    ),
    "heads": ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "feed_forward": ("intermediate_size", "ffn_dim", "hidden_features", "n_inner"),
    "all": ("all_head_size", "split_size", "attn_dim", "inner_dim"),
    "groups": ("num_key_value_groups",),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Channels of the residual stream, query heads, key and value heads, neurons of a feed-forward part, layers."""

    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    layers: int


class Widths:
    """The sizes of a decoder or vision transformer, and the model at other ones.

    Args:
        tower: the axes, where they are known from a model of the same wiring; found and checked when None.

    Raises:
        UsageError: no blocks or several lists of them, a wiring that is not understood, sharded or quantized weights.
    """

    def __init__(self, host: Any, tower: Tower | None = None) -> None:
        model = host.model
        self.host = host
        if tower is not None:
            self.tower = tower
            return
        if host.kind not in ("decoder", "vit", "diffusion_lm"):
            raise UsageError(
                f"{type(model).__name__} is a {host.kind}; sizes are known of decoders and vision transformers"
            )
        if any(type(p) is not nn.Parameter or type(p.data) is not Tensor for p in model.parameters()):
            raise UsageError(f"the weights of {type(model).__name__} are sharded or quantized: they can't be resized")
        embedding = getattr(host, "embedding", None)
        if embedding is not None and type(embedding) is not nn.Embedding:
            raise UsageError(f"{type(embedding).__name__} is more than a table: the model can't be resized")
        given = {
            "attention": host.attention_name,
            "mlp": host.mlp_names,
            "head": getattr(host, "lm_head", None),
            "embedding": embedding,
            "final_norm": getattr(host, "final_norm", None),
        }
        for inner in (None, True, False):
            found = towers(model, inner=inner, **given)
            if len(found) > 1:
                raise UsageError(f"{type(model).__name__} has several lists of blocks: it can't be resized as a whole")
            self.tower = found[0]
            if self._permutes():
                return
        raise UsageError(
            f"{type(model).__name__} gives another output after its channels, heads and neurons are permuted: it is "
            "wired in a way that is not known, so it can't be resized"
        )

    @property
    def sizes(self) -> Sizes:
        """As the parameters are now."""
        found: dict[str, int] = {}
        for name, p in self.host.model.named_parameters():
            for axis, size in zip(self.tower.axes(name) or (), p.shape, strict=False):
                if axis is not None:
                    n = size // (axis.outer * axis.inner)
                    if found.setdefault(axis.kind, n) != n:
                        raise UsageError(f"{name} has {n} {axis.kind}, others {found[axis.kind]}")
        found.setdefault("kv_heads", found["heads"])
        return Sizes(layers=len(self.host.blocks), **found)

    def axes(self, name: str) -> Axes:
        """Of any parameter; all None where no size shows in it."""
        return self.axes_of(name, self.host.model.get_parameter(name).ndim)

    def axes_of(self, name: str, dimensions: int) -> Axes:
        """Of a parameter that the model may not have now, such as one of a layer that is gone."""
        found = self.tower.axes(name)
        return found if found is not None else (None,) * dimensions

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters, by name; tied ones once."""
        return {name: p.detach() for name, p in self.host.model.named_parameters()}

    def check(self, width: float, layers: float = 1.0) -> Sizes:
        """The sizes at a fraction of the channels, heads and neurons, and of the layers.

        Raises:
            UsageError: a size that the fraction does not divide; the text names those that do not fit.
        """
        now = self.sizes
        wanted = {kind: getattr(now, kind) * width for kind in KINDS}
        if now.kv_heads == 1:
            wanted["kv_heads"] = 1
        wanted["layers"] = now.layers * layers
        wrong = [f"{getattr(now, k)} {k}" for k, v in wanted.items() if abs(v - round(v)) > 1e-6 or round(v) < 1]
        wrong += ["heads in groups"] if not wrong and round(wanted["heads"]) % round(wanted["kv_heads"]) else []
        if wrong:
            raise UsageError(
                f"{type(self.host.model).__name__} has no model of {width:g} of its width and {layers:g} of its depth: "
                f"{', '.join(wrong)} can't be divided so; choose another fraction"
            )
        return Sizes(**{k: round(v) for k, v in wanted.items()})

    def put(
        self, tensors: Mapping[str, Tensor], layers: Sequence[int] | None = None
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Makes the model hold other tensors, whose shapes decide its sizes; undone with the host's other changes.

        Args:
            tensors: one for each parameter, by the names that the model has with its new layers.
            layers: which present layers the new ones stand for; repeated ones as copies, otherwise in rising order.

        Returns:
            {new parameter: the one whose place it takes}, as `run.resize` asks for it.

        Raises:
            UsageError: tensors are missing, or their sizes do not go together. Nothing is changed then.
        """
        model, changes, path = self.host.model, self.host.changes, self.tower.path
        before, old = dict(model.named_parameters()), self.sizes
        layers = list(range(old.layers)) if layers is None else list(layers)
        self._fit(tensors, layers)
        if layers != list(range(old.layers)):
            if len(set(layers)) == len(layers):
                self.host.keep_layers(layers)
            else:
                self.host.stack_layers(layers)
        sources: dict[nn.Parameter, nn.Parameter] = {}
        made: dict[int, nn.Parameter] = {}
        for name, p in model.named_parameters():
            made[id(p)] = nn.Parameter(tensors[name].detach().to(p, copy=True), requires_grad=p.requires_grad)
            was = name
            if name.startswith(path + "."):
                place, _, rest = name[len(path) + 1 :].partition(".")
                was = f"{path}.{layers[int(place)]}.{rest}"
            sources[made[id(p)]] = before[was]
        for part in model.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    changes.set(part, name, made[id(p)])
        self._refit(old, self.sizes)
        return sources

    def _fit(self, tensors: Mapping[str, Tensor], layers: list[int]) -> None:
        path, depth = self.tower.path, len(layers)
        names = {n for n, _ in self.host.model.named_parameters() if not n.startswith(path + ".")}
        names |= {f"{path}.{place}.{rest}" for place in range(depth) for rest in self.tower.block}
        if names != set(tensors):
            raise UsageError(f"these parameters are missing or too many: {', '.join(sorted(names ^ set(tensors))[:5])}")
        found: dict[str, int] = {}
        for name, tensor in tensors.items():
            for axis, size in zip(self.tower.axes(name) or (), tensor.shape, strict=False):
                if (
                    axis is not None
                    and found.setdefault(axis.kind, size // (axis.outer * axis.inner)) * (axis.outer * axis.inner)
                    != size
                ):
                    raise UsageError(f"{name} {tuple(tensor.shape)} does not fit {found[axis.kind]} {axis.kind}")

    def _refit(self, old: Sizes, new: Sizes) -> None:
        """Sets what modules and configs say about sizes."""
        set_, dim = self.host.changes.set, self.tower.head_dim
        values = {kind: (getattr(old, kind), getattr(new, kind)) for kind in KINDS}
        values["all"] = (old.heads * dim, new.heads * dim)
        values["groups"] = (old.heads // old.kv_heads, new.heads // new.kv_heads)
        for part in self.host.model.modules():
            weight = part._parameters.get("weight")
            if weight is not None:
                for name, value in _own_sizes(part, weight).items():
                    if getattr(part, name) != value:
                        set_(part, name, value)
            for kind, (was, now) in values.items():
                for name in _NAMES[kind]:
                    if was != now and type(vars(part).get(name)) is int and vars(part)[name] == was:
                        set_(part, name, now)
        for config in self.host._configs() if getattr(self.host.model, "config", None) is not None else []:
            alias = getattr(config, "attribute_map", {})
            for kind, (was, now) in values.items():
                for name in {alias.get(name, name) for name in _NAMES[kind]}:
                    if was != now and vars(config).get(name) == was:
                        set_(config, name, now)
            if "n_inner" in vars(config) and config.n_inner is None and new.feed_forward != 4 * new.width:
                set_(config, "n_inner", new.feed_forward)

    @torch.no_grad()
    def _permutes(self) -> bool:
        """Whether the output stays when every kind is permuted."""
        generator, sizes, model = torch.Generator().manual_seed(0), self.sizes, self.host.model
        group = sizes.heads // sizes.kv_heads
        order = {k: torch.randperm(getattr(sizes, k), generator=generator) for k in KINDS}
        within = torch.stack([torch.randperm(group, generator=generator) for _ in range(sizes.kv_heads)])
        order["heads"] = (order["kv_heads"][:, None] * group + within).flatten()
        maps = {kind: torch.eye(len(rows))[rows] for kind, rows in order.items()}
        kept = [(p, p.detach().clone()) for p in model.parameters()]
        with evaluating(model):
            wanted = self._output()
            try:
                for name, p in model.named_parameters():
                    p.copy_(mapped(p, self.axes(name), maps))
                found = self._output()
            finally:
                for p, value in kept:
                    p.copy_(value)
        error = (found - wanted).norm() / wanted.norm().clamp_min(1e-20)
        return bool(error < 1e3 * torch.finfo(kept[0][1].dtype).eps)

    def _output(self) -> Tensor:
        out = self.host._run(self.host._example())
        first = getattr(out, "logits", None)
        first = next(iter(out.values())) if first is None and isinstance(out, Mapping) else first
        return (out if first is None else first).double()  # type: ignore[union-attr,no-any-return]


def _own_sizes(part: nn.Module, weight: Tensor) -> dict[str, Any]:
    """What a layer's own attributes say about its weight's shape."""
    if isinstance(part, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if is_projection(part):
        return {"nx": weight.shape[0], "nf": weight.shape[1]}
    if isinstance(part, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    if isinstance(part, nn.Conv2d):
        return {"out_channels": weight.shape[0]}
    return {"normalized_shape": tuple(weight.shape)} if hasattr(part, "normalized_shape") else {}
