"""Guided diffusion: a small autoregressive model says how many of the masks' proposals fit together, from the left.

The diffusion model proposes tokens d for all masks at once, each without knowing the others. The guide reads them in
one pass, left to right; with m_1 < m_2 < ... the masked columns of a row and p_k the guide's distribution at m_k given
everything before it, proposals included, a step decides d_1 ... d_n (arXiv 2505.21467 and official code)

    n = max(1, most k with d_1 ... d_k all agreeing),    d_k agrees if rank(d_k) <= top and p_k(d_k) >= share max p_k

The first proposal stands although the guide disagrees, and the guide's own token is never used: the text is the
diffusion model's. top=1 is the code's `deterministic`, top=5 its `topk`, top=2 with share=0.5 its `topk_relative`.

Shapes: scores [B, C, V] the guide's for each column, drafts [B, C], masked, known and judged [B, C] bool; returns
which columns are decided, [B, C] bool.

Departures: any batch size (the code has 1). Where the call gives `steps`, at least as many are decided as its schedule
says. An infill's guide reads the text on the left only. Proposals are drawn where the temperature is above 0 (the code
takes the likeliest) and put to the same test, so the law is no one model's. The guide needs the same tokenizer (the
code translates) but no mask token; it never agrees with tokens that it lacks, and reads token 0 in their place.
"""

import dataclasses
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._checks import check_cache
from hasten.decode._denoising import Denoising, Guess, State, check_host
from hasten.hosts.context import Context

CARD = Card(
    title="FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
    paper="2505.21467",
    seams=("denoise.order",),
    effects=("time", "steps", "quality"),
    lossless=False,
    claim="12.14x on average over tasks together with FreeCache, Dream-7B guided by Qwen2.5-1.5B",
    claimed=12.14,
    identity="none: the order is from left to right with every option",
    experiment=("stdlib-denoiser(task=continue)", "decode/guided_diffusion"),
    when="A guide much smaller than the diffusion model, with its tokenizer, and text that is written on.",
    when_not="A guide that costs as much as the diffusion model, or infills that hang on the text to the right.",
    needs=("draft",),
    hosts=("diffusion_lm",),
)


def naive_guided_diffusion(
    scores: Tensor,
    drafts: Tensor,
    masked: Tensor,
    known: Tensor,
    judged: Tensor,
    quota: list[int],
    top: int,
    share: float,
) -> Tensor:
    """The rule column by column.

    Args:
        scores: [B, C, V]; drafts: [B, C]; masked: [B, C], which columns are undecided.
        known: [B, C], which of them have a proposal; judged: [B, C], where the guide has something to go by.
        quota: proposals that each row decides at least; top, share: the options.

    Returns:
        [B, C] bool.
    """
    chosen = torch.zeros(masked.shape, dtype=torch.bool)
    for b in range(len(masked)):
        going, taken = True, 0
        for c in range(masked.shape[1]):
            if not masked[b, c]:
                continue
            if going and known[b, c] and judged[b, c] and int(drafts[b, c]) < scores.shape[-1]:
                row = scores[b, c].float()
                mine = row[drafts[b, c]].item()
                going = sum(other > mine for other in row.tolist()) < top
                going = going and mine >= max(row.tolist()) + math.log(share or 1e-30)
            else:
                going = False
            if known[b, c] and (going or taken < quota[b]):
                chosen[b, c] = True
                taken += 1
    return chosen


def guided_diffusion(
    scores: Tensor,
    drafts: Tensor,
    masked: Tensor,
    known: Tensor,
    judged: Tensor,
    quota: list[int],
    top: int,
    share: float,
) -> Tensor:
    """As `naive_guided_diffusion`, all rows at once."""
    has = drafts < scores.shape[-1]
    scores = scores.float()
    mine = scores.gather(-1, drafts.where(has, 0)[..., None])
    agrees = (scores > mine).sum(-1) < top
    agrees &= mine[..., 0] >= scores.max(-1).values + math.log(share or 1e-30)
    stops = masked & ~(agrees & known & judged & has)
    ready = masked & known
    least = torch.tensor(quota, device=drafts.device)[:, None]
    return ready & ((stops.cumsum(1) == 0) | (ready.cumsum(1) <= least))


@dataclasses.dataclass(frozen=True)
class GuidedDiffusion(Denoising):
    """Decides the proposals that the draft, an autoregressive model, agrees with, up to the first that it does not."""

    top: int = option(1, "likeliest tokens of the guide among which a proposal must be", least=1)
    share: float = option(0.0, "of the guide's highest probability, which a proposal must have", least=0, most=1)

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Makes the draft a part of the model, `guide`.

        Raises:
            UsageError: the model is no masked-diffusion language model, or the draft can't guide it.
        """
        from hasten.hosts.records import record_of

        check_host(self.name, host)
        check_guide(self.name, host, context.draft)
        super().install(host, context)
        put(host, context.draft)  # type: ignore[arg-type]
        return {"guide": record_of(context.draft)}  # type: ignore[arg-type]

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        from hasten.hosts.records import rebuild

        super().restore(host, record)
        put(host, rebuild(record["guide"]))

    def choose(self, state: State, guess: Guess) -> tuple[Tensor, Tensor]:
        masked, rows, at = state.open, *guess.open.nonzero(as_tuple=True)
        known, drafts = torch.zeros_like(masked), state.tokens.clone()
        columns = guess.columns[rows, at]
        known[rows, columns], drafts[rows, columns] = True, guess.tokens[rows, at]
        begin, end, before = span(masked, state.real)
        judged = before[:, begin:end] >= 0
        scores = read(state, drafts, before, begin, end, self.name)
        part = slice(begin, end)
        found = guided_diffusion(
            scores, drafts[:, part], masked[:, part], known[:, part], judged, state.quota, self.top, self.share
        )
        chosen = torch.zeros_like(masked)
        chosen[:, part] = found
        return chosen.gather(1, guess.columns) & guess.open, guess.tokens


def span(masked: Tensor, real: Tensor | None) -> tuple[int, int, Tensor]:
    """First and last open column plus one, over all rows, and for each column the real one before it, -1 for none."""
    some = masked.any(0).nonzero()[:, 0]
    place = torch.arange(masked.shape[1], device=masked.device).expand(masked.shape)
    last = place if real is None else torch.where(real, place, -1).cummax(1).values
    return int(some[0]), int(some[-1]) + 1, nn.functional.pad(last, (1, 0), value=-1)[:, :-1]


def read(state: State, drafts: Tensor, before: Tensor, begin: int, end: int, name: str) -> Tensor:
    """The guide's scores for the columns from `begin` to `end`, [B, end - begin, V], in one pass.

    Keys of what is decided in all rows, up to the first mask, stay in its cache; the rest is read again.
    """
    from transformers import DynamicCache

    guide = state.host.model.guide
    words = guide.config.get_text_config().vocab_size
    cache = state.facts.setdefault(name, DynamicCache(config=guide.config))
    first = max(0, int(before[:, begin].min()))
    if end == 1:  # a mask with nothing before it
        return torch.zeros(len(drafts), 1, words, device=drafts.device)
    tokens = torch.where(drafts < words, drafts, 0)
    done = cache.get_seq_length()
    if done > first:
        cache.crop(first - done)
        done = first
    positions = state.positions.expand(drafts.shape)[:, done : end - 1]
    real = torch.ones_like(drafts) if state.real is None else state.real.long()
    logits = guide(
        input_ids=tokens[:, done : end - 1],
        attention_mask=real[:, : end - 1],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=end - 1 - first,
    ).logits
    at = (before[:, begin:end] - first).clamp(min=0)
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))


def put(host: Any, guide: nn.Module) -> None:
    training = [part for part in guide.modules() if part.training]

    def back() -> None:
        for part in training:
            part.training = True

    guide.eval()
    host.changes.call(back)
    host.changes.set(host.model, "guide", guide)


def check_guide(name: str, host: Any, guide: Any) -> None:
    """Raises UsageError where a draft can't guide the model; nothing is changed."""
    from transformers import DynamicCache

    if guide is None:
        raise UsageError(f"{name} needs a guide: pass draft=, a small autoregressive model with the same tokenizer")
    if guide is host.model:
        raise UsageError(f"{name}: the guide is the model itself: pass a small autoregressive model")
    who = f"{name}: the guide {type(guide).__name__}"
    takes = inspect.signature(guide.forward).parameters
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= set(takes) or not hasattr(guide, "config"):
        raise UsageError(f"{who} is no decoder of transformers with a key-value cache: pass one")
    if getattr(guide.config, "mask_token_id", None) is not None:
        raise UsageError(f"{who} fills in masks itself: pass a model that predicts the next token")
    words = guide.config.get_text_config().vocab_size
    if words < host.mask_token:
        raise UsageError(
            f"{who} has {words} tokens, and {type(host.model).__name__} {host.mask_token} before its mask token: give "
            "a guide with the same tokenizer (it needs no mask token)"
        )
    if next(guide.parameters()).device != host.device:
        raise UsageError(
            f"{who} is on {next(guide.parameters()).device} and the model on {host.device}: move the guide"
        )
    check_cache(DynamicCache(config=guide.config), who)


METHOD = GuidedDiffusion
