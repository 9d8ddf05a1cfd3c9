"""Denoisers of diffusion models (diffusers' DiT and UNets, or alike): the call that a sampler makes, and its blocks.

Guidance is batched by the pipelines: DiTPipeline calls with [conditional; unconditional] (the null class is the last
label), StableDiffusionPipeline with [unconditional; conditional].
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts import mixing
from hasten.hosts.base import Host, Layer
from hasten.hosts.records import record_of
from hasten.hosts.structure import attention_child, feed_forward_children, is_block, is_norm, is_projection

_UNET = {"down": 0, "mid": 1, "up": 2}  # a UNet's parts in the order in which they run
Call = Callable[[torch.Tensor, Any, dict[str, Any]], torch.Tensor]


def denoiser_arguments(model: nn.Module) -> tuple[str, str] | None:
    """The names of the noisy input and the time among the first arguments of a denoiser's forward, else None."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    samples = [name for name in names[:1] if name in ("sample", "hidden_states", "x")]
    times = [name for name in names if name in ("timestep", "timesteps", "t")]
    return (samples[0], times[0]) if samples and times else None


class DenoiserHost(Host):
    """A model that predicts noise from (noisy sample, time, conditions)."""

    kind = "denoiser"

    def __init__(self, model: nn.Module, sample: str | None = None, timestep: str | None = None) -> None:
        super().__init__(model)
        found = denoiser_arguments(model) if sample is None or timestep is None else (sample, timestep)
        if found is None:
            raise UsageError(f"the forward of {type(model).__name__} has no arguments for a noisy sample and a time")
        self.sample_name, self.time_name = found
        paths = [path for path, part in model.named_modules() if path and is_block(part)]
        self._block_paths = sorted(paths, key=lambda path: _UNET.get(path.partition("_")[0], 0))
        self._calls: list[Callable[..., torch.Tensor]] = []
        self._wrapped = False
        self._record = record_of(model)

    def record(self) -> dict[str, Any]:
        """What `hosts.rebuild` needs to build the model's original architecture; JSON-able, without weights."""
        return self._record

    @property
    def layers(self) -> list[Layer]:
        """The transformer blocks in order.

        Raises:
            UsageError: the model has none (a UNet without attention blocks).
        """
        if not self._block_paths:
            raise UsageError(
                f"{type(self.model).__name__} has no transformer blocks: only methods that act on whole calls or on "
                "linear layers work on it"
            )
        found = []
        for i, path in enumerate(self._block_paths):
            block = self.model.get_submodule(path)
            mlp = feed_forward_children(block)
            found.append(Layer(i, path, block, attention_child(block), mlp[0] if len(mlp) == 1 else None))
        return found

    def linears(self) -> dict[str, nn.Linear]:
        """The blocks' linear layers that see tokens, not those that turn time into scales; path to module, in order.

        All linear layers of the model where it has no blocks.
        """
        if not self._block_paths:
            return super().linears()
        return dict(self._projections())

    def _projections(self) -> Iterator[tuple[str, nn.Linear]]:
        for name, part in self._weighted():
            if is_projection(part):
                yield name, part  # type: ignore[misc]

    def _weighted(self) -> Iterator[tuple[str, nn.Module]]:
        if not self._block_paths:
            yield from super()._weighted()
        for path in self._block_paths:
            for child, module in self.model.get_submodule(path).named_children():
                if not is_norm(module):
                    yield from module.named_modules(prefix=f"{path}.{child}")

    @property
    def patch_embedding(self) -> nn.Module | None:
        """The convolution that turns patches into tokens, None in a U-Net."""
        for part in self.model.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d) and part.kernel_size == part.stride and max(part.stride) > 1:
                return part
        return None

    def attend_with(self, layer: int, run: mixing.Run) -> None:
        """Puts `run(call) -> [B, H, N, e]` in the place of one layer's own attention (`hosts.attention.Call`).

        The grid of the tokens is (rows, columns) or (frames, rows, columns). Attention to a text is left alone.

        Raises:
            UsageError: an unknown layer, or attention that is taken over already or not computed by PyTorch's SDPA.
        """
        mixing.attend_with(self, layer, run, self.patch_embedding, sample=self.sample_name)

    def wrap_call(self, fn: Callable[..., torch.Tensor]) -> None:
        """Puts `fn(call, sample, timestep, kwargs)` around the model's forward; the last one is the outermost.

        `call(sample, timestep, kwargs)` runs what is inside. Both return the predicted tensor [B, C, H, W]; the caller
        of the model gets it in the form that the model always returns.
        """
        if not self._wrapped:
            self._wrap()
        self._calls.append(fn)
        self.changes.call(lambda: self._calls.remove(fn))

    def _wrap(self) -> None:
        forward, signature = self.model.forward, inspect.signature(self.model.forward)
        switch = "return_dict" in signature.parameters
        remembered: list[type | None] = [output_class(type(self.model).forward)]

        def inside(sample: torch.Tensor, timestep: Any, kwargs: dict[str, Any]) -> torch.Tensor:
            output = forward(**{self.sample_name: sample, self.time_name: timestep}, **kwargs)
            if isinstance(output, torch.Tensor):
                return output
            if hasattr(output, "sample"):
                remembered[0] = type(output)
                return output.sample
            return output[0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(*args, **kwargs).arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= given.pop(parameter.name, {})
            sample, timestep = given.pop(self.sample_name), given.pop(self.time_name, None)
            as_dict = given.pop("return_dict", True)
            call: Call = inside
            for fn in self._calls:
                call = functools.partial(fn, call)
            tensor = call(sample, timestep, given)
            if not switch:
                return tensor if remembered[0] is None else remembered[0](sample=tensor)
            if not as_dict or remembered[0] is None:
                return (tensor,)
            return remembered[0](sample=tensor)

        self.changes.set(self.model, "forward", wrapped)
        self._wrapped = True
        self.changes.call(lambda: setattr(self, "_wrapped", False))


def output_class(forward: Callable[..., Any]) -> type | None:
    """The class with a field `sample` that a forward is annotated to return."""
    try:
        hint = typing.get_type_hints(inspect.unwrap(forward)).get("return")
    except NameError:
        return None
    for one in (hint, *typing.get_args(hint)):
        if isinstance(one, type) and "sample" in getattr(one, "__dataclass_fields__", {}):
            return one
    return None
