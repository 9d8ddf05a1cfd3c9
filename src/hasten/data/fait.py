"""FAIT: where correct code differs from a similar faulty variant, its tokens count more in fine-tuning.

For correct code c of n trained tokens, prompted by p, and a variant v of it (section 3 of the paper):

    L = - (1/n) sum_j w_j log P(c_j | p, c_<j),    w_j = 1 + a s(d) at error-sensitive tokens, 1 at the others

Error-sensitive are the tokens of c that a diff of lines, and within the lines that differ a diff of tokens, does not
find in v. The weight is dynamic: s is the logistic function and d how much likelier the model finds the variant now,

    d = mean over error-sensitive i of log P(v_i | p, v_<i) - mean over error-sensitive j of log P(c_j | p, c_<j),

without gradient, so that a token that the model gets right already goes back to weight 1 and one that it gets wrong to
1 + a. Shapes: logits [batch, tokens, vocabulary], ids and labels [batch, tokens].

Departures: the text of the paper's equation for w_j was not at hand; the logistic form of w_j and a = 2 are ours, after
its description (weights at error-sensitive tokens that follow the model's likelihood of both implementations). A diff
of tokens is difflib's where the paper has Levenshtein's distance. A token that follows what the variant has more of
counts as error-sensitive. `compare=fork` saves the forward of the variant: d is then taken at the one place where the
two part, whose tokens both follow the same text, from the scores that the correct code's forward has anyway.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option

CARD = Card(
    title="FAIT: Fault-Aware Fine-Tuning for Better Code Generation",
    paper="2503.16913",
    seams=("loss",),
    effects=("quality", "steps"),
    lossless=False,
    claim="pass@1 of seven models of code 6.9% higher (relative) after one epoch than by plain fine-tuning",
    claimed=None,
    identity={"strength": 0.0},
    hosts=("decoder",),
    experiment=("stdlib-faults(target=0.65)", "data/fait(strength=8, compare=fork)"),
    when="Fine-tuning on code or sums for which faulty variants are at hand or can be made.",
    when_not="Pre-training, or texts without variants; variants that differ everywhere.",
    tune={"strength": (0.5, 16.0)},
)

IGNORED = -100


def naive_fait(logits: Tensor, labels: Tensor, sensitive: Tensor, lead: Tensor, strength: float) -> Tensor:
    """L with loops.

    Args:
        logits: [batch, tokens, vocabulary]; row j scores label j. labels: [batch, tokens], -100 where none counts.
        sensitive: bool [batch, tokens]. lead: [batch], d. strength: a.

    Returns:
        fp32 scalar, the mean over all trained tokens; 0 where there is none.
    """
    total, count = torch.zeros(()), 0
    for b in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            if int(labels[b, j]) == IGNORED:
                continue
            scores = logits[b, j].float()
            logp = scores[labels[b, j]] - scores.logsumexp(0)
            weight = 1 + strength * torch.sigmoid(lead[b].detach().float()) if sensitive[b, j] else 1.0
            total, count = total - weight * logp, count + 1
    return total / max(1, count)


def fait(logits: Tensor, labels: Tensor, sensitive: Tensor, lead: Tensor, strength: float) -> Tensor:
    """As `naive_fait`, all tokens at once."""
    each = F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    weight = 1 + strength * torch.sigmoid(lead.detach().float())[:, None] * sensitive
    return (weight * each).sum() / (labels != IGNORED).sum().clamp(min=1)


def differences(
    tokens: list[int], variant: list[int], line_ends: tuple[int, ...], by: str = "token"
) -> tuple[list[bool], list[bool]]:
    """Which tokens of either text the other does not have at that place.

    Args:
        line_ends: tokens that end a line. by: `token`, or `line`: all tokens of lines that differ.
    """
    masks = [False] * len(tokens), [False] * len(variant)
    lines = [_lines(one, line_ends) for one in (tokens, variant)]
    ends = [[0], [0]]
    for side in (0, 1):
        for line in lines[side]:
            ends[side].append(ends[side][-1] + len(line))
    for kind, a, b, c, d in difflib.SequenceMatcher(None, lines[0], lines[1], autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        (i, j), (k, m) = (ends[0][a], ends[0][b]), (ends[1][c], ends[1][d])
        if by == "line":
            spans = [(i, j, k, m)]
        else:
            found = difflib.SequenceMatcher(None, tokens[i:j], variant[k:m], autojunk=False).get_opcodes()
            spans = [(i + p, i + q, k + r, k + s) for op, p, q, r, s in found if op != "equal"]
        for begin, end, other_begin, other_end in spans:
            for mask, first, last in ((masks[0], begin, end), (masks[1], other_begin, other_end)):
                for place in range(first, min(len(mask), max(last, first + 1))):
                    mask[place] = True
    return masks


def _lines(tokens: list[int], ends: tuple[int, ...]) -> list[tuple[int, ...]]:
    found, line = [], []
    for token in tokens:
        line.append(token)
        if token in ends:
            found.append(tuple(line))
            line = []
    return [*found, tuple(line)] if line else found


@dataclass(frozen=True)
class Fait(Method):
    """Weights in the loss at the tokens where a faulty variant differs."""

    strength: float = option(2.0, "a: what an error-sensitive token weighs more at most", least=0)
    by: str = option("token", "the tokens that differ, or all of the lines that do", choices=("token", "line"))
    compare: str = option(
        "variant", "how the two are compared: a forward of the variant, or where they part", choices=("variant", "fork")
    )
    line_ends: tuple[int, ...] = option((10,), "ids of the tokens that end a line; the newline of bytes by default")

    def attach(self, run: Any) -> None:
        """Adds (w_j - 1) log P(c_j) of the error-sensitive tokens to the loss of the person's loop."""
        if not self.strength:
            return
        calls, held = run.watch_calls(), {}

        def begin(run: Any, batch: Any) -> None:
            held["batch"] = self.checked(batch)

        def weigh(run: Any, loss: Tensor) -> Tensor:
            ids, variant, labels = held["batch"]
            logits = calls.of(self.name)[0].logits
            if logits.shape[:2] != ids.shape:
                raise UsageError(
                    f"{self.name}: the model gave scores {list(logits.shape[:2])} for a batch of {list(ids.shape)}: "
                    "call it on the whole of input_ids"
                )
            sensitive, other = self.masks(ids, variant, labels)
            if self.compare == "fork":
                lead = fork(logits.detach(), ids, variant)
            else:
                with torch.no_grad(), run.autocast():
                    wrong = run.host.model(input_ids=variant).logits
                lead = _mean(wrong, variant, other) - _mean(logits.detach(), ids, sensitive)
            labels, sensitive = labels[:, 1:], sensitive[:, 1:]
            plain = torch.where(sensitive, labels, IGNORED)
            whole = (labels != IGNORED).sum().clamp(min=1)
            more = fait(logits[:, :-1], plain, sensitive, lead, self.strength) - fait(
                logits[:, :-1], plain, sensitive, lead, 0.0
            )
            return loss + more * (plain != IGNORED).sum() / whole

        run.on("forward", begin)
        run.on("loss", weigh)

    def checked(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, variant_ids and labels of a batch, [batch, tokens] each.

        Raises:
            UsageError: the batch does not hold them.
        """
        keys = ("input_ids", "variant_ids")
        if not isinstance(batch, Mapping) or any(not isinstance(batch.get(key), Tensor) for key in keys):
            raise UsageError(
                f"{self.name} needs batches that map input_ids and variant_ids, the correct and the faulty text, to "
                "ids [batch, tokens] (and labels, -100 where no token is trained on)"
            )
        ids, variant = (batch[key] for key in keys)
        labels = batch.get("labels", ids)
        if ids.dim() != 2 or labels.shape != ids.shape or len(variant) != len(ids):
            raise UsageError(
                f"{self.name}: input_ids {list(ids.shape)}, labels {list(labels.shape)} and variant_ids "
                f"{list(variant.shape)} must be [batch, tokens] of one batch"
            )
        return ids, variant, labels

    def masks(self, ids: Tensor, variant: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Error-sensitive tokens of both texts, bool [batch, tokens]; of the correct one only those with a label."""
        pairs = [
            differences(a, b, self.line_ends, self.by) for a, b in zip(ids.tolist(), variant.tolist(), strict=True)
        ]
        sensitive, other = (torch.tensor([pair[side] for pair in pairs], device=ids.device) for side in (0, 1))
        return sensitive & (labels != IGNORED), other


def fork(logits: Tensor, ids: Tensor, variant: Tensor) -> Tensor:
    """d at the first token in which the two texts differ, [batch]; 0 where they do not.

    Args:
        logits: [batch, tokens, vocabulary] of the correct texts.
    """
    width = min(ids.shape[1], variant.shape[1])
    differ = ids[:, :width] != variant[:, :width]
    differ[:, 0] = False
    place = differ.int().argmax(1).clamp(min=1)
    row = torch.arange(len(ids), device=ids.device)
    scores = logits[row, place - 1].float()
    lead = scores[row, variant[row, place]] - scores[row, ids[row, place]]
    return torch.where(differ.any(1), lead, 0.0)


def _mean(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of the tokens in the mask, each given those before it, [batch]; 0 where there is none."""
    each = -F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none") * mask[:, 1:]
    return each.sum(1) / mask[:, 1:].sum(1).clamp(min=1)


METHOD = Fait
