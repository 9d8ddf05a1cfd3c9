"""SWAN: standardise the rows of a gradient matrix, whiten it, and step as SGD does.

GradNorm takes the noise's scale out of each row, GradWhitening makes all singular values about equal; together they
take the place of Adam's two averages, so that a matrix needs no optimizer state. Algorithms 1 to 3:

    G~ = (G - mean(G)) / std(G), row by row over the n columns                                             GradNorm
    Y <- G~ G~' / |G~|_F^2,  Z <- I;   k times:  Y <- beta Y (3 I - Z Y),  Z <- beta (3 I - Z Y) Z         GradWhitening
    D = Z G~;     W <- W - alpha eta D sqrt(m n) / |D|_F

G, W, D: [m, n]; Y, Z: [m, m], both from the old pair. With beta = 1/2 the limit is D ~ (G~ G~')^-1/2 G~; with 0.8, the
default, small singular values rise faster and all end in a band around 1.

Departures: the pair is not formed. Z Y = D D' for D = Z G~, so D <- beta (3 D - D D' D) from D = G~ / |G~|_F is the
same in exact arithmetic, and rounding errors don't grow in directions that G~ lacks, as a square or tall matrix with
centred rows always does. Dividing by |G~|_F keeps it from diverging. The paper has m <= n; a tall matrix is transposed
for the whitening, which has the same limit. Without `center` GradNorm is |g|_2 = sqrt(n) only, as in paper 2502.06742.
k and beta are those of public implementations; their diagonal approximation is left out. `lr` is the product alpha eta
(0.05 x 0.02). The other parameters keep the person's optimizer and, unless `rest_lr` is given, its rate. `momentum` and
`weight_decay` are additions and off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option

CARD = Card(
    title="SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
    paper="2412.13148",
    seams=("optim.update",),
    effects=("steps", "memory"),
    lossless=False,
    claim="2x speedup over Adam: LLaMA 350M and 1.3B on C4 to the same perplexity with half the tokens; SGD's memory",
    claimed=2.0,
    identity="it replaces the optimizer of the matrices, so no option leaves the steps as they were",
    experiment=(
        "stdlib-lm(task=train, length=64, rows=8, target=3.3)",
        "optim/swan(momentum=0.9, lr=0.002, rest_lr=0.006, steps=5)",
    ),
    tune={"lr": (2e-4, 5e-3), "rest_lr": (1e-3, 2e-2)},
    when="Training a transformer from scratch with large batches, short of memory for an optimizer's state.",
    when_not="Fine-tuning; wide models on a CPU, where 2 k products of matrices a step cost more than Adam's state.",
)

SMALL = 1e-30  # below any norm that counts


def naive_swan(gradient: Tensor, steps: int, beta: float, center: bool) -> Tensor:
    """The equation with loops, in fp64; the coupled iteration on singular values, whose vectors it does not change.

    Args:
        gradient: [..., m, n].
        steps: k.
        beta: the iteration's step size.
        center: whether a row's mean is taken out.

    Returns:
        D sqrt(m n) / |D|_F: [..., m, n] in fp64.
    """
    if gradient.dim() > 2:
        return torch.stack([naive_swan(one, steps, beta, center) for one in gradient])
    g = gradient.double()
    m, n = g.shape
    rows = []
    for row in g:
        row = row - row.sum() / n if center else row
        scale = (row.square().sum() / n).sqrt()
        rows.append(row / scale if scale > 0 else row)
    x = torch.stack(rows)
    if x.norm() == 0:
        return x
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    whitened = []
    for value in (values / x.norm()).tolist():
        y, z = value**2, 1.0
        for _ in range(steps):
            y, z = beta * y * (3 - z * y), beta * (3 - z * y) * z
        whitened.append(z * value)
    d = left @ torch.diag(torch.tensor(whitened, dtype=torch.float64)) @ right
    return d * ((m * n) ** 0.5 / d.norm())


def swan(gradient: Tensor, steps: int, beta: float, center: bool) -> Tensor:
    """As `naive_swan`, in fp32 with products of matrices, for all matrices at once."""
    x = gradient.float()
    m, n = x.shape[-2:]
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(SMALL)  # the result does not depend on the scale
    if center:
        x = x - x.mean(-1, keepdim=True)
    x = x * (n**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(SMALL))
    tall = m > n
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALL)
    for _ in range(steps):
        x = (3 * beta) * x - (beta * (x @ x.mT)) @ x
    x = x * ((m * n) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALL))
    return x.mT if tall else x


@dataclass(frozen=True)
class Swan(Method):
    """SWAN for the matrices of the hidden layers; everything else stays with the person's optimizer."""

    lr: float = option(0.001, "learning rate of the matrices (the paper's alpha eta); schedules scale it", above=0)
    rest_lr: float | None = option(None, "learning rate of all other parameters; none: as the person set it", above=0)
    steps: int = option(10, "steps k of the Newton-Schulz iteration", least=1, most=100)
    beta: float = option(0.8, "its step size; 0.5 converges to the whitened gradient", above=0, most=0.85)
    center: bool = option(True, "take a row's mean out before it is divided by its deviation")
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
        return swan(gradients, self.steps, self.beta, self.center), state


METHOD = Swan
