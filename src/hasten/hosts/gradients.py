"""How sensitive the loss is to each weight: the diagonal of the Fisher information, some layers at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.hosts.base import Host
from hasten.hosts.streaming import evaluating
from hasten.hosts.weights import Weight

GRADIENT_BYTES = 512 * 2**20


def fisher(
    host: Host, batches: list[dict[str, Any]], weights: dict[str, Weight], seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """(path, fp32 [out, in]) of each layer: the mean over the examples of the squared gradient of the loss.

    A decoder's loss is that of the next tokens of the calibration texts; of other models, the negative log-likelihood
    of a class drawn from the model's own prediction (the true Fisher information). The model is run whole and as it
    is, once for as many layers at a time as `GRADIENT_BYTES` hold; a caller may change a layer once it has its own.

    Raises:
        UsageError: the model's output has no logits, or a gradient is not finite.
    """
    waiting = list(weights)
    while waiting:
        some: list[str] = []
        total = 0
        for path in waiting:
            total += 4 * weights[path].matrix.numel()
            if some and total > GRADIENT_BYTES:
                break
            some.append(path)
        waiting = waiting[len(some) :]
        yield from _squares(host, batches, {path: weights[path] for path in some}, seed).items()


def _squares(host: Host, batches: list[dict[str, Any]], weights: dict[str, Weight], seed: int) -> dict[str, Tensor]:
    parameters = {path: weight.part.weight for path, weight in weights.items()}
    totals = {path: torch.zeros(weight.shape, device=host.device) for path, weight in weights.items()}
    before = [(one, one.requires_grad) for one in host.model.parameters()]
    examples = 0
    make = torch.Generator().manual_seed(seed)
    try:
        for one, _ in before:
            one.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)  # type: ignore[operator,union-attr]
        with evaluating(host.model), torch.enable_grad():
            for batch in batches:
                for example in _examples(batch):
                    loss = _loss(host, example, make)
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
                    for path, gradient in zip(totals, found, strict=True):
                        if gradient is not None:
                            totals[path] += weights_like(weights[path], gradient).float().square()
                    examples += 1
    finally:
        for one, required in before:
            one.requires_grad_(required)
    wrong = next((path for path, total in totals.items() if not total.isfinite().all()), None)
    if wrong is not None:
        raise UsageError(f"the calibration gives {wrong} a gradient that is not finite: check the data and the dtype")
    return {path: total / max(1, examples) for path, total in totals.items()}


def weights_like(weight: Weight, gradient: Tensor) -> Tensor:
    """A gradient of a module's weight as [out, in]."""
    return gradient.flatten(1) if gradient.flatten(1).shape == weight.shape else gradient.t()


def _examples(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a batch, one by one."""
    rows = max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), default=1)
    for row in range(rows):
        yield {
            name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
            for name, value in batch.items()
        }


def _loss(host: Host, batch: dict[str, Any], make: torch.Generator) -> Tensor:
    out = host.forward(
        {"use_cache": False} | batch if host.kind == "decoder" and hasattr(host.model, "config") else batch
    )
    logits = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise UsageError(f"{type(host.model).__name__} returns no logits, so its weights have no sensitivity")
    if host.kind == "decoder" and "input_ids" in batch:
        targets = batch["input_ids"].to(logits.device)[:, 1:]
        mask = batch.get("attention_mask")
        if mask is not None:
            targets = targets.masked_fill(mask.to(logits.device)[:, 1:] == 0, -100)
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
    rows = logits.float().flatten(0, -2)
    drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=make)[:, 0].to(rows.device)
    return F.cross_entropy(rows, drawn)
