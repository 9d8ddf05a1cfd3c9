"""A draft that runs ahead: it goes on from its own candidates while they are still to be judged."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.decode._rows import Rows
from hasten.decode._sampling import draw
from hasten.decode._stops import Scores, Stops

Heard = list[tuple[int, int]]
"""What became of a round, a pair for each row: how many pending candidates stay, and the token after them."""


@dataclasses.dataclass
class Order:
    """What a draft needs to know of one call of generate.

    Attributes:
        ids, real: the prompt [B, T] and which of its tokens are real, None where all are.
        prompt: the same as the logits processors see it.
        limit: tokens that a row may have in the end; `most`: the most tokens of one draft; `words`: the vocabulary.
        seed: of the draft's draws, which are its own, so that they are the same beside the target and between its
            passes.
    """

    ids: Tensor
    real: Tensor | None
    prompt: Tensor
    limit: int
    most: int
    words: int
    processors: Any
    sampled: bool
    seed: int


class Written(Stops):
    """The rows' tokens as the draft has them, unjudged ones included: history for the logits processors."""

    def __init__(self, prompt: Tensor) -> None:
        self.prompt, self.new = prompt, [[] for _ in prompt]


class Ahead:
    """A draft in one call of generate. `order` starts a round's candidates, `collect` hands them over.

    A row's candidates of the round before are pending while the target reads them. They, and the candidates that
    follow, are in the draft's cache already; a refusal takes them back.
    """

    def __init__(self, model: Any, order: Order) -> None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        self.rows = Rows(model, cache, limit=order.limit, width=1)
        device = order.ids.device
        generator = torch.Generator(device).manual_seed(order.seed) if order.sampled else None
        self.scores = Scores(order.processors, order.sampled, generator)
        self.written = Written(order.prompt)
        self.places = list(range(len(order.ids)))
        self.unread: tuple[Tensor, Tensor | None] = (order.ids, order.real)
        self.pending = [0] * len(order.ids)
        self.made: list[list[int]] = []
        self.q: Tensor | None = None

    @property
    def passes(self) -> int:
        return self.rows.passes

    def order(self, heard: Heard | None, going: list[int] | None, count: int, out: Tensor | None = None) -> None:
        """Hears of the round before, lets rows go, and drafts.

        Args:
            going: the places of the rows that stay, None where all do.
            count: tokens to draft, at least 1.
            out: [count, B, V], takes the distributions.
        """
        if heard is not None:
            self._hear(heard)
        if going is not None:
            self._select(going)
        ids, real = self.unread
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        for step in range(count):
            logits = self.rows.step(ids, real)
            scores = self.scores(logits, self.written, self.places, tokens)[:, 0]
            if self.scores.sampled:
                q_BV = scores.softmax(-1)
                tokens.append(draw(q_BV, self.scores.generator))
                chances.append(q_BV if out is None else out[step].copy_(q_BV))
            else:
                tokens.append(scores.argmax(-1))
            ids, real = tokens[-1][:, None], None
        self.made = torch.stack(tokens, 1).tolist()
        self.q = torch.stack(chances, 1) if chances and out is None else None

    def collect(self) -> tuple[list[list[int]], Tensor | None]:
        """Tokens [B][count], and q [B, count, V] where they are drawn."""
        return self.made, self.q

    def _hear(self, heard: Heard) -> None:
        """Takes back what was refused.

        The latest slots are those of the pending candidates, of which the last was read first in this round (by a row
        that has none pending, its refreshed last token), and those of all new candidates but the last.
        """
        before, window = max(self.pending), max(self.pending) + len(self.made[0]) - 1
        kept, last, pending = [], [], []
        for place, (count, token) in enumerate(heard):
            made, had, new = self.made[place], self.pending[place], self.written.new[self.places[place]]
            goes_on = goes_ahead(count, token, had, made)
            kept.append(window if goes_on else count if had else before)
            last.append(made[-1] if goes_on else token)
            pending.append(len(made) - 1 if goes_on else 0)
            if goes_on:
                new.extend(made)
            else:
                del new[len(new) - had + count :]
                new.append(token)
        most, ids = max(kept), self.unread[0]
        if window:
            stays = None
            if min(kept) < most:
                stays = torch.arange(window, device=ids.device) < torch.tensor(kept, device=ids.device)[:, None]
            self.rows.keep(stays, window - most)
        self.unread, self.pending = (torch.tensor(last, device=ids.device)[:, None], None), pending

    def _select(self, going: list[int]) -> None:
        ids, real = self.unread
        index = torch.tensor(going, device=ids.device)
        self.rows.select(index)
        self.unread = (ids[index], None if real is None else real[index])
        self.places = [self.places[place] for place in going]
        self.pending = [self.pending[place] for place in going]

    def close(self) -> None:
        self.rows.close()


def goes_ahead(count: int, token: int, pending: int, made: list[int]) -> bool:
    """Whether all pending candidates of a row were accepted and the first that follows them too."""
    return count == pending and token == made[0]
