"""Recycled Attention: the tokens that one step attends to most are all that the next steps read (arXiv 2411.05787).

Every S-th step reads the whole cache and remembers, for every key head, the K tokens with the most attention. The steps
between read these K, each new token in the place of the least attended one.

    full step:      A = softmax(q K^T / sqrt(d)),  C_r = TopK_k(max over the heads of a group of A[k], K)
    recycled step:  C_r = C_r + {t} - {the last of C_r}

With a threshold s the schedule follows the text: every `check` steps a layer's query is compared with that of its last
full step, and the step is a full one if their cosine is below s (section 3.3: check 5, s 0.8).

Departures: the paper's choice for the heads of a group is not spelled out in what we could read; the maximum is used.
Which token is dropped follows the full step's attention alone. Rows of a batch decide for themselves with a threshold.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.attention._reading import Chosen, Look, Reading
from hasten.core.cards import Card
from hasten.core.options import option

CARD = Card(
    title="Recycled Attention: Efficient inference for long-context language models",
    paper="2411.05787",
    seams=("cache.read", "cache.keep"),
    effects=("time", "quality"),
    lossless=False,
    claim="1.35x faster generation at 32K tokens (1.27 s for 1.71 s, Llama-3.1-8B, K=4096, S=50), RULER 63 for 90",
    claimed=1.35,
    identity={"budget": None},
    experiment=("stdlib-lm(prompt=3584, new=256, examples=12)", "attention/recycled(budget=512)"),
    when="Long prompts with answers of dozens of tokens and more, where neighbouring tokens look at the same places.",
    when_not="Short answers (the first step is a full one); retrieval of a new place with every token.",
    hosts=("decoder",),
)


def naive_recycled(weights: Tensor, begin: Tensor, groups: int, budget: int = 4096) -> Tensor:
    """The most attended tokens of each key head, the best first; padding only behind all others.

    Args:
        weights: [batch, heads, tokens], attention of a full step; groups: query heads per key head.
        begin: int64 [batch], tokens of padding in front of each row.

    Returns:
        int32 [batch, heads / groups, min(budget, tokens)].
    """
    batch, heads, tokens = weights.shape
    rows = torch.zeros(batch, heads // groups, min(budget, tokens), dtype=torch.int32)
    for b in range(batch):
        for g in range(heads // groups):
            worth = [max(float(weights[b, h, k]) for h in range(g * groups, (g + 1) * groups)) for k in range(tokens)]
            best = sorted(range(tokens), key=lambda k: (k < int(begin[b]), -worth[k]))[:budget]
            rows[b, g] = torch.tensor(best, dtype=torch.int32)
    return rows


def recycled(weights: Tensor, begin: Tensor | None, groups: int, budget: int = 4096) -> Tensor:
    """`naive_recycled` without loops; `begin` may be None where nothing is padded."""
    worth = weights.unflatten(1, (-1, groups)).amax(dim=2)  # [batch, kv heads, tokens]
    if begin is not None:
        place = torch.arange(worth.shape[-1], device=worth.device)
        worth = worth.masked_fill((place < begin[:, None])[:, None], -1)
    return worth.topk(min(budget, worth.shape[-1]), dim=-1).indices.int()


@dataclasses.dataclass(frozen=True)
class Recycled(Reading):
    budget: int | None = option(4096, "tokens that a recycled step reads (K); none reads everything", least=2)
    every: int = option(50, "decoding steps from one full step to the next (S)", least=1)
    threshold: float | None = option(
        None, "cosine to the last full step's query below which a step is full; replaces every", least=-1, most=1
    )
    check: int = option(5, "with a threshold, steps from one comparison to the next", least=1)

    @property
    def idle(self) -> bool:
        return self.budget is None

    def prefill(self, look: Look) -> None:
        assert self.budget is not None
        if look.prompt == look.columns > self.budget:
            self._full(look)  # the last token of the prompt has read everything

    def select(self, look: Look) -> Chosen | None:
        assert self.budget is not None
        if look.columns <= self.budget:
            return None
        if look.state is None:
            return self._full(look)
        column, kept = look.state
        if self.threshold is None:
            since = look.columns - 1 - column
            if since >= self.every:
                return self._full(look)
            ahead = kept[0]  # the tokens to come, the last first, then those of the full step
            return Chosen(ahead.narrow(2, self.every - 1 - since, self.budget), self._counts(look))
        top, last, query = kept
        if (look.columns - look.prompt) % self.check == 0:
            full = torch.cosine_similarity(look.query.flatten(1).float(), query.float()) < self.threshold
            if bool(full.all()):
                return self._full(look)
            if bool(full.any()):
                return self._some(look, full, top, last, query)
        return Chosen(self._recycled(look, top, last), self._counts(look))

    def _counts(self, look: Look) -> Tensor | None:
        if look.begin is None:
            return None
        counts = (look.columns - look.begin).clamp(max=self.budget).int()
        return counts[:, None].expand(-1, look.keys.shape[1])

    def _recycled(self, look: Look, top: Tensor, last: Tensor) -> Tensor:
        """The tokens since each row's full step, the last first, then the best of that step."""
        place = torch.arange(top.shape[-1], device=top.device)
        since = (look.columns - 1 - last)[:, None, None]
        best = top.gather(2, (place - since).clamp(min=0).expand(top.shape))
        return torch.where(place < since, look.columns - 1 - place, best).int()

    def _full(self, look: Look) -> Chosen:
        weights = look.weights()
        top = recycled(weights, look.begin, weights.shape[1] // look.keys.shape[1], self.budget or 0)
        if self.threshold is not None:
            last = torch.full((len(top),), look.columns - 1, device=top.device)
            look.push(top, last, look.query[:, :, -1].flatten(1))
            return Chosen(weights=weights)
        new = torch.arange(look.columns + self.every - 2, look.columns - 1, -1, dtype=torch.int32, device=top.device)
        look.push(torch.cat([new.expand(*top.shape[:2], -1), top], dim=-1))
        return Chosen(weights=weights)

    def _some(self, look: Look, full: Tensor, top: Tensor, last: Tensor, query: Tensor) -> Chosen:
        """A step that is full for some rows only."""
        weights = look.weights()
        best = recycled(weights, look.begin, weights.shape[1] // look.keys.shape[1], self.budget or 0)
        rows = self._recycled(look, top, last)
        look.push(
            torch.where(full[:, None, None], best, top),
            torch.where(full, look.columns - 1, last),
            torch.where(full[:, None], look.query[:, :, -1].flatten(1), query),
        )
        begin = torch.zeros_like(last) if look.begin is None else look.begin
        every = (begin[:, None] + torch.arange(look.columns, device=last.device)).clamp_(max=look.columns - 1).int()
        rows = torch.nn.functional.pad(rows, (0, look.columns - rows.shape[-1]))
        counts = torch.where(full, look.columns - begin, (look.columns - begin).clamp(max=self.budget)).int()
        rows = torch.where(full[:, None, None], every[:, None], rows)
        share = float(full.float().mean())
        part = share + (1 - share) * (self.budget or 0) / look.columns
        return Chosen(rows, counts[:, None].expand(-1, rows.shape[1]), cost=0.5, part=part)


METHOD = Recycled
