"""Multi-normalization: project a gradient matrix onto the unit spheres of several norms in turn, then step as SGD does.

A projection keeps the direction of the gradient as far as a norm allows; a few rounds come near a matrix that has all
norms at once, which takes the place of Adam's state. Algorithms 1 and 2, for norms g_1 .. g_K:

    X <- G;   L times, for i = 1..K:   X <- P_gi(X) = argmax <X, Z> over g_i(Z) = 1;      W <- W - eta X

G, X, W: [m, n]. Every norm is scaled so that its projection has a root mean square of 1:

    row       max_i |X_i:|_2 / sqrt(n)      P = sqrt(n) X_i: / |X_i:|_2, row by row
    column    max_j |X_:j|_2 / sqrt(m)      P = sqrt(m) X_:j / |X_:j|_2
    spectral  |X|_2 / sqrt(max(m, n))       P = sqrt(max(m, n)) (X X')^-1/2 X, all singular values equal
    sign      max_ij |X_ij|                 P = sign(X)
    rms       |X|_F / sqrt(m n)             P = X / rms(X)

(row, column) is SinkGD, (row, spectral) with L = 1 is SWAN, (spectral) alone Muon, (sign) alone signSGD.

Departures: (X X')^-1/2 X is the polar factor, found by `newton` steps of Newton and Schulz's cubic iteration. A matrix,
row or column of zeros stays zero. The other parameters keep the person's optimizer and, unless `rest_lr` is given, its
rate. `momentum` and `weight_decay` are additions and off; momentum costs a buffer a matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    paper="2502.06742",
    seams=("optim.update",),
    effects=("steps", "memory"),
    lossless=False,
    claim="norms (row, column), as SinkGD: 3x effective speedup over Adam on LLaMA 1B; SGD's memory",
    claimed=3.0,
    identity="it replaces the optimizer of the matrices, so no option leaves the steps as they were",
    experiment=(
        "stdlib-lm(task=train, length=64, rows=8, target=3.3)",
        "optim/multi_norm(norms=[row, spectral], iterations=1, newton=5, momentum=0.9, lr=0.002, rest_lr=0.006)",
    ),
    tune={"lr": (2e-4, 5e-3), "rest_lr": (1e-3, 2e-2)},
    when="Trying which norms suit a model; short of memory for an optimizer's state.",
    when_not="Norms (row, column): optim/sinkgd is that, in a fraction of the time. Fine-tuning.",
)

NORMS = ("row", "column", "spectral", "sign", "rms")
SMALL = 1e-30  # below any norm that counts


def naive_multi_norm(gradient: Tensor, norms: tuple[str, ...], iterations: int, newton: int) -> Tensor:
    """The equation with loops over matrices, rows and columns, in fp64; the Newton-Schulz steps on singular values.

    Args:
        gradient: [..., m, n].
        norms: words of `NORMS`, in order.
        iterations: L.
        newton: steps of the cubic iteration in a spectral projection.

    Returns:
        X: [..., m, n] in fp64.
    """
    if gradient.dim() > 2:
        return torch.stack([naive_multi_norm(one, norms, iterations, newton) for one in gradient])
    x = gradient.double()
    m, n = x.shape
    for name in norms * iterations:
        if name == "row":
            x = torch.stack([row * (n**0.5 / norm) if (norm := row.norm()) > 0 else row for row in x])
        elif name == "column":
            x = torch.stack([col * (m**0.5 / norm) if (norm := col.norm()) > 0 else col for col in x.T]).T
        elif name == "sign":
            x = torch.tensor([[float(v > 0) - float(v < 0) for v in row] for row in x.tolist()]).double()
        elif name == "rms":
            x = x * ((m * n) ** 0.5 / norm) if (norm := x.norm()) > 0 else x
        elif x.norm() > 0:
            left, values, right = torch.linalg.svd(x / x.norm(), full_matrices=False)
            for _ in range(newton):
                values = 1.5 * values - 0.5 * values**3
            x = max(m, n) ** 0.5 * left @ torch.diag(values) @ right
    return x


def multi_norm(gradient: Tensor, norms: tuple[str, ...], iterations: int, newton: int) -> Tensor:
    """As `naive_multi_norm`, in fp32, for all matrices at once and with products of matrices only."""
    x = gradient.float()
    m, n = x.shape[-2:]
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(SMALL)  # no projection depends on the scale
    for name in norms * iterations:
        if name == "row":
            x = x * (n**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(SMALL))
        elif name == "column":
            x = x * (m**0.5 / x.norm(dim=-2, keepdim=True).clamp_min(SMALL))
        elif name == "sign":
            x = x.sign()
        elif name == "rms":
            x = x * ((m * n) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALL))
        else:
            x = max(m, n) ** 0.5 * polar(x, newton)
    return x


def polar(x: Tensor, steps: int) -> Tensor:
    """X <- (3 X - X X' X) / 2 from X / |X|_F: singular values go to 1, the smallest by 1.5 a step at first."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALL)
    for _ in range(steps):
        x = 1.5 * x - (0.5 * (x @ x.mT)) @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class MultiNorm(Method):
    """Multi-normalization for the matrices of the hidden layers; everything else stays with the person's optimizer."""

    norms: tuple[str, ...] = option(("row", "column"), "norms to project onto, in this order", choices=NORMS)
    lr: float = option(0.001, "learning rate of the matrices, eta; schedules scale it", above=0)
    rest_lr: float | None = option(None, "learning rate of all other parameters; none: as the person set it", above=0)
    iterations: int = option(5, "rounds L over the norms", least=1, most=100)
    newton: int = option(10, "steps of Newton and Schulz's iteration in a spectral projection", least=1, most=100)
    momentum: float = option(0.0, "average of the gradients before normalisation; 0 keeps no state", least=0, below=1)
    weight_decay: float = option(0.0, "decoupled decay of the matrices, as AdamW's", least=0)

    def problems(self) -> list[str]:
        return [] if self.norms else [f"norms needs at least one of {', '.join(NORMS)}"]

    def init(self, weights: Tensor) -> dict[str, Tensor]:
        """The state of a stack of weights [k, m, n]."""
        return {"average": torch.zeros_like(weights, dtype=torch.float32)} if self.momentum else {}

    def update(self, gradients: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients [k, m, n] and state to steps [k, m, n], which the learning rate scales, and the new state."""
        if self.momentum:
            average = state["average"].lerp(gradients.float(), 1 - self.momentum)
            gradients = average.lerp(gradients.float(), 1 - self.momentum)  # Nesterov's look ahead
            state = {"average": average}
        return multi_norm(gradients, self.norms, self.iterations, self.newton), state


METHOD = MultiNorm
