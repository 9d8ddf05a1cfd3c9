"""SinkGD: rescale a gradient matrix until all its rows and all its columns have equal l2 norms, then step as SGD does.

The l2 norms take the place of Adam's second moment, so that a matrix needs no optimizer state. Algorithms 3 and 4:

    X <- G;   L times:   X <- sqrt(n) Q(X)^-1 X,   X <- sqrt(m) X R(X)^-1;      W <- W - alpha eta X

G, X, W: [m, n]; Q(X), R(X): the diagonal matrices of the l2 norms of X's rows and columns; in the end X's root mean
square is 1. The fast path uses that X = diag(u)^1/2 G diag(v)^1/2 all along, with u = n / (S v), v = m / (S' u) and
S = G * G: it is the classical Sinkhorn iteration on S, so an iteration only reads G, and writes vectors.

Departures: `lr` is the paper's product alpha eta (0.05 x 0.02). The other parameters keep the person's own optimizer
and, unless `rest_lr` is given, its learning rate; the paper uses Adam with eta, 20 times the matrices' rate. `momentum`
and `weight_decay` are additions and off; momentum costs one buffer a matrix. A row or column of zeros stays zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.kernels.sinkhorn import sinkhorn, sinkhorn_step_

CARD = Card(
    title="Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    paper="2502.06742",
    seams=("optim.update",),
    effects=("steps", "memory"),
    lossless=False,
    claim="3x effective speedup over Adam: LLaMA 1B on C4, batches of 130k tokens, to Adam's perplexity; SGD's memory",
    claimed=3.0,
    identity="it replaces the optimizer of the matrices, so no option leaves the steps as they were",
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "optim/sinkgd(momentum=0.9, lr=0.0007)"),
    tune={"lr": (2e-4, 5e-3), "rest_lr": (1e-3, 2e-2)},
    when="Training a transformer from scratch, above all where the memory of the optimizer's state is short.",
    when_not="Fine-tuning. The best rate lies in a narrow range: tune `lr` by factors of two, and the warm-up with it.",
)


def naive_sinkgd(gradient: Tensor, iterations: int) -> Tensor:
    """The equation with loops: row and column norms one by one, in fp32.

    Args:
        gradient: [..., m, n].
        iterations: L.

    Returns:
        X: [..., m, n] in fp32.
    """
    if gradient.dim() > 2:
        return torch.stack([naive_sinkgd(one, iterations) for one in gradient])
    x = gradient.float()
    m, n = x.shape
    for _ in range(iterations):
        x = torch.stack([row * (n**0.5 / norm) if (norm := row.norm()) > 0 else row for row in x])
        x = torch.stack([col * (m**0.5 / norm) if (norm := col.norm()) > 0 else col for col in x.T]).T
    return x


def sinkgd(gradient: Tensor, iterations: int) -> Tensor:
    """As `naive_sinkgd`, reading a matrix once an iteration (`hasten.kernels.sinkhorn`)."""
    return sinkhorn(gradient, iterations)


@dataclass(frozen=True)
class SinkGD(Method):
    """SinkGD for the matrices of the hidden layers; everything else stays with the person's optimizer."""

    lr: float = option(0.001, "learning rate of the matrices (the paper's alpha eta); schedules scale it", above=0)
    rest_lr: float | None = option(None, "learning rate of all other parameters; none: as the person set it", above=0)
    iterations: int = option(5, "alternations L of row and column normalisation", least=1, most=100)
    momentum: float = option(0.0, "average of the gradients before normalisation; 0 keeps no state", least=0, below=1)
    weight_decay: float = option(0.0, "decoupled decay of the matrices, as AdamW's", least=0)

    def init(self, weights: Tensor) -> dict[str, Tensor]:
        """The state of a stack of weights [k, m, n]."""
        return {"average": torch.zeros_like(weights, dtype=torch.float32)} if self.momentum else {}

    def update(self, gradients: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients [k, m, n] and state to steps [k, m, n], which the learning rate scales, and the new state."""
        if self.momentum:
            average = state["average"].lerp(gradients.float(), 1 - self.momentum)
            gradients = average.lerp(gradients.float(), 1 - self.momentum)  # Nesterov's look ahead
            state = {"average": average}
        return sinkgd(gradients, self.iterations), state

    def step_(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        state: dict[str, list[Tensor]],
        lr: list[float],
        decay: list[float],
    ) -> bool:
        """`update` and the step in place, for matrices [m_i, n_i] of any shapes; False: these tensors need `update`."""
        averages = state["average"] if self.momentum else None
        return sinkhorn_step_(
            weights,
            gradients,
            averages,
            iterations=self.iterations,
            momentum=self.momentum,
            lr=lr,
            decay=decay,
        )


METHOD = SinkGD
