"""FreeCache: keys and values of the prompt, and of blocks that are wholly decided, are computed no more.

What later tokens do to the representation of a decided one soon fades, so it can be frozen. With a first forward of
everything, and F_b the first column of row b that is still masked, a step computes (arXiv 2505.21467)

    A_b = {i >= s_b : i was not given},   s_b = o_b + floor((F_b - o_b) / block) block

where o_b is the row's first mask at the beginning: the block that is being filled in, and all that follows it. Nothing
is refreshed. A block is frozen as its last forward left it, with a mask where the last token then was, as in the
official code (the cache is saved in the last step of a block); `settle` computes it once more first.

Shapes: decided_at [B, T], the step that decided a position (-1 given, UNDECIDED a mask); returns [B, T] bool.

Departures: the prompt is all that was given, so an infill's text on the right is frozen too; the paper's is on the
left. Blocks are counted from each row's first mask, and end where the call's own blocks end too (the code has these
only). With blockwise attention nothing behind the present block is computed, as nobody sees it. The code's window of
fixed size, which forgets the masks behind it, is left out.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._denoising import UNDECIDED, Denoising, State

CARD = Card(
    title="FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
    paper="2505.21467",
    seams=("denoise.cache",),
    effects=("time", "quality"),
    lossless=False,
    claim="12.14x on average over tasks together with Guided Diffusion, Dream-7B",
    claimed=12.14,
    identity="none: the prompt's keys are those of the first forward with every option",
    experiment=("stdlib-denoiser(task=infill)", "decode/freecache"),
    when="Long prompts, and text that is filled in roughly from left to right, block by block.",
    when_not="Nearly everything masked, few steps in all, or a prompt whose reading depends much on the masked text.",
    hosts=("diffusion_lm",),
)


def naive_freecache(decided_at: Tensor, begin: int, end: int, step: int, block: int, settle: bool) -> Tensor:
    """Which positions a step computes, position by position; the first step of all is not asked about.

    Args:
        decided_at: [B, T]; step: forwards so far.
        begin: column of the call's present block; end: the last column that is seen, plus one.
        block: columns that are frozen together; settle: whether they are computed once more when all are decided.

    Returns:
        [B, T] bool.
    """
    active = torch.zeros(decided_at.shape, dtype=torch.bool)
    for b, at in enumerate(decided_at.tolist()):
        length = len(at)
        moving = [i for i in range(length) if at[i] == UNDECIDED or (settle and at[i] == step - 1)]
        frontier = moving[0] if moving else length
        origin = next((i for i in range(length) if at[i] != -1), length)
        start = max(origin + (frontier - origin) // block * block, min(begin, frontier))
        for i in range(start, min(end, length)):
            active[b, i] = at[i] != -1
    return active


def freecache(decided_at: Tensor, begin: int, end: int, step: int, block: int, settle: bool) -> Tensor:
    """As `naive_freecache`, all positions at once."""
    length = decided_at.shape[1]
    moving = decided_at >= step - 1 if settle else decided_at == UNDECIDED
    frontier, origin = first(moving & (decided_at >= 0)), first(decided_at >= 0)
    start = torch.maximum(origin + (frontier - origin) // block * block, frontier.clamp(max=begin))
    place = torch.arange(length, device=decided_at.device)
    return (place >= start) & (place < end) & (decided_at >= 0)


def first(where: Tensor) -> Tensor:
    """The first column of each row where it holds, [B, 1]; the number of columns where there is none."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])[:, None]


@dataclasses.dataclass(frozen=True)
class FreeCache(Denoising):
    """Computes the block that is being filled in and what follows it; keys of all before it are read from a cache."""

    block: int = option(32, "columns that are frozen together, once all of them are decided", least=1)
    settle: bool = option(False, "whether a decided block is computed once more before it is frozen")

    def active(self, state: State) -> Tensor | None:
        end = state.tokens.shape[1] if state.sees is None else state.end
        return freecache(state.decided_at, state.begin, end, state.step, self.block, self.settle)


METHOD = FreeCache
