"""Leaving out layers and sublayers: the base of such methods and their executor.

A method has two verbs:

    importance(before, after, mask) -> (sum over the real tokens, their number)     of one part of one layer
    leave_out(depth, importance) -> {part: indices}                                 part: attention, mlp or block

`observes` names the parts whose importance it wants to see; where that is empty, `leave_out` gets nothing and no data
is needed. `decoding_only` says that blocks left out still read the prompt. The executor runs the calibration data,
shows the method the residual stream before and after each part, and takes out what the method names.
"""

import dataclasses
from typing import Any

import torch

from hasten.core.errors import UsageError
from hasten.core.options import Method
from hasten.hosts.base import Host
from hasten.hosts.context import Context


@dataclasses.dataclass(frozen=True)
class LayerPruning(Method):
    """Base of methods that leave out layers and sublayers of a model."""

    @property
    def observes(self) -> tuple[str, ...]:
        """Of attention, mlp and block, those whose importance decides."""
        return ()

    @property
    def decoding_only(self) -> bool:
        """Whether the blocks left out still run for the prompt."""
        return False

    def importance(self, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What one part of one layer does to one batch.

        Args:
            before, after: the residual stream around the part, [batch, tokens, width].
            mask: bool [batch, tokens], False at padding.

        Returns:
            the sum over the real tokens (a scalar tensor) and their number.
        """
        raise NotImplementedError

    def leave_out(self, depth: int, importance: dict[str, torch.Tensor]) -> dict[str, list[int]]:
        """The indices of the layers that lose each part.

        Args:
            depth: layers of the model.
            importance: for each observed part the mean over all real tokens, float64 [depth].
        """
        raise NotImplementedError

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        return install(self, host, context)

    def restore(self, host: Host, record: dict[str, Any]) -> None:
        restore(self, host, record)


def install(method: LayerPruning, host: Any, context: Context) -> dict[str, Any]:
    """Takes layers and sublayers out of a model.

    Returns:
        `leave_out`: part to the indices of the layers that lose it.

    Raises:
        UsageError: the model shows no sublayers, parts of it are gone already, its sublayers can't be left out, or
            there is no calibration data.
    """
    _check(method, host)
    importance = measure(method, host, context.calibration) if method.observes else {}
    left_out = method.leave_out(len(host.layers), importance)
    chosen = {part: sorted(indices) for part, indices in left_out.items() if indices}
    before = _count(host)
    restore(method, host, {"leave_out": chosen})
    context.note(
        method.name,
        left_out=chosen,
        weights_kept=round(_count(host) / before, 4),
        **{f"importance_{part}": [round(float(value), 6) for value in values] for part, values in importance.items()},
    )
    return {"leave_out": chosen}


def restore(method: LayerPruning, host: Any, record: dict[str, Any]) -> None:
    """Takes out the same parts again, from the record.

    Raises:
        UsageError: as `install`.
    """
    chosen: dict[str, list[int]] = record["leave_out"]
    if method.decoding_only:
        if chosen.get("block"):
            host.skip_while_decoding(chosen["block"])
        return
    attention, mlp = set(chosen.get("attention", ())), set(chosen.get("mlp", ()))
    blocks = set(chosen.get("block", ())) | (attention & mlp)  # a block without both computes nothing
    for part, indices in (("attention", attention), ("mlp", mlp)):
        for index in sorted(indices - blocks):
            host.drop(index, part)
    if blocks:
        host.keep_layers(index for index in range(len(host.layers)) if index not in blocks)


@torch.no_grad()
def measure(method: LayerPruning, host: Any, batches: list[dict[str, Any]] | None) -> dict[str, torch.Tensor]:
    """The mean importance of every observed part over the calibration data, each float64 [depth].

    Raises:
        UsageError: there is no calibration data, or it holds no real token.
    """
    if not batches:
        raise UsageError(f"{method.name} needs calibration data: pass calibration=[...] (model inputs or texts)")
    depth = len(host.layers)
    sums = {part: torch.zeros(depth, dtype=torch.float64) for part in method.observes}
    counts = {part: torch.zeros(depth, dtype=torch.float64) for part in method.observes}

    def see(index: int, part: str, before: torch.Tensor, after: torch.Tensor) -> None:
        if part in sums:
            total, number = method.importance(before, after, _real(host, before))
            sums[part][index] += total.double().cpu()
            counts[part][index] += number

    if set(method.observes) & {"attention", "mlp"}:
        host.observe_sublayers(batches, see)
    if "block" in method.observes:
        host.observe_layers(batches, lambda index, before, after: see(index, "block", before, after))
    if any(bool((count == 0).any()) for count in counts.values()):
        raise UsageError("the calibration data holds no real token: its attention_mask is 0 everywhere")
    return {part: sums[part] / counts[part] for part in sums}


def _real(host: Any, stream: torch.Tensor) -> torch.Tensor:
    if host.mask is None or host.mask.shape != stream.shape[:2]:
        return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
    return host.mask  # type: ignore[no-any-return]


def _check(method: LayerPruning, host: Any) -> None:
    if not hasattr(host, "observe_sublayers"):
        raise UsageError(f"{method.name} works on decoders and ViTs; {type(host.model).__name__} is a {host.kind}")
    if method.decoding_only and host.kind != "decoder":
        raise UsageError(f"{method.name} skips while decoding, and a {host.kind} does not decode")
    partial = [i for i in range(len(host.layers)) for part in ("attention", "mlp") if not host.has(i, part)]
    if partial and (method.observes or not method.decoding_only):
        raise UsageError(f"layer {partial[0]} has lost a part already: apply {method.name} to the whole model")
    if set(method.observes) - {"block"} and not host.anatomy.additive:
        raise UsageError(
            f"{type(host.model).__name__} does not add its sublayers to a residual stream, so that none can be left "
            "out; whole layers can"
        )


def _count(host: Host) -> int:
    return sum(parameter.numel() for parameter in host.model.parameters())
