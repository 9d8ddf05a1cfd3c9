"""TokenSelect: all heads vote for the tokens that a query reads (arXiv 2411.02886, section 4).

A token's votes are the sum over the heads of its softmax weight; the k best are read, and beside them the first tokens
and the last ones. While a query stays like the one that voted last, its choice is read again (the Selection Cache).

    I = TopK_k(sum_h softmax(q_h K_h^T)),   anew where cos(q, q_voted) < theta

The prompt is read the same way, chunk by chunk; a chunk votes with its mean query and sees itself causally.

Departures: keys carry the positions of the text, where the authors number what is read anew to reach beyond the trained
length. The dot products of the vote are not scaled, as in their code. Rows of a batch vote for themselves.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.attention._reading import Chosen, Look, Reading
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.kernels.top_rows import top_rows

CARD = Card(
    title=(
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level "
        "KV Cache Selection"
    ),
    paper="2411.02886",
    seams=("attention.mask", "cache.read", "cache.keep"),
    effects=("time", "quality"),
    lossless=False,
    claim="up to 23.84x faster attention and 2.28x lower latency end to end (Qwen2-7B, up to 1M tokens)",
    claimed=2.28,
    identity={"top": None},
    experiment=(
        "stdlib-lm(prompt=3584, new=256, examples=16)",
        "attention/token_select(top=384, first=16, last=64, chunk=256)",
    ),
    when="Long prompts and answers whose few relevant tokens are spread over the text.",
    when_not="Contexts of a few times first + top + last: a vote reads all keys, half of what attention reads.",
    hosts=("decoder",),
)


def naive_token_select(
    scores: Tensor, begin: Tensor, top: int = 2048, first: int = 128, last: int = 512
) -> tuple[Tensor, Tensor]:
    """The tokens that are read.

    Args:
        scores: [batch, heads, tokens], dot products of one query.
        begin: int64 [batch], tokens of padding in front of each row.
        top: tokens that are voted for, beside the `first` and the `last` ones; together no more than `tokens`.

    Returns:
        rows int32 [batch, 1, first + top + last] in ascending order, the row's last token behind the valid ones, and
        counts int32 [batch, 1].
    """
    batch, heads, tokens = scores.shape
    rows = torch.full((batch, 1, first + top + last), tokens - 1, dtype=torch.int32)
    counts = torch.zeros(batch, 1, dtype=torch.int32)
    for b in range(batch):
        low, high = int(begin[b]) + first, tokens - last
        votes = {k: 0.0 for k in range(low, high)}
        for h in range(heads):
            peak = max((float(scores[b, h, k]) for k in votes), default=0.0)
            total = sum(torch.tensor(float(scores[b, h, k]) - peak).exp().item() for k in votes)
            for k in votes:
                votes[k] += torch.tensor(float(scores[b, h, k]) - peak).exp().item() / total
        best = sorted(votes, key=lambda k: -votes[k])[:top]
        chosen = sorted({*range(int(begin[b]), min(low, tokens)), *best, *range(max(high, int(begin[b])), tokens)})
        rows[b, 0, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[b] = len(chosen)
    return rows, counts


def token_select(
    scores: Tensor, begin: Tensor | None, top: int = 2048, first: int = 128, last: int = 512
) -> tuple[Tensor, Tensor]:
    """`naive_token_select` without loops; `begin` may be None where nothing is padded."""
    batch, _, tokens = scores.shape
    middle = scores.narrow(2, first, tokens - first - last)  # of a padded row: those from column `begin` on
    early = None
    if begin is not None:
        early = torch.arange(middle.shape[-1], device=scores.device) < begin[:, None]
        middle = middle.masked_fill(early[:, None], torch.finfo(middle.dtype).min)
    votes = middle.softmax(dim=-1).sum(dim=1)
    if early is not None:
        votes = votes.masked_fill(early, -1)
    chosen = top_rows(votes, top) + first
    head = torch.arange(first, dtype=torch.int32, device=scores.device).expand(batch, -1)
    tail = torch.arange(tokens - last, tokens, dtype=torch.int32, device=scores.device).expand(batch, -1)
    if begin is None:
        counts = torch.full((batch, 1), first + top + last, dtype=torch.int32, device=scores.device)
        return torch.cat([head, chosen, tail], dim=-1)[:, None], counts
    rows = torch.cat([head + begin[:, None].int(), chosen, tail], dim=-1)
    real = tokens - begin[:, None]
    whole = (begin[:, None] + torch.arange(rows.shape[1], device=rows.device)).clamp(max=tokens - 1).int()
    rows = torch.where(real <= rows.shape[1], whole, rows)
    return rows[:, None], real.clamp(max=rows.shape[1]).int()


@dataclasses.dataclass(frozen=True)
class TokenSelect(Reading):
    top: int | None = option(2048, "tokens that are voted for (k); none reads everything", least=1)
    first: int = option(128, "first tokens of the text, which are always read", least=0)
    last: int = option(512, "last tokens of the text, which are always read", least=1)
    theta: float = option(0.9, "cosine to the query that voted last, below which a query votes anew", least=-1, most=1)
    chunk: int | None = option(512, "tokens of the prompt that vote together; none reads the prompt densely", least=2)

    @property
    def idle(self) -> bool:
        return self.top is None

    def _enough(self, tokens: int, last: int) -> bool:
        return self.first + (self.top or 0) + last >= tokens

    def prefill(self, look: Look) -> Tensor | None:
        assert self.top is not None
        new = look.query.shape[2]
        past = look.columns - new
        if self.chunk is None or self._enough(look.columns, max(self.last, self.chunk)):
            return None
        outs = []
        for start in range(0, new, self.chunk):
            query = look.query[:, :, start : start + self.chunk]
            tokens = past + start + query.shape[2]
            part = dataclasses.replace(
                look, query=query, keys=look.keys[:, :, :tokens], values=look.values[:, :, :tokens]
            )
            last = max(self.last, query.shape[2])
            if self._enough(tokens, last):
                outs.append(part.causal(None, None))
                continue
            mean = dataclasses.replace(part, query=query.mean(dim=2, keepdim=True))
            outs.append(part.causal(*token_select(mean.scores(1.0), look.begin, self.top, self.first, last)))
        return torch.cat(outs, dim=2)

    def select(self, look: Look) -> Chosen | None:
        assert self.top is not None
        if self._enough(look.columns, self.last):
            return None
        query, state = look.query.flatten(1), look.state
        anew = torch.ones(len(query), dtype=torch.bool)
        if state is not None:
            rows, counts, voter = state[1]
            anew = ~(torch.cosine_similarity(query.float(), voter.float()) >= self.theta)  # [batch]
        if bool(anew.any()):
            fresh, number = token_select(look.scores(1.0), look.begin, self.top, self.first, self.last)
            voted = query
            if look.begin is not None:  # a row that is read whole has no choice to keep
                short = look.columns - look.begin <= fresh.shape[-1]
                voted = query.masked_fill(short[:, None], torch.nan)
            if state is not None:
                fresh = torch.where(anew[:, None, None], fresh, self._moved(rows, look.columns))
                number, voted = torch.where(anew[:, None], number, counts), torch.where(anew[:, None], voted, voter)
            look.push(fresh, number, voted)
            return Chosen(fresh, None if look.begin is None else number, cost=0.5)
        return Chosen(self._moved(rows, look.columns), None if look.begin is None else counts)

    def _moved(self, rows: Tensor, columns: int) -> Tensor:
        """A choice with the last tokens of now."""
        tail = torch.arange(columns - self.last, columns, dtype=torch.int32, device=rows.device)
        return torch.cat([rows[..., : -self.last], tail.expand(len(rows), 1, -1)], dim=-1)


METHOD = TokenSelect
