"""A small model that is trained before the run, so that what it learns about the examples guides their selection."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.data._batches import apply_to, tensors
from hasten.data.base import join

OWN = 0x5EED  # keeps the proxy's own random state apart from the run's


MOST_HELD = 1 << 29  # bytes of examples that are kept collated while a proxy goes through them several times


class Held:
    """Examples whose batches are cut out of whole columns, which is quicker than collating them again each time."""

    def __init__(self, whole: Any, count: int) -> None:
        self._whole, self._count = whole, count

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """As `Examples.batches`."""
        wanted = torch.arange(self._count) if indices is None else torch.as_tensor(indices)
        for part in wanted.split(size):
            yield apply_to(self._whole, lambda column, part=part: column[part.to(column.device)])


def held(examples: Any) -> Any:
    """The examples, as `Held` where they are few and of one shape. What a data set draws anew each time stays fixed."""
    found, room = [], MOST_HELD
    for batch in examples.batches(256):
        room -= sum(part.numel() * part.element_size() for part in tensors(batch))
        found.append(batch)
        same = [part.shape[1:] for part in tensors(batch)] == [part.shape[1:] for part in tensors(found[0])]
        if room < 0 or not same or not tensors(batch):
            return examples
    return Held(join(found), len(examples)) if found else examples


@contextlib.contextmanager
def _random_state(run: Any) -> Iterator[None]:
    """A random state of its own for dropout and the like; the caller's is untouched."""
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(run.seed ^ OWN)
        yield


def train_proxy(
    examples: Any,
    run: Any,
    proxy: nn.Module,
    *,
    passes: float,
    rows: int,
    lr: float,
    generator: torch.Generator,
    pauses: int = 1,
    at_pause: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """A copy of the proxy, trained on all examples in random order with AdamW, rate rising over the first tenth.

    Args:
        passes: over the examples; a fraction of one trains on as many of them. rows: of a batch.
        lr: the rate after its rise, then falling linearly to a tenth of it.
        pauses: evenly spread times, the last one at the end, at which `at_pause` is called with the proxy in eval mode.

    Raises:
        UsageError: the loss is not finite.
    """
    model = copy.deepcopy(proxy).to(run.device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = max(pauses, round(passes * len(examples) / rows))
    stops = {max(1, round((k + 1) * steps / pauses)) for k in range(pauses)}
    with _random_state(run):
        batches = _endless(examples, rows, generator)
        for step in range(1, steps + 1):
            warm = max(1, steps // 10)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / warm, 1 - 0.9 * (step - 1) / steps)
            loss = run.losses(model, next(batches)).float().mean()
            if not bool(torch.isfinite(loss)):
                raise UsageError(f"the loss of the proxy is {float(loss.detach())}: lower its lr ({lr:g})")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in stops and at_pause is not None:
                model.eval()
                at_pause(model)
                model.train()
    return model.eval()


def _endless(examples: Any, rows: int, generator: torch.Generator) -> Iterator[Any]:
    while True:
        order = torch.randperm(len(examples), generator=generator)
        whole = len(order) - len(order) % rows if len(order) >= rows else len(order)
        yield from examples.batches(rows, order[:whole])


@torch.no_grad()
def losses_of(examples: Any, run: Any, model: nn.Module, rows: int) -> Tensor:
    """The loss of each example, [n] fp32 on the CPU, in the data's order."""
    return torch.cat([run.losses(model, batch).detach().float().cpu() for batch in examples.batches(rows)])


@contextlib.contextmanager
def seen(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Notes what passes through a model: `output` of its last forward, `features`, the input of its last linear layer.

    Both are as the model made them; a model without a linear layer leaves `features` out.
    """
    found: dict[str, Any] = {}
    heads = [part for part in model.modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_pre_hook(lambda _, args: found.update(features=args[0].detach())) for part in heads]
    hooks.append(model.register_forward_hook(lambda _, args, output: found.update(output=output)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def outputs(model: nn.Module, batches: Any, losses: Callable[[nn.Module, Any], Tensor], what: str) -> Tensor:
    """What the model makes of each batch, by way of the person's own loss, which knows how the model is called.

    Args:
        what: `logits`, one row of classes an example, or `features`, one vector an example.

    Returns:
        [n, classes] or [n, width], fp32 on the CPU.

    Raises:
        UsageError: there is no batch, or the model's output is no such matrix.
    """
    rows = []
    with seen(model) as found:
        for batch in batches:
            found.clear()
            losses(model, batch)
            value = found.get("features") if what == "features" else _logits(found.get("output"))
            if what == "features" and value is not None and value.dim() > 2:
                value = value.flatten(1, -2).mean(1)
            if value is None or value.dim() != 2:
                raise UsageError(f"no {what} of one row an example can be had from a {type(model).__name__}")
            rows.append(value.float().cpu())
    if not rows:
        raise UsageError("there are no batches to look at")
    return torch.cat(rows)


def _logits(output: Any) -> Tensor | None:
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    return found if isinstance(found, Tensor) else None


def labels_of(examples: Any, name: str, rows: int = 512) -> Tensor:
    """The class of each example, [n] int64 on the CPU: what stands second in a batch, or under `labels`.

    Raises:
        UsageError: the examples have no class labels.
    """
    found = []
    for batch in examples.batches(rows):
        label = batch.get("labels") if isinstance(batch, dict) else None
        if isinstance(batch, tuple | list) and len(batch) > 1:
            label = batch[1]
        if not isinstance(label, Tensor) or label.dim() != 1 or label.is_floating_point():
            raise UsageError(
                f"{name} needs the class of each example: batches are (inputs, labels) or have the key labels, and "
                "labels are whole numbers [batch]"
            )
        found.append(label.long().cpu())
    return torch.cat(found)
