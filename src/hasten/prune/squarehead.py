"""SquareHead: a pruned model is trained towards the dense model's hidden states, each layer's error taken relatively.

With the hidden states f_l of the dense teacher t and of the student s after block l (the paper's distillation loss):

    L_feat = sum_l MSE(f_l^t, f_l^s) / MSE(f_l^t, 0),    L = task L_task + hidden L_feat + logit L_KL

L_task is the loss of the person's own loop; L_KL = T^2 KL(softmax(z^t / T) || softmax(z^s / T)), mean over tokens, is 0
by default, as in the authors' run scripts. States [batch, tokens, width], padding left out. Zeros stay zero; with
`sparsity` more weights, those of least magnitude, become zero during training, along a cubic (Zhu and Gupta,
arXiv 1710.01878, eq. 1; from 0 at `begin` to `sparsity` at `end`, in `prunings` steps):

    S_k = sparsity (1 - (1 - k / prunings)^3)

Departures: states are those of the residual stream after each block, also after the last, before the last norm. The
divisor's guard against 0 is 1e-8, where the official code adds bfloat16's epsilon. L_KL takes in all real tokens, not
those with labels only. Gradual pruning goes by magnitude.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.prune import _patterns
from hasten.prune._recovery import Pair, distil, hold_zeros

CARD = Card(
    title="Sparse Finetuning for Inference Acceleration of Large Language Models",
    paper="2310.06927",
    seams=("loss",),
    effects=("steps", "quality"),
    lossless=False,
    claim="MPT-7B fine-tuned on GSM8K at 75% sparsity as accurate as the dense model; CE alone falls behind",
    claimed=None,
    identity={"hidden": 0.0, "logit": 0.0},
    needs=("teacher",),
    hosts=("decoder", "diffusion_lm", "vit"),
    experiment=("stdlib-recover(task=train)", "prune/squarehead(logit=1.0)"),
    when="After pruning to 60% and more, while training data and the dense model are at hand.",
    when_not="Up to half of the weights, where no training is needed. The teacher makes each step a third dearer.",
)

GUARD = 1e-8


def naive_squarehead(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """L_feat with loops over layers and tokens.

    Args:
        student, teacher: [batch, tokens, width] of each layer. mask: bool [batch, tokens], False at padding.

    Returns:
        fp32 scalar.
    """
    total = torch.zeros(())
    for s, t in zip(student, teacher, strict=True):
        error, size, number = torch.zeros(()), torch.zeros(()), 0
        for b in range(s.shape[0]):
            for n in range(s.shape[1]):
                if mask is None or mask[b, n]:
                    error = error + (s[b, n].float() - t[b, n].float()).square().sum()
                    size = size + t[b, n].float().square().sum()
                    number += s.shape[2]
        total = total + (error / number) / (size / number + GUARD)
    return total


def squarehead(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """As `naive_squarehead`, a layer at a time."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        real_s, real_t = (s, t) if mask is None else (s[mask], t[mask])
        size = real_t.float().square().mean() + GUARD
        losses.append((real_s.float() - real_t.float()).square().mean() / size)
    return torch.stack(losses).sum()


def divergence(logits: Tensor, wanted: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(teacher || student), mean over the rows of [..., classes] where `mask` [...] is True."""
    if mask is not None:
        logits, wanted = logits[mask], wanted[mask]
    mine, theirs = ((one.flatten(0, -2).float() / temperature).log_softmax(-1) for one in (logits, wanted))
    return temperature**2 * F.kl_div(mine, theirs, log_target=True, reduction="batchmean")


@dataclasses.dataclass(frozen=True)
class SquareHead(Method):
    task: float = option(1.0, "weight of the loop's own loss", least=0)
    hidden: float = option(1.0, "weight of the hidden states' error", least=0)
    logit: float = option(0.0, "weight of the divergence from the teacher's outputs", least=0)
    temperature: float = option(1.0, "of that divergence", above=0)
    sparsity: float | None = option(
        None, "sparsity that gradual pruning ends at; none: only zeros that are there hold", above=0, below=1
    )
    pattern: str = option("unstructured", "which weights gradual pruning takes together, as in prune/magnitude")
    begin: float = option(0.0, "fraction of the run at which gradual pruning begins", least=0, below=1)
    end: float = option(0.5, "fraction of the run at which it ends", above=0, most=1)
    prunings: int = option(10, "times that weights are pruned", least=1)

    training_only = True

    def problems(self) -> list[str]:
        if self.task == self.hidden == self.logit == 0:
            return ["task, hidden and logit are all 0: there is no loss left"]
        if self.begin >= self.end:
            return [f"gradual pruning begins at {self.begin:g} and ends at {self.end:g}: begin must be before end"]
        return [] if self.sparsity is None else _patterns.problems(self.pattern, self.sparsity)

    def attach(self, run: Any) -> None:
        """Hooks the losses and the zeros into a run.

        Raises:
            UsageError: no teacher that fits, sparse layers, or gradual pruning without a number of steps.
        """
        if self.sparsity is not None and run.steps is None:
            raise UsageError(f"{self.name} prunes gradually over the run: pass steps=N")
        hold_zeros(self, run)
        if self.hidden or self.logit or self.task != 1:
            distil(self.name, run, self.combine)

    def combine(self, loss: Tensor, pair: Pair) -> Tensor:
        """L."""
        total = self.task * loss
        if self.hidden:
            total = total + self.hidden * squarehead(pair.student, pair.teacher, pair.mask)
        if self.logit:
            if pair.logits is None or pair.wanted is None:
                raise UsageError(f"{self.name}: logit > 0 needs a model that returns logits")
            mask = pair.mask if pair.mask is not None and pair.mask.shape == pair.logits.shape[:-1] else None
            total = total + self.logit * divergence(pair.logits, pair.wanted, self.temperature, mask)
        return total

    def target(self, step: int, steps: int | None) -> float | None:
        """The sparsity that gradual pruning has at a step, 0 before it begins; None without it."""
        if self.sparsity is None or steps is None:
            return None
        if _patterns.of(self.pattern):  # n:m comes whole
            return self.sparsity if step >= int(self.begin * steps) else 0.0
        at = 0
        for k in range(1, self.prunings + 1):
            if step >= min(steps - 1, int((self.begin + (self.end - self.begin) * (k / self.prunings)) * steps)):
                at = k
        return self.sparsity * (1 - (1 - at / self.prunings) ** 3)

    def keep(self, weight: Tensor, sparsity: float) -> Tensor:
        """Which weights [out, in] stay, by magnitude within the matrix."""
        return _patterns.keep(weight.abs(), sparsity, self.pattern, by_row=False)


METHOD = SquareHead
