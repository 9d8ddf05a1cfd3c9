"""Confident decoding: a step of a diffusion language model decides every token that is surer than a threshold.

    decide i  where  c_i > gamma;    where no token of a row is that sure, those that the schedule decides
    c_i = p(x_i), or p(x_i) - p of the second likeliest (margin)

so that the number of steps follows the text instead of being fixed (Dimple, arXiv 2505.16990).
The schedule decides at least one token, the one with the highest confidence unless `fallback` says otherwise. In
the last of a given number of steps all are decided. p is the model's own, whatever the temperature, as the official
code recommends (`use_original_confidence`); sampled tokens are judged by their own probability.

Shapes: confidence and rank [B, C], open [B, C] bool; returns what is decided, [B, C] bool.

Departures: the official code applies the rule to all rows of a batch at once, this one to each row, so that a row's
text does not depend on its neighbours. There one option (`alg`) says both what the threshold is put to and what the
fallback goes by, and `entropy` is put to the threshold though it is never above 0; here these are two options, and the
entropy serves as a fallback only. Tokens that run ahead of the schedule are made up for by smaller later quotas, each
the remaining tokens over the remaining steps, where the code walks along its list of times. The paper's prefilling,
which computes the prompt once, is `decode/dkv_cache(variant=prefill)`, to be added to the plan.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._denoising import Denoising, Guess, State
from hasten.decode._denoising_loop import best

CARD = Card(
    title="Dimple: Discrete Diffusion Multimodal Large Language Model with Parallel Decoding",
    paper="2505.16990",
    seams=("denoise.order",),
    effects=("time", "steps", "quality"),
    lossless=False,
    claim="a third of the steps of one token a step, Dimple-7B, threshold 0.95",
    claimed=3.0,
    identity={"threshold": 1.0},
    experiment=("stdlib-denoiser(task=infill)", "decode/dimple(threshold=0.7)"),
    when="Text with easy stretches, of which the model is sure whatever stands in the other masks, and a schedule of "
    "one token a step otherwise.",
    when_not="A model whose confidence means little, or a schedule that already decides several tokens a step.",
    hosts=("diffusion_lm",),
)


def naive_dimple(
    confidence: Tensor, rank: Tensor, open: Tensor, quota: list[int], threshold: float, last: bool
) -> Tensor:
    """The rule row by row.

    Args:
        confidence: [B, C]; rank: [B, C], what the fallback goes by; open: [B, C], which columns may be decided.
        quota: tokens that the schedule decides in each row; last: whether this is the last step.

    Returns:
        [B, C] bool.
    """
    chosen = torch.zeros(open.shape, dtype=torch.bool)
    for b in range(len(open)):
        places = [c for c in range(open.shape[1]) if open[b, c]]
        sure = [c for c in places if last or confidence[b, c].item() > threshold]
        for c in sure or sorted(places, key=lambda c: -rank[b, c].item())[: quota[b]]:
            chosen[b, c] = True
    return chosen


def dimple(confidence: Tensor, rank: Tensor, open: Tensor, quota: list[int], threshold: float, last: bool) -> Tensor:
    """As `naive_dimple`, all rows at once."""
    if last:
        return open
    sure = (confidence > threshold) & open
    fallback = best(rank.masked_fill(~open, -torch.inf), quota)
    return torch.where(sure.any(1, keepdim=True), sure, fallback)


@dataclasses.dataclass(frozen=True)
class Dimple(Denoising):
    """Decides every token surer than the threshold, or what the schedule decides where none is."""

    threshold: float = option(
        0.95, "gamma, confidence above which a token is decided; 1 decides none so", above=0, most=1
    )
    measure: str = option("probability", "what the threshold is put to", choices=("probability", "margin"))
    fallback: str = option(
        "plain",
        "what decides where none is sure; plain is the call's own confidence",
        choices=("plain", "probability", "margin", "entropy", "random", "left"),
    )

    def choose(self, state: State, guess: Guess) -> tuple[Tensor, Tensor]:
        confidence = guess.confidence(self.measure, state)
        kind = state.confidence if self.fallback == "plain" else self.fallback
        rank = confidence if kind == self.measure else guess.confidence(kind, state)
        last = state.steps_left == 1
        return dimple(confidence, rank, guess.open, state.quota, self.threshold, last), guess.tokens


METHOD = Dimple
