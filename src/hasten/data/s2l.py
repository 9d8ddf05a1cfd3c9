"""S2L: cluster the examples by how a small model's loss on them falls, and take equally many from every cluster.

A proxy is trained on the data and L_i = (l_i^1, ..., l_i^T), example i's loss at T checkpoints, is its trajectory.
k-means finds clusters C_1, ..., C_K of the trajectories, sorted by size; with budget B (Algorithm 1)

    for k = 1 .. K:   R_k = floor((B - |S|) / (K - k + 1));   S <- S + C_k if |C_k| <= R_k, else R_k of C_k at random

so what small clusters leave over goes to the larger ones. Trajectories: [n, T]. As in the authors' code, clusters of
one or two examples come last and k-means makes 20 iterations, from K examples drawn at random.

Departures: start=spread, k-means++ (Arthur and Vassilvitskii 2007), is an addition: where most examples are alike most
centres begin among them, and k-means leaves them there. Budgets are not split over the data's sources first. An empty
cluster stays empty (the authors' faiss splits a large one). The proxy is trained with AdamW on the run's own loss, and
the time is the run's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.data import _proxies
from hasten.data._clusters import lloyd, spread

CARD = Card(
    title="SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models by Summarizing Training "
    "Trajectories of Small Models",
    paper="2403.07384",
    seams=("batch.select",),
    effects=("time", "steps"),
    lossless=False,
    claim="11% of MathInstruct serves Phi-2 as well as all of it; the proxy is 40 times smaller",
    claimed=None,
    identity="examples come in another order even where all of them are kept",
    needs=("proxy", "losses"),
    experiment=("redundant", "data/s2l(fraction=0.4, clusters=30, passes=3.0, lr=0.01, start=spread)"),
    tune={"fraction": (0.05, 0.8), "lr": (1e-4, 1e-1)},
    when="Much of the data says the same, and a model many times smaller learns enough to tell examples apart.",
    when_not="Little data, noisy labels (mislabelled examples form small clusters), or no smaller model of the task.",
)

TINY = 2  # clusters of so few examples are drawn from last


def naive_s2l(
    trajectories: Tensor, keys: Tensor, draws: Tensor | None, count: int, clusters: int, iterations: int
) -> Tensor:
    """The selection with loops over examples and clusters, in fp64.

    Args:
        trajectories: losses [n, T].
        keys: [n] random numbers; k-means begins at the examples with the least keys, and from a cluster those with
            the least keys are taken.
        draws: [clusters] random numbers in 0..1 for k-means++, by which k-means begins instead; None: it does not.
        count: budget B, at most n. clusters: K. iterations: of k-means.

    Returns:
        The chosen examples [count], ascending.
    """
    points = [[float(x) for x in row] for row in trajectories.double()]
    n, keyed = len(points), sorted(range(len(points)), key=lambda i: float(keys[i]))
    starts = keyed[:clusters]
    if draws is not None:
        starts = [min(n - 1, int(float(draws[0]) * n))]
        for draw in draws[1:].tolist():
            least = [min(sum((a - b) ** 2 for a, b in zip(x, points[i], strict=True)) for i in starts) for x in points]
            sums = [sum(least[: i + 1]) for i in range(n)]
            starts.append(next((i for i in range(n) if sums[i] > draw * sums[-1]), 0))
    centres = [list(points[i]) for i in starts]
    members: list[list[int]] = []
    for turn in range(iterations + 1):
        members = [[] for _ in centres]
        for i in range(n):
            distances = [sum((a - b) ** 2 for a, b in zip(points[i], centre, strict=True)) for centre in centres]
            members[distances.index(min(distances))].append(i)
        if turn < iterations:
            for k, mine in enumerate(members):
                if mine:
                    centres[k] = [sum(points[i][t] for i in mine) / len(mine) for t in range(len(points[0]))]
    chosen: list[int] = []
    real = sorted((mine for mine in members if len(mine) > TINY), key=len)
    for k, mine in enumerate(real):
        share = (count - len(chosen)) // (len(real) - k)
        chosen += [i for i in keyed if i in mine][:share]
    tiny = [i for i in keyed if any(i in mine for mine in members if len(mine) <= TINY)]
    return torch.tensor(sorted(chosen + tiny[: count - len(chosen)]))


def s2l(trajectories: Tensor, keys: Tensor, draws: Tensor | None, count: int, clusters: int, iterations: int) -> Tensor:
    """As `naive_s2l`, with products of matrices and one sort."""
    x = trajectories.double()
    n = len(x)
    starts = keys.argsort(stable=True)[:clusters] if draws is None else spread(x, draws)
    nearest = lloyd(x, x[starts], iterations)
    sizes = torch.bincount(nearest, minlength=clusters)
    shares, left = torch.zeros_like(sizes), count
    order = [k for k in sizes.argsort(stable=True).tolist() if sizes[k] > TINY]
    for place, k in enumerate(order):
        shares[k] = min(int(sizes[k]), left // (len(order) - place))
        left -= int(shares[k])
    by_key = keys.argsort(stable=True)
    grouped = by_key[nearest[by_key].argsort(stable=True)]  # cluster by cluster, each in the order of the keys
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(grouped)
    rank[grouped] = torch.arange(n, device=x.device) - starts[nearest[grouped]]
    taken = rank < shares[nearest]
    tiny = by_key[sizes[nearest[by_key]] <= TINY][:left]
    taken[tiny] = True
    return taken.nonzero()[:, 0]


@dataclass(frozen=True)
class S2L(Method):
    """Selection once, before the first step, by a proxy's losses."""

    fraction: float = option(0.11, "fraction of the examples that is kept", above=0, most=1)
    clusters: int = option(100, "clusters K of k-means", least=1, most=100_000)
    start: str = option("random", "where k-means begins: random examples, or k-means++", choices=("random", "spread"))
    checkpoints: int = option(8, "times T at which each example's loss is recorded", least=1, most=1000)
    passes: float = option(3.0, "passes over the data that the proxy is trained for", above=0)
    lr: float = option(1e-3, "peak learning rate of the proxy's AdamW", above=0)
    rows: int = option(64, "examples of a batch of the proxy", least=1)
    iterations: int = option(20, "iterations of k-means", least=1, most=1000)

    every = 0

    def choose(self, examples: Any, run: Any) -> Tensor:
        """The chosen examples, ascending; see `hasten.data.base.Selection`.

        Raises:
            UsageError: fewer examples would be kept than one, or a loss that is not finite.
        """
        n = len(examples)
        count = round(self.fraction * n)
        if count < 1:
            raise UsageError(f"{self.name}: {self.fraction:g} of {n} examples is none: raise fraction")
        if count == n:
            return torch.arange(n)
        generator = run.generator(self.name)
        examples = _proxies.held(examples)
        found: list[Tensor] = []
        _proxies.train_proxy(
            examples, run, run.context.proxy,
            passes=self.passes, rows=self.rows, lr=self.lr, generator=generator, pauses=self.checkpoints,
            at_pause=lambda model: found.append(_proxies.losses_of(examples, run, model, 4 * self.rows)),
        )  # fmt: skip
        keys = torch.rand(n, generator=generator, dtype=torch.float64)
        clusters = min(self.clusters, n)
        draws = torch.rand(clusters, generator=generator, dtype=torch.float64) if self.start == "spread" else None
        return s2l(torch.stack(found, 1), keys, draws, count, clusters, self.iterations)


METHOD = S2L
