"""Generation with masked-diffusion language models: the plain sampler, and the two places that methods take over.

A method is a `Denoising` and has one of two verbs (or both, where its card claims both seams):

    choose(state, guess) -> (Bool[B, C], Int[B, C])     denoise.order: which columns are decided now, and as what
    active(state) -> Bool[B, T] | None                  denoise.cache: which positions the next forward computes

The loop, its state and its counters are those of `_denoising_loop.py`; a plan may hold one method of each seam. Any
batch size; prompts may be padded, and rows may have different numbers of masks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError, nearest
from hasten.decode._decoding import Decoding
from hasten.decode._denoising_loop import CONFIDENCE, UNDECIDED, Counters, Guess, Loop, State
from hasten.hosts.context import Context

__all__ = ["CONFIDENCE", "UNDECIDED", "Counters", "Denoising", "Guess", "State", "check_host", "denoise"]

SEAMS = {"denoise.order": "denoise_order", "denoise.cache": "denoise_cache"}
KNOWN = (
    "input_ids", "attention_mask", "max_new_tokens", "steps", "block_length", "blockwise", "temperature", "confidence",
    "seed", "generator", "eos_token_id",
)  # fmt: skip


class Denoising(Decoding):
    """Base of methods that say which masks are filled in, or which positions are computed for it."""

    def choose(self, state: State, guess: Guess) -> tuple[Tensor, Tensor]:
        """Which columns of the guess are decided in this step, [B, C] bool, and as which tokens, [B, C].

        Only open columns count. Where nothing is chosen in any row the plain order decides.
        """
        raise NotImplementedError

    def active(self, state: State) -> Tensor | None:
        """Which positions the next forward computes, [B, T] bool, None for all; asked before every forward but the
        first, which computes all. Keys and values of the others are those of their latest forward.
        """
        raise NotImplementedError

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Tells the host who chooses or caches; the model itself is not changed.

        Raises:
            UsageError: the model is no masked-diffusion language model, or has no cache that a method needs.
        """
        check_host(self.name, host)
        if "denoise.cache" in self.card.seams:
            host.check_cache(self.name)
        for seam in self.card.seams:
            if seam in SEAMS:
                taken = getattr(host, SEAMS[seam], None)
                if taken is not None:
                    raise UsageError(f"{taken.name} already holds the seam {seam!r}: undo it before {self.name}")
                host.changes.set(host, SEAMS[seam], self)
        return {}

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        """The same as `install`: nothing was decided there."""
        Denoising.install(self, host, Context())


def check_host(who: str, host: Any) -> None:
    """Raises UsageError where a model can't fill in masks."""
    model = type(host.model).__name__
    if host.kind != "diffusion_lm":
        raise UsageError(
            f"{who} fills in masks, and {model} is a {host.kind}: give a masked-diffusion language model, whose config "
            'has mask_token_id, or describe one with hasten.describe(model, kind="diffusion_lm", mask_token=ID)'
        )
    if not host.sees_both_ways:
        raise UsageError(f"{who} needs attention in both directions, and {model} hides later tokens from earlier ones")


def denoise(host: Any, inputs: Any = None, **options: Any) -> tuple[Tensor, Counters]:
    """Fills in the masks of the inputs, and `max_new_tokens` further ones behind them.

    Args:
        inputs: token ids [B, T], or a dict with `input_ids` and perhaps `attention_mask`. Masks may stand anywhere.
        options: `max_new_tokens`: masks put behind the inputs, 0. `block_length`: of the parts of the new text (of all
            columns where the inputs hold masks) that are filled in one after another; by default one part. `steps`:
            forwards in all, as many for each block; by default one a token. `blockwise`: whether a token sees its own
            block and those before it only, as the model was trained (block diffusion, arXiv 2503.09573); blocks are
            counted from the first token of the prompt then, and the first one to fill in may be a shorter one.
            `temperature`: 0 for the likeliest tokens. `confidence`: which go first, `probability`, `margin`, `entropy`,
            `random` or `left` (the first ones). `seed` or `generator`: for draws. `eos_token_id`: what ends the new
            text, as the model has it.

    Returns:
        [B, T + max_new_tokens] without masks, and counters.

    Raises:
        UsageError: what can't be served, before the model runs.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else {} if inputs is None else {"input_ids": inputs}
    request = Request(host, **checked(given | options))
    with torch.inference_mode():
        loop = request.loop()
        loop.run(request.blocks, request.steps_per_block)
    return loop.state.tokens.clone(), loop.counters


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The same options.

    Raises:
        UsageError: one that denoising does not have, or no token ids.
    """
    unknown = [name for name in options if name not in KNOWN]
    if unknown:
        name = unknown[0]
        raise UsageError(
            f"denoising has no option {name!r}{nearest(name, KNOWN)} it has {', '.join(KNOWN[2:])}; "
            "temperature=0 takes the likeliest tokens"
        )
    if not isinstance(options.get("input_ids"), Tensor):
        raise UsageError("give token ids [batch, tokens], or a dict with input_ids")
    return options


class Request:
    """What one call asks for, checked.

    Attributes:
        blocks: (begin, end) of the columns that are filled in one after another; steps_per_block: None for one a token.
    """

    def __init__(
        self,
        host: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 0,
        steps: int | None = None,
        block_length: int | None = None,
        blockwise: bool | None = None,
        temperature: float = 0.0,
        confidence: str = "probability",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | Iterable[int] | None = None,
    ) -> None:
        check_host("denoising", host)
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise UsageError(f"token ids are whole numbers [batch, tokens], not {list(input_ids.shape)}")
        if confidence not in CONFIDENCE:
            raise UsageError(f"confidence is one of {', '.join(CONFIDENCE)}, not {confidence!r}")
        if temperature < 0:
            raise UsageError(f"temperature is 0 or above, not {temperature}")
        if seed is not None and generator is not None:
            raise UsageError("give a seed or a generator, not both")
        if max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is 0 or above, not {max_new_tokens}")
        self.host, self.temperature, self.confidence = host, float(temperature), confidence
        device = host.device
        self.generator = generator if seed is None else torch.Generator(device).manual_seed(seed)
        rows, prompt = input_ids.shape
        self.new_from, self.tokens = prompt, torch.full((rows, prompt + max_new_tokens), host.mask_token, device=device)
        self.tokens[:, :prompt] = input_ids
        self.real = self._real(attention_mask, rows, prompt, max_new_tokens)
        self.masked = self.tokens == host.mask_token
        if self.real is not None:
            self.masked &= self.real
        self._check_masks(max_new_tokens)
        if self.real is None:
            self.positions = torch.arange(self.masked.shape[1], device=device)
        else:
            self.positions = (self.real.long().cumsum(1) - 1).clamp(min=0)
        infill = bool(self.masked[:, :prompt].any())
        self.sees: Tensor | None = None
        if host.blockwise if blockwise is None else blockwise:
            self.blocks = self._aligned(block_length or host.block_length, infill)
        else:
            self.blocks = self._blocks(block_length, infill)
        self.steps_per_block = self._steps(steps)
        ends = host.end_tokens if eos_token_id is None else eos_token_id
        self.ends = (tuple(ends) if isinstance(ends, Iterable) else (ends,)) if max_new_tokens else ()
        pad = getattr(getattr(host.model, "generation_config", None), "pad_token_id", None)
        self.fill = pad if pad is not None else self.ends[0] if self.ends else 0

    def _real(self, mask: Tensor | None, rows: int, prompt: int, new: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.shape != (rows, prompt):
            raise UsageError(
                f"attention_mask is {list(mask.shape)}, and input_ids {[rows, prompt]}: give one of its shape"
            )
        real = torch.nn.functional.pad(mask.to(self.host.device).bool(), (0, new), value=True)
        return None if bool(real.all()) else real

    def _check_masks(self, new: int) -> None:
        if not bool(self.masked.any()):
            raise UsageError(
                f"there is nothing to fill in: give max_new_tokens, or ids that hold the mask token "
                f"{self.host.mask_token}"
            )
        real = torch.ones_like(self.masked) if self.real is None else self.real
        if not bool((real & ~self.masked).any(1).all()):
            raise UsageError("a row holds nothing but masks: give at least one token to begin with")
        longest, context = int(real.sum(1).max()), self.host.context
        if context is not None and longest > context:
            raise UsageError(
                f"the text would have {longest} tokens and the model has {context} positions: lower max_new_tokens"
                if new
                else f"the text has {longest} tokens and the model has {context} positions: give a shorter one"
            )
        first = real.long().argmax(1, keepdim=True)
        if self.host.shifted and bool(self.masked.gather(1, first).any()):
            raise UsageError("this model predicts the token after each one, so the first of a row can't be a mask")

    def _blocks(self, length: int | None, infill: bool) -> list[tuple[int, int]]:
        begin, end = 0 if infill else self.new_from, self.tokens.shape[1]
        if length is None:
            return [(begin, end)]
        if length < 1 or (end - begin) % length:
            what = "the whole text's" if infill else "max_new_tokens ="
            raise UsageError(f"block_length={length} does not divide {what} {end - begin} tokens evenly")
        return [(start, start + length) for start in range(begin, end, length)]

    def _aligned(self, length: int | None, infill: bool) -> list[tuple[int, int]]:
        """Blocks counted from the first token, and the mask with which a token sees none behind its own."""
        if length is None or length < 1:
            raise UsageError("blockwise needs the length of the blocks that the model was trained with: block_length=N")
        if self.real is not None and bool(((~self.real).sum(1) % length != 0).any()):
            raise UsageError(
                f"blockwise needs rows padded by a multiple of block_length={length}, or one row at a time"
            )
        place = self.positions.view(-1, self.masked.shape[1]) // length
        self.sees = (place[:, None, None] <= place[:, None, :, None]) & (
            True if self.real is None else self.real[:, None, None]
        )
        first = 0 if infill else self.new_from // length * length
        starts = range(first, self.masked.shape[1], length)
        return [(max(start, 0 if infill else self.new_from), min(start + length, starts.stop)) for start in starts]

    def _steps(self, steps: int | None) -> int | None:
        if steps is None:
            return None
        blocks = [part for part in self.blocks if bool(self.masked[:, part[0] : part[1]].any())]
        if steps < 1 or steps % len(blocks):
            raise UsageError(f"steps={steps} is no multiple of the {len(blocks)} blocks that have masks")
        most = min(int(self.masked[:, begin:end].sum(1).max()) for begin, end in blocks)
        if steps // len(blocks) > most:
            raise UsageError(f"steps={steps} is more than the tokens to fill in: at most {most * len(blocks)}")
        return steps // len(blocks)

    def loop(self) -> Loop:
        """The loop with whatever is installed on the host, ready to run."""
        host, masked = self.host, self.masked
        decided_at = torch.where(masked, UNDECIDED, -1)
        state = State(
            host, self.tokens, masked, decided_at, self.real, self.positions, self.temperature, self.confidence,
            self.generator, self.sees,
        )  # fmt: skip
        order, policy = (getattr(host, name, None) for name in SEAMS.values())
        return Loop(state, order, policy, self.new_from, self.ends, self.fill)
