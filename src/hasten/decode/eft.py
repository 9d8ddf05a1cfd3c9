"""Emulated fine-tuning: a small model's fine-tuning is added to a large model's scores, token by token.

Up-scaling: log p~ = log p_large + beta (log p_tuned - log p_small) + const, with the large base model p_large, and
small models before (p_small) and after (p_tuned) fine-tuning. Read the other way, the small tuned model times the
up-scaling weight p_large / p_small; `top_p` below 1 sets that weight to 1 outside the smallest set of tokens to which
the small tuned model gives at least that probability (they are not cut off).

Speculation: the small tuned model proposes a block, and one pass each of the large and of the small base model over the
block gives the true p~ at every place. A round leaves the three caches with the same tokens.

Shapes: scores of the three models [..., V]; returns scores [..., V] whose softmax is p~.

Departures: the paper keeps a proposed token if a draw from p~ gives the same one; here speculative sampling
(arXiv 2211.17192) accepts it, with the same law and fewer refusals. beta outside top_p's set: p_small weighs 1 - beta.
Temperature, top-k and other processors act on p~, and on p_tuned where it proposes. After a block accepted as a
whole one token more is drawn, at the price of one more pass of the small tuned model.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._loop import Request, Run
from hasten.decode._proposals import Proposal, Proposer, Verdict
from hasten.decode._rows import Rows
from hasten.decode._sampling import draw
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="An Emulator for Fine-Tuning Large Language Models using Small Language Models",
    paper="2310.12962",
    seams=("decode.draft", "logits"),
    effects=("quality", "time"),
    lossless=False,
    claim="2.5x more tokens a second than the same emulation without speculation, Llama-2-70B up-scaled with 7B and "
    "7B-chat; against the 70B model alone emulation costs time and gives it the small one's fine-tuning",
    claimed=2.5,
    identity={"beta": 0.0, "candidates": 0},
    experiment=("stdlib-upscale", "decode/eft(candidates=4)"),
    when="A model that is too large to fine-tune, of a family with a small member that has been, or that is quick to.",
    when_not="Where the large model can be fine-tuned itself: that is better and three models need not be kept. After "
    "a long fine-tuning to a new domain, where the small tuned model alone may be better than the emulated one.",
    needs=("draft", "teacher"),
    hosts=("decoder",),
)


def naive_eft(large: Tensor, tuned: Tensor, small: Tensor, beta: float, top_p: float) -> Tensor:
    """One place at a time, in float32, by probabilities.

    Args:
        large, tuned, small: the models' scores, [..., V].

    Returns:
        log p~ up to a constant of each place, [..., V]: the large model's scores where beta is 0.
    """
    out = torch.zeros(large.shape, dtype=torch.float32)
    words = large.shape[-1]
    for place in range(large.numel() // words):
        l_V, t_V, s_V = (part.reshape(-1, words)[place].float() for part in (large, tuned, small))
        p_tuned, p_small = (torch.exp(part) / torch.exp(part).sum() for part in (t_V, s_V))
        total, inside = 0.0, set()
        for token in torch.argsort(p_tuned, descending=True, stable=True).tolist():
            if total < top_p:
                inside.add(token)
            total += p_tuned[token].item()
        for token in range(words):
            shift = beta * torch.log(p_tuned[token] / p_small[token])
            weighted = l_V[token] if token in inside else torch.log(p_small[token] * torch.exp(l_V).sum())
            out.view(-1, words)[place, token] = weighted + shift
    return out


def eft(large: Tensor, tuned: Tensor, small: Tensor, beta: float, top_p: float) -> Tensor:
    """As `naive_eft`, all places at once."""
    large, tuned, small = large.float(), tuned.float().log_softmax(-1), small.float().log_softmax(-1)
    if top_p < 1:
        chances, order = tuned.exp().sort(dim=-1, descending=True, stable=True)
        outside = chances.cumsum(-1) - chances >= top_p
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
        large = torch.where(outside, small + large.logsumexp(-1, keepdim=True), large)
    return large + beta * (tuned - small)


class Pair(nn.Module):
    """The small model before and after fine-tuning."""

    def __init__(self, base: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.base, self.tuned = base, tuned

    @property
    def config(self) -> Any:
        return self.base.config


class Tuned(Proposer):
    """The small tuned model, which proposes, and the small base model, which is asked about the proposal."""

    def __init__(self, run: Run) -> None:
        from transformers import DynamicCache

        super().__init__(run)
        pair = run.spec.drafter.model
        assert isinstance(pair, Pair)
        self.tuned, self.base = (
            Rows(model, DynamicCache(config=model.config), limit=run.limit, width=run.width)  # type: ignore[arg-type]
            for model in (pair.tuned, pair.base)
        )
        self.unread = (run.ids, run.real)
        self.seen: list[Tensor] = []

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.tuned.passes + self.base.passes

    def propose(self, most: int) -> Proposal:
        run = self.run
        ids, real = self.unread
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        self.seen = []
        for _ in range(most):
            self.seen.append(self.tuned.step(ids, real))
            scores = run.scores(self.seen[-1], run.stops, run.rows, tokens)[:, 0]
            if run.scores.sampled:
                chances.append(scores.softmax(-1))
                tokens.append(draw(chances[-1], run.scores.generator))
            else:
                tokens.append(scores.argmax(-1))
            ids, real = tokens[-1][:, None], None
        self.seen.append(self.tuned.step(ids, real))
        drafts = torch.stack(tokens, 1) if tokens else ids.new_empty(len(run.rows), 0)
        return Proposal(drafts, q=torch.stack(chances, 1) if chances else None)

    def read(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """The scores of the tuned and of the base model after the last token and every candidate, [B, N + 1, V]."""
        ids, real = self.unread
        if real is not None:
            real = torch.cat([real, real.new_ones(proposal.tokens.shape)], 1)
        small = self.base.step(torch.cat([ids, proposal.tokens], 1), real, proposal.size + 1)
        return torch.cat(self.seen, 1), small

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        most, ragged = max(verdict.told), max(verdict.told) != min(verdict.told)
        for rows in (self.tuned, self.base):
            kept = rows.order[: proposal.size] < verdict.accepted[:, None] if ragged else None
            rows.keep(kept, proposal.size - most)
        self.unread = (verdict.last, None)

    def select(self, going: Tensor) -> None:
        self.tuned.select(going)
        self.base.select(going)
        ids, real = self.unread
        self.unread = (ids[going], None if real is None else real[going])


class Emulation(Run):
    """The loop of drafting, where the scores that accept are the emulated model's."""

    def verify(self, proposal: Proposal) -> Tensor:
        large = super().verify(proposal)
        assert isinstance(self.proposer, Tuned)
        return eft(large, *self.proposer.read(proposal), self.method.beta, self.method.top_p)


@dataclasses.dataclass(frozen=True)
class EFT(Drafting):
    beta: float = option(1.0, "how much of the fine-tuning is added; 0 leaves the large model as it is", least=0)
    candidates: int = option(8, "tokens that the small tuned model proposes; 0 is plain emulation", least=0, most=64)
    top_p: float = option(1.0, "the small tuned model's probability inside which tokens are up-scaled", above=0, most=1)

    @property
    def longest(self) -> int:
        return self.candidates

    def run(self, request: Request) -> Run:
        return Emulation(request)

    def proposer(self, run: Run) -> Proposer:
        return Tuned(run)

    def draft_of(self, host: Any, context: Context) -> tuple[nn.Module, dict[str, Any]]:
        """The small models, `context.draft` before fine-tuning and `context.teacher` after it.

        Raises:
            UsageError: the two are one model, or don't fit each other.
        """
        from hasten.hosts.records import record_of

        base: Any = context.draft
        tuned: Any = context.teacher
        if tuned is base or tuned is host.model:
            other = "draft" if tuned is base else "model"
            raise UsageError(f"{self.name}: teacher is the {other} itself: pass the draft's fine-tuned version")
        if type(tuned) is not type(base):
            raise UsageError(
                f"{self.name}: draft is a {type(base).__name__} and teacher a {type(tuned).__name__}: pass the same "
                "small model before (draft=) and after fine-tuning (teacher=)"
            )
        words = [model.config.get_text_config().vocab_size for model in (base, tuned)]
        if words[0] != words[1]:
            raise UsageError(
                f"{self.name}: draft has a vocabulary of {words[0]} tokens and teacher one of {words[1]}: fine-tune "
                "without adding tokens"
            )
        devices = [next(model.parameters()).device for model in (base, tuned)]
        if devices[0] != devices[1]:
            raise UsageError(f"{self.name}: draft is on {devices[0]} and teacher on {devices[1]}: move one of them")
        return Pair(base, tuned), {"draft": record_of(base), "teacher": record_of(tuned)}

    def rebuild(self, host: Any, record: dict[str, Any]) -> nn.Module:
        from hasten.hosts.records import rebuild

        return Pair(rebuild(record["draft"]), rebuild(record["teacher"]))


METHOD = EFT
