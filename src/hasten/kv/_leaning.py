"""What a passage's attention to those before it says of its keys and values elsewhere (Cache-Craft's scores)."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Leaning:
    """How much a passage leaned on those before it.

    Attributes:
        names: of the passages before it; bounds: where they stood, [J, 2].
        inter: attention of each token to each of them, float64 [n, J]; intra: of all tokens to the passage itself; both
            summed over heads and layers, of which the scores need no more.
    """

    names: list[bytes]
    bounds: list[tuple[int, int]]
    inter: Tensor
    intra: float = 0.0

    @classmethod
    def of(cls, bounds: Any, n: int, names: list[bytes] | None = None) -> "Leaning":
        bounds = [tuple(one) for one in (bounds.tolist() if isinstance(bounds, Tensor) else bounds)]
        return cls(names or [], bounds, torch.zeros(n, len(bounds), dtype=torch.float64))

    def add(self, weights: Tensor, first: int = 0) -> None:
        """One layer's attention of the tokens from `first` on, [heads, some, N], nothing where a token sees nothing."""
        summed = weights.double().sum(0)  # [some, N]
        rows = slice(first, first + len(summed))
        for j, (begin, end) in enumerate(self.bounds):
            self.inter[rows, j] += summed[:, begin:end].sum(1).to(self.inter.device)
        self.intra += float(summed[:, summed.shape[1] - len(self.inter) :].sum())

    def judge(self, places: list[int], before: int, alpha: float) -> tuple[float, float, float]:
        """CCI, beta' and CFO behind other passages, of which `places` says where those of S_old stand, -1 for gone."""
        n, sums = len(self.inter), self.inter.sum(0)  # [J]
        lengths = torch.tensor([end - begin for begin, end in self.bounds], dtype=torch.float64)
        a, b = float((sums / (n * lengths)).sum()), self.intra / n**2
        cci = 1 / (1 + math.exp(-a / b)) if b else 1.0
        kept = torch.tensor([place >= 0 for place in places], dtype=torch.bool)
        total = float(sums.sum())
        beta = float(sums[kept].sum()) / total if total else float(before == 0)
        order = torch.tensor(places)[kept]
        pairs = len(order) * (len(order) - 1) / 2
        swapped = int((order[:, None] > order).triu(1).sum())
        overlap = beta * (1 - swapped / pairs) if pairs else beta
        return cci, overlap, min(1.0, alpha * cci * (1 - overlap))

    def choose(self, share: float) -> Tensor:
        """That share of the tokens, those with most attention to other passages, the earlier of equals; bool [n]."""
        chosen = torch.zeros(len(self.inter), dtype=torch.bool)
        order = self.inter.sum(1).sort(descending=True, stable=True).indices
        chosen[order[: math.ceil(share * len(order))]] = True
        return chosen
