"""R2R: a small model writes, and a router on its state asks the large model at the tokens that would part their ways.

At each token the router reads the small model's last hidden state h, its largest scores z and its choice y's embedding:
p = sigmoid(MLP([h; E y; W z])). Where p is at least a threshold the large model reads all that it missed, in one
pass, and its token takes y's place (section 3.3). Labels (3.2): along a text by the large model the small one's choice
is divergent, and not neutral, where it leads the large model's own continuation elsewhere.

Shapes: hidden [B, D], scores [B, V], tokens [B], table [V, E]; returns p [B] and whether the large model is asked [B].

Departures: no third model judges two continuations: a choice is divergent where the large model finds the segment that
it writes itself after it less likely, by `margin` nats a token, than the one after its own. The texts are
continuations of the calibration inputs, a fifth of which validate. The threshold is the exact quantile, not the best
of 100. Two linear layers without anything between them are one. The router's embeddings are the draft's own. In a batch
a pass reads for all rows what they missed; only the rows that asked take its token, so each gets the tokens that it
gets alone. A label looks at the likeliest tokens; drawn ones are routed the same.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._loop import Request, Run
from hasten.decode._proposals import Proposer
from hasten.decode._router import Router, fit, threshold
from hasten.decode._rows import Rows
from hasten.decode._sampling import draw
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing",
    paper="2505.21600",
    seams=("decode.draft", "decode.sample"),
    effects=("time", "quality"),
    lossless=False,
    claim="2.8x over R1-32B with R1-1.5B beside it at comparable accuracy on AIME, GPQA and LiveCodeBench",
    claimed=2.8,
    identity={"rate": 1.0},
    experiment=(
        "stdlib-written",
        "decode/r2r(rate=0.3, segment=16, ends=[10], width=64, blocks=2, lr=0.001, batch=128)",
    ),
    when="Long texts where a small model is right nearly always, as in reasoning by models of one family, and what "
    "counts is where the text leads, not each word.",
    when_not="Where the output must be the large model's own: then let it check a draft. In large batches, where some "
    "row asks at nearly every token.",
    needs=("draft", "calibration"),
    hosts=("decoder",),
)

BRANCHES = 64
"""Continuations that are written at once in labelling; each has a copy of its text's cache."""


def naive_r2r(
    hidden: Tensor, scores: Tensor, tokens: Tensor, table: Tensor, router: Router, limit: float
) -> tuple[Tensor, Tensor]:
    """Row by row in float32, the router's layers written out.

    Args:
        hidden: [B, D]; `scores`: the small model's, [B, V]; `tokens`: its choices, [B]; `table`: embeddings [V, E].
        limit: the threshold.

    Returns:
        p [B], and whether the large model is asked [B].
    """

    def linear(layer: Any, x: Tensor) -> Tensor:
        return (layer.weight.float() * x).sum(1) + layer.bias.float()

    def norm(layer: Any, x: Tensor) -> Tensor:
        x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + layer.eps)
        return x * layer.weight.float() + layer.bias.float()

    chances = []
    for b in range(len(tokens)):
        top = torch.tensor(sorted(scores[b].tolist(), reverse=True)[: router.top])
        x = torch.cat([hidden[b].float(), table[tokens[b]].float(), linear(router.scores, top)])
        x = linear(router.join, x)
        for block in router.blocks:
            part: Any = block
            inner = linear(part.up, norm(part.norm, x))
            x = x + linear(part.down, inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        chances.append(1 / (1 + torch.exp(-linear(router.last, norm(router.norm, x))[0])))
    p = torch.stack(chances)
    return p, p >= limit


def r2r(
    hidden: Tensor, scores: Tensor, tokens: Tensor, table: Tensor, router: Router, limit: float | Tensor
) -> tuple[Tensor, Tensor]:
    """As `naive_r2r`, all rows at once."""
    p = router(hidden, scores.topk(router.top, -1).values, table[tokens]).float().sigmoid()
    return p, p >= limit


class Writer(Proposer):
    """The small model, which reads every token, and its router."""

    def __init__(self, run: Run) -> None:
        from transformers import DynamicCache

        super().__init__(run)
        model: Any = run.spec.drafter.model
        self.rows = Rows(model, DynamicCache(config=model.config), limit=run.limit, width=run.width, watch=True)
        self.table = model.get_input_embeddings().weight
        self.unread = (run.ids, run.real)

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.rows.passes

    def write(self) -> tuple[Tensor, Tensor]:
        """The small model's next token of each row, [B], and whether the large model is asked, [B]."""
        router = self.run.spec.drafter.learnt
        logits = self.rows.step(*self.unread)
        tokens = choose(self.run, logits)
        return tokens, r2r(self.rows.hidden, logits[:, 0], tokens, self.table, router, router.threshold)[1]

    def select(self, going: Tensor) -> None:
        self.rows.select(going)
        self.unread = (self.unread[0][going], None)

    def close(self) -> None:
        self.rows.close()


def choose(run: Run, logits: Tensor) -> Tensor:
    """One token of each row from [B, 1, V], drawn or the likeliest."""
    scores = run.scores(logits, run.stops, run.rows, [])[:, 0]
    return draw(scores.softmax(-1), run.scores.generator) if run.scores.sampled else scores.argmax(-1)


class Routed(Run):
    """A token a round. Of the counters, `accepted` are the small model's tokens among the `drafted`, which are all."""

    def round(self) -> None:
        writer, spent = self.proposer, self.counters.seconds
        assert isinstance(writer, Writer)
        started = time.perf_counter()
        tokens, asked = writer.write()
        asking = asked.tolist()
        wrote = time.perf_counter()
        if any(asking):
            tokens = torch.where(asked, self.ask(), tokens)
        answered = time.perf_counter()
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            self.stops.tell(row, [token])
        self.counters.add([len(asking)], [int(not one) for one in asking])
        if self.request.streamer is not None:
            self.request.streamer.put(torch.tensor(self.stops.fresh(self.rows[0])))
        ids, real = self.unread
        real = None if real is None else nn.functional.pad(real, (0, 1), value=True)
        self.unread, writer.unread = (torch.cat([ids, tokens[:, None]], 1), real), (tokens[:, None], None)
        going = [place for place, row in enumerate(self.rows) if not self.stops.finished(row)]
        if going and len(going) < len(self.rows):
            self.release(torch.tensor(going, device=tokens.device))
        self.rows = [self.rows[place] for place in going]
        spent["draft"] += wrote - started
        spent["verify"] += answered - wrote
        spent["accept"] += time.perf_counter() - answered

    def ask(self) -> Tensor:
        """The large model's next token of each row, [B], after it has read what it missed."""
        ids, real = self.unread
        prompt = self.ids.shape[1]
        if self.prefill and ids.shape[1] > prompt:
            self.target.step(ids[:, :prompt], None if real is None else real[:, :prompt])
            ids, real = ids[:, prompt:], None
        self.prefill, self.unread = False, (ids[:, :0], None)
        return choose(self, self.target.step(ids, real))


@dataclasses.dataclass(frozen=True)
class R2R(Drafting):
    rate: float | None = option(
        None, "share of tokens to ask about, met in validation; none: by recall", least=0, most=1
    )
    recall: float = option(0.95, "share of divergent tokens to ask about, where there is no rate", above=0, most=1)
    tokens: int = option(64, "tokens that the large model writes, and are labelled, after each input", least=1)
    segment: int = option(32, "tokens of the continuations that are compared, where none ends before", least=1)
    ends: tuple[int, ...] = option((), "tokens that end a sentence, and so a continuation (the end of a text does)")
    margin: float = option(0.1, "nats a token by which a divergent continuation is less likely", least=0)
    top: int = option(100, "largest scores of the small model that the router reads", least=1)
    width: int = option(1024, "width of the router", least=1)
    blocks: int = option(6, "residual blocks of the router", least=0)
    expansion: int = option(4, "how much wider a block is inside", least=1)
    dropout: float = option(0.1, "dropout in the blocks, in fitting", least=0, below=1)
    lr: float = option(5e-5, "learning rate of the router, AdamW (the paper's, for millions of tokens)", above=0)
    decay: float = option(5e-4, "weight decay of the router", least=0)
    batch: int = option(1024, "examples of a batch", least=1)
    epochs: int = option(50, "most passes over the examples", least=1)
    patience: int = option(10, "epochs without a better validation after which fitting ends", least=1)

    @property
    def longest(self) -> int:
        return 0

    def run(self, request: Request) -> Run:
        return Routed(request)

    def proposer(self, run: Run) -> Proposer:
        return Writer(run)

    def blank(self, host: Any, draft: Any) -> Router:
        words, embedding = draft.get_input_embeddings().weight.shape
        hidden = draft.get_output_embeddings().weight.shape[1]
        sizes: dict[str, Any] = {
            "width": self.width,
            "blocks": self.blocks,
            "expansion": self.expansion,
            "dropout": self.dropout,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            router = Router(hidden, embedding, min(self.top, words), **sizes)
        return router.to(next(draft.parameters()).device)

    def learn(self, host: Any, draft: Any, context: Context) -> Router:
        """Labels tokens of the large model's texts, fits the router, and chooses its threshold."""
        started = time.perf_counter()
        router, rows = self.blank(host, draft), 0
        parts = []
        for batch in context.calibration or []:
            *found, places = self.examples(host, draft, batch, router.top)
            parts.append((*found, places + rows))
            rows += len(batch["input_ids"])
        hidden, top, tokens, differs, labels, row = (torch.cat(part) for part in zip(*parts, strict=True))
        features = (hidden, top, draft.get_input_embeddings().weight.detach()[tokens].float())
        held = (row if rows >= 5 else torch.arange(len(row), device=row.device)) % 5 == 4
        options: dict[str, Any] = {"lr": self.lr, "decay": self.decay, "batch": self.batch, "epochs": self.epochs}
        facts = fit(router, features, labels, held, patience=self.patience, seed=context.seed, **options)
        with torch.no_grad():
            p = router(*(part[held] for part in features)).sigmoid()
        limit = threshold(p, labels[held], self.rate, self.recall)
        router.threshold.fill_(limit)
        asked, wanted = p >= limit, labels[held] > 0.5
        caught = (asked & wanted).sum().item() / max(1, wanted.sum().item())
        context.note(
            self.name, examples=len(labels), differing=differs.float().mean().item(), divergent=labels.mean().item(),
            threshold=limit, rate=asked.float().mean().item(), recall=caught, seconds=time.perf_counter() - started,
            **facts,
        )  # fmt: skip
        return router

    @torch.no_grad()
    def examples(self, host: Any, draft: Any, batch: dict[str, Any], top: int) -> tuple[Tensor, ...]:
        """The large model's continuations, token by token, with what the small model would have written.

        Returns:
            of N tokens the small model's hidden state [N, D], largest scores [N, top] and choice [N], whether it
            differs [N], whether it is divergent [N] (float), and the row of the batch [N].
        """
        from transformers import DynamicCache

        model, ids = host.model, batch["input_ids"].to(host.device)
        mask = batch.get("attention_mask")
        real = None if mask is None or bool((mask == 1).all()) else mask.to(host.device).bool()
        limit, prompt = ids.shape[1] + self.tokens + self.segment, ids.shape[1]
        large = Rows(model, DynamicCache(config=model.config), limit=limit, width=1)
        small = Rows(draft, DynamicCache(config=draft.config), limit=limit, width=1, watch=True)
        written, likely, states, scores, answers, given = ([] for _ in range(6))  # type: ignore[var-annotated]
        try:
            for step in range(self.tokens + self.segment - 1):
                chances = large.step(ids, real)[:, -1].float().log_softmax(-1)
                best, chosen = chances.max(-1)
                if step < self.tokens:
                    z = small.step(ids, real)[:, -1].float()
                    answers.append(z.argmax(-1))
                    scores.append(z.topk(top, -1).values)
                    states.append(small.hidden.float())
                    given.append(chances.gather(1, answers[-1][:, None])[:, 0])
                written.append(chosen)
                likely.append(best)
                ids, real = chosen[:, None], None
        finally:
            small.close()
        written_BT, likely_BT, answers_BN, given_BN = (torch.stack(x, 1) for x in (written, likely, answers, given))
        text_ends = _tokens(getattr(model.config.get_text_config(), "eos_token_id", None), answers_BN)
        ends = torch.cat([_tokens(list(self.ends), answers_BN), text_ends])
        alive = _until(torch.isin(written_BT, ends).unfold(1, self.segment, 1))
        own_BN = (likely_BT.unfold(1, self.segment, 1) * alive).sum(-1) / alive.sum(-1)
        inside = _until(torch.isin(written_BT, text_ends))[:, : self.tokens]  # nothing counts after the end of a text
        differs = (answers_BN != written_BT[:, : self.tokens]) & inside
        divergent = torch.zeros_like(own_BN)
        for chosen in differs.nonzero().split(BRANCHES) if differs.any() else ():
            row, place = chosen.unbind(1)
            other = self.branch(large, prompt, row, place, answers_BN[row, place], given_BN[row, place], ends)
            divergent[row, place] = (own_BN[row, place] - other > self.margin).float()
        row, place = inside.nonzero().unbind(1)
        features = [torch.stack(x, 1)[row, place] for x in (states, scores, answers)]
        return *features, differs[row, place], divergent[row, place], row

    def branch(
        self, large: Rows, prompt: int, row: Tensor, place: Tensor, token: Tensor, given: Tensor, ends: Tensor
    ) -> Tensor:
        """The mean log-likelihood of the segments that begin with `token` [N], after `place` tokens of text `row`.

        Args:
            large: a pass over the whole texts, whose prompts have `prompt` tokens; it is left as it is.
            given: the log-likelihood of `token`, [N].
        """
        from transformers import DynamicCache

        if self.segment == 1:
            return given
        model: Any = large.model
        cache = DynamicCache(config=model.config)
        for layer, part in enumerate(large.cache.layers):
            cache.update(part.keys[row], part.values[row], layer)
        rows = Rows(model, cache, limit=large.last + 1, width=1)
        rows.real = None if large.real is None else large.real[row]
        after = large.slots - prompt
        rows.keep(large.order[:after] < place[:, None], after - int(place.max()))
        total, count, alive = given.clone(), torch.ones_like(given), ~torch.isin(token, ends)
        for _ in range(self.segment - 1):
            if not alive.any():
                break
            best, token = rows.step(token[:, None])[:, -1].float().log_softmax(-1).max(-1)
            total, count = total + best * alive, count + alive
            alive = alive & ~torch.isin(token, ends)
        return total / count


def _tokens(given: Any, like: Tensor) -> Tensor:
    return like.new_tensor([] if given is None else given).reshape(-1)


def _until(ends: Tensor) -> Tensor:
    """Of places marked along the last dimension those up to the first mark, itself included."""
    marks = ends.long()
    return marks.cumsum(-1) - marks == 0


METHOD = R2R
