"""TinyCLIP: a small model begins with weights cut out of a larger one, and mimics how that one relates image and text.

Affinity mimicking: with the normalised embeddings I, T [B, P] of the batch, the logit scale s and (t) for the teacher,

    A_I2T = softmax(s I T'),   A_T2I = softmax(s T I'),   L = 1/2 (KL(A_I2T^t || A_I2T) + KL(A_T2I^t || A_T2I)),

and alpha L + (1 - alpha) L_task is minimised; alpha is 1 in the authors' runs. KL is over rows, a mean over the batch.

Weight inheritance (manual): layer i of s student layers is the teacher's layer i floor(t / s); of channels, heads and
neurons the leading ones are taken, of fused projections those of queries, keys and values each. `channels=important`
takes those of the largest absolute weights instead, in their order (the paper: learned masks, not offered here). Every
model whose teacher is of the same classes can inherit; affinity mimicking needs a model with `logits_per_image`.

Departures: KL, where the authors' code has the cross-entropy (which differs by the teacher's entropy, without a
gradient); one stage, where they go from the teacher to 25% of its size in three.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.grow import _inheritance

CARD = Card(
    title="TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance",
    paper="2309.12314",
    seams=("weights.resize", "loss"),
    effects=("steps", "quality"),
    lossless=False,
    claim="ViT-B/32 halved: as accurate as trained from scratch in 1.4 to 7.8 times less training",
    claimed=1.4,
    identity={"inherit": "none", "alpha": 0.0},
    needs=("teacher",),
    experiment=("digits-pairs(task=train)", "grow/weight_inheritance(alpha=0.5, until=0.05)"),
    tune={"alpha": (0.1, 1.0)},
    when="A small CLIP (or decoder, or vision transformer: alpha=0) is wanted, and a larger one of its kind is there.",
    when_not="No larger model of the same classes is there, or mimicking it costs more than the steps that it saves.",
)


def naive_weight_inheritance(
    image: Tensor, text: Tensor, scale: float, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float
) -> Tensor:
    """The affinity loss L with loops.

    Args:
        image, text: [B, P] normalised embeddings of the student. scale: its logit scale, after the exponential.
        teacher_image, teacher_text: [B, P'] of the teacher; teacher_scale: its logit scale.

    Returns:
        Scalar, fp32 or finer.
    """
    total, count = torch.zeros((), dtype=torch.promote_types(image.dtype, torch.float32)), len(image)
    image, text, teacher_image, teacher_text = (one.to(total) for one in (image, text, teacher_image, teacher_text))
    for mine, theirs in (
        ((image, text), (teacher_image, teacher_text)),
        ((text, image), (teacher_text, teacher_image)),
    ):
        for row in range(count):
            scores = [scale * (mine[0][row] * mine[1][b]).sum() for b in range(count)]
            wanted = [teacher_scale * (theirs[0][row] * theirs[1][b]).sum() for b in range(count)]
            norm, norm_wanted = (sum(torch.exp(z) for z in each) for each in (scores, wanted))
            for z, w in zip(scores, wanted, strict=True):
                p = torch.exp(w) / norm_wanted
                total = total + p * (torch.log(p) - torch.log(torch.exp(z) / norm))
    return total / (2 * count)


def weight_inheritance(
    image: Tensor, text: Tensor, scale: float, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float
) -> Tensor:
    """As `naive_weight_inheritance`, at once."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    image, text, teacher_image, teacher_text = (one.to(dtype) for one in (image, text, teacher_image, teacher_text))
    return affinity(scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T)


def affinity(scores: Tensor, wanted: Tensor) -> Tensor:
    """L of the scores [B, B] of images (rows) and texts, and the teacher's."""
    losses = []
    for mine, theirs in ((scores, wanted), (scores.T, wanted.T)):
        log, log_wanted = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
        losses.append(F.kl_div(log, log_wanted, log_target=True, reduction="batchmean"))
    return (losses[0] + losses[1]) / 2


@dataclass(frozen=True)
class WeightInheritance(Method):
    inherit: str = option("manual", "whether weights come from the teacher", choices=("manual", "none"))
    channels: str = option("leading", "which channels, heads and neurons are taken", choices=("leading", "important"))
    alpha: float = option(1.0, "share of the affinity loss; the rest is the loop's own loss", least=0, most=1)
    until: float = option(1.0, "part of the run in which affinities are mimicked; needs steps below 1", above=0, most=1)

    def attach(self, run: Any) -> None:
        """Gives the model the teacher's weights, and hooks the affinity loss into the run.

        Raises:
            UsageError: a teacher of other classes or smaller than the model; a run without steps where `until` < 1.
        """
        if self.until < 1 and run.steps is None:
            raise UsageError(f"{self.name} ends within the run: pass steps=N, or leave until at 1")
        teacher = run.context.teacher
        if self.inherit == "manual":
            _inheritance.inherit(self.name, run, teacher, self.channels)
        if not self.alpha:
            return
        training = teacher.training
        teacher.eval()
        run.changes.call(lambda: teacher.train(training))
        calls = run.watch_calls()

        def mimic(run: Any, loss: Tensor) -> Tensor:
            if self.until < 1 and run.progress >= self.until:
                return loss
            parts = []
            for call in calls.of(self.name):
                with torch.no_grad(), run.autocast():
                    wanted = scores_of(self.name, teacher(**call.inputs))
                parts.append(affinity(scores_of(self.name, call.output), wanted))
            mimicked = torch.stack(parts).mean()
            return mimicked if self.alpha == 1 else self.alpha * mimicked + (1 - self.alpha) * loss

        run.on("loss", mimic)


def scores_of(name: str, output: Any) -> Tensor:
    """The scaled scores of images and texts.

    Raises:
        UsageError: the model does not score images against texts.
    """
    found = output.get("logits_per_image") if isinstance(output, Mapping) else getattr(output, "logits_per_image", None)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"{name} mimics how images relate to texts, and the model's output, a {type(output).__name__}, holds no "
            "logits_per_image: set alpha=0 to inherit weights only"
        )
    return found


METHOD = WeightInheritance
