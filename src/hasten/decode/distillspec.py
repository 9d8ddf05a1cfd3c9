"""DistillSpec: before it drafts, the draft is trained to have the target's distribution on text that it writes itself.

On a sequence y that the draft writes after a prompt (share lambda of the batches; else the calibration's own text, or
the target's), with p and q the target's and the draft's distributions after x, y_<t, the mean over t is minimised of

    FKL   sum_v p log(p / q)            RKL   sum_v q log(q / p)            TVD   1/2 sum_v |p - q|
    JSD   beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

A drawn candidate is accepted with probability sum_v min(p, q) = 1 - TVD. Then another method drafts with
what was trained; what it promises of the output holds, whatever the draft has learnt.

Shapes: logits of the target and the draft [B, N, V] and which positions count [B, N]; returns the mean, a scalar.

Departures: a copy of the draft is trained, the one handed over stays as it is. AdamW with a cosine schedule and few
steps, so that set-up takes a minute (the paper trains on whole data sets). One gradient step for every batch that is
written; no gradient goes through the drawing, as in the paper. Which divergence is best differs between tasks and
between greedy and sampled decoding in the paper; all of its four are options.
"""

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.decode._drafting import check
from hasten.decode._writing import extended, prompts, read, written
from hasten.decode.base import Decoding, Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
    paper="2310.08461",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="10 to 45% faster than speculative decoding with the draft as it was, on a range of benchmarks, greedy and "
    "sampled",
    claimed=1.45,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate)", "decode/distillspec(steps=100)"),
    when="A draft that was trained apart from the target, and text of the kind that will be asked for.",
    when_not="A draft that has been distilled from this target already, or too few requests to pay for the training.",
    needs=("draft", "calibration"),
    hosts=("decoder",),
)


def naive_distillspec(target: Tensor, draft: Tensor, real: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """The divergence word by word.

    Args:
        target, draft: logits [B, N, V]; `real`: bool [B, N], the positions that count, at least one.
        divergence: fkl, rkl, jsd or tvd; `beta`: of jsd.

    Returns:
        the mean over these positions, float32.
    """
    total, count = torch.zeros(()), 0
    for b in range(target.shape[0]):
        for t in range(target.shape[1]):
            if not real[b, t]:
                continue
            count += 1
            p, q = torch.softmax(target[b, t].float(), 0), torch.softmax(draft[b, t].float(), 0)
            for v in range(len(p)):
                m = beta * p[v] + (1 - beta) * q[v]
                if divergence == "fkl":
                    total = total + p[v] * torch.log(p[v] / q[v])
                elif divergence == "rkl":
                    total = total + q[v] * torch.log(q[v] / p[v])
                elif divergence == "tvd":
                    total = total + (p[v] - q[v]).abs() / 2
                else:
                    total = total + beta * p[v] * torch.log(p[v] / m) + (1 - beta) * q[v] * torch.log(q[v] / m)
    return total / count


def distillspec(target: Tensor, draft: Tensor, real: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """As `naive_distillspec`, all words at once, in logarithms."""
    log_p, log_q = target[real].float().log_softmax(-1), draft[real].float().log_softmax(-1)
    if divergence == "fkl":
        return _kl(log_p, log_q)
    if divergence == "rkl":
        return _kl(log_q, log_p)
    if divergence == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2
    weights = torch.tensor([beta, 1 - beta], device=log_p.device).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@dataclasses.dataclass(frozen=True)
class DistillSpec(Decoding):
    """Trains the draft, then drafts with another method."""

    then: Method = option("decode/speculative", "the method that drafts with what was trained")
    divergence: str = option("fkl", "what is minimised", choices=("fkl", "rkl", "jsd", "tvd"))
    beta: float = option(0.5, "weight of the target's side in jsd", above=0, below=1)
    on_policy: float = option(1.0, "lambda, share of the batches that the draft writes itself", least=0, most=1)
    other: str = option(
        "data", "text of the other batches: the calibration's own, or the target's", choices=("data", "target")
    )
    temperature: float = option(1.0, "temperature at which is written, 0 is greedy", least=0)
    tokens: int = option(32, "tokens that are written after each prompt and learnt from", least=1)
    prompt: int = option(64, "most tokens of a prompt, the last ones of a calibration input", least=1)
    steps: int = option(200, "gradient steps", least=1)
    batch: int = option(16, "sequences a step", least=1)
    lr: float = option(3e-4, "peak learning rate, AdamW, cosine decay", above=0)

    def problems(self) -> list[str]:
        if not isinstance(self.then, Drafting) or "draft" not in self.then.card.needs:
            return [f"then={self.then} drafts with no small model: give a method that needs a draft"]
        return []

    @property
    def card(self) -> Any:
        """The card, with what the method that drafts needs and takes over."""
        theirs = self.then.card
        needs = tuple(dict.fromkeys([*CARD.needs, *theirs.needs]))
        return dataclasses.replace(CARD, needs=needs, seams=tuple(dict.fromkeys([*CARD.seams, *theirs.seams])))

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        then: Any = self.then
        check(then, host, context.draft)
        trained = self.trained(host, context)
        return then.install(host, dataclasses.replace(context, draft=trained))

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        then: Any = self.then
        then.restore(host, record)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def trained(self, host: Any, context: Context) -> nn.Module:
        """A trained copy of the draft; notes its acceptance before and after on texts that it was not trained on."""
        started = time.perf_counter()
        device, draft = host.device, context.draft
        assert draft is not None, "the plan was checked"
        generator = torch.Generator(device).manual_seed(context.seed)
        texts = [
            row if real is None else row[real[i]]
            for ids, real in prompts(context.calibration or [], device, last=self.prompt + self.tokens)
            for i, row in enumerate(ids)
        ]
        spared = max(1, len(texts) // 8)
        held_out, texts = texts[-spared:], texts[:-spared] or texts
        small = copy.deepcopy(draft).eval()
        dtype = next(small.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            small = small.float()
        small.requires_grad_(True)
        examples = [self.written(host.model, part, generator) for part in _parts(held_out, self.batch)]
        before = self.acceptance(host.model, small, examples)
        losses = self.fit(host.model, small, texts, generator)
        small.to(dtype)
        after = self.acceptance(host.model, small, examples)
        for own, theirs in zip(small.parameters(), draft.parameters(), strict=True):
            own.requires_grad_(theirs.requires_grad)
            own.grad = None
        context.note(
            self.name,
            acceptance_before=before[0],
            acceptance_after=after[0],
            agreement_before=before[1],
            agreement_after=after[1],
            first_loss=losses[0],
            last_loss=losses[-1],
            seconds=time.perf_counter() - started,
        )
        return small

    def fit(self, model: nn.Module, small: nn.Module, texts: list[Tensor], generator: torch.Generator) -> list[float]:
        """Trains; returns the loss of every step."""
        device = generator.device
        weights = list(small.parameters())
        optimizer = torch.optim.AdamW(weights, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        losses: list[float] = []
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < self.batch:
                order += torch.randperm(len(texts), generator=generator, device=device).tolist()
            chosen, order = [texts[i] for i in order[: self.batch]], order[self.batch :]
            drawn = torch.rand((), generator=generator, device=device).item()
            if drawn < self.on_policy:
                ids, real, count = self.written(small, chosen, generator)
            elif self.other == "target":
                ids, real, count = self.written(model, chosen, generator)
            else:
                ids, real = _together(chosen)
                count = min(self.tokens, ids.shape[1] - 1)
            with torch.no_grad():
                target = read(model, ids, real, count)
            loss = distillspec(
                target, read(small, ids, real, count), _counts(ids, real, count), self.divergence, self.beta
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    def written(
        self, model: nn.Module, texts: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, int]:
        """What a model writes after the ends of these texts: ids [B, T + n], which are real, and n."""
        ids, real = _together([text[-self.prompt :] for text in texts])
        new = written(model, ids, real, self.tokens, self.temperature, generator)
        return torch.cat([ids, new], 1), extended(real, self.tokens), self.tokens

    @torch.no_grad()
    def acceptance(
        self, model: nn.Module, small: nn.Module, examples: list[tuple[Tensor, Tensor | None, int]]
    ) -> tuple[float, float]:
        """How likely a drawn candidate is accepted, and how often both models' first choices agree."""
        shared, same = [], []
        for ids, real, count in examples:
            p, q = (read(one, ids, real, count).float().softmax(-1) for one in (model, small))
            shared.append(torch.minimum(p, q).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).float())
        return torch.cat(shared).mean().item(), torch.cat(same).mean().item()


def _parts(texts: list[Tensor], size: int) -> list[list[Tensor]]:
    return [texts[at : at + size] for at in range(0, len(texts), size)]


def _together(texts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """One left-padded batch: ids [B, T] and which are real, None where all are."""
    width = max(map(len, texts))
    ids = torch.stack([nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    if all(len(text) == width for text in texts):
        return ids, None
    return ids, torch.stack([torch.arange(width, device=ids.device) >= width - len(text) for text in texts])


def _counts(ids: Tensor, real: Tensor | None, count: int) -> Tensor:
    """The last `count` positions at which a token follows a token, [B, count]."""
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    return real[:, -count:] & real[:, -count - 1 : -1]


METHOD = DistillSpec
