"""Weight refactorization: low-rank pre-training, its factors balanced anew by an SVD every T steps.

Each hidden linear layer holds W = B A with B [m, r] and A [r, n]; only the factors exist while it trains. Every T steps
(section 4 of the paper; merge_and_reinit in the authors' code)

    U S V^T = B A;     B <- U sqrt(S),  A <- sqrt(S) V^T

The product, and so the model, is the same before and after; but factors of unequal scale, which slow training down,
have equal Gram matrices B^T B = A A^T = S again. A step's matrix products, gradients and optimizer states shrink from
m n to r (m + n) a layer. When the run finishes, the layers are plain linear layers again with the weight B A.

The moments that an optimizer keeps belong to the old factors: put `optim/momentum_reset` with the same `every` behind
it.

Departures: the first factors are the best approximation of the person's own initial weights (the authors draw both
factors afresh and scale the product by alpha / r), so trained weights keep what rank r can hold. The SVD goes through
QR of the factors, r x r, and never makes the product. An optimizer that keeps copies of the weights does not see the
change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.changes import Changes
from hasten.hosts.factored import balanced, factor, factorable, factored, merge

CARD = Card(
    title="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking",
    paper="2505.22922",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="low-rank LLaMA 1B on C4 with this and momentum reset: a lower perplexity than GaLore, in 25% less memory",
    claimed=None,
    identity="the layers hold fewer numbers from the first step on, so no option leaves the steps as they were",
    experiment=(
        "stdlib-lm(task=train, length=64, rows=8, target=3.3)",
        "optim/weight_refactorization(rank=0.35, every=50) + optim/momentum_reset(every=50)",
    ),
    tune={"rank": (0.1, 0.45)},
    when="Pre-training where the memory of weights, gradients and optimizer state is what is short.",
    when_not="Where the full weights fit: they reach a lower loss in as many steps. Layers of about a hundred columns.",
)


def naive_weight_refactorization(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The equation through the whole product, summed column by column, and its SVD, in fp64.

    Args:
        b, a: B [m, r] and A [r, n], of rank r.

    Returns:
        B [m, r] and A [r, n] in the dtype of `b`. In each column of U the entry of largest magnitude is positive.
    """
    rank = b.shape[1]
    product = sum((torch.outer(b[:, k].double(), a[k].double()) for k in range(rank)), torch.zeros(()).double())
    u, s, vt = torch.linalg.svd(product)
    left, right = torch.zeros(b.shape).double(), torch.zeros(a.shape).double()
    for k in range(rank):
        sign = 1.0 if u[:, k].max() > -u[:, k].min() else -1.0
        left[:, k] = sign * s[k].sqrt() * u[:, k]
        right[k] = sign * s[k].sqrt() * vt[k]
    return left.to(b.dtype), right.to(b.dtype)


def weight_refactorization(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """As `naive_weight_refactorization`, through the factors' orthogonal bases."""
    return balanced(b, a)


@dataclass(frozen=True)
class WeightRefactorization(Method):
    """Low-rank layers for the hidden linears that get smaller by it; everything else stays as it is."""

    rank: float = option(0.25, "rank r, as a fraction of each matrix's smaller side", above=0, below=1)
    every: int = option(200, "steps T between two refactorizations", least=1)

    def attach(self, run: Any) -> None:
        """Factors the layers and hooks the refactorization into a run.

        Raises:
            UsageError: no layer gets smaller.
        """
        host, changes = run.host, Changes()
        ranks = factorable(host, self.rank)
        if not ranks:
            raise UsageError(
                f"{self.name}: with factors of rank {self.rank:g} no linear layer of this model gets smaller: give a "
                "smaller rank (square matrices: below 0.5)"
            )
        run.resize(lambda run: factor(host, ranks, changes))

        def step(run: Any) -> None:
            if run.step % self.every == 0 and not run.done:
                refactor(factored(host).values())

        def finish() -> None:
            changes.undo()  # of a run that has not begun
            merge(host)

        run.on("forward", lambda run, batch: changes.forget())  # the run has begun for good: dense weights are freed
        run.on("step", step)
        run.changes.call(finish)


@torch.no_grad()
def refactor(layers: Any) -> None:
    """Balances the factors of layers in place."""
    for layer in layers:
        b, a = weight_refactorization(layer.b, layer.a)
        layer.b.copy_(b)
        layer.a.copy_(a)


METHOD = WeightRefactorization
