"""Sparse MeZO: MeZO that moves and updates only the smallest weights of each layer, which take its noise best.

With MeZO's direction z ~ N(0, I), a threshold h for each matrix and the mask of Algorithm 1 (section 3.2):

    m = 1 where |theta| <= h, else 0
    g = (L(theta + eps m z) - L(theta - eps m z)) / (2 eps);     theta <- theta - lr g m z

h is the magnitude below which 1 - sparsity of the matrix's weights lie when training begins, and stays; the mask is
found anew at each step from the present weights. theta, z, m: of one shape. Vectors (biases, norms) move whole.

The mask is never stored. The paper computes it layer by layer inside a forward pass that leaves theta as it is; here
theta is moved in place, the mask read off the moved weights, and only the places that this misjudges are kept: weights
within eps |z| above h, a fraction that shrinks with eps.

Departures: these places, and MeZO's (one sweep puts back and updates; dropout stays on, the same in both passes). The
embedding counts as a matrix like any other. The authors' sparsities are 0.5 to 0.8.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.optim import _zeroth

CARD = Card(
    title="Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    paper="2402.15751",
    seams=("step.passes", "optim.update"),
    effects=("memory", "steps"),
    lossless=False,
    claim="9% more accuracy and 3.5x fewer steps than MeZO: LLaMA-7B on RTE, 5,000 against 17,500 steps to 70%",
    claimed=None,
    identity="a step goes along a random direction, so no option leaves the steps as they were",
    experiment=("stdlib-tune", "optim/sparse_mezo(lr=0.0006)"),
    tune={"lr": (1e-4, 1e-2), "eps": (1e-4, 1e-2)},
    when="Where MeZO is used and large models diverge at a higher rate: it bears several times MeZO's.",
    when_not="Small models: on stdlib-tune it needs MeZO's 180 passes too, and masks make a step a third dearer.",
)


def naive_sparse_mezo(
    weights: Tensor, z: Tensor, plus: float, minus: float, eps: float, lr: float, threshold: float
) -> Tensor:
    """One step with a loop over the weights, in fp32.

    Args:
        weights, z: [...], theta and the direction.
        plus, minus: L(theta + eps m z) and L(theta - eps m z).
        threshold: h.

    Returns:
        The new theta, fp32.
    """
    out = weights.to(torch.float32, copy=True).contiguous()
    for place, (theta, along) in enumerate(zip(weights.flatten().tolist(), z.flatten().tolist(), strict=True)):
        if abs(theta) <= threshold:
            out.view(-1)[place] = theta - lr * (plus - minus) / (2 * eps) * along
    return out


def sparse_mezo(
    weights: Tensor, z: Tensor, plus: float, minus: float, eps: float, lr: float, threshold: float
) -> Tensor:
    """As `naive_sparse_mezo`, on the way that the weights take: to +eps m z, to -eps m z, to the new theta."""
    theta = weights.to(torch.float32, copy=True).contiguous()
    end = -lr * (plus - minus) / (2 * eps)
    wrong = None
    for start, to in ((0.0, eps), (eps, -eps), (-eps, end)):
        moves = _zeroth.judged(theta, z, start, threshold)
        if wrong is not None:
            moves ^= wrong
        _zeroth.move(theta, z, start, to, moves)
        wrong = _zeroth.judged(theta, z, to, threshold) ^ moves
    return theta


@dataclass(frozen=True)
class SparseMeZO(Method):
    """Sparse MeZO for all parameters that the person's optimizer holds."""

    lr: float = option(2e-6, "learning rate; twice to several times MeZO's", above=0)
    eps: float = option(1e-3, "perturbation scale", above=0)
    sparsity: float = option(0.75, "fraction of each matrix's weights, the largest, that stay", above=0, below=1)
    samples: int = option(1, "directions a batch, at two forward passes each", least=1, most=1000)
    weight_decay: float = option(0.0, "decay of the matrices' moving weights, scaled by the rate", least=0)

    def attach(self, run: Any) -> None:
        """Makes the run step by pairs of passes.

        Raises:
            UsageError: fp16, or several processes.
        """
        _zeroth.attach(self, run, self.sparsity)


METHOD = SparseMeZO
