"""ProSparse: feed-forward layers get ReLU, are trained to few active neurons, and inactive ones are not computed.

    1. substitution   x_1 = ReLU(x W_s^T) * (x W_1^T),  FFN(x) = x_1 W_2^T          (paper, eq. 1)
    2. regularisation L = L_task + lambda(t) ||x_1||_1, lambda constant in the first of S stages, then along a sine:
                      lambda(t) = lambda_(i-1) + (lambda_i - lambda_(i-1)) (1 + sin(-pi/2 + pi (t - T_(i-1)) /
                      (T_i - T_(i-1)))) / 2        in stage i, which ends at step T_i   (eq. 2 and 3)
    3. threshold      FATReLU(z) = z where z > threshold, else 0                        (section 3.2, step 3)

x [tokens, width], W_s and W_1 [hidden, width], W_2 [width, hidden]. In a training run (`hasten.training`) 1 and 2
happen; a served model (`hasten.apply`) has ReLU and the threshold, and for up to eight tokens at a time only the rows
and columns of active neurons are read. All neurons enter the gate: nothing is predicted, the result is exact.

Departures: ||x_1||_1 is the mean over tokens, neurons and layers; the run of regularisation follows its plain training
in the same run where `factors` begins with 0. Factors and stages depend on the model and the run; the defaults suit
small models. A shifted ReLU stays shifted. Layers without a gate (W_1) are taken too. The paper's faster predicted
variant (PowerInfer) is not here. Feed-forward parts that are no module of their own (OPT) stay as they are.
"""

import dataclasses
import fnmatch
import math
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.hosts.feed_forward import FeedForward
from hasten.kernels import relu_ffn
from hasten.math.shapes import Float
from hasten.prune import _feed_forward

CARD = Card(
    title="ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models",
    paper="2402.13516",
    seams=("weights.keep", "loss"),
    effects=("time", "quality"),
    lossless=False,
    claim="LLaMA2-7B with 89.3% of the activations zero decodes up to 4.52x as fast with PowerInfer's predictors",
    claimed=4.52,
    identity={"activation": "keep"},
    hosts=("decoder", "diffusion_lm", "vit", "module"),
    experiment=("llama2c(model=relu_sparse)", "prune/prosparse(activation=keep, threshold=0.0)"),
    when="Decoding one or a few tokens at a time with a model that was trained with ReLU, 80% of neurons inactive.",
    when_not="Models with SiLU or GELU that are not trained after the substitution, prompts, and large batches.",
)


def naive_prosparse(
    x: Float[Tensor, "... width"],
    gate: Float[Tensor, "hidden width"],
    down: Float[Tensor, "out hidden"],
    up: Float[Tensor, "hidden width"] | None = None,
    threshold: float = 0.01,
) -> Float[Tensor, "... out"]:
    """FFN(x) with FATReLU, token by token and neuron by neuron in fp32, in x's dtype."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]).float():
        y = torch.zeros(down.shape[0])
        for i in range(gate.shape[0]):
            z = (gate[i].float() * token).sum()
            if z > threshold:
                y = y + z * (1 if up is None else (up[i].float() * token).sum()) * down[:, i].float()
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1).to(x.dtype)


def prosparse(
    x: Float[Tensor, "... width"],
    gate: Float[Tensor, "hidden width"],
    down: Float[Tensor, "out hidden"],
    up: Float[Tensor, "hidden width"] | None = None,
    threshold: float = 0.01,
) -> Float[Tensor, "... out"]:
    """As `naive_prosparse`; for up to eight tokens only active neurons are computed.

    Args:
        down: read by rows of its transpose; keep it so in memory (`down.t().contiguous().t()`).
        threshold: neurons at or below it are inactive.
    """
    return relu_ffn.relu_ffn(x, gate, down.t().contiguous(), up, threshold=threshold)


def factor(at: float, factors: tuple[float, ...], ends: tuple[float, ...]) -> float:
    """lambda at a fraction of the run: constant in the first stage, then from factor to factor along a sine."""
    for i, end in enumerate(ends):
        if at < end:
            if i == 0:
                return factors[0]
            share = (at - ends[i - 1]) / (end - ends[i - 1])
            rise = (1 + math.sin(-math.pi / 2 + math.pi * share)) / 2
            return factors[i - 1] + (factors[i] - factors[i - 1]) * rise
    return factors[-1]


@dataclasses.dataclass(frozen=True)
class ProSparse(Method):
    threshold: float = option(0.01, "what a neuron must be above to be active, when serving", least=0)
    activation: str = option(
        "relu", "relu: activations of another kind become ReLU; keep: their layers stay", choices=("relu", "keep")
    )
    factors: tuple[float, ...] = option((0.005, 0.05, 0.2), "lambda of each stage of a training run")
    ends: tuple[float, ...] = option((0.1, 0.5, 0.9), "fraction of the run at which each stage ends")
    ignore: tuple[str, ...] = option((), "paths of feed-forward layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        if not self.factors or len(self.factors) != len(self.ends):
            return [f"factors and ends go together: there are {len(self.factors)} and {len(self.ends)}"]
        if (
            min(self.factors) < 0
            or list(self.ends) != sorted(set(self.ends))
            or not 0 < self.ends[0] <= self.ends[-1] <= 1
        ):
            return ["factors must not be negative, and ends must rise within 0 and 1"]
        return []

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        """Puts layers that leave out inactive neurons in the place of feed-forward layers.

        Returns:
            {"layers": {path: form, shift and threshold}}.

        Raises:
            UsageError: the model has no feed-forward layer of a form that is known.
        """
        layers: dict[str, Any] = {}
        others = 0
        for path, _, form, shift in list(_feed_forward.found_in(host.model)):
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.ignore):
                continue
            others += shift is None
            if shift is not None or self.activation == "relu":
                layers[path] = {"form": dataclasses.asdict(form), "shift": shift or 0.0, "threshold": self.threshold}
        if not layers and not others:
            raise UsageError(
                f"{self.name} finds no feed-forward layer in {type(host.model).__name__}: it takes modules of two or "
                "three linear layers and an activation"
            )
        self.restore(host, {"layers": layers})
        facts: dict[str, Any] = {"layers": len(layers), "substituted": others if self.activation == "relu" else 0}
        ways = {part.way() for part in _feed_forward.layers_of(host.model).values()}
        if context.calibration and layers:
            facts["inactive"] = measure(host, context.calibration)
        if not layers:
            facts["simulated"] = "no feed-forward layer has a ReLU, so every neuron is computed"
        context.note(self.name, kernel=", ".join(sorted(ways)) or "none", **facts)
        return {"layers": layers}

    def restore(self, host: Host, record: dict[str, Any]) -> None:
        for path, one in record["layers"].items():
            _feed_forward.put(host, path, FeedForward(**one["form"]), one["shift"], one["threshold"])

    def attach(self, run: Any) -> None:
        """Adds the regularisation to a run's loss.

        Raises:
            UsageError: the run has no number of steps.
        """
        if not any(self.factors):
            return
        if run.steps is None:
            raise UsageError(f"{self.name} raises its factor over the run: pass steps=N")
        sizes: list[Tensor] = []

        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                sizes.append(given[0].float().abs().mean())

        for part in _feed_forward.layers_of(run.model).values():
            run.changes.hook(part.get_submodule(part.form.down).register_forward_pre_hook(see))

        def loss(run: Any, value: Tensor) -> Tensor:
            if not sizes:
                return value
            mean = torch.stack(sizes).mean()
            sizes.clear()
            return value + factor(run.step / run.steps, self.factors, self.ends) * mean

        run.on("forward", lambda run, batch: sizes.clear())
        run.on("loss", loss)


@torch.no_grad()
def measure(host: Host, batches: list[dict[str, Any]]) -> dict[str, float]:
    """The share of neurons of each layer that are inactive for a token of some data."""
    counts: dict[str, list[int]] = {}
    hooks = []

    def watch(path: str) -> Any:
        def see(part: Any, given: tuple[Tensor, ...]) -> None:
            zero, number = part.inactive(given[0])
            old = counts.get(path, [0, 0])
            counts[path] = [old[0] + zero, old[1] + number]

        return see

    for path, part in _feed_forward.layers_of(host.model).items():
        hooks.append(part.register_forward_pre_hook(watch(path)))
    try:
        for batch in batches:
            host.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: round(zero / number, 4) for path, (zero, number) in counts.items() if number}


METHOD = ProSparse
