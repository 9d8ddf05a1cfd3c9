"""Chain-of-models pre-training: small models of a chain are trained first, each hands its knowledge to the next.

A model of the chain takes over its predecessor's weights (parameter space) and, while it is trained, learns to have the
features of the frozen predecessor (feature space). With theta_s of the small model and theta_0 of a fresh large one:

    theta[leading channels] = theta_s, theta_0 elsewhere;      layer j takes layer i = j s / l of s (l: large depth)
    L = L_task + alpha MSE(f / |f|, f_s / |f_s|)

f [..., D] are the features that enter the head, of the larger model its leading D_s channels. In one run the person
brings the last, largest model of the chain; the run begins with the first of the given fractions of its size.

Departures: the authors train each model in a run of its own, for ever fewer epochs, and count the family's cost; here
the smaller models are means to the last one. Where the widths differ, the authors learn a linear map to the smaller
features and distil image and text features of a CLIP; here the leading channels, which come from the predecessor, are
compared, so that there are no further weights. If only depths differ, layers keep their places, as in the authors' code
(`stretch=true`: they are spread). `expand=copy` copies the channels instead, halves what reads them, and keeps the
function; `noise` tells the copies apart. alpha is 500 for features of 512 channels, and its effect is alpha / D_s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.grow import _widths
from hasten.grow.base import check_growable
from hasten.hosts.anatomy import first_tensor
from hasten.hosts.changes import Changes
from hasten.hosts.widths import Sizes, Widths

CARD = Card(
    title="Chain-of-Models Pre-Training: Rethinking Training Acceleration of Vision Foundation Models",
    paper="2604.12391",
    seams=("weights.resize", "loss"),
    effects=("time", "steps"),
    lossless=False,
    claim="ViT-L on CC3M with up to 72% less computation; a family of 3, 4 or 7 models 4.13, 5.68 or 7.09 times faster",
    claimed=3.57,
    identity={"widths": (), "depths": (), "at": ()},
    needs=("steps",),
    hosts=("decoder", "vit"),
    experiment=("digits-vit(task=train)", "grow/com_pt(widths=[0.5], depths=[0.5], at=[0.4], alpha=50)"),
    tune={"alpha": (1.0, 1000.0)},
    when="Pre-training a family of models, or one large model from scratch.",
    when_not="Fine-tuning: the model's weights are dropped but for those that the expansion leaves.",
)


def naive_com_pt(features: Tensor, predecessor: Tensor) -> Tensor:
    """The distillation loss of one batch, with loops.

    Args:
        features: [rows, D] of the larger model. predecessor: [rows, d], d <= D, of the frozen smaller one.

    Returns:
        Scalar, the mean over rows and channels.
    """
    rows, width = predecessor.shape
    total = torch.zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
    for f, wanted in zip(features.to(total.dtype), predecessor.to(total.dtype), strict=True):
        mine = sum(f[d] ** 2 for d in range(width)) ** 0.5
        theirs = sum(wanted[d] ** 2 for d in range(width)) ** 0.5
        for d in range(width):
            total = total + (f[d] / mine - wanted[d] / theirs) ** 2
    return total / (rows * width)


def com_pt(features: Tensor, predecessor: Tensor) -> Tensor:
    """As `naive_com_pt`, at once, for features [..., D]."""
    width, dtype = predecessor.shape[-1], torch.promote_types(features.dtype, torch.float32)
    mine, theirs = (F.normalize(one[..., :width].to(dtype), dim=-1) for one in (features, predecessor))
    return F.mse_loss(mine, theirs)


@dataclass(frozen=True)
class ComPT(Method):
    """A chain of models. Each list has one entry for each smaller model, the smallest first."""

    widths: tuple[float, ...] = option(
        (0.5,), "width of each smaller model, as a fraction of the last", above=0, most=1
    )
    depths: tuple[float, ...] = option(
        (0.5,), "depth of each smaller model, as a fraction of the last", above=0, most=1
    )
    at: tuple[float, ...] = option((0.5,), "when each ends, as a fraction of the run's steps", above=0, below=1)
    alpha: float = option(500.0, "weight of the distance of the features; 0: weights only", least=0)
    distil: float = option(1.0, "how long features are distilled, as a fraction of each model's steps", above=0, most=1)
    expand: str = option("slice", "how weights are taken over", choices=("slice", "copy"))
    noise: float = option(0.01, "of expand=copy: deviation of the noise, relative to each weight's own", least=0)
    stretch: bool = option(False, "spread the layers over the larger depth also where the widths agree")
    warmup: float = option(0.0, "fraction of the steps in which the rate rises after each growth", least=0, most=0.5)

    def problems(self) -> list[str]:
        if not len(self.widths) == len(self.depths) == len(self.at):
            return ["widths, depths and at need an entry for each smaller model, so they are of equal length"]
        if list(self.at) != sorted(set(self.at)):
            return ["the steps in `at` must rise"]
        chain = [*zip(self.widths, self.depths, strict=True), (1.0, 1.0)]
        if any(a >= c and b >= d or a > c or b > d for (a, b), (c, d) in zip(chain, chain[1:], strict=False)):
            return ["each model of the chain must be wider or deeper than the one before, and neither smaller"]
        return []

    def attach(self, run: Any) -> None:
        """Makes the model small, and hooks growth and distillation into the run.

        Raises:
            UsageError: sizes that the fractions do not divide, a model whose sizes are not understood or without head.
        """
        if not self.at:
            return
        check_growable(self.name, run)
        _Chain(self, run)


class _Chain:
    """The moves of one run; what they need lies in `run.state`."""

    def __init__(self, method: ComPT, run: Any) -> None:
        self.method, self.widths, head = method, Widths(run.host), _widths.head_of(run.host)
        fractions = [*zip(method.widths, method.depths, strict=True), (1.0, 1.0)]
        self.sizes = [self.widths.check(*pair) for pair in fractions]
        self.starts = [0, *(max(n + 1, round(f * run.steps)) for n, f in enumerate(method.at))]
        if method.alpha and head is None:
            raise UsageError(f"{method.name} compares what enters the head, and {type(run.model).__name__} has none")
        self.teacher: Any = None
        self.seen: list[Tensor] = []  # what entered the model's head in the batch in hand
        self.wanted: list[Tensor] = []  # the same of the predecessor
        self.taught: Widths | None = None
        self.state, self.stage, self.begin = run.state[method.name], 0, len(run.host.changes)
        self.state.update(stage=0, teacher={})
        if method.expand == "slice":
            self.state["initial"] = {n: t.clone() for n, t in self.widths.tensors().items()}
        self.shapes = {n: t.shape for n, t in self.widths.tensors().items()}
        _widths.move(run, self.widths, *self.cut(self.widths.tensors(), self.widths.sizes, self.sizes[0]), keep=True)
        self.left_out: int | None = len(run.host.changes) - self.begin
        if method.alpha:
            self.teacher = _widths.twin(run.host)
            self.taught = Widths(self.teacher, self.widths.tower)
            self.calls = run.watch_calls()
            for owner, found in ((run.host, self.seen), (self.teacher, self.wanted)):
                run.changes.hook(_widths.head_of(owner).register_forward_pre_hook(_keep(found), with_kwargs=True))
            run.on("forward", lambda run, batch: self.seen.clear())
            run.on("loss", self.loss)
        run.on("step", self.step)
        run.on("restore", self.restore)
        if rise := round(method.warmup * run.steps):
            run.multiply_lr(lambda run: _widths.rising(run.step - self.starts[self.stage], rise) if self.stage else 1.0)

    def cut(self, tensors: _widths.Weights, sizes: Sizes, wanted: Sizes) -> tuple[_widths.Weights, list[int]]:
        """The leading channels and layers of a model."""
        layers = list(range(wanted.layers))
        maps = _widths.leading(sizes, wanted)
        return _widths.remade(self.widths, tensors, maps, [[layer] for layer in layers]), layers

    def grow(self, run: Any) -> None:
        """One model on in the chain."""
        small, now, wanted = self.widths.tensors(), self.widths.sizes, self.sizes[self.stage + 1]
        self.state["teacher"] = {n: t.clone() for n, t in small.items()} if self.method.alpha else {}
        spread = self.method.stretch or now.width != wanted.width or self.method.expand == "copy"
        layers = _widths.stretched(now.layers, wanted.layers) if spread else list(range(now.layers))
        if self.method.expand == "slice":
            fresh, _ = self.cut(self.state["initial"], self.sizes[-1], wanted)
            weights = _widths.overlaid(self.widths, fresh, small, layers)
        else:
            maps = _widths.copies(now, wanted)
            weights = _widths.remade(self.widths, small, maps, [[layer] for layer in layers])
            generator = run.generator(self.method.name)
            for name, tensor in weights.items():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                weights[name] = tensor + noise * (self.method.noise * (tensor.std() if tensor.numel() > 1 else 0))
        more = [*layers, *range(len(layers), wanted.layers)]
        _widths.move(run, self.widths, weights, [min(layer, now.layers - 1) for layer in more])
        self.stage = self.state["stage"] = self.stage + 1
        if self.stage == len(self.sizes) - 1:
            self.state.pop("initial", None)
        self.teach()

    def teach(self) -> None:
        """Gives the twin the predecessor's size and weights."""
        if self.taught is None:
            return
        have, wanted = self.taught.sizes.layers, self.sizes[self.stage - 1].layers
        self.taught.put(self.state["teacher"], _widths.stretched(have, wanted))
        self.teacher.model.requires_grad_(False)
        self.teacher.changes = Changes()

    def step(self, run: Any) -> None:
        due = sum(run.step >= start for start in self.starts) - 1
        if self.left_out is not None:
            run.host.changes.forget(self.begin, self.begin + self.left_out)
            self.left_out = None
        while self.stage < due:
            self.grow(run)

    def restore(self, run: Any, _: dict[str, Any]) -> None:
        _widths.check_fresh(self.method.name, self.stage)
        found = dict(self.state)
        self.state.setdefault("initial", {n: torch.zeros(shape) for n, shape in self.shapes.items()})
        while self.stage < found["stage"]:
            self.grow(run)
        self.state.clear()
        self.state.update(found)
        if self.stage:
            self.teach()

    def distils(self, run: Any) -> bool:
        ends = [*self.starts[1:], run.steps]
        since, whole = run.step - self.starts[self.stage], ends[self.stage] - self.starts[self.stage]
        return self.stage > 0 and since < self.method.distil * whole

    def loss(self, run: Any, loss: Tensor) -> Tensor:
        """L_task + alpha times the distance of the features, a mean over the loop's forwards."""
        if not self.distils(run):
            return loss
        calls, parts = self.calls.of(self.method.name), []
        for call, features in zip(calls, self.seen[-len(calls) :], strict=True):
            with torch.no_grad(), run.autocast():
                self.teacher.model(**{k: v for k, v in call.inputs.items() if k not in ("labels", "past_key_values")})
            parts.append(com_pt(features, self.wanted.pop()))
        return loss + self.method.alpha * torch.stack(parts).mean()


def _keep(found: list[Tensor]) -> Callable[..., None]:
    def hook(_: Any, args: Any, kwargs: Any) -> None:
        features = first_tensor(args, kwargs)
        assert features is not None
        found.append(features)

    return hook


METHOD = ComPT
