"""TS: while a model thinks, the score of the token that ends the thought is scaled by a temperature.

Below 1 the thought ends earlier, above 1 later; no other score changes, and none after the thought has ended:

    z_e' = z_e / T  where z_e > 0,    z_e' = z_e T  otherwise

z_e is the logit of the end-of-thought token, before temperature, top-k and top-p. Shapes: scores [B, V], the tokens so
far [B, N]; a row thinks from its latest begin-of-thought token on, until an end-of-thought token follows. Where a model
has no begin token, it thinks from the end of the prompt on.

arXiv 2505.07961, section on temperature scaling. Of the paper only the abstract and summaries were at hand, and no code
of it: they say that this one logit is scaled. Departures: the rule for z_e <= 0, where dividing would turn the effect
around (raw logits are known up to a constant only; where the token has a chance its logit is nearly always positive);
the paper tries several T, the default is ours. TLDR, the paper's other half, is reinforcement learning and left out.
"""

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode.base import Decoding
from hasten.hosts.context import Context

CARD = Card(
    title="Making Small Language Models Efficient Reasoners: Intervention, Supervision, Reinforcement",
    paper="2505.07961",
    seams=("logits",),
    effects=("time", "quality"),
    lossless=False,
    claim="Better accuracy for its tokens than s1's budget forcing on MATH500, AMC, AIME24 and OlympiadBench; the "
    "abstract's figure, half of the tokens, is that of TLDR, the trained half of the paper",
    claimed=None,
    identity={"temperature": 1.0},
    experiment=("sums-lm(examples=400)", "decode/thought_temperature"),
    when="A reasoning model that goes on checking after it has the answer; it needs no calibration.",
    when_not="Thoughts that are long by their style and not by being gone through again, or problems that need all of "
    "the thought.",
    hosts=("decoder",),
)


def naive_thought_temperature(
    scores: Tensor, ids: Tensor, temperature: float, end: int, begin: int | None = None, start: int = 0
) -> Tensor:
    """The rule row by row, token by token.

    Args:
        scores: [B, V]; `ids`: tokens so far, [B, N], prompt and padding included.
        temperature: T; `end`, `begin`: tokens around a thought, `begin` None where there is none.
        start: columns of the prompt; without `begin` the thought starts there.

    Returns:
        [B, V], the end token's score scaled in the rows that think.
    """
    out = scores.clone()
    for b in range(len(ids)):
        thinks = False
        for n in range(ids.shape[1]):
            if begin is None:
                thinks = thinks or n == start
            elif int(ids[b, n]) == begin:
                thinks = True
            if int(ids[b, n]) == end and (begin is not None or n >= start):
                thinks = False
        if begin is None and start >= ids.shape[1]:
            thinks = True
        z = scores[b, end]
        if thinks:
            out[b, end] = z / temperature if z > 0 else z * temperature
    return out


def thought_temperature(
    scores: Tensor, ids: Tensor, temperature: float, end: int, begin: int | None = None, start: int = 0
) -> Tensor:
    """As `naive_thought_temperature`, all rows at once."""
    if begin is None:
        thinks = ~(ids[:, start:] == end).any(1)
    else:
        place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        latest = [nn.functional.pad((ids == token) * place, (1, 0)).amax(1) for token in (begin, end)]
        thinks = latest[0] > latest[1]
    z = scores[:, end]
    scaled = torch.where(z > 0, z / temperature, z * temperature)
    out = scores.clone()
    out[:, end] = torch.where(thinks, scaled, z)
    return out


@dataclasses.dataclass
class EndOfThought:
    """A logits processor of one call of generate."""

    temperature: float
    end: int
    begin: int | None
    start: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return thought_temperature(scores, input_ids, self.temperature, self.end, self.begin, self.start)


@dataclasses.dataclass(frozen=True)
class TS(Decoding):
    temperature: float = option(0.8, "T: below 1 the thought ends earlier, above 1 later", above=0)
    end: int | None = option(None, "end-of-thought token; None takes end_of_thought_token_id of the model", least=0)
    begin: int | None = option(None, "begin-of-thought token; None takes begin_of_thought_token_id, if any", least=0)

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Puts the processor behind `model.generate`, before the caller's own ones.

        Raises:
            UsageError: the end-of-thought token is neither given nor named by the model's generation config or config,
                or is no token of the vocabulary; or the model has no `generate`.
        """
        if self.temperature == 1:
            return {"end": None, "begin": None}
        end, begin = self.end, self.begin
        end = _named(host.model, "end_of_thought_token_id") if end is None else end
        begin = _named(host.model, "begin_of_thought_token_id") if begin is None else begin
        if end is None:
            raise UsageError(
                f"{self.name}: {type(host.model).__name__} does not say which token ends a thought: give it, as "
                f"{self.name}(end=ID), with tokenizer.convert_tokens_to_ids('</think>') for most reasoning models"
            )
        size = host.embedding.weight.shape[0]
        for name, token in (("end", end), ("begin", begin)):
            if token is not None and token >= size:
                raise UsageError(f"{self.name}: {name}={token} is no token of a vocabulary of {size}: give another id")
        if end == begin:
            raise UsageError(f"{self.name}: token {end} can't both begin and end a thought: give begin= or end=")
        self._put(host, end, begin)
        return {"end": end, "begin": begin}

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        if record["end"] is not None:
            self._put(host, record["end"], record["begin"])

    def _put(self, host: Any, end: int, begin: int | None) -> None:
        made = functools.partial(EndOfThought, self.temperature, end, begin)
        host.wrap_generate(functools.partial(_generate, host.model, made))


def _named(model: Any, name: str) -> int | None:
    """A token that the model's generation config, or its config, names."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None


def _generate(model: Any, made: Any, inner: Any, *args: Any, **options: Any) -> Any:
    names = list(inspect.signature(type(model).generate).parameters)[1:]
    options = dict(zip(names, args, strict=False)) | options
    ids = options.get("input_ids", options.get("inputs"))
    processor = made(0 if ids is None else ids.shape[1])
    options["logits_processor"] = [processor, *(options.get("logits_processor") or [])]
    return inner(**options)


METHOD = TS
