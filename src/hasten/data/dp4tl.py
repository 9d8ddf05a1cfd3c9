"""DP4TL: pre-train only on those classes of the source data that the data of the task to come falls into.

A surrogate, a small model trained on the source data, looks at the downstream examples x_1, ..., x_m. A source class
i = 1 .. C counts for as much as falls into it, and the classes that count most are kept with all their examples:

    s_i = sum_j 1[argmax_c f(x_j)_c = i]                                      (label mapping)
    s_i = sum_j 1[argmin_k |h(x_j) - h(z_k)| is an example of cluster i]      (feature mapping)

f: the surrogate's logits; h: its features; z_k: the source examples, whose clusters by k-means of h take the place of
classes where there are no labels. Scores [m, C].

Departures: ties, such as those of classes that nothing falls into, go to the class of the higher mean score (log
probability, or minus the least distance). The surrogate is the run's proxy, trained first, on the clock (with passes=0
it is taken as it is). h is what its last linear layer reads. The paper's surrogate is a ResNet-18.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.data import _proxies
from hasten.data._clusters import lloyd

CARD = Card(
    title="Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning",
    paper="2310.08782",
    seams=("batch.select",),
    effects=("time", "steps"),
    lossless=False,
    claim="40 to 80% of ImageNet's classes pruned without loss downstream: pre-training 2 to 5 times as fast",
    claimed=5.0,
    identity="examples come in another order even where all classes are kept",
    needs=("downstream", "losses", "proxy"),
    experiment=("transfer", "data/dp4tl(keep=0.25, passes=1.0, lr=0.01)"),
    tune={"keep": (0.05, 0.8)},
    when="Pre-training on many classes for one known task, to which only some of them are related.",
    when_not="A model for tasks that are not known yet; few classes; downstream data unlike all of the source.",
)


def naive_dp4tl(scores: Tensor, keep: int) -> Tensor:
    """The kept classes with loops over downstream examples and classes.

    Args:
        scores: of each downstream example for each source class [m, C], the highest is where it falls.
        keep: how many classes, at most C.

    Returns:
        The classes [keep], ascending.
    """
    m, count = scores.shape
    votes = [0] * count
    for row in scores.double().tolist():
        votes[row.index(max(row))] += 1
    means = [sum(float(scores[j, i].double()) for j in range(m)) / m for i in range(count)]
    order = sorted(range(count), key=lambda i: (-votes[i], -means[i], i))
    return torch.tensor(sorted(order[:keep]))


def dp4tl(scores: Tensor, keep: int) -> Tensor:
    """As `naive_dp4tl`, with one count and two stable sorts."""
    votes = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    by_mean = scores.double().mean(0).argsort(descending=True, stable=True)
    order = by_mean[votes[by_mean].argsort(descending=True, stable=True)]
    return order[:keep].sort().values


def nearness(target: Tensor, source: Tensor, clusters: Tensor, count: int) -> Tensor:
    """Scores of feature mapping: minus the distance to the nearest example of each cluster, [m, count].

    Args:
        target, source: features [m, d] and [n, d]. clusters: of each source example [n], below `count`.
    """
    rows = []
    for part in target.split(256):
        least = torch.full((len(part), count), torch.inf, dtype=target.dtype, device=target.device)
        distances = torch.cdist(part, source)
        rows.append(-least.scatter_reduce_(1, clusters.expand(len(part), -1), distances, "amin"))
    found = torch.cat(rows)
    return found.where(found.isfinite(), torch.finfo(found.dtype).min / 4)  # an empty cluster is far from all


@dataclass(frozen=True)
class DP4TL(Method):
    """Selection once, before the first step: all examples of the classes that matter to the task to come."""

    keep: float = option(0.4, "fraction of the classes (or clusters) that is kept", above=0, most=1)
    mapping: str = option("label", "by classes, or by features where there are none", choices=("label", "feature"))
    clusters: int = option(2000, "clusters of k-means (mapping=feature)", least=2)
    iterations: int = option(20, "iterations of k-means (mapping=feature)", least=1, most=1000)
    passes: float = option(3.0, "passes over the data that the surrogate is trained for; 0: it knows them", least=0)
    lr: float = option(1e-3, "peak learning rate of the surrogate's AdamW", above=0)
    rows: int = option(64, "examples of a batch of the surrogate", least=1)

    every = 0

    def choose(self, examples: Any, run: Any) -> Tensor:
        """The examples of the kept classes, ascending; see `hasten.data.base.Selection`.

        Raises:
            UsageError: there is no downstream batch, or the classes can't be told.
        """
        generator, data = run.generator(self.name), _proxies.held(examples)
        labels = _proxies.labels_of(data, self.name) if self.mapping == "label" else None
        surrogate = run.context.proxy
        if self.passes:
            surrogate = _proxies.train_proxy(
                data, run, surrogate, passes=self.passes, rows=self.rows, lr=self.lr, generator=generator
            )
        what = "logits" if labels is not None else "features"
        target = _proxies.outputs(surrogate, run.context.downstream, run.losses, what)
        if labels is not None:
            classes = int(labels.max()) + 1
            if target.shape[1] < classes:
                raise UsageError(
                    f"{self.name}: the surrogate knows {target.shape[1]} classes and the examples are of {classes}"
                )
            scores = target.log_softmax(1)[:, : labels.max() + 1]
        else:
            source = _proxies.outputs(surrogate, data.batches(4 * self.rows), run.losses, what)
            first = torch.randperm(len(source), generator=generator)[: self.clusters]
            labels = lloyd(source, source[first], self.iterations)
            scores = nearness(target, source, labels, len(first))
        present = labels.unique()
        kept = present[dp4tl(scores[:, present], max(1, round(self.keep * len(present))))]
        run.context.note(self.name, classes=kept.tolist())
        return torch.isin(labels, kept).nonzero()[:, 0]


METHOD = DP4TL
