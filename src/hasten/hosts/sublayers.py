"""Hosts whose blocks add sublayers to a residual stream: seeing what each adds, and leaving some out."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import Anatomy, dissect
from hasten.hosts.blocks import BlockHost
from hasten.hosts.stream import See, SeeLayer, layer_hooks, sublayer_hooks
from hasten.hosts.structure import Dropped

PARTS = ("attention", "mlp")


class SublayerHost(BlockHost):
    """A model whose blocks are an attention and a feed-forward part on a residual stream.

    Attributes:
        mask: while `observe_sublayers` runs, which positions of the batch are real, bool [B, T]; None: all of them.
    """

    mask: torch.Tensor | None = None

    def _example(self) -> dict[str, Any]:
        """A small input, from which the wiring is found."""
        raise NotImplementedError

    def _run(self, batch: dict[str, Any]) -> Any:
        return self.forward(batch)

    def _real(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Which positions of a batch are no padding."""
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if mask is None and ids is None:
            return None
        return (torch.ones_like(ids) if mask is None else mask).bool().to(self.device)  # type: ignore[arg-type]

    def _check_drop(self, part: str) -> None:
        """Refuses to drop a part where the model can't do without."""

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The wiring of the blocks, found once with one forward."""
        block = next((b for b in self.blocks if not any(isinstance(part, Dropped) for part in b.children())), None)
        if block is None or self.attention_name is None:
            raise UsageError("no block of this model has both its sublayers: start from the whole model")
        training = self.model.training
        self.model.eval()
        try:
            return dissect(block, self.attention_name, self.mlp_names, lambda: self._run(self._example()))
        finally:
            self.model.train(training)

    def has(self, index: int, part: str) -> bool:
        """Whether a layer still has its `attention` or `mlp`."""
        names = (self.attention_name,) if part == "attention" else self.mlp_names
        return not any(isinstance(self.blocks[index].get_submodule(n), Dropped) for n in names if n)

    def drop(self, index: int, part: str) -> None:
        """Removes one sublayer with its norms; the residual stream passes by, and attention leaves no cache entry.

        Args:
            part: `attention` or `mlp`.

        Raises:
            UsageError: an unknown layer or part, one that is gone already, the last attention, or a model whose
                sublayers do not add to a residual stream.
        """
        self._checked([index])
        if part not in PARTS:
            raise UsageError(f"a layer has the parts attention and mlp, not {part!r}")
        if not self.has(index, part):
            raise UsageError(f"the {part} of layer {index} is dropped already")
        self._check_drop(part)
        if not self.anatomy.additive:
            raise UsageError(
                f"{type(self.model).__name__} does not add its sublayers to a residual stream (a norm follows the sum, "
                "or the sum is inside the sublayer), so that none can be left out; whole layers can"
            )
        other = PARTS[part == "attention"]
        block, own, path = self.blocks[index], self.anatomy[part], f"{self.blocks_path}.{index}."
        shared = set(self.anatomy[other].before) if self.has(index, other) else set()
        for name in (*own.modules[:-1], *own.before, *own.after):
            if name not in shared and not isinstance(block.get_submodule(name), nn.Identity):
                self.changes.module(self.model, path + name, nn.Identity())
        self.changes.module(self.model, path + own.modules[-1], Dropped(own.length))
        self._renumber()

    def observe_sublayers(self, batches: Iterable[dict[str, Any]], see: See) -> None:
        """Runs the batches and hands the residual stream before and after every sublayer to `see`.

        Args:
            see: called as `see(index, part, before, after)`, both [B, T, D], the parts of a block in order; `host.mask`
                [B, T] says which positions are real (None: all of them).
        """
        self._observe(batches, sublayer_hooks(self, see))

    def observe_layers(self, batches: Iterable[dict[str, Any]], see: SeeLayer) -> None:
        """The same around whole blocks: `see(index, before, after)`."""
        self._observe(batches, layer_hooks(self, see))

    @torch.no_grad()
    def _observe(self, batches: Iterable[dict[str, Any]], handles: list[Any]) -> None:
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                self.mask = self._real(batch)
                self._run({name: value for name, value in batch.items() if name != "labels"})
        finally:
            self.mask = None
            for handle in handles:
                handle.remove()
            self.model.train(training)
