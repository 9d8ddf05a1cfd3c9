"""Hosts of models that are a list of residual blocks: finding, leaving out and copying blocks."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.base import Host, Layer
from hasten.hosts.records import record_of
from hasten.hosts.structure import Dropped, attention_child, feed_forward_children, is_conv1d, is_projection


class BlockHost(Host):
    """A model whose depth is one list of blocks of one class.

    Args:
        blocks: the list's path. `attention`, `mlp`: the blocks' children, found by structure where not given.
    """

    def __init__(self, model: nn.Module, blocks: str, attention: str | None = None, mlp: str | None = None) -> None:
        super().__init__(model)
        self.blocks_path = blocks
        whole = next((b for b in self.blocks if attention_child(b) and feed_forward_children(b)), self.blocks[0])
        self.attention_name = attention or attention_child(whole)
        self.mlp_names = (mlp,) if mlp else feed_forward_children(whole)
        self._record = record_of(model)

    def record(self) -> dict[str, Any]:
        """What `hosts.rebuild` needs to build the model's original architecture; JSON-able, without weights."""
        return self._record

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        return self.model.get_submodule(self.blocks_path)  # type: ignore[return-value]

    @property
    def layers(self) -> list[Layer]:
        """The blocks in order. `mlp` is None where a block holds its feed-forward projections itself (OPT)."""
        attention, mlp = self.attention_name, self.mlp_names[0] if len(self.mlp_names) == 1 else None
        return [
            Layer(i, f"{self.blocks_path}.{i}", block, self._present(block, attention), self._present(block, mlp))
            for i, block in enumerate(self.blocks)
        ]

    @staticmethod
    def _present(block: nn.Module, name: str | None) -> str | None:
        return None if name is None or isinstance(block.get_submodule(name), Dropped) else name

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of the blocks, path to module, in order.

        Of GPT-2's `Conv1D`, whose weight is [in, out], a linear layer that shares its storage: read it, change its
        weight in place, or put another module at its path with `replace`. Parameters to train are those of `matrices`.
        """
        return {path: linear_view(part) if is_conv1d(part) else part for path, part in self._projections()}  # type: ignore[misc]

    def _projections(self) -> Iterator[tuple[str, nn.Module]]:
        for path, part in self.blocks.named_modules(prefix=self.blocks_path):
            if is_projection(part):
                yield path, part

    def _weighted(self) -> Iterable[tuple[str, nn.Module]]:
        return self.blocks.named_modules(prefix=self.blocks_path)

    def keep_layers(self, indices: Iterable[int]) -> None:
        """Removes all other blocks. The same set as now changes nothing.

        Raises:
            UsageError: no index, an unknown one, or one given twice.
        """
        kept = self._checked(indices)
        if len(set(kept)) < len(kept):
            raise UsageError(f"the layers {kept} name one twice: keep_layers keeps each once; stack_layers copies")
        kept.sort()
        if kept != list(range(len(self.blocks))):
            self._put([self.blocks[i] for i in kept], kept)

    def stack_layers(self, indices: Sequence[int]) -> dict[str, str]:
        """Makes the depth `len(indices)`: block j becomes a copy of the present block `indices[j]`.

        Returns:
            For every parameter of the new blocks, its name and the name that the parameter it copies had before.
            Names are reused (`layers.1` may copy `layers.0`): keep `dict(model.named_parameters())` from before.

        Raises:
            UsageError: no index, or an unknown one.
        """
        chosen = self._checked(indices)
        old = self.blocks
        names = {id(p): name for name, p in old.named_parameters(prefix=self.blocks_path, remove_duplicate=False)}
        copies = [copy.deepcopy(old[i]) for i in chosen]
        mapping = {
            f"{self.blocks_path}.{j}.{name}": names[id(parameter)]
            for j, i in enumerate(chosen)
            for name, parameter in old[i].named_parameters()
        }
        self._put(copies, chosen)
        return mapping

    def _checked(self, indices: Iterable[int]) -> list[int]:
        chosen, depth = [int(i) for i in indices], len(self.blocks)
        if not chosen:
            raise UsageError("a model needs at least one layer: give the indices of the layers that stay")
        wrong = [i for i in chosen if not 0 <= i < depth]
        if wrong:
            raise UsageError(f"there is no layer {wrong[0]}: this model has the layers 0 to {depth - 1}")
        return chosen

    def _put(self, blocks: list[nn.Module], chosen: list[int]) -> None:
        old = self.blocks
        new = nn.Sequential(*blocks) if isinstance(old, nn.Sequential) else nn.ModuleList(blocks)
        new.training = old.training
        depth = len(old)
        self.changes.module(self.model, self.blocks_path, new)
        for config in self._configs():
            self._choose_in_config(config, depth, chosen)
        self._renumber()

    def _configs(self) -> list[Any]:
        """The distinct config objects that the model's modules read."""
        found = {}
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "to_dict"):
                text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
                found[id(text)] = text
        return list(found.values())

    def _choose_in_config(self, config: Any, depth: int, chosen: list[int]) -> None:
        """The number of layers, and each list in the config that has one entry per layer."""
        for name in ("num_hidden_layers", "num_layers"):
            name = getattr(config, "attribute_map", {}).get(name, name)
            if vars(config).get(name) == depth:
                self.changes.set(config, name, len(chosen))
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
                self.changes.set(config, name, type(value)(value[i] for i in chosen))

    def _renumber(self) -> None:
        """Tells each block its place, where it holds one."""
        for i, block in enumerate(self.blocks):
            self._set_index(block, i)

    def _set_index(self, part: nn.Module, index: int) -> None:
        for module in part.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(vars(module).get(name), int) and vars(module)[name] != index:
                    self.changes.set(module, name, index)


def linear_view(conv: nn.Module) -> nn.Linear:
    """A linear layer [out, in] that shares the storage of a Conv1D [in, out]."""
    weight: torch.Tensor = conv.weight  # type: ignore[assignment]
    size_in, size_out = weight.shape
    linear = nn.Linear(size_in, size_out, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.bias = conv.bias  # type: ignore[assignment]
    linear.training = conv.training
    return linear
