"""GrokAlign: penalise the norm of the network's Jacobian, so that its rows turn towards the training inputs.

A network generalises after it has memorised (groks) when the Jacobian J_b = df/dx at each training point x_b aligns
with the point; where its rank is low, the smaller its Frobenius norm at a given loss, the better. The loss becomes

    L + jacobian R,    R = mean_b ( C / P  sum_p |v_bp' J_b|^2 )^(power / 2),    E[C |v' J|^2] = |J|_F^2

with P random unit vectors v_bp of the C outputs for each example, each of which costs one backward pass that can itself
be differentiated. power=1 is the official code's, the norm; 2 the square. `centroid_alignment` tells how far it is: the
cosine of the sum of J_b's rows with x_b, 1 where the network is aligned.

x: the floating-point inputs that the model is called with, [batch, ...]; for a model of tokens the output of its input
embedding, as in the authors' transformer. Outputs [batch, ..., C]: where there are several places before C, each has
its own v and the sum over p is divided by their number (the authors take the last place only); padding is left out.

Departures: `every` is an addition. Attention runs without fused kernels, which can't be differentiated twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="GrokAlign: Geometric Characterisation and Acceleration of Grokking",
    paper="2506.12284",
    seams=("loss",),
    effects=("steps", "quality"),
    lossless=False,
    claim="groks MNIST sooner than weight decay, Grokfast and adversarial training; no common figure is given",
    claimed=None,
    identity={"jacobian": 0.0},
    experiment=("modular-sums", "optim/grokalign(jacobian=0.1)"),
    tune={"jacobian": (1e-4, 1.0)},
    when="Held-out quality comes long after the training loss is at its floor: small data, many passes over it.",
    when_not="Models that see each example once. A step costs two to three times as much; `every` shares it out.",
)

_SMALL = 1e-8  # of the estimate and of the norms, as in the official code


def naive_grokalign(output: Tensor, x: Tensor, projections: Tensor, power: float, real: Tensor | None = None) -> Tensor:
    """R with loops: the whole Jacobian of each example, a row at a time.

    Args:
        output: [batch, ..., C], made from x, with its graph.
        x: [batch, ...].
        projections: v, [P, batch, ..., C], unit vectors along C.
        power: 1 or 2.
        real: bool [batch, ...], False at places that don't count.

    Returns:
        0-d fp32.
    """
    count, values = output.shape[-1], []
    for b in range(output.shape[0]):
        places = output[b].reshape(-1, count)
        kept = [True] * len(places) if real is None else real[b].flatten().tolist()
        rows = [
            [torch.autograd.grad(one, x, retain_graph=True)[0][b].flatten().float() for one in place] if keep else None
            for place, keep in zip(places, kept, strict=True)
        ]
        total = torch.zeros(())
        for v in projections[:, b].reshape(len(projections), -1, count).float():
            projected = [
                v[n, c] * row for n, place in enumerate(rows) if place is not None for c, row in enumerate(place)
            ]
            total = total + (torch.stack(projected).sum(0).square().sum() if projected else 0.0)
        total = total * count / (len(projections) * max(1, sum(kept)))
        values.append(total.clamp_min(_SMALL) ** (power / 2))
    return torch.stack(values).mean()


def grokalign(output: Tensor, x: Tensor, projections: Tensor, power: float, real: Tensor | None = None) -> Tensor:
    """As `naive_grokalign`, one product of vector and Jacobian a projection; differentiable in the weights."""
    if real is None:
        places = torch.full((len(output),), output[0].numel() // output.shape[-1], device=output.device)
    else:
        projections, places = projections * real[..., None], real.flatten(1).sum(1).clamp_min(1)
    total = torch.zeros(len(output), device=output.device)
    for v in projections:
        (slope,) = torch.autograd.grad(output, x, v.to(output.dtype), create_graph=True)
        total = total + slope.flatten(1).float().square().sum(1)
    total = total * output.shape[-1] / (len(projections) * places)
    return (total.clamp_min(_SMALL) ** (power / 2)).mean()


def centroid_alignment(output: Tensor, x: Tensor) -> Tensor:
    """The cosine of each input with the sum of the Jacobian's rows at it, the paper's measure, [batch] fp32.

    Args:
        output: [batch, ...], made from x, with its graph, which is kept.
        x: [batch, ...].
    """
    (centroid,) = torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)
    c, x = centroid.flatten(1).float(), x.detach().flatten(1).float()
    return (c * x).sum(1) / (c.norm(dim=1) * x.norm(dim=1)).clamp_min(_SMALL)


@dataclass(frozen=True)
class GrokAlign(Method):
    """The penalty on the Jacobian, added to the loss of each batch."""

    jacobian: float = option(0.001, "weight lambda of the penalty; the authors' for cross-entropy", least=0)
    projections: int = option(1, "random projections P for each example", least=1, most=1024)
    power: int = option(1, "1: the Frobenius norm, as the official code; 2: its square", choices=(1, 2))
    every: int = option(1, "batches from one penalty to the next", least=1)

    def attach(self, run: Any) -> None:
        """Watches the model's inputs and adds the penalty to the loss.

        The forward of a batch raises UsageError where there are no floating-point inputs and no input embedding.
        """
        if not self.jacobian:
            return
        model, mine = run.host.model, run.state[self.name]
        embedding = _embedding(model)
        held: list[Tensor] = []  # x of the batch in hand

        def due() -> bool:
            return run.in_hand and torch.is_grad_enabled() and mine.get("batches", 0) % self.every == 0

        def enter(inputs: dict[str, Any]) -> None:
            held.clear()
            name = _floating(inputs)
            if name is None and embedding is None:
                raise UsageError(f"{self.name} needs floating-point inputs, or a model with get_input_embeddings()")
            if due() and name is not None:
                if not inputs[name].requires_grad:
                    inputs[name] = inputs[name].detach().requires_grad_()
                held.append(inputs[name])

        def embedded(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            if due() and not held:
                held.append(output if output.requires_grad else output.requires_grad_())
            return output

        def loss(run: Any, value: Tensor) -> Tensor:
            if due():
                call = calls.of(self.name)[-1]
                value = value + self.jacobian * self._penalty(run, call.logits, held[-1], call.inputs)
            mine["batches"] = mine.get("batches", 0) + 1
            return value

        calls = run.watch_calls(enter=enter)
        if embedding is not None:
            run.changes.hook(embedding.register_forward_hook(embedded))
        run.on("loss", loss)
        _unfused(run, due)

    def _penalty(self, run: Any, output: Tensor, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        draws = torch.randn((self.projections, *output.shape), generator=run.generator(self.name)).to(output.device)
        mask = inputs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.shape == output.shape[:-1] else None
        with torch.autocast(output.device.type, enabled=False):
            return grokalign(output, x, draws / draws.norm(dim=-1, keepdim=True), self.power, real)


def _embedding(model: nn.Module) -> nn.Module | None:
    """The table that turns tokens into vectors, or None where the model has none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None


def _floating(inputs: dict[str, Any]) -> str | None:
    """The name of the floating-point input: none for a model that is called with tokens."""
    if isinstance(inputs.get("input_ids"), Tensor):
        return None
    names = [name for name, one in inputs.items() if isinstance(one, Tensor) and one.is_floating_point()]
    known = [name for name in ("inputs_embeds", "pixel_values") if name in names]
    return (known + names)[0] if names else None


def _unfused(run: Any, due: Callable[[], bool]) -> None:
    """Attention by plain products in the forwards whose Jacobian is asked for."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    entered: list[Any] = []

    def before(*_: Any) -> None:
        if due():
            context = sdpa_kernel(SDPBackend.MATH)
            context.__enter__()
            entered.append(context)

    def after(*_: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    run.changes.hook(run.host.model.register_forward_pre_hook(before))
    run.changes.hook(run.host.model.register_forward_hook(after, always_call=True))


METHOD = GrokAlign
