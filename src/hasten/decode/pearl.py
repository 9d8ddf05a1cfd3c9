"""PEARL: the draft goes on while the target reads, so neither waits for the other.

A row is in one of two modes. Pre-verify: the target reads the last token while the draft writes x_1 .. x_gamma; its p
judges x_1. If x_1 stays, x_2 .. x_gamma are pending and the row is in post-verify: the target reads them while the
draft writes the next gamma from their end; p judges the pending ones and the first new one, and if all stay the other
new ones are pending. The first refusal is replaced from norm(max(p - q, 0)) and leads back to pre-verify, so easy text
is drafted on and on. Each token is judged with p and q at its place: the law is the target's. Best gamma: how many
passes of the draft take as long as one of the target. Rule and default gamma are those of the official code
(`parallel_speculative_decoding`, which takes 3 to 5 for its pairs).

Shapes: p [B, K + 1, V], pending [B, K] with q [B, K, V], late (the first new) [B] with q [B, V]; returns tokens
[B, K + 1], of which accepted + 1 count, and accepted [B].

Departures: rows keep modes of their own, without pending tokens padded and masked (the paper has one row). Near the
length limit fewer are drafted. The paper has a GPU for each model; here the draft has a process (`_overlap.py`) on a
core that the target leaves free. No such core, no POSIX system, or models on a GPU (streams or several devices are not
served): the draft works between the target's passes, same tokens, and a warning says so.
"""

import dataclasses
import functools
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._ahead import Ahead, Order, goes_ahead
from hasten.decode._loop import Request, Run
from hasten.decode._overlap import Unsendable, Worker, cores, release, worker_of
from hasten.decode._proposals import Proposal, Proposer, Verdict
from hasten.decode._stops import Scores
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="PEARL: Parallel Speculative Decoding with Adaptive Draft Length",
    paper="2408.11850",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="up to 4.43x over plain decoding and 1.50x over speculative decoding (abstract), models on separate GPUs",
    claimed=4.43,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate)", "decode/pearl(candidates=7)"),
    when="As speculative decoding, where a second core (or more) idles while the target runs: a draft that costs a "
    "third to a tenth of the target and often agrees, small batches.",
    when_not="One core, a machine that is busy already, models on one GPU, or memory too scarce for a second process; "
    "a draft that is refused often: each refusal costs one more pass of the target than with plain drafting.",
    needs=("draft",),
    hosts=("decoder",),
)


def naive_pearl(
    p: Tensor, pending: Tensor, q: Tensor, lengths: Tensor, late: Tensor, q_late: Tensor, u: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """One round, row by row: pre-verify where `lengths` is 0, else post-verify.

    Args:
        p: the target's distributions [B, K + 1, V].
        pending: [B, K], drawn from `q` [B, K, V], of which the first `lengths` [B] are meant.
        late: [B], drawn from `q_late` [B, V], the candidate after them.
        u: uniform numbers [B, K + 1]; `e`: exponential numbers [B, V], a draw from w being argmax of w / e.

    Returns:
        tokens [B, K + 1], zero beyond the `accepted + 1` that count, and accepted [B], pending tokens that stay. The
        token after them is `late` where that stays too.
    """
    tokens = torch.zeros(pending.shape[0], pending.shape[1] + 1, dtype=torch.long)
    accepted = torch.zeros(len(p), dtype=torch.long)
    for b in range(len(p)):
        own = int(lengths[b])
        candidates = [*pending[b, :own].tolist(), int(late[b])]
        drafts = [*q[b, :own], q_late[b]]
        for n, x in enumerate(candidates):
            tokens[b, n], accepted[b] = x, min(n + 1, own)
            if not u[b, n].item() * drafts[n][x].item() < p[b, n, x].item():
                weights = [max(a - c, 0.0) for a, c in zip(p[b, n].tolist(), drafts[n].tolist(), strict=True)]
                if sum(weights) == 0:
                    weights = p[b, n].tolist()
                race = [weight / wait for weight, wait in zip(weights, e[b].tolist(), strict=True)]
                tokens[b, n], accepted[b] = race.index(max(race)), n
                break
    return tokens, accepted


def pearl(
    p: Tensor, pending: Tensor, q: Tensor, lengths: Tensor, late: Tensor, q_late: Tensor, u: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """As `naive_pearl`, all rows at once."""
    p, q, q_late = p.float(), q.float(), q_late.float()
    place = torch.arange(p.shape[1], device=p.device)
    is_late = place == lengths[:, None]
    drafts = torch.where(is_late, late[:, None], nn.functional.pad(pending, (0, 1)))
    q_all = torch.where(is_late[..., None], q_late[:, None], nn.functional.pad(q, (0, 0, 0, 1)))
    index = drafts[..., None]
    stays = u * q_all.gather(2, index)[..., 0] < p.gather(2, index)[..., 0]
    stayed = (stays & (place <= lengths[:, None])).long().cumprod(1).sum(1)
    accepted = stayed.clamp(max=lengths)
    at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p_BV = p.gather(1, at)[:, 0]
    rest = (p_BV - q_all.gather(1, at)[:, 0]).clamp_(min=0)
    # p equal to q up to rounding leaves nothing over, and is refused with a probability of the order of rounding
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_BV)
    last = torch.where(stayed > lengths, late, (rest / e).argmax(-1))
    tokens = drafts.scatter(1, accepted[:, None], last[:, None])
    return tokens * (place <= accepted[:, None]), accepted


@dataclasses.dataclass
class Window(Proposal):
    """The pending candidates of a round; `late` [B] and `q_late` [B, V] follow them, known after the target's pass."""

    late: Tensor | None = None
    q_late: Tensor | None = None


class Beside(Proposer):
    """Keeps the rows' pending candidates and a draft that goes on from them."""

    def __init__(self, run: Run, worker: Worker | None) -> None:
        super().__init__(run)
        self.side = _side(run, worker)
        self.window = self._none_pending(len(run.rows))
        self.pending = [0] * len(run.rows)
        self.made: list[list[int]] = []
        self.q: Tensor | None = None
        self.heard: list[tuple[int, int]] | None = None
        self.going: list[int] | None = None

    @property
    def beside(self) -> bool:
        """Whether the draft works while the target does."""
        return isinstance(self.side, Worker)

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.side.passes

    def propose(self, most: int) -> Proposal:
        """The pending candidates; the draft is told to go on."""
        run = self.run
        if most == 0:  # each row gets its last token, which takes no candidate
            return self.none()
        stops, start = run.stops, run.stops.prompt.shape[1]
        left = [
            stops.limit - start - len(stops.new[row]) - had for row, had in zip(run.rows, self.pending, strict=True)
        ]
        self.side.order(self.heard, self.going, min(run.method.longest, max(1, max(left) - 1)))
        self.heard = self.going = None
        return self.window

    def collect(self, window: Window) -> None:
        """Waits for the new candidates: the first of them is judged in this round."""
        self.made, self.q = self.side.collect()
        window.late = window.tokens.new_tensor([row[0] for row in self.made])
        window.q_late = None if self.q is None else self.q[:, 0]

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        if not isinstance(proposal, Window):
            return
        last = verdict.last[:, 0].tolist()
        self.heard = list(zip(verdict.told, last, strict=True))
        told = zip(self.heard, self.pending, self.made, strict=True)
        ahead = [goes_ahead(count, token, had, made) for (count, token), had, made in told]
        self._count(ahead)
        size = len(self.made[0]) - 1
        self.pending = [size if goes else 0 for goes in ahead]
        if max(self.pending) == 0:
            self.window = self._none_pending(len(ahead))
            return
        tokens = proposal.tokens.new_tensor(self.made)[:, 1:]
        self.window = Window(tokens, q=None if self.q is None else self.q[:, 1:], lengths=self._lengths())

    def _count(self, ahead: list[bool]) -> None:
        """The late candidates are candidates too, at the place after the pending ones."""
        counters = self.run.counters
        for place, stays in zip(self.pending, ahead, strict=True):
            for places, more in ((counters.drafted_at, 1), (counters.accepted_at, int(stays))):
                places.extend([0] * (place + 1 - len(places)))
                places[place] += more
        counters.drafted += len(ahead)
        counters.accepted += sum(ahead)

    def _none_pending(self, rows: int) -> Window:
        run, ids = self.run, self.run.ids
        q = torch.empty(rows, 0, _words(run.spec.drafter.model), device=ids.device) if run.scores.sampled else None
        return Window(ids.new_empty(rows, 0), q=q)

    def _lengths(self) -> list[int] | None:
        return self.pending if min(self.pending) < max(self.pending) else None

    def select(self, going: Tensor) -> None:
        self.going = going.tolist()
        self.pending = [self.pending[place] for place in self.going]
        window = self.window
        if max(self.pending) == 0:
            self.window = self._none_pending(len(going))
        else:
            q = None if window.q is None else window.q[going]
            self.window = Window(window.tokens[going], q=q, lengths=self._lengths())

    def close(self) -> None:
        self.side.close()


def _side(run: Run, worker: Worker | None) -> Worker | Ahead:
    """The draft of this call: in its process, or here."""
    how, draft = run.scores, run.spec.drafter.model
    ids, prompt, seed = run.ids, run.stops.prompt.to(run.ids.device), 0
    if how.sampled:
        seed = int(torch.randint(2**62, (1,), generator=how.generator, device=ids.device))
    most, words = run.method.longest, _words(draft)
    order = Order(ids, run.real, prompt, run.limit, most, words, how.processors, how.sampled, seed)
    if worker is None:
        return Ahead(draft, order)
    try:
        worker.open(order)
    except Unsendable as problem:
        _say(str(problem))
        return Ahead(draft, order)
    return worker


def _words(draft: Any) -> int:
    return draft.get_output_embeddings().weight.shape[0]


class Overlapped(Run):
    """The loop; the target leaves a core to a draft that works beside it."""

    proposer: Beside

    def all(self) -> None:
        before = torch.get_num_threads()
        threads = self.method.threads or min(before, max(1, int(cores()) - 1))
        if not self.proposer.beside or threads == before:
            super().all()
            return
        torch.set_num_threads(threads)
        try:
            super().all()
        finally:
            torch.set_num_threads(before)

    def verify(self, proposal: Proposal) -> Tensor:
        logits = super().verify(proposal)
        if isinstance(proposal, Window):
            started = time.perf_counter()
            self.proposer.collect(proposal)
            waited, spent = time.perf_counter() - started, self.counters.seconds
            spent["draft"] += waited
            spent["verify"] -= waited
        return logits


def _say(why: str) -> None:
    warnings.warn(f"decode/pearl drafts between the target's passes, not beside them: {why}", stacklevel=3)


@dataclasses.dataclass(frozen=True)
class Pearl(Drafting):
    candidates: int = option(
        4, "gamma, tokens drafted during one pass of the target: best as many as take that long", least=1, most=64
    )
    overlap: bool = option(True, "draft in a process of its own; false drafts the same between the target's passes")
    threads: int = option(0, "threads of the target while the draft works beside it; 0 leaves it one core", least=0)

    @property
    def longest(self) -> int:
        return self.candidates

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Puts the loop behind `model.generate` and starts the draft's process.

        Raises:
            UsageError: there is no draft, or it doesn't fit the model; nothing is changed then.
            HastenError: the process could not start.
        """
        record = super().install(host, context)
        self._tie(host)
        if self.overlap:
            started = time.perf_counter()
            worker = self._worker(host.model.drafter)
            beside = "a process beside the target" if worker is not None else "between the target's passes"
            context.note(self.name, drafting=beside, seconds=time.perf_counter() - started)
        return record

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        """The same from `install`'s record; the process starts with the first call of generate."""
        super().restore(host, record)
        self._tie(host)

    def _tie(self, host: Any) -> None:
        host.changes.call(functools.partial(release, host.model.drafter))

    def _worker(self, drafter: Any) -> Worker | None:
        if not self.overlap:
            return None
        found = worker_of(drafter)
        if isinstance(found, str):
            _say(found)
            return None
        return found

    def run(self, request: Request) -> Run:
        return Overlapped(request)

    def proposer(self, run: Run) -> Proposer:
        return Beside(run, self._worker(run.spec.drafter))

    def accept(self, scores: Tensor, proposal: Proposal, how: Scores) -> Verdict:
        if not isinstance(proposal, Window):
            return super().accept(scores, proposal, how)
        lengths = proposal.tokens.new_tensor(proposal.lengths or [proposal.size] * len(scores))
        if proposal.q is None:
            verdict = super().accept(scores, proposal, how)
            return Verdict(verdict.tokens, verdict.accepted.clamp(max=lengths))
        p_BKV = scores.softmax(-1)
        u_BK = torch.rand(p_BKV.shape[:2], device=p_BKV.device, generator=how.generator)
        e_BV = torch.empty_like(p_BKV[:, 0]).exponential_(generator=how.generator)
        assert proposal.late is not None and proposal.q_late is not None, "the draft's round is collected by now"
        late = (proposal.late, proposal.q_late)
        return Verdict(*pearl(p_BKV, proposal.tokens, proposal.q, lengths, *late, u_BK, e_BV))


METHOD = Pearl
