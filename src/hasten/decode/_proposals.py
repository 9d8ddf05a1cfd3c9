"""Who drafts: the protocol of a drafter during one call of generate, and the small model that drafts a chain.

Letters: B rows, N candidates, V vocabulary. A chain's candidates follow each other; a tree's say whom they follow.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from hasten.decode._rows import Rows, Tree
from hasten.decode._sampling import draw


@dataclasses.dataclass
class Proposal:
    """Candidates of one round.

    Attributes:
        tokens: [B, N]; of a tree in an order in which parents come before their children.
        tree: whom each candidate follows, the same for all rows; None for a chain.
        q: [B, N, V], the distributions that the candidates were drawn from; None where they were chosen.
        lengths: how many of each row's candidates are meant, the rest being filling; None where all are. For counting.
    """

    tokens: Tensor
    tree: Tree | None = None
    q: Tensor | None = None
    lengths: list[int] | None = None

    @property
    def size(self) -> int:
        return self.tokens.shape[1]


@dataclasses.dataclass
class Verdict:
    """What was accepted.

    Attributes:
        tokens: [B, D + 1], of which the first `accepted + 1` count: the accepted ones and one of the target's own.
        accepted: [B].
        path: [B, D], which candidates the accepted ones are; None for a chain, whose first ones they are.
        told: `accepted` as a list, filled in by the loop.
        last: [B, 1], the latest token of each row.
    """

    tokens: Tensor
    accepted: Tensor
    path: Tensor | None = None
    told: list[int] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def last(self) -> Tensor:
        return self.tokens.gather(1, self.accepted[:, None])


class Proposer:
    """A drafter during one call; `run` is the loop (`_loop.Run`) with its rows, stops, scores and target.

    `passes` counts the forward passes of a draft model.
    """

    passes = 0

    def __init__(self, run: Any) -> None:
        self.run = run

    def propose(self, most: int) -> Proposal:
        """Candidates for every running row, at most `most` after each other (0 is possible)."""
        raise NotImplementedError

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        """Hears what became of the round's candidates, before finished rows leave."""

    def select(self, going: Tensor) -> None:
        """Keeps these rows of the batch only."""

    def close(self) -> None:
        """The call is over, or has failed."""

    def none(self) -> Proposal:
        """No candidates."""
        run = self.run
        return Proposal(run.unread[0].new_empty(len(run.rows), 0))


class SmallModel(Proposer):
    """Drafts a chain with a small model, a pass a token, and stops where the method says so."""

    def __init__(self, run: Any, model: nn.Module) -> None:
        from transformers import DynamicCache

        super().__init__(run)
        cache = DynamicCache(config=model.config)
        self.rows = Rows(model, cache, limit=run.limit, width=run.width, watch=run.method.watches)
        self.unread = (run.ids, run.real)

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.rows.passes

    def propose(self, most: int) -> Proposal:
        run = self.run
        method, learnt = run.method, run.spec.drafter.learnt
        ids, real = self.unread
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        survived = None
        for step in range(1, most + 1):
            logits = self.rows.step(ids, real)
            stop = False
            if method.watches and step > 1:
                survived, stop = method.stop(learnt, self.rows.hidden, survived, step)
            scores = run.scores(logits, run.stops, run.rows, tokens)[:, 0]
            if run.scores.sampled:
                chances.append(scores.softmax(-1))
                tokens.append(draw(chances[-1], run.scores.generator))
            else:
                tokens.append(scores.argmax(-1))
            ids, real = tokens[-1][:, None], None
            if stop:
                break
        drafts = torch.stack(tokens, 1) if tokens else ids.new_empty(len(run.rows), 0)
        return Proposal(drafts, q=torch.stack(chances, 1) if chances else None)

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        """Takes refused tokens back and notes what the draft has yet to read."""
        length, last = proposal.size, verdict.last
        if not length:
            ids, real = self.unread
            real = None if real is None else nn.functional.pad(real, (0, 1), value=True)
            self.unread = (torch.cat([ids, last], 1), real)
            return
        most, ragged = max(verdict.told), max(verdict.told) != min(verdict.told)
        read = length - 1  # the draft has not read its own last candidate
        kept = self.rows.order[:read] < verdict.accepted[:, None] if ragged and read else None
        self.rows.keep(kept, max(0, read - most))
        if most < length:
            self.unread = (last, None)
        else:
            real = torch.cat([verdict.accepted[:, None] == length, torch.ones_like(last, dtype=torch.bool)], 1)
            self.unread = (torch.cat([proposal.tokens[:, -1:], last], 1), real if ragged else None)

    def select(self, going: Tensor) -> None:
        self.rows.select(going)
        ids, real = self.unread
        self.unread = (ids[going], None if real is None else real[going])

    def close(self) -> None:
        self.rows.close()
