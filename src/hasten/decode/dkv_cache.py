"""dKV-Cache: keys and values of decided tokens are cached, one step after the token was decided.

The representation of a token still changes much in the step in which it is decided, from the mask's to its own, and
little after it. With D_t the positions decided before step t, the prompt included, a step computes (arXiv 2505.15781)

    Decode:  all but D_{t-1}                          masks, and what the step before decided
    Greedy:  C_t, what step t - 1 decided, and W_t     C_t is decided now, W_t are masks around it

and everything every `refresh` steps and at the beginning of a block. `prefill` computes all but the prompt, and the
prompt once; `pd` is Decode with a prompt that is never computed again.

Shapes: decided_at [B, T], the step that decided a position (-1 given, UNDECIDED a mask), ahead [B, T] bool or None is
C_t; returns which positions are computed, [B, T] bool.

Departures: Greedy needs to know C_t before the step. That is so with confidence=random, the only one of the official
code, and with left; otherwise W_t are the masks around what was decided last, and one of them is decided. With
several tokens to decide the code takes window masks for each in turn, those on the left first; so does this one. The
code's LLaDA variant computes everything in the second step of a block too, this one and its Dream variant do not.
Where scores are those of the next token (Dream), a position whose next token is masked is computed too (the code has
three choices; `un_right` is this one). Rows of a batch may compute different positions.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._denoising import UNDECIDED, Denoising, State

CARD = Card(
    title="dKV-Cache: The Cache for Diffusion Language Models",
    paper="2505.15781",
    seams=("denoise.cache",),
    effects=("time", "quality"),
    lossless=False,
    claim="2x to 10x over the full computation, LLaDA-8B and Dream-7B, almost lossless with Decode",
    claimed=2.0,
    identity={"refresh": 1},
    experiment=("stdlib-denoiser(task=infill)", "decode/dkv_cache"),
    when="One or few tokens a step, and a prompt or decided text that is long beside the masks.",
    when_not="Few steps in all, nearly everything masked, or a model whose forward costs the same for few positions.",
    hosts=("diffusion_lm",),
)

VARIANTS = ("decode", "greedy", "prefill", "pd")


def naive_dkv_cache(
    decided_at: Tensor, ahead: Tensor | None, step: int, block_step: int, refresh: int, variant: str, window: int
) -> Tensor:
    """Which positions a step computes, position by position; the first step of all is not asked about.

    Args:
        decided_at: [B, T]; ahead: [B, T] bool, what this step will decide, None where the scores decide that.
        step, block_step: forwards so far, and those of this block.
        refresh: steps from one computation of everything to the next; window: masks around each token (greedy).

    Returns:
        [B, T] bool.
    """
    rows, length = decided_at.shape
    active = torch.zeros(rows, length, dtype=torch.bool)
    fresh = block_step % refresh == 0 and variant != "prefill"
    for b in range(rows):
        at = decided_at[b].tolist()
        late = [i for i in range(length) if at[i] == step - 1]
        for i in range(length):
            if fresh:
                active[b, i] = variant != "pd" or at[i] >= 0
            elif variant == "prefill":
                active[b, i] = at[i] >= 0
            elif variant != "greedy":
                active[b, i] = at[i] >= step - 1
        if variant == "greedy" and not fresh:
            now = late if ahead is None else [i for i in range(length) if ahead[b, i]]
            for i in late + now:
                active[b, i] = True
            for i in now:
                wanted = window if ahead is not None else max(1, window)
                for distance in range(1, length):
                    for j in (i - distance, i + distance):
                        if wanted and 0 <= j < length and at[j] == UNDECIDED and not active[b, j]:
                            active[b, j] = True
                            wanted -= 1
    return active


def dkv_cache(
    decided_at: Tensor, ahead: Tensor | None, step: int, block_step: int, refresh: int, variant: str, window: int
) -> Tensor:
    """As `naive_dkv_cache`, all positions at once; greedy goes from token to token."""
    if variant == "prefill":
        return decided_at >= 0
    if block_step % refresh == 0:
        return decided_at >= (0 if variant == "pd" else -1)
    if variant != "greedy":
        return decided_at >= step - 1
    late = decided_at == step - 1
    now = late if ahead is None else ahead
    active = late | now
    wanted = window if ahead is not None else max(1, window)
    if wanted:
        masked, place = decided_at == UNDECIDED, torch.arange(decided_at.shape[1], device=decided_at.device)
        for b, i in now.nonzero().tolist():
            free = masked[b] & ~active[b]
            # nearest first, the left one of two that are as near
            away = torch.where(free, 2 * (place - i).abs() + (place > i), torch.iinfo(torch.long).max)
            active[b, away.topk(min(wanted, int(free.sum())), largest=False).indices] = True
    return active


@dataclasses.dataclass(frozen=True)
class DKVCache(Denoising):
    """Computes masks and freshly decided tokens, and reads the keys and values of the others from a cache."""

    variant: str = option("decode", "what is computed in a step", choices=VARIANTS)
    refresh: int | None = option(None, "steps between full computations; 8, with greedy 2, by default", least=1)
    window: int = option(4, "masks that greedy computes around each token", least=0)

    def active(self, state: State) -> Tensor | None:
        every = self.refresh or (2 if self.variant == "greedy" else 8)
        if state.block_step % every == 0 and self.variant in ("decode", "greedy"):
            return None
        ahead = state.ahead() if self.variant == "greedy" else None
        return dkv_cache(state.decided_at, ahead, state.step, state.block_step, every, self.variant, self.window)


METHOD = DKVCache
