"""The host: the one place that knows where a model keeps its parts. Every change goes through `host.changes`."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.changes import Changes
from hasten.hosts.structure import is_projection
from hasten.hosts.weights import Weight, is_held, is_unfoldable


@dataclasses.dataclass
class Layer:
    """One residual block and its parts; a part that the block lacks (or that was dropped) is None.

    Attributes:
        index: place in the model, from 0.
        path: dotted path of the block from the model.
        block: the block.
        attention, mlp: the sublayers; their paths are relative to the block.
    """

    index: int
    path: str
    block: nn.Module
    attention_path: str | None
    mlp_path: str | None

    @property
    def attention(self) -> nn.Module | None:
        return self.block.get_submodule(self.attention_path) if self.attention_path else None

    @property
    def mlp(self) -> nn.Module | None:
        return self.block.get_submodule(self.mlp_path) if self.mlp_path else None


class Host:
    """Base of all hosts, and by itself the host of any `nn.Module`: it knows the linears only.

    Attributes:
        kind: decoder, diffusion_lm, vit, denoiser or module.
        model: the person's own object; changed in place.
        changes: the undo stack of everything done to the model.
    """

    kind = "module"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changes = Changes()

    @property
    def layers(self) -> list[Layer]:
        raise UsageError(
            f"{type(self.model).__name__} shows no residual blocks: only methods that act on linear layers work on it"
        )

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers that hold the model's weight, path to module, in order; heads and embeddings left out."""
        return {path: part for path, part in self.model.named_modules() if isinstance(part, nn.Linear)}

    def weights(self) -> dict[str, Weight]:
        """What compression decides about, path to matrix: `linears`, sparse layers, a plain model's convolutions.

        Heads, embeddings and matrices that several modules share are left out.
        """
        users: dict[int, int] = {}
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            users[parameter.data_ptr()] = users.get(parameter.data_ptr(), 0) + 1
        heads = [getattr(self, name, None) for name in ("lm_head", "head")]
        return {
            path: Weight(path, part)
            for path, part in self._weighted()
            if is_held(part)
            or not getattr(part, "exact", False)
            and (is_projection(part) or (self.kind == "module" and is_unfoldable(part)))
            and users.get(part.weight.data_ptr(), 0) == 1  # type: ignore[operator,union-attr]
            and not any(part is head for head in heads)
        }

    def _weighted(self) -> Iterable[tuple[str, nn.Module]]:
        """The modules among which `weights` looks."""
        return self.model.named_modules()

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are matrices of hidden layers, factors too: what matrix optimizers act on."""
        seen = set()
        for path, part in self._projections():
            weight = part.weight
            if isinstance(weight, nn.Parameter) and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{path}.weight", weight
        for path, part in self.model.named_modules():
            for name in getattr(part, "matrix_names", ()):
                yield f"{path}.{name}", getattr(part, name)

    def _projections(self) -> Iterable[tuple[str, nn.Module]]:
        """The modules whose weights are matrices."""
        return self.linears().items()

    def replace(self, path: str, new: nn.Module) -> None:
        """Replaces one submodule; undone with the rest."""
        self.changes.module(self.model, path, new)

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Runs the model on one dict of inputs, moved to its device."""
        device = self.device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return self.model(**moved)

    def first_input(self) -> str:
        """The name of the first argument of the model's forward."""
        return next(iter(inspect.signature(self.model.forward).parameters))

    @torch.no_grad()
    def capture(
        self, paths: Iterable[str], batches: Iterable[dict[str, Any]], see: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Runs the batches and hands each named submodule's first input to `see(path, tensor)`."""
        handles = []
        training = self.model.training
        self.model.eval()
        try:
            for path in paths:
                part = self.model.get_submodule(path)
                handles.append(part.register_forward_pre_hook(lambda _, given, path=path: see(path, given[0])))
            for batch in batches:
                self.forward(batch)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))
