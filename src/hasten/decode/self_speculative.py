"""Draft & Verify: the model drafts for itself with some of its sublayers left out, and checks with all of them.

The draft shares every weight with the model, and reads the model's keys and values of the layers that it keeps.
Drafting ends after a candidate whose probability in the draft is below gamma, or after `most` candidates. After
each check, with e the share of the round's candidates that were accepted and full whether all `most` were drafted:

    AR <- beta1 AR + (1 - beta1) e
    gamma' = gamma + epsilon if AR < alpha, gamma if full, else gamma - epsilon
    gamma <- beta2 gamma + (1 - beta2) gamma'

Shapes: confidence and whether the target agrees [R, B, K] of R rounds; returns lengths [R] and gamma [R + 1].

Departures: which sublayers are left out is found by Bayesian optimisation of measured tokens a second there, about
1000 runs; here by a greedy search that is the same on every machine. From the whole model on, of the `tries` sublayers
that turn the residual stream least, the one goes without which the draft agrees most often with what the model wrote
after the calibration inputs; of the sets on the way the one is kept with which that text would have been written
fastest by drafts of one length, for passes that cost as much as their sublayers. The rule for a full round is the
official code's. Gamma begins anew in every call (there: it goes on); rows of a batch stop together, by their mean.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._proposals import Proposal, SmallModel, Verdict
from hasten.decode._sampling import draw
from hasten.decode._skipping import Search, by_part, skipping
from hasten.decode._writing import extended, prompts, written
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding",
    paper="2309.08168",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="up to 1.99x over plain decoding, LLaMA-2 and its variants",
    claimed=1.99,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate)", "decode/self_speculative(most=4, tries=4, beside=6)"),
    when="A deep model without a small one of its vocabulary; no memory is spared for a draft.",
    when_not="Shallow models, whose every layer counts, or where a trained draft many times smaller is at hand.",
    needs=("calibration",),
    hosts=("decoder",),
)


def naive_self_speculative(
    confidence: Tensor,
    agrees: Tensor,
    threshold: float,
    alpha: float = 0.9,
    epsilon: float = 0.01,
    beta1: float = 0.5,
    beta2: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """The exit rule, candidate by candidate.

    Args:
        confidence: probability of each candidate in the draft, [R, B, K]; all K are there, as if none were left out.
        agrees: bool [R, B, K], whether the target would accept each one.
        threshold: gamma in the first round; `alpha`, `epsilon`, `beta1`, `beta2` as above.

    Returns:
        how many are drafted in each round, [R], and gamma before the first round and after each, float64 [R + 1].
    """
    rounds, rows, most = confidence.shape
    gamma, rate = threshold, 0.0
    lengths, gammas = [], [gamma]
    for r in range(rounds):
        length = 0
        while length < most:
            length += 1
            if sum(confidence[r, b, length - 1].item() for b in range(rows)) / rows < gamma:
                break
        total = 0
        for b in range(rows):
            k = 0
            while k < length and agrees[r, b, k]:
                k += 1
            total += k
        rate = beta1 * rate + (1 - beta1) * total / (rows * length)
        other = gamma + epsilon
        if rate >= alpha:
            other = gamma if length == most else gamma - epsilon
        gamma = beta2 * gamma + (1 - beta2) * other
        lengths.append(length)
        gammas.append(gamma)
    return torch.tensor(lengths), torch.tensor(gammas, dtype=torch.float64)


def self_speculative(
    confidence: Tensor,
    agrees: Tensor,
    threshold: float,
    alpha: float = 0.9,
    epsilon: float = 0.01,
    beta1: float = 0.5,
    beta2: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """As `naive_self_speculative`, round by round, a round at once."""
    rounds, _, most = confidence.shape
    exit_ = Exit(threshold, alpha, epsilon, beta1, beta2)
    means_RK, lengths, gammas = confidence.double().mean(1), torch.zeros(rounds, dtype=torch.long), [threshold]
    for r in range(rounds):
        below = (means_RK[r] < exit_.gamma).nonzero()[:, 0]
        lengths[r] = length = min(most, int(below[0]) + 1) if len(below) else most
        accepted = agrees[r, :, :length].long().cumprod(1).sum(1)
        exit_.hear(accepted.tolist(), length, length == most)
        gammas.append(exit_.gamma)
    return lengths, torch.tensor(gammas, dtype=torch.float64)


@dataclasses.dataclass
class Exit:
    """The threshold gamma as it follows the acceptance rate during one call."""

    gamma: float
    alpha: float
    epsilon: float
    beta1: float
    beta2: float
    rate: float = 0.0

    def hear(self, accepted: list[int], length: int, full: bool) -> None:
        """A round of `length` candidates a row, of which each row accepted so many."""
        self.rate = self.beta1 * self.rate + (1 - self.beta1) * sum(accepted) / (len(accepted) * length)
        step = self.epsilon if self.rate < self.alpha else 0.0 if full else -self.epsilon
        self.gamma = self.beta2 * self.gamma + (1 - self.beta2) * (self.gamma + step)


@dataclasses.dataclass(frozen=True)
class SelfSpeculative(Drafting):
    """Drafts with the model itself, some sublayers left out."""

    most: int = option(12, "most candidates of one draft", least=1, most=64)
    threshold: float = option(
        0.6, "gamma at first: a less likely candidate ends the draft; 0 never does", least=0, most=1
    )
    adaptive: bool = option(True, "gamma follows the acceptance rate")
    alpha: float = option(0.9, "acceptance rate that gamma aims at", above=0, most=1)
    epsilon: float = option(0.01, "step of gamma", least=0, below=1)
    beta1: float = option(0.5, "how slowly the acceptance rate is averaged", least=0, below=1)
    beta2: float = option(0.9, "how slowly gamma moves", least=0, below=1)
    skip: float | None = option(None, "share of the parts left out; none: what promises most speed", above=0, below=1)
    unit: str = option(
        "sublayer", "what is left out: attention and mlp, or whole layers", choices=("sublayer", "layer")
    )
    tries: int = option(8, "parts of least importance of which each step of the search chooses one", least=1)
    inputs: int = option(16, "rows of the calibration data that are searched with", least=1)
    prompt: int = option(128, "most tokens of each that are read, the last ones", least=1)
    written: int = option(32, "tokens that the model writes after each of them", least=1)
    attention: float = option(1.0, "cost of an attention in a pass of one token, where an mlp costs 1", above=0)
    beside: float = option(1.0, "cost of all beside the layers in such a pass: head, launching, sampling", least=0)

    @property
    def longest(self) -> int:
        return self.most

    def proposer(self, run: Any) -> "Skipping":
        return Skipping(run)

    def draft_of(self, host: Any, context: Context) -> tuple[nn.Module, dict[str, Any]]:
        """Finds what is left out, and the draft without it.

        Raises:
            UsageError: the model's sublayers or layers can't be left out, or there is no calibration data.
        """
        if self.unit == "sublayer" and not host.anatomy.additive:
            raise UsageError(
                f"{self.name}: {type(host.model).__name__} does not add its sublayers to a residual stream, so that "
                "none can be left out: give unit=layer"
            )
        texts = []
        for ids, real in prompts(context.calibration or [], host.device, rows=self.inputs, last=self.prompt):
            tokens = written(host.model, ids, real, self.written)
            texts.append((torch.cat([ids, tokens], 1), extended(real, self.written), self.written))
        costs = {"attention": self.attention, "mlp": 1.0, "beside": self.beside}
        search = Search(host, texts, self.unit, costs, self.tries, self.most)
        number = None if self.skip is None else max(1, round(self.skip * len(search.costs)))
        found = search.best(number)
        context.note(
            self.name,
            skipped=by_part(found.skipped),
            parts=len(search.costs),
            agreement=round(found.agreement, 4),
            cost=round(found.cost, 4),
            expected_speed=round(found.speed, 3),
            expected_candidates=found.candidates,
        )
        record = {"skipped": by_part(found.skipped)}
        return self.rebuild(host, record), record

    def rebuild(self, host: Any, record: dict[str, Any]) -> nn.Module:
        return skipping(host, record["skipped"])


class Skipping(SmallModel):
    """Drafts with the model's own cache where that is a plain one, and ends where the draft is unsure."""

    def __init__(self, run: Any) -> None:
        draft = run.spec.drafter.model
        super().__init__(run, draft)
        method = run.method
        self.exit = Exit(method.threshold, method.alpha, method.epsilon, method.beta1, method.beta2)
        self.places: list[int] = draft.cache_of
        self.borrows = bool(self.places) and type(run.target.cache) is type(self.rows.cache)
        self.asked = 0

    def propose(self, most: int) -> Proposal:
        run, self.asked = self.run, most
        if self.borrows:
            if not most or run.unread[0].shape[1] > 1:  # the model reads the prompt first
                return self.none()
            self._borrow()
        ids, real = run.unread if self.borrows else self.unread
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        for _ in range(most):
            logits = self.rows.step(ids, real)
            scores = run.scores(logits, run.stops, run.rows, tokens)[:, 0]
            if run.scores.sampled:
                chances.append(scores.softmax(-1))
                tokens.append(draw(chances[-1], run.scores.generator))
            else:
                tokens.append(scores.argmax(-1))
            ids, real = tokens[-1][:, None], None
            if self.exit.gamma > 0 and logits[:, 0].float().softmax(-1).gather(1, ids).mean() < self.exit.gamma:
                break
        drafts = torch.stack(tokens, 1) if tokens else ids.new_empty(len(run.rows), 0)
        return Proposal(drafts, q=torch.stack(chances, 1) if chances else None)

    def _borrow(self) -> None:
        """Puts the draft where the model is: its cache refers to the model's entries, and what it adds is its own."""
        target, rows = self.run.target, self.rows
        rows.cache.layers = [copy.copy(target.cache.layers[place]) for place in self.places]
        rows.slots, rows.real, rows.count = target.slots, target.real, target.count

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        if proposal.size and self.run.method.adaptive:
            self.exit.hear(verdict.told, proposal.size, proposal.size == self.asked)
        if not self.borrows:
            super().settle(proposal, verdict)

    def select(self, going: Tensor) -> None:
        if not self.borrows:
            super().select(going)


METHOD = SelfSpeculative
