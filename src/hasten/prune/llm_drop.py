"""LLM-Drop: attention sublayers that hardly turn the residual stream are left out, with their norms (arXiv 2406.15786).

Each sublayer f is judged by how similar the stream is before and after it, in the whole model (sections 3.1, 3.2):

    X' = X + f(norm(X)),    S = mean over tokens of cos(X, X'),    importance = 1 - S

X, X' [batch, tokens, width]; those of least importance go, all at once. Attention Drop judges attention, MLP Drop the
feed-forward part, Joint Layer Drop ranks both in one list, Block Drop judges whole blocks.

Departures: padding is left out of the mean; the attention that matters most always stays, since a decoder without any
sees one token only; a block that loses both sublayers is removed whole.
"""

import dataclasses

import torch

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.prune.base import LayerPruning

CARD = Card(
    title="What Matters in Transformers? Not All Attention is Needed",
    paper="2406.15786",
    seams=("layers.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Llama-2-70B: 48.4% faster with half of the attention sublayers left out, 2.4% less accuracy on average",
    claimed=1.484,
    identity={"keep": 1.0},
    experiment=("stdlib-lm(task=generate)", "prune/llm_drop(keep=0.75)"),
    when="A deep decoder whose middle and late attention changes little; no training is needed.",
    when_not="Small or shallow models, where each sublayer counts, and tasks that look up facts in a long prompt.",
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit"),
)

TARGETS = {"attention": ("attention",), "mlp": ("mlp",), "joint": ("attention", "mlp"), "block": ("block",)}


def naive_llm_drop(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The importance of one part on one batch, token by token.

    Args:
        before, after: [batch, tokens, width], the residual stream around the part.
        mask: bool [batch, tokens], False at padding.

    Returns:
        the sum of 1 - cos over the real tokens, float32 scalar, and their number.
    """
    total, number = torch.zeros(()), 0
    for x, y, real in zip(before.flatten(0, 1).float(), after.flatten(0, 1).float(), mask.flatten(), strict=True):
        if real:
            total = total + 1 - (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())
            number += 1
    return total, number


def llm_drop(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As `naive_llm_drop`, for all tokens at once."""
    similarity = torch.cosine_similarity(before.float(), after.float(), dim=-1)  # [batch, tokens]
    return torch.where(mask, 1 - similarity, 0).sum(), int(mask.sum())


@dataclasses.dataclass(frozen=True)
class LLMDrop(LayerPruning):
    """Leaves out the sublayers (or blocks) of least importance."""

    keep: float = option(0.75, "fraction of the judged sublayers or blocks that stay", above=0, most=1)
    drop: int | None = option(None, "how many are left out; replaces keep", least=0)
    target: str = option("attention", "what is judged and left out", choices=TARGETS)

    def problems(self) -> list[str]:
        given = self.drop is not None and self.keep != 0.75
        return ["drop replaces keep: give only one of them"] if given else []

    @property
    def observes(self) -> tuple[str, ...]:
        return () if self.keep == 1 or self.drop == 0 else TARGETS[self.target]

    def importance(self, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
        return llm_drop(before, after, mask)

    def leave_out(self, depth: int, importance: dict[str, torch.Tensor]) -> dict[str, list[int]]:
        """The least important of the judged parts; ties go to the earlier layer, and to attention before mlp."""
        ranked = sorted((float(value), part, i) for part in importance for i, value in enumerate(importance[part]))
        number = round((1 - self.keep) * len(ranked)) if self.drop is None else self.drop
        spared = max((one for one in ranked if one[1] != "mlp"), default=None)
        ranked = [one for one in ranked if one != spared][:number]
        return {part: [i for _, kind, i in ranked if kind == part] for part in importance}


METHOD = LLMDrop
