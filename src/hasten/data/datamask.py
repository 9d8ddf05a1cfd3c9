"""DataMask: learn by policy gradient how likely a good and varied subset holds each example, and keep the likeliest.

A mask M of S examples is drawn without replacement with P(M_i|L) = softmax(L)_i and is worth

    f(M) = lambda mean_{i in M} q_i + (1 - lambda) f_div(M)
    f_div = -mean_{i != j in M} <e_i, e_j>  (pairwise)    or    mean_i max_{j in M} <e_i, e_j>  (facility location)

with quality q [n] in 0..1 and unit vectors e [n, d]. Of G masks the advantage is A_j = (f(M_j) - mean f) / std f, and

    L <- L + eta grad,    grad = 1/G sum_j A_j grad ln P(M_j|L) = 1/G sum_j A_j M_j      (advantages sum to zero)

As in the paper the worst examples by quality are left out, L starts at ln q, a step draws from and updates a random
part of the examples, and very many examples are taken in blocks. A greedy search (`greedy`) is there to compare with.

Departures: the paper gives no eta and no number of steps; those here were set on random data. The subset is the S
likeliest examples, not one more draw. ln P is taken as sum_{i in M} ln softmax(L)_i, as if draws were independent.
Quality and embeddings: see the options; the paper has three classifiers and a text encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.data import _proxies

CARD = Card(
    title="Joint Selection for Large-Scale Pre-Training Data via Policy Gradient-based Mask Learning",
    paper="2512.24265",
    seams=("batch.select",),
    effects=("time", "steps", "quality"),
    lossless=False,
    claim="98.9% less selection time than greedy; 10% of FineWeb: +3.2% on 12 tasks (1.5B dense), +1.9% (7B MoE)",
    claimed=None,
    identity="examples come in another order even where all of them are kept",
    needs=("losses",),
    experiment=("redundant", "data/datamask(fraction=0.4, prune=0.0, balance=0.0, steps=300, groups=64)"),
    tune={"fraction": (0.05, 0.8), "balance": (0.05, 0.9)},
    when="Much more data than steps, with a score of quality for each example, and many near-duplicates.",
    when_not="Data that training goes through many times; embeddings that do not tell examples apart.",
)


def naive_datamask(
    embeddings: Tensor, quality: Tensor, masks: Tensor, balance: float, diversity: str
) -> tuple[Tensor, Tensor]:
    """The policy gradient of a group of masks, with loops over masks and pairs, in fp64.

    Args:
        embeddings: unit vectors [n, d]. quality: [n].
        masks: [G, S] int64, the examples of each mask, S at least 2.
        balance: lambda. diversity: pairwise or facility.

    Returns:
        The gradient with respect to the logits [n], and f of each mask [G].
    """
    e, q, n = embeddings.double(), quality.double(), len(quality)
    worths = []
    for mask in masks.tolist():
        if diversity == "pairwise":
            pairs = [float(e[i] @ e[j]) for i in mask for j in mask if i != j]
            spread = -sum(pairs) / len(pairs)
        else:
            spread = sum(max(float(e[i] @ e[j]) for j in mask) for i in range(n)) / n
        worths.append(balance * sum(float(q[i]) for i in mask) / len(mask) + (1 - balance) * spread)
    mean = sum(worths) / len(worths)
    deviation = (sum((f - mean) ** 2 for f in worths) / len(worths)) ** 0.5
    gradient = torch.zeros(n, dtype=torch.float64)
    for mask, f in zip(masks.tolist(), worths, strict=True):
        for i in mask:
            gradient[i] += (f - mean) / (deviation + SMALL) / len(worths)
    return gradient, torch.tensor(worths, dtype=torch.float64)


def datamask(
    embeddings: Tensor, quality: Tensor, masks: Tensor, balance: float, diversity: str
) -> tuple[Tensor, Tensor]:
    """As `naive_datamask`; mean similarity follows from the sum of a mask's vectors: (|sum e|^2 - S) / (S (S - 1))."""
    groups, size = masks.shape
    e, q = embeddings.float(), quality.float()
    if diversity == "pairwise":
        chosen = torch.zeros(groups, len(q), device=e.device).scatter_(1, masks, 1.0)
        total = (chosen @ e).double().square().sum(1) - chosen.double() @ e.double().square().sum(1)
        spread = -total / (size * (size - 1))
    else:
        similar = e @ e.T
        spread = torch.stack([similar[mask].amax(0).mean() for mask in masks]).double()
    worth = balance * q.double()[masks].mean(1) + (1 - balance) * spread
    advantage = (worth - worth.mean()) / (worth.std(correction=0) + SMALL)
    gradient = torch.zeros(len(q), dtype=torch.float64, device=e.device)
    gradient.index_add_(0, masks.flatten(), (advantage / groups).repeat_interleave(size))
    return gradient, worth


SMALL = 1e-12


def objective(embeddings: Tensor, quality: Tensor, chosen: Tensor, balance: float, diversity: str) -> float:
    """f of one subset, which `learn` and `greedy` maximise; `chosen`: indices [S]."""
    return float(datamask(embeddings, quality, chosen[None], balance, diversity)[1])


def learn(
    embeddings: Tensor,
    quality: Tensor,
    count: int,
    *,
    balance: float,
    diversity: str,
    steps: int,
    groups: int,
    eta: float,
    part: float,
    generator: torch.Generator,
) -> Tensor:
    """The `count` examples that are likeliest after `steps` steps, ascending.

    Args:
        embeddings: unit vectors [n, d]. quality: [n] in 0..1, on the same device. part: fraction of the examples that
            a step draws from and updates.
    """
    n, device = len(quality), quality.device
    logits = (quality.double() + 0.01).log()
    at_once = min(n, max(round(part * n), -(-2 * n // count)))  # so many that a mask has two examples
    size = max(2, min(at_once, round(count * at_once / n)))
    for _ in range(steps):
        mine = torch.randperm(n, generator=generator)[:at_once].to(device)
        uniform = torch.rand(groups, at_once, generator=generator).clamp_min_(1e-30).to(device)
        masks = (logits[mine].float() - (-uniform.log()).log()).topk(size, dim=1, sorted=False).indices
        gradient, _ = datamask(embeddings[mine], quality[mine], masks, balance, diversity)
        logits[mine] += eta * gradient
    return logits.topk(count).indices.sort().values


def picks(
    embeddings: Tensor, quality: Tensor, count: int, *, balance: float, diversity: str, lazy: bool = False
) -> Iterator[int]:
    """The examples that a greedy search takes, in order: each time the one that helps f most.

    With `lazy` a candidate of facility location is looked at again only when its last gain is the largest (Minoux
    1978): the same order, usually much sooner.
    """
    e, score, n = embeddings.float(), balance * quality.float() / count, len(quality)
    taken = torch.zeros(n, dtype=torch.bool, device=e.device)
    total, nearest = torch.zeros_like(e[0]), torch.full((n,), -1.0, device=e.device)
    similar = e @ e.T if diversity == "facility" else e[:0]
    gains = torch.full((n,), torch.inf, device=e.device)
    for _ in range(count):
        if diversity == "pairwise":
            gains = score - 2 * (1 - balance) / (count * max(1, count - 1)) * (e @ total)
        elif not lazy:
            gains = torch.cat([(rows - nearest).clamp_min_(0).mean(1) for rows in similar.split(1024)])
            gains = score + (1 - balance) * gains
        best = int(gains.masked_fill(taken, -torch.inf).argmax())
        while diversity == "facility" and lazy:
            now = score[best] + (1 - balance) * (similar[best] - nearest).clamp_min(0).mean()
            fresh = bool(now >= gains[best])
            gains[best] = now
            if fresh:
                break
            best = int(gains.masked_fill(taken, -torch.inf).argmax())
        taken[best] = True
        if diversity == "pairwise":
            total = total + e[best]
        else:
            nearest = torch.maximum(nearest, similar[best])
        yield best


def greedy(
    embeddings: Tensor, quality: Tensor, count: int, *, balance: float, diversity: str, lazy: bool = False
) -> Tensor:
    """The subset of a greedy search (`picks`), ascending: what the paper compares its time with."""
    found = picks(embeddings, quality, count, balance=balance, diversity=diversity, lazy=lazy)
    return torch.tensor(sorted(found))


@dataclass(frozen=True)
class DataMask(Method):
    """Selection once, before the first step, by quality and variety."""

    fraction: float = option(0.1, "fraction of the examples that is kept", above=0, most=1)
    balance: float = option(0.3, "weight lambda of quality; the paper advises 0.1 to 0.5", least=0, most=1)
    diversity: str = option("pairwise", "how variety is measured", choices=("pairwise", "facility"))
    prune: float = option(0.4, "fraction of the examples, those of least quality, left out first", least=0, below=1)
    steps: int = option(500, "steps of the policy gradient", least=1, most=1_000_000)
    groups: int = option(128, "masks G of a step", least=2, most=4096)
    eta: float = option(4.0, "learning rate of the logits", above=0)
    part: float = option(0.1, "fraction of the examples that a step draws from and updates", above=0, most=1)
    block: int = option(1_000_000, "examples that are selected from together; more are split at random", least=4)
    quality: str = option(
        "auto",
        "score of an example: the dataset's `quality`, or minus the model's loss before training, or none; auto: the "
        "dataset's where it has one, else none",
        choices=("auto", "dataset", "loss", "none"),
    )
    grams: int = option(2, "length of the token runs that an embedding counts, where the dataset has none", least=1)
    width: int = option(128, "length of such an embedding", least=8, most=4096)

    every = 0

    def problems(self) -> list[str]:
        if self.fraction < 1 and self.fraction > 1 - self.prune:
            return [f"prune={self.prune:g} leaves fewer examples than fraction={self.fraction:g}: lower prune"]
        return []

    def choose(self, examples: Any, run: Any) -> Tensor:
        """The chosen examples, ascending; see `hasten.data.base.Selection`.

        Raises:
            UsageError: fewer than two examples would be kept, or the dataset's quality or embeddings do not fit.
        """
        n = len(examples)
        count = round(self.fraction * n)
        if count == n:
            return torch.arange(n)
        if count < 2:
            raise UsageError(f"{self.name}: {self.fraction:g} of {n} examples is fewer than two: raise fraction")
        quality = self.scores(examples, run)
        generator = run.generator(self.name)
        vectors = embeddings_of(examples, self.name, self.width, self.grams)
        order = torch.randperm(n, generator=generator)
        blocks = -(-n // self.block)
        chosen = []
        for k in range(blocks):
            mine = order[k * n // blocks : (k + 1) * n // blocks]
            budget = (k + 1) * count // blocks - k * count // blocks
            kept = mine[quality[mine].topk(max(budget, round((1 - self.prune) * len(mine)))).indices]
            best = learn(
                vectors[kept].to(run.device), quality[kept].to(run.device), budget, generator=generator,
                balance=self.balance, diversity=self.diversity, steps=self.steps, groups=self.groups, eta=self.eta,
                part=self.part,
            )  # fmt: skip
            chosen.append(kept[best.cpu()])
        return torch.cat(chosen).sort().values

    def scores(self, examples: Any, run: Any) -> Tensor:
        """Quality of each example in 0..1, [n] fp32; a half where there is none.

        Raises:
            UsageError: the dataset has no `quality` of one number an example.
        """
        n, given = len(examples), getattr(examples.dataset, "quality", None)
        if self.quality == "loss":
            found = -_proxies.losses_of(examples, run, run.model, 256)
        elif self.quality == "none" or (self.quality == "auto" and given is None):
            return torch.full((n,), 0.5)
        else:
            found = _attribute(given, n, 1, "quality", self.name)
        low, high = found.min(), found.max()
        return (found - low) / (high - low) if high > low else torch.full((n,), 0.5)


def _attribute(given: Any, n: int, dims: int, what: str, name: str) -> Tensor:
    found = torch.as_tensor(given).float().cpu() if given is not None else None
    if found is None or found.dim() != dims or len(found) != n or not bool(found.isfinite().all()):
        shape = "[examples]" if dims == 1 else "[examples, width]"
        raise UsageError(f"{name}: the dataset's `{what}` must be finite numbers {shape} for its {n} examples")
    return found


def embeddings_of(examples: Any, name: str, width: int, grams: int) -> Tensor:
    """A unit vector for each example, [n, d] fp32: the dataset's `embeddings`, else made of the examples' inputs.

    Tokens become counts of runs of `grams` tokens, each hashed to one of `width` places. Real inputs become random
    Fourier features, `width` in all (Rahimi and Recht 2007): products of two are near exp(-|x - y|^2 / 2 s^2) with s a
    quarter of the median distance, so that near-duplicates are alike and others hardly. The first tensor of a batch (or
    `input_ids`) is the input.
    """
    given = getattr(examples.dataset, "embeddings", None)
    if given is not None:
        return _unit(_attribute(given, len(examples), 2, "embeddings", name))
    rows = []
    for batch in examples.batches(256):
        part = _inputs(batch, name)
        if part.is_floating_point():
            rows.append(part.flatten(1).float())
        else:
            runs = part.unfold(1, min(grams, part.shape[1]), 1)  # [batch, runs, grams]
            code = torch.zeros_like(runs[..., 0])
            for k in range(runs.shape[-1]):
                code = (code * 1_000_003 + runs[..., k] + 1) % 2_147_483_647
            rows.append(torch.zeros(len(part), width).scatter_add_(1, code % width, torch.ones(code.shape)))
    found = torch.cat(rows)
    return _unit(_fourier(found, width) if part.is_floating_point() else found)


def _fourier(x: Tensor, width: int) -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(x), (2, 512), generator=seeded)
    scale = (x[pairs[0]] - x[pairs[1]]).norm(dim=1).median().clamp_min(1e-12) / 4
    angles = (x / scale) @ torch.randn(x.shape[1], (width + 1) // 2, generator=seeded)
    return torch.cat([angles.cos(), angles.sin()], 1)


def _inputs(batch: Any, name: str) -> Tensor:
    if isinstance(batch, dict):
        found = batch.get("input_ids", batch.get("pixel_values", next(iter(batch.values()), None)))
    else:
        found = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise UsageError(f"{name}: the examples are no tensors to compare: give the dataset `embeddings`")
    return found.detach().cpu()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


METHOD = DataMask
