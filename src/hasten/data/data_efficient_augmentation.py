"""Data-efficient augmentation: augment strongly only a small subset whose gradients stand for those of all the data.

Every R passes, for each class c, a subset S_c of the examples V_c is chosen greedily by facility location on last-layer
gradients g_i = p_i - y_i (softmax output less one-hot label), and weighted by how many examples it stands for:

    S_c = argmax_{|S| <= k_c} sum_{i in V_c} max_{j in S} s_ij,   s_ij = max_{a,b} d_ab - d_ij,   d_ij = |g_i - g_j|
    gamma_j = |{i in V_c : j = argmax_{j' in S} s_ij'}|

A pass then has all examples as they are and beside them those of S augmented (mode=full), or S as it is and augmented
(mode=coreset). g: [n, classes]. As in the authors' code classes share the subset equally, smaller ones are taken whole.

Departures: weights gamma are followed by drawing examples that often (`weights`; mode=coreset), not by weighting the
loss, which stays the person's. Gradients are of the examples without augmentation. Similarity has no scale, which the
greedy search does not see.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.data import _augment, _proxies
from hasten.data._examples import Examples
from hasten.data._samplers import Chosen

CARD = Card(
    title="Data-Efficient Augmentation for Training Neural Networks",
    paper="2210.08363",
    seams=("batch.select",),
    effects=("time", "steps"),
    lossless=False,
    claim="against augmenting all data 6.3x faster on CIFAR10, 2.2x on SVHN, up to 3.3x on TinyImageNet and ImageNet",
    claimed=6.3,
    identity="the data set has plain and augmented examples side by side, in another order, whatever the options",
    needs=("losses",),
    experiment=("augmented-digits", "data/data_efficient_augmentation(fraction=0.3, every=2)"),
    tune={"fraction": (0.02, 0.8)},
    when="Augmentation costs several times a training step, on data with class labels.",
    when_not="Cheap augmentation, or one that runs beside training on idle cores; data without classes.",
)


def naive_data_efficient_augmentation(gradients: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The subset and its weights with loops over classes, candidates and examples, in fp64.

    Args:
        gradients: p - y [n, d]. labels: [n]. count: examples in all, at most n.

    Returns:
        Examples [count], class by class in the order of the search, and gamma of each [count].
    """
    chosen: list[int] = []
    weights: list[int] = []
    sizes = shares(torch.bincount(labels).tolist(), count)
    for kind, size in enumerate(sizes):
        if not size:
            continue
        members = [i for i in range(len(labels)) if int(labels[i]) == kind]
        g = gradients[members].double()
        distance = [[float((a - b).norm()) for b in g] for a in g]
        largest = max(max(row) for row in distance)
        best = [0.0] * len(members)
        picked: list[int] = []
        for _ in range(size):
            gains = []
            for j in range(len(members)):
                gain = sum(max(0.0, largest - distance[i][j] - best[i]) for i in range(len(members)))
                gains.append(-1.0 if j in picked else round(gain, 9))
            picked.append(gains.index(max(gains)))
            best = [max(best[i], largest - distance[i][picked[-1]]) for i in range(len(members))]
        near = [min(picked, key=lambda j: (round(distance[i][j], 9), picked.index(j))) for i in range(len(members))]
        chosen += [members[j] for j in picked]
        weights += [near.count(j) for j in picked]
    return torch.tensor(chosen), torch.tensor(weights)


def data_efficient_augmentation(gradients: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `naive_data_efficient_augmentation`, with one matrix of distances a class and lazy evaluation of gains."""
    chosen, weights = [], []
    for kind, size in enumerate(shares(torch.bincount(labels).tolist(), count)):
        members = (labels == kind).nonzero()[:, 0]
        if not size:
            continue
        g = gradients[members].double()
        distance = torch.cdist(g, g, compute_mode="donot_use_mm_for_euclid_dist")
        similar = distance.max() - distance
        picked = torch.tensor(_lazy_greedy(similar, size), device=members.device)
        near = (distance[:, picked] * 1e9).round().argmin(1)
        chosen.append(members[picked])
        weights.append(torch.bincount(near, minlength=size))
    return torch.cat(chosen), torch.cat(weights)


def _lazy_greedy(similar: Tensor, count: int) -> list[int]:
    """Facility location: a candidate is looked at again only when its last gain is the largest (Minoux 1978)."""
    best = torch.zeros_like(similar[0])
    gains = _rounded(similar.sum(0))
    picked: list[int] = []
    for _ in range(count):
        while True:
            j = int(gains.argmax())
            now = _rounded((similar[j] - best).clamp_min(0).sum())
            if now >= gains[j]:
                break
            gains[j] = now
        picked.append(j)
        gains[j] = -1.0
        best = torch.maximum(best, similar[j])
    return picked


def _rounded(gain: Tensor) -> Tensor:
    return (gain * 1e9).round() / 1e9  # so that rounding does not decide between equal gains


def shares(sizes: list[int], count: int) -> list[int]:
    """How many of each class: equally many, small classes whole; what is left over goes to the first ones."""
    found, left = [0] * len(sizes), count
    order = sorted(range(len(sizes)), key=lambda k: (sizes[k], -k))
    for place, k in enumerate(order):
        found[k] = min(sizes[k], left // (len(order) - place))
        left -= found[k]
    return found


@dataclass(frozen=True)
class DataEfficientAugmentation(Method):
    """Strong augmentation for a subset that follows the model, instead of for everything."""

    fraction: float = option(0.3, "fraction of the examples that is chosen", above=0, most=1)
    every: int = option(5, "passes R between two choices", least=1, most=10_000)
    mode: str = option(
        "full", "what is trained on beside augmented examples: all, or those", choices=("full", "coreset")
    )
    weights: bool = option(False, "draw the examples as often as they stand for others (mode=coreset)")
    augmentation: str = option(
        "dataset",
        "the data set's own `augment(example, generator)`, or one for images [C, H, W]",
        choices=("dataset", *_augment.NAMES),
    )
    rows: int = option(256, "examples of a batch when gradients are looked at", least=1)

    def problems(self) -> list[str]:
        return (
            ["weights=true needs mode=coreset: with mode=full every example is there"]
            if (self.weights and self.mode == "full")
            else []
        )

    def attach(self, run: Any) -> None:
        """Puts plain and augmented examples in the place of the loader's.

        A data set's `plain(index)`, where it has one, gives an example as it is; else indexing does.

        Raises:
            UsageError: no data set by index, none with `augment` where that is asked for, or no class labels.
        """
        given = Examples(self.name, run.loader, run.device)
        augment = _augment.find(given.dataset, self.augmentation, self.name)
        data = Doubled(given.dataset, augment, run.seed)
        examples = DoubledExamples(self.name, run.loader, run.device, data)
        count = max(1, round(self.fraction * len(given)))
        sampler = Chosen(2 * len(given), run.seed, run.rank, run.processes)
        state = run.state.setdefault(self.name, {})
        plain = PlainExamples(examples, len(given))
        labels = _proxies.labels_of(plain, self.name, self.rows)

        def begin(run: Any) -> None:
            state["turn"] = run.stream.epoch
            data.turn.fill_(run.stream.epoch)
            if "entries" not in state or run.stream.epoch % self.every == 0:
                with run.evaluation() as model:
                    state["entries"] = self.entries(plain, labels, count, run, model)
                sampler.choose(state["entries"])

        def restore(run: Any, _: Any) -> None:
            if "entries" in state:
                data.turn.fill_(state["turn"])
                sampler.choose(state["entries"])

        run.replace_loader(examples.loader_over(sampler))
        run.on("pass", begin)
        run.on("restore", restore)

    def entries(self, plain: Any, labels: Tensor, count: int, run: Any, model: Any) -> Tensor:
        """What the passes to come are made of: i < n is example i, n + i its augmented form; [entries] int64."""
        n = len(labels)
        logits = _proxies.outputs(model, plain.batches(self.rows), run.losses, "logits")
        gradients = logits.softmax(1) - torch.nn.functional.one_hot(labels, logits.shape[1])
        chosen, gamma = data_efficient_augmentation(gradients, labels, count)
        if self.mode == "full":
            return torch.cat([torch.arange(n), n + chosen])
        if self.weights:
            draws = torch.multinomial(
                gamma.double().clamp_min(1), len(chosen), replacement=True, generator=run.generator(self.name)
            )
            chosen = chosen[draws]
        return torch.cat([chosen, n + chosen])


class Doubled(Dataset):
    """A data set's n examples as they are, then each once more, augmented.

    The random numbers of an augmentation follow from the seed, the pass (`turn`) and the example alone.
    """

    def __init__(self, data: Any, augment: Any, seed: int) -> None:
        self.data, self.augment, self.seed = data, augment, seed
        self.turn = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it too
        self.plain = getattr(data, "plain", data.__getitem__)

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, index: int) -> Any:
        n = len(self.data)
        if index < n:
            return self.plain(index)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.turn)) * 1_000_003 % 2**62 + index)
        return self.augment(self.plain(index - n), generator)


class DoubledExamples(Examples):
    """The examples of another data set than the loader's."""

    def __init__(self, name: str, loader: Any, device: torch.device, data: Doubled) -> None:
        super().__init__(name, loader, device)
        self._data = data

    @property
    def dataset(self) -> Any:
        return self._data


class PlainExamples:
    """The first n of doubled examples."""

    def __init__(self, examples: Examples, count: int) -> None:
        self._examples, self._count = examples, count

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Any]:
        return self._examples.batches(size, range(self._count))


METHOD = DataEfficientAugmentation
