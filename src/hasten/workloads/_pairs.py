"""Correct texts beside faulty variants of them: data, training loss and quality of the workloads that have both."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads.base import Metric, Workload, warm_cosine

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Pair:
    """A text and one with a fault, as ids; the first `given` ids are a prompt, which neither is trained on."""

    tokens: list[int]
    variant: list[int]
    given: int = 1


class Pairs(torch.utils.data.Dataset):
    """Examples {input_ids, variant_ids, labels}, each [length] int64.

    A text that is shorter is padded with 0; labels are the ids that are to be predicted, and -100 elsewhere.
    """

    def __init__(self, pairs: list[Pair], length: int) -> None:
        self.pairs, self.length = pairs, length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        pair = self.pairs[place]
        ids, variant = (_padded(one, self.length, 0) for one in (pair.tokens, pair.variant))
        labels = _padded([IGNORED] * pair.given + pair.tokens[pair.given :], self.length, IGNORED)
        return {"input_ids": ids, "variant_ids": variant, "labels": labels}


def _padded(ids: list[int], length: int, filler: int) -> torch.Tensor:
    return torch.tensor(ids + [filler] * (length - len(ids)))


@dataclasses.dataclass(frozen=True)
class PairWorkload(Workload):
    """Base: a subclass gives `pairs`, `build` and the target.

    Quality of a held-out pair is log(1 + P(variant) / P(text)) at the place where the two part: 0 for a model that is
    sure of the right token, 0.69 for one that can't tell.
    """

    task: str = option("train", "what is done", choices=("train",))
    length: int = option(160, "tokens of a text at most", least=16, most=1024)
    rows: int = option(8, "texts of a training batch", least=1, most=1024)
    texts: int = option(1500, "texts for training", least=16, most=1_000_000)
    examples: int = option(256, "held-out pairs that quality is measured on", least=8, most=65536)

    steps: int = option(150, "steps of the baseline's schedule", least=10)
    lr: float = option(1e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.1, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)

    tunable = {"lr": (5e-5, 1e-2), "warmup": (0.02, 0.5)}

    @property
    def metric(self) -> Metric:
        return Metric("loss of telling right from wrong", "lower", "nat")

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def pairs(self, held_out: bool, count: int) -> list[Pair]:
        """The first `count` pairs of a part; fewer where there are no more."""
        raise NotImplementedError

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        found = self.pairs(False, self.texts)
        if len(found) < self.rows:
            raise UsageError(f"{len(found)} texts of at most {self.length} tokens were found: raise length, lower rows")
        device = self.device()
        return torch.utils.data.DataLoader(
            Pairs(found, self.length),
            batch_size=self.rows,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=lambda examples: {
                key: torch.stack([one[key] for one in examples]).to(device) for key in examples[0]
            },
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, self.warmup)

    def losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"][:, 1:]
        each = self._each(model, batch["input_ids"], labels)
        return each.sum(1) / (labels != IGNORED).sum(1)

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"][:, 1:]
        return self._each(model, batch["input_ids"], labels).sum() / (labels != IGNORED).sum()

    def _each(self, model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1].float()
        return F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        found = []
        pairs = self.pairs(True, self.examples)
        for at in range(0, len(pairs), 32):
            part = Pairs(pairs[at : at + 32], self.length)
            rows: list[Any] = [part[place] for place in range(len(part))]
            ids, variant = (
                torch.stack([row[key] for row in rows]).to(self.device()) for key in rows[0] if key != "labels"
            )
            place = (ids != variant).int().argmax(1)  # the first difference
            logits = model(input_ids=ids).logits.float()
            row = torch.arange(len(ids), device=ids.device)
            scores = logits[row, place - 1]
            found.append(F.softplus(scores[row, variant[row, place]] - scores[row, ids[row, place]]))
        return torch.cat(found).double().cpu().numpy()
