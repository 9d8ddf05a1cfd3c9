"""Two-dimensional bucketing: batches of examples alike in input and output length, with as many as the memory takes.

With input lengths x_n and output lengths y_n, example n belongs to the bucket of the input whose place in the inputs'
total S = sum x is that of all shorter ones, and in it to the part found likewise among the bucket's outputs,

    i = floor(B sum_{m: x_m < x_n} x_m / S),    j = floor(P sum_{m in i: y_m < y_n} y_m / sum_{m in i} y_m),

so that buckets hold equal totals (section 3.1; B = 30 and P = 2 in the authors' scripts), and equal lengths stay
together. A batch of bucket (i, j), padded to its longest x and y, holds as many examples as the budget V takes:

    b_ij = max(1, floor(V / (max x + c max y))),    V = fill b (max_n x_n + c max_n y_n)

where b is the loader's own batch size: with `fill` = 1, V is what that loader needs for its worst batch. Batches come
in random order, their members are drawn anew in each pass, and no example is lost. Lengths [N, 1] have no y.

Departures: b_ij follows from V, a sum of lengths, where the authors' tool tries batches until the GPU's memory is full.
They discard outputs of over 4 standard deviations' length; here none is. A bucket's examples are dealt out into batches
of equal size, b_ij at most, where a stream would leave a short last one. Their decoder's layers moved to the encoder
are a choice of architecture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.data._examples import Examples
from hasten.data._samplers import Buckets

CARD = Card(
    title="Training and Inference Efficiency of Encoder-Decoder Speech Models",
    paper="2503.05931",
    seams=("batch.select",),
    effects=("time", "memory"),
    lossless=False,
    claim="Canary-1B trains in half the wall time on the same GPUs, with batches 5x as large on average",
    claimed=2.0,
    identity="None: batches are made of examples alike in length, which random ones are not.",
    experiment=("spoken-digits(target=0.5)", "data/bucketing(buckets=8)"),
    when="Examples whose lengths differ, in batches padded to the longest: speech, translation, dialogues.",
    when_not="Text that is cut or packed into windows of one length; few examples, whose batches would repeat.",
    tune={"fill": (0.15, 1.0)},
)


def naive_bucketing(
    lengths: Tensor, buckets: int, parts: int, volume: float, output_cost: float
) -> tuple[Tensor, Tensor]:
    """Buckets and their batch sizes, example by example.

    Args:
        lengths: [N, d] whole numbers: inputs, and outputs if d is 2.
        buckets, parts: B and P. volume: V. output_cost: c.

    Returns:
        [N] int64 in 0..B P - 1, the bucket of each example; [B P] int64, the batch size of each, 0 for empty ones.
    """
    rows = [[int(x) for x in row] for row in lengths]
    n = len(rows)

    def place(value: int, values: list[int], count: int) -> int:
        total = sum(values)
        return count * sum(one for one in values if one < value) // total if total else 0

    inputs = [row[0] for row in rows]
    first = [place(row[0], inputs, buckets) for row in rows]
    found = []
    for k in range(n):
        outputs = [rows[m][1] for m in range(n) if first[m] == first[k]] if len(rows[k]) > 1 else []
        found.append(first[k] * parts + (place(rows[k][1], outputs, parts) if outputs else 0))
    sizes = []
    for bucket in range(buckets * parts):
        members = [rows[m] for m in range(n) if found[m] == bucket]
        longest = [max((row[d] for row in members), default=0) for d in range(2 if n and len(rows[0]) > 1 else 1)]
        cost = longest[0] + (output_cost * longest[1] if len(longest) > 1 else 0)
        sizes.append(max(1, int(volume // max(cost, 1e-9))) if members else 0)
    return torch.tensor(found, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64)


def bucketing(lengths: Tensor, buckets: int, parts: int, volume: float, output_cost: float) -> tuple[Tensor, Tensor]:
    """As `naive_bucketing`, by sorting."""
    inputs = lengths[:, 0].long()
    found = _places(inputs, torch.zeros_like(inputs), 1, buckets)
    outputs = lengths[:, 1].long() if lengths.shape[1] > 1 else torch.zeros_like(inputs)
    found = found * parts + _places(outputs, found, buckets, parts)
    longest = torch.zeros(2, buckets * parts, dtype=torch.int64)
    longest[0].scatter_reduce_(0, found, inputs, "amax")
    longest[1].scatter_reduce_(0, found, outputs, "amax")
    cost = longest[0].double() + output_cost * longest[1].double()
    sizes = (volume // cost.clamp(min=1e-9)).long().clamp(min=1)
    return found, sizes * (torch.bincount(found, minlength=buckets * parts) > 0)


def _places(values: Tensor, groups: Tensor, groups_in_all: int, count: int) -> Tensor:
    """floor(count x the sum of the smaller values of the same group / the group's sum), [N]."""
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    v, g = values[order], groups[order]
    before = v.cumsum(0) - v
    totals = torch.zeros(groups_in_all, dtype=torch.int64).index_add_(0, g, v)
    begins = totals.cumsum(0) - totals
    new = torch.ones(len(v), dtype=torch.bool)  # where another value or group begins
    new[1:] = (v[1:] != v[:-1]) | (g[1:] != g[:-1])
    smaller = (before - begins[g])[new][new.cumsum(0) - 1] if len(v) else before
    place = count * smaller // totals[g].clamp(min=1)
    return torch.empty_like(place).scatter_(0, order, place)


def padding(lengths: Tensor, batches: list[list[int]]) -> Tensor:
    """The share of what is computed that is padding, [d], when each batch is padded to its longest example."""
    real, padded = torch.zeros(lengths.shape[1]), torch.zeros(lengths.shape[1])
    for batch in batches:
        rows = lengths[batch].float()
        real += rows.sum(0)
        padded += rows.amax(0) * len(batch)
    return 1 - real / padded.clamp(min=1)


@dataclass(frozen=True)
class Bucketing(Method):
    """Batches by input and output length, each as large as one memory budget takes."""

    buckets: int = option(30, "ranges of input length", least=1, most=10_000)
    parts: int = option(2, "ranges of output length in each of them", least=1, most=1000)
    fill: float = option(
        1.0,
        "the budget, as a fraction of what the loader's batch takes at its worst; below 1: smaller batches",
        above=0,
    )
    output_cost: float = option(1.0, "what an output element takes, in input elements", least=0)

    def attach(self, run: Any) -> None:
        """Puts the batches in place of the loader's.

        Raises:
            UsageError: the loader's data has no lengths, or more than two of them an example.
        """
        examples = Examples(self.name, run.loader, run.device)
        lengths = examples.lengths()
        if lengths.shape[1] > 2:
            raise UsageError(
                f"{self.name} takes an input and an output length, and the examples hold {lengths.shape[1]} tensors: "
                "give the data set an attribute lengths, [examples, 2]"
            )
        volume = self.fill * examples.batch_size * self.cost(lengths.amax(0))
        found, sizes = bucketing(lengths, self.buckets, self.parts, volume, self.output_cost)
        sampler = Buckets(
            lengths,
            lambda lengths, generator: self.deal(found, sizes, generator),
            run.seed,
            run.rank,
            run.processes,
        )
        if not len(sampler):
            raise UsageError(f"{self.name} makes fewer batches than there are processes: give more data, or lower fill")
        one_pass = sampler.entries(torch.Generator().manual_seed(0))
        run.context.note(
            self.name,
            padding=[round(share, 4) for share in padding(lengths, one_pass).tolist()],
            examples_a_batch=round(len(lengths) / len(one_pass), 2),
        )
        run.replace_loader(examples.loader_over(sampler, batches=True))

    def cost(self, longest: Tensor) -> float:
        """What one example padded to `longest` [d] takes of the budget."""
        return float(longest[0]) + (self.output_cost * float(longest[1]) if len(longest) > 1 else 0.0)

    def deal(self, found: Tensor, sizes: Tensor, generator: torch.Generator) -> list[list[int]]:
        """A pass: every example once, in batches of one bucket of at most its size, in random order.

        Args:
            found: [N], the bucket of each example. sizes: [buckets], the batch sizes.
        """
        order = torch.randperm(len(found), generator=generator)
        order = order[found[order].argsort(stable=True)]
        made: list[list[int]] = []
        for members in order.split(torch.bincount(found, minlength=len(sizes)).tolist()):
            if len(members):
                count = -(-len(members) // int(sizes[found[members[0]]]))
                made += [part.tolist() for part in members.tensor_split(count)]
        return [made[place] for place in torch.randperm(len(made), generator=generator).tolist()]


METHOD = Bucketing
