"""Muon: the momentum of a matrix is orthogonalised before the step. PyTorch's own optimizer, as a baseline for others.

    B <- mu B + (1 - mu) G;    G~ = mu B + (1 - mu) G  (Nesterov)  or  B
    X <- G~ / |G~|_F;   five times:   X <- a X + b (X X') X + c (X X')^2 X,   (a, b, c) = (3.4445, -4.7750, 2.0315)
    W <- W - eta (lambda W + s X);    s = 0.2 sqrt(max(m, n))  (match_rms_adamw)  or  sqrt(max(1, m / n))  (original)

W, G, B, X: [m, n]. The iteration brings all singular values near 1, between about 0.7 and 1.2, not to 1. With
match_rms_adamw a step has about the root mean square of AdamW's, so that AdamW's rate fits (the paper's section 2.2).

Departures: this is `torch.optim.Muon`, which iterates in bf16 and steps one matrix after another. The other parameters
keep the person's own optimizer and, unless `rest_lr` is given, its learning rate; the paper uses AdamW with one rate.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="Muon is Scalable for LLM Training",
    paper="2502.16982",
    seams=("optim.update",),
    effects=("steps", "memory"),
    lossless=False,
    claim="about 2x AdamW's computational efficiency in compute-optimal training of language models; one buffer",
    claimed=2.0,
    identity="it replaces the optimizer of the matrices, so no option leaves the steps as they were",
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "optim/muon(lr=0.008, rest_lr=0.006)"),
    tune={"lr": (5e-4, 2e-2), "rest_lr": (1e-3, 2e-2)},
    when="Training a transformer from scratch; with match_rms_adamw the rate that was tuned for AdamW is a good start.",
    when_not="Fine-tuning a model that AdamW has trained; small batches on a CPU, where 15 products a step are dear.",
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def naive_muon(gradients: Tensor, momentum: float, nesterov: bool, steps: int, adjust: str) -> Tensor:
    """The equations in fp64, with the iteration on singular values, whose vectors it does not change.

    Args:
        gradients: [t, m, n], those of t steps from an empty buffer B.
        momentum: mu.
        steps: of the iteration.
        adjust: `match_rms_adamw` or `original`.

    Returns:
        s X of the last step: [m, n] in fp64.
    """
    a, b, c = COEFFICIENTS
    m, n = gradients.shape[-2:]
    buffer = torch.zeros(m, n, dtype=torch.float64)
    for gradient in gradients.double():
        buffer = momentum * buffer + (1 - momentum) * gradient
        ahead = momentum * buffer + (1 - momentum) * gradient if nesterov else buffer
    if ahead.norm() == 0:
        return ahead
    left, values, right = torch.linalg.svd(ahead / ahead.norm(), full_matrices=False)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    scale = 0.2 * max(m, n) ** 0.5 if adjust == "match_rms_adamw" else max(1.0, m / n) ** 0.5
    return scale * left @ torch.diag(values) @ right


def muon(gradients: Tensor, momentum: float, nesterov: bool, steps: int, adjust: str) -> Tensor:
    """As `naive_muon`, by PyTorch's optimizer on a weight of zeros: fp32 with an iteration in bf16."""
    weight = torch.nn.Parameter(torch.zeros(gradients.shape[-2:], device=gradients.device))
    method = Muon(lr=1.0, momentum=momentum, nesterov=nesterov, steps=steps, adjust=adjust, weight_decay=0.0)
    optimizer = method.make([{"params": [weight]}])
    for gradient in gradients.float():
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    return before - weight.detach()


@dataclass(frozen=True)
class Muon(Method):
    """PyTorch's Muon for the matrices of the hidden layers; everything else stays with the person's optimizer."""

    takes: ClassVar[str] = "matrices"

    lr: float = option(0.001, "learning rate of the matrices; schedules scale it", above=0)
    rest_lr: float | None = option(None, "learning rate of all other parameters; none: as the person set it", above=0)
    momentum: float = option(0.95, "mu, the part of the buffer that stays", least=0, below=1)
    nesterov: bool = option(True, "look ahead along the buffer")
    steps: int = option(5, "steps of the iteration", least=1, below=100)
    adjust: str = option("match_rms_adamw", "how the rate follows the shape", choices=("match_rms_adamw", "original"))
    weight_decay: float = option(0.1, "decoupled decay of the matrices", least=0)

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """PyTorch's optimizer over groups of matrices."""
        return torch.optim.Muon(
            groups,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_coefficients=COEFFICIENTS,
            ns_steps=self.steps,
            adjust_lr_fn=self.adjust,
        )


METHOD = Muon
