"""SpecDec++: drafting goes on as long as all candidates so far are likely to be accepted, by a small head on the draft.

The head f reads the draft's last hidden state e_i at candidate Y_i and predicts the probability that Y_i is accepted;
drafting stops when 1 - prod_i f(e_i) > h (section 4 proves a threshold optimal). f is a residual network
of SiLU layers with two outputs, fitted with -w_acc a log f - w_rej (1 - a) log(1 - f), a = min(1, p(Y_i) / q(Y_i)),
where the target writes X, the draft answers Y_i to each prefix X_<i and reads Y with a share r of X mixed in.

Shapes: hidden [B, K, D] at K candidates; returns the probability of a refusal [B, K] and the drafted length [B].

As in the official code, e_i is known when the draft has read Y_i, so the token that this pass gives is drafted too.
Departures: there, list multiplication makes the residual blocks share their weights; here each has its own, as in the
paper. The head is fitted at set-up on the calibration inputs, hidden states computed once, with a learning rate for
thousands of examples (the official code: 5e-5). temperature=0 fits it for greedy decoding: a is whether the models
agree. In a batch, whose rows share their passes, the round ends when the mean over the rows exceeds h.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._rows import Rows
from hasten.decode._sampling import draw
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths",
    paper="2405.19715",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="2.04x on Alpaca, 2.26x on GSM8K and 2.23x on HumanEval over plain decoding, llama-2-chat 70B with a 7B "
    "draft, two A100s; 7 to 11% more than a fixed length",
    claimed=2.04,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate)", "decode/specdec_pp(temperature=0)"),
    when="As speculative decoding, where easy and hard stretches alternate, so that no fixed length suits both.",
    when_not="Without text like that to be generated for calibration, or when acceptance hardly varies: then a fixed "
    "length does as well and needs no fitting.",
    needs=("draft", "calibration"),
    hosts=("decoder",),
)


def naive_specdec_pp(
    hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: tuple[Tensor, Tensor], threshold: float, least: int
) -> tuple[Tensor, Tensor]:
    """The stopping rule row by row and candidate by candidate, in float32.

    Args:
        hidden: the draft's last hidden states at the candidates, [B, K, D].
        blocks: weight [D, D] and bias [D] of each residual layer; `last`: [2, D] and [2], outputs (refused, accepted).
        threshold: h; `least`: candidates drafted in any case.

    Returns:
        the probability that one candidate up to here is refused, [B, K], and how many are drafted, [B]; at most K + 1.
    """
    refused = torch.zeros(hidden.shape[:2])
    length = torch.zeros(len(hidden), dtype=torch.long)
    for b in range(len(hidden)):
        survived, stopped = 1.0, False
        for k in range(hidden.shape[1]):
            x = hidden[b, k].float()
            for weight, bias in blocks:
                z = weight.float() @ x + bias.float()
                x = x + z / (1 + torch.exp(-z))
            out = torch.exp(last[0].float() @ x + last[1].float())
            survived = survived * (out[1] / out.sum()).item()
            refused[b, k] = 1 - survived
            drafted = k + 2  # the candidate after this one comes from the same pass
            if not stopped:
                length[b] = drafted
                stopped = drafted >= least and 1 - survived > threshold
    return refused, length.clamp(min=1)


def specdec_pp(
    hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: tuple[Tensor, Tensor], threshold: float, least: int
) -> tuple[Tensor, Tensor]:
    """As `naive_specdec_pp`, all rows and candidates at once."""
    refused = 1 - chance(hidden, blocks, last).cumprod(1)
    drafted = torch.arange(2, hidden.shape[1] + 2, device=hidden.device)
    goes_on = ((refused <= threshold) | (drafted < least)).long().cumprod(1)
    return refused, (goes_on.sum(1) + 2).clamp(max=hidden.shape[1] + 1)


def chance(hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: tuple[Tensor, Tensor]) -> Tensor:
    """f(e): the predicted probability that a candidate is accepted, [...] from [..., D]."""
    x = hidden.float()
    for weight, bias in blocks:
        x = x + nn.functional.silu(nn.functional.linear(x, weight.float(), bias.float()))
    return nn.functional.linear(x, last[0].float(), last[1].float()).softmax(-1)[..., 1]


class AcceptanceHead(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return chance(hidden, [(part.weight, part.bias) for part in self.blocks], (self.last.weight, self.last.bias))


@dataclasses.dataclass(frozen=True)
class SpecDecPP(Drafting):
    threshold: float = option(0.7, "h: drafting stops when a refusal is more likely than this", above=0, below=1)
    least: int = option(2, "candidates drafted in any case, where the length limit lets them", least=1)
    most: int = option(20, "most candidates of one draft", least=1, most=64)
    layers: int = option(3, "residual layers of the head", least=0)
    weight: float = option(6.0, "w_rej, weight of a refusal in the loss (w_acc is 1)", above=0)
    mixing: float = option(0.15, "r, share of the target's tokens in what the draft reads in fitting", least=0, below=1)
    temperature: float = option(1.0, "temperature of the text that the head is fitted on; 0 is greedy", least=0)
    tokens: int = option(64, "tokens that the target writes after each calibration input", least=2)
    epochs: int = option(20, "passes over the examples (paper: 3, over far more of them)", least=1)
    lr: float = option(1e-3, "learning rate of the head, AdamW, cosine decay", above=0)

    watches = True

    def problems(self) -> list[str]:
        return [f"least={self.least} is above most={self.most}"] if self.least > self.most else []

    @property
    def longest(self) -> int:
        return self.most

    def stop(self, learnt: Any, hidden_BD: Tensor, survived_B: Tensor | None, step: int) -> tuple[Tensor, bool]:
        now = learnt(hidden_BD)
        survived = now if survived_B is None else survived_B * now
        return survived, step >= self.least and bool((1 - survived).mean() > self.threshold)

    def blank(self, host: Any, draft: Any) -> AcceptanceHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = AcceptanceHead(draft.get_output_embeddings().weight.shape[1], self.layers)
        return head.to(next(draft.parameters()).device)

    def learn(self, host: Any, draft: Any, context: Context) -> AcceptanceHead:
        started = time.perf_counter()
        generator = torch.Generator(host.device).manual_seed(context.seed)
        parts = [self.examples(host, draft, batch, generator) for batch in context.calibration or []]
        hidden_ND, accepted_N = (torch.cat(part) for part in zip(*parts, strict=True))
        head = self.blank(host, draft)
        loss = self.fit(head, hidden_ND, accepted_N, generator)
        seconds = time.perf_counter() - started
        context.note(
            self.name, examples=len(hidden_ND), acceptance=accepted_N.mean().item(), loss=loss, seconds=seconds
        )
        return head

    @torch.no_grad()
    def examples(
        self, host: Any, draft: nn.Module, batch: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the draft at its own answers, [N, D], and how likely each is accepted, [N]."""
        from transformers import DynamicCache

        ids = batch["input_ids"].to(host.device)
        mask = batch.get("attention_mask")
        real = None if mask is None or bool((mask == 1).all()) else mask.to(host.device).bool()
        small: Any = draft
        limit = ids.shape[1] + self.tokens
        places = [Rows(host.model, host.new_cache(), limit=limit, width=1)]
        places.append(Rows(draft, DynamicCache(config=small.config), limit=limit, width=1))
        written, answers, accepted = [], [], []
        step, still = ids, real
        for _ in range(self.tokens):
            p, q = (self._chances(rows.step(step, still)[:, -1]) for rows in places)
            x, y = draw(p, generator), draw(q, generator)
            index = y[:, None]
            accepted.append((p.gather(1, index) / q.gather(1, index))[:, 0].clamp(max=1))
            written.append(x)
            answers.append(y)
            step, still = x[:, None], None
        written_BN, answers_BN, accepted_BN = (torch.stack(part, 1) for part in (written, answers, accepted))
        taken = torch.rand(answers_BN.shape, generator=generator, device=ids.device) < self.mixing
        mixed = torch.where(taken, written_BN, answers_BN)
        whole = None if real is None else nn.functional.pad(real, (0, self.tokens), value=True)
        reader = Rows(draft, DynamicCache(config=small.config), limit=limit, width=1)
        seen: list[Tensor] = []
        hook = small.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            reader.step(torch.cat([ids, mixed], 1), whole, logits=self.tokens)
        finally:
            hook.remove()
        return seen[-1][:, -self.tokens :][~taken].float(), accepted_BN[~taken]

    def _chances(self, logits_BV: Tensor) -> Tensor:
        if self.temperature == 0:
            return nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).float()
        return (logits_BV.float() / self.temperature).softmax(-1)

    @torch.enable_grad()
    def fit(self, head: AcceptanceHead, hidden_ND: Tensor, accepted_N: Tensor, generator: torch.Generator) -> float:
        """Fits the head; returns the weighted loss of the last epoch."""
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=0.0)
        batches = -(-len(hidden_ND) // 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        total = 0.0
        for _ in range(self.epochs):
            total = 0.0
            for chosen in torch.randperm(len(hidden_ND), generator=generator, device=hidden_ND.device).split(256):
                f, a = head(hidden_ND[chosen]).clamp(1e-6, 1 - 1e-6), accepted_N[chosen]
                loss = -(a * f.log() + self.weight * (1 - a) * (1 - f).log()).sum() / (a + self.weight * (1 - a)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() / batches
        head.requires_grad_(False)
        return total


METHOD = SpecDecPP
