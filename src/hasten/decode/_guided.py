"""The loop of constrained decoding: each row has a state of the constraint, and perhaps a weight.

With particles every prompt has several rows, which are resampled by their weights as they grow; one of them is kept.

Letters: B rows, V vocabulary.
"""

import copy
import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.decode._constraints import Constraint, Regex
from hasten.decode._json_schema import Schema, read_schema
from hasten.decode._loop import Counters, Request, Run
from hasten.decode._sampling import exponential
from hasten.decode._stops import Scores
from hasten.decode._vocabulary import Words, words_of

OVER = "over"
"""The state after the end."""


@dataclasses.dataclass
class Checked(Counters):
    """What a constrained call of generate did.

    Attributes:
        checks: times that a token was checked; `steps`: tokens that were chosen, ends included; over all rows.
        complete: of each row, whether its text is whole; a row is not where the length limit cut it off, or where the
            model gives no allowed token any chance.
        log_weights: of each row, the sum of its tokens' log weights (0 where none are asked for); with particles, log
            of their mean weight: an estimate of the chance that the model's own text fits.
        resampled: times that particles were.
        particles: of each row its (tokens, log weight), where there are several.
    """

    checks: int = 0
    steps: int = 0
    complete: list[bool] = dataclasses.field(default_factory=list)
    log_weights: list[float] = dataclasses.field(default_factory=list)
    resampled: int = 0
    particles: list[list[tuple[list[int], float]]] = dataclasses.field(default_factory=list)


class Checker(nn.Module):
    """A constraint over a model's tokens; travels with the model."""

    def __init__(self, constraint: Constraint, words: Words | None) -> None:
        super().__init__()
        self.constraint, self.words = constraint, words
        spoken = torch.tensor([True] if words is None else [word is not None for word in words])
        self.register_buffer("spoken", spoken, persistent=False)

    @classmethod
    def of(cls, method: Any, record: dict[str, Any]) -> "Checker":
        """From the record of `constraint_of`."""
        words = record["words"]
        if words is not None:
            words = [None if word is None else word.encode("latin-1") for word in words]
        return cls(read_constraint(method, record["schema"]), words)

    def advance(self, state: Any, token: int) -> Any:
        if self.words is None:
            return self.constraint.step(state, token) if token < 256 else None
        word = self.words[token]
        return None if word is None else self.constraint.advance(state, word)


def read_constraint(method: Any, schema: Any = None) -> Constraint:
    """A method's constraint, its schema being read from its option where none is given.

    Raises:
        UsageError: see `Regex`, `Schema`; or no text at all fits.
    """
    if method.regex:
        found: Constraint = Regex(method.regex)
    else:
        found = Schema(read_schema(method.schema or "{}") if schema is None else schema, method.spaces)
    if found.start() is None:
        raise UsageError(f"no text fits the {'regex' if method.regex else 'schema'}: change it")
    return found


def constraint_of(method: Any, model: Any) -> tuple[Checker, dict[str, Any]]:
    """A method's constraint over a model's tokens, and a record from which it can be made again.

    Raises:
        UsageError: see `read_constraint`, `words_of`.
    """
    schema = None if method.regex else read_schema(method.schema or "{}")
    words = words_of(model, method.tokenizer)
    texts = None if words is None else [None if word is None else word.decode("latin-1") for word in words]
    record = {"schema": schema, "words": texts}
    return Checker.of(method, record), record


@dataclasses.dataclass
class Text:
    """One row: the constraint's state, its weight, whether it has ended and whether it is whole."""

    state: Any
    weight: float = 0.0
    over: bool = False
    complete: bool = False


class Noise:
    """Exponential numbers [B, V] for each round of draws, made when they are asked for."""

    def __init__(self, like: Tensor, generator: torch.Generator | None) -> None:
        self.like, self.generator = like, generator

    def __getitem__(self, turn: int) -> Tensor:
        return exponential(self.like, self.generator)


class Guided(Run):
    """One call. `rows` are places among all particles of all prompts, those of a prompt next to each other."""

    def __init__(self, request: Request) -> None:
        self.checked = request.spec.counters = Checked()
        super().__init__(request)
        self.checker: Checker = request.spec.drafter.learnt  # type: ignore[assignment]
        self.constraint, self.each = self.checker.constraint, self.method.particles
        self.texts = [Text(self.constraint.start()) for _ in range(len(self.ids) * self.each)]
        size = request.model.config.get_text_config().vocab_size
        self.ends = {token for token in self.stops.ends if 0 <= token < size}
        self.loose = self._loose()
        if self.method.weighs and self.loose is not None:
            self.scores, self.loose = self.loose, None
        self.own = self.stops  # the caller's; with particles `stops` are those of all of them
        self.own.pads = True  # a row may end before the others whether or not there is a token for it
        if self.each > 1:
            self.stops = copy.copy(self.own)
            self.stops.prompt = self.own.prompt.repeat_interleave(self.each, 0)
            self.stops.new = [[] for _ in self.texts]
            self.stops.met = [None] * len(self.texts)

    def _loose(self) -> Scores | None:
        """Scores without what only cuts the unlikely (top-k and the like); None where there is nothing of the kind."""
        kept = [one for one in self.scores.processors if not _cuts(one)]
        if len(kept) == len(self.scores.processors):
            return None
        loose = copy.copy(self.scores)
        loose.processors = type(self.scores.processors)(kept)
        return loose

    def all(self) -> None:
        self.rows = list(range(len(self.texts)))
        self.rows = [row for row in self.rows if not self._ended(row)]
        logits = None
        while self.rows:
            started = time.perf_counter()
            if logits is None:
                logits = self._prompt()
            else:
                last = torch.tensor([[self.stops.new[row][-1]] for row in self.rows], device=self.ids.device)
                logits = self.target.step(last)
            verified = time.perf_counter()
            self.choose(logits)
            ancestors = self.resample() if self.each > 1 else None
            self._leave(ancestors)
            self.counters.rounds += 1
            self.counters.seconds["verify"] += verified - started
            self.counters.seconds["accept"] += time.perf_counter() - verified
        self._tell()
        self.counters.target_passes = self.target.passes

    def _prompt(self) -> Tensor:
        """Reads the prompts, once each."""
        logits = self.target.step(*self.unread)
        if len(self.rows) < len(self.texts) or self.each > 1:
            rows = torch.tensor(self.rows, device=logits.device) // self.each
            self.target.select(rows)
            logits = logits[rows]
        return logits

    def choose(self, logits_B1V: Tensor) -> None:
        """Chooses a token for every running row, and tells it."""
        scores = self.scores(logits_B1V, self.stops, self.rows, [])[:, 0]
        after: list[dict[int, Any]] = [{} for _ in self.rows]

        def allowed(place: int, token: int) -> bool:
            after[place][token] = state = self.after(self.texts[self.rows[place]].state, token)
            return state is not None

        tokens, logs = self._draw(scores, allowed)
        lost = [place for place, token in enumerate(tokens) if token < 0]
        if lost and self.loose is not None:
            again = self.loose(logits_B1V, self.stops, self.rows, [])[:, 0]
            for place, token in zip(lost, self._draw(again, allowed, lost)[0], strict=True):
                tokens[place] = token
        for place, row in enumerate(self.rows):
            self.texts[row].weight += logs[place]
            self._take(row, tokens[place], after[place].get(tokens[place]))
        if self.request.streamer is not None and self.each == 1:
            fresh = self.stops.fresh(self.rows[0])
            if fresh:
                self.request.streamer.put(torch.tensor(fresh))

    def after(self, state: Any, token: int) -> Any:
        """The state after a token: None if it is refused, `OVER` if the text ends there."""
        if token in self.ends:
            return OVER if self.constraint.finished(state) else None
        found = self.checker.advance(state, token)
        if found is None and not self.ends and self.constraint.finished(state):
            return OVER
        return found

    def _draw(self, scores_BV: Tensor, allowed: Any, places: list[int] | None = None) -> tuple[list[int], list[float]]:
        """Tokens and log weights of these rows, of all by default."""
        places = list(range(len(scores_BV))) if places is None else places
        scores = scores_BV[places] if len(places) < len(scores_BV) else scores_BV
        kept = self._spoken(places, scores)
        generator = self.scores.generator
        mass = [0.0] * len(places)
        seeds = [0] * len(places)
        if not self.scores.sampled:
            # the order of the scores, as that of chances
            p = (scores - scores.amax(-1, keepdim=True)).double().exp()
            noise: Any = [torch.ones_like(scores)]
            p = p if kept is None else p * kept
        else:
            p = scores.double().softmax(-1) if self.method.weighs else scores.softmax(-1)
            noise = Noise(scores, generator)
            if kept is not None:
                p = p * kept
                total = p.sum(-1, keepdim=True)
                mass, p = total[:, 0].log().tolist(), p / total.clamp(min=torch.finfo(p.dtype).tiny)
            if self.method.weights in ("geometric", "adaptive"):
                seeds = torch.randint(2**62, (len(places),), generator=generator, device=scores.device).tolist()
        tokens, logs, checks = self.method.draw(p, lambda place, token: allowed(places[place], token), noise, seeds)
        self.checked.checks += int(checks.sum())
        self.checked.steps += len(places)
        weights = [log + known for log, known in zip(logs.tolist(), mass, strict=True)]
        return tokens.tolist(), weights if self.method.weighs else [0.0] * len(places)

    def _spoken(self, places: list[int], scores_BV: Tensor) -> Tensor | None:
        """Which tokens need to be asked about, [B, V]: of those without text only the ends, where all must end these.

        None where every one does. A row that may end at any token asks about all.
        """
        states = [self.texts[self.rows[place]].state for place in places]
        closed = [self.constraint.closed(state) for state in states]
        if self.checker.words is None and not any(closed):
            return None
        words = torch.zeros(scores_BV.shape[1], dtype=torch.bool, device=scores_BV.device)
        if self.checker.words is None:
            words[:256] = True
        else:
            words[: len(self.checker.words)] = self.checker.spoken  # type: ignore[assignment]
        ends = torch.zeros_like(words)
        ends[list(self.ends)] = True
        rows = [
            ends if shut else words | (not self.ends and self.constraint.finished(state)) | ends
            for state, shut in zip(states, closed, strict=True)
        ]
        return torch.stack(rows)

    def _take(self, row: int, token: int, state: Any) -> None:
        """One row goes on with a token, or ends: without one, -1, the model has nowhere to go."""
        text = self.texts[row]
        if token < 0:
            text.over, text.complete = True, False
            self._stop(row)
            return
        if state == OVER:
            text.over = text.complete = True
            if token in self.ends:
                self.stops.tell(row, [token])
            self._stop(row)
            return
        text.state = state
        self.stops.tell(row, [token])
        if self.stops.finished(row):
            text.over, text.complete = True, self.constraint.finished(state)
            return
        text.over = self._ended(row)

    def _ended(self, row: int) -> bool:
        """Ends a row that has to, where that takes no pass of the model: an end whose chance nobody asks for."""
        text = self.texts[row]
        if not self.constraint.closed(text.state) or (self.ends and (self.method.weighs or len(self.ends) > 1)):
            return False
        if self.ends:
            self.stops.tell(row, list(self.ends))
        self._stop(row)
        text.over = text.complete = True
        return True

    def _stop(self, row: int) -> None:
        if self.stops.met[row] is None:
            self.stops.met[row] = len(self.stops.new[row])

    def resample(self) -> list[int]:
        """Resamples the particles of prompts with few effective ones; returns each place's ancestor."""
        ancestors = list(range(len(self.texts)))
        for first in range(0, len(self.texts), self.each):
            places = range(first, first + self.each)
            weights = torch.tensor([self.texts[place].weight for place in places], dtype=torch.float64)
            if bool(weights.isneginf().all()) or all(self.texts[place].over for place in places):
                continue
            shares = weights.softmax(0)
            if 1 / shares.square().sum().item() >= self.method.resample * self.each:
                continue
            drawn = torch.multinomial(shares, self.each, replacement=True, generator=self._cpu_generator())
            mean = weights.logsumexp(0).item() - math.log(self.each)
            ancestors[first : first + self.each] = [first + place for place in drawn.tolist()]
            self.checked.resampled += 1
            texts = [dataclasses.replace(self.texts[one], weight=mean) for one in ancestors[first : first + self.each]]
            new = [list(self.stops.new[one]) for one in ancestors[first : first + self.each]]
            met = [self.stops.met[one] for one in ancestors[first : first + self.each]]
            self.texts[first : first + self.each] = texts
            self.stops.new[first : first + self.each] = new
            self.stops.met[first : first + self.each] = met
        return ancestors

    def _cpu_generator(self) -> torch.Generator | None:
        generator = self.scores.generator
        if generator is None or generator.device.type == "cpu":
            return generator
        return torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
        )

    def _leave(self, ancestors: list[int] | None) -> None:
        """Takes rows that have ended out of the batch, and lets each place follow its ancestor's cache."""
        going = [row for row, text in enumerate(self.texts) if not text.over]
        at = {row: place for place, row in enumerate(self.rows)}
        order = [at[row if ancestors is None else ancestors[row]] for row in going]
        if going and order != list(range(len(self.rows))):
            self.target.select(torch.tensor(order, device=self.ids.device))
        self.rows = going

    def _tell(self) -> None:
        """Says how it went; of several particles one is kept, drawn by weight among those that are whole."""
        for row in range(len(self.ids)):
            places = range(row * self.each, (row + 1) * self.each)
            texts = [self.texts[place] for place in places]
            weights = torch.tensor([text.weight for text in texts], dtype=torch.float64)
            kept = 0
            if self.each > 1:
                whole = torch.tensor([text.complete for text in texts])
                usable = weights.masked_fill(~whole, -math.inf) if bool(whole.any()) else weights
                if bool(usable.isneginf().all()):
                    usable = torch.zeros_like(weights)
                kept = int(torch.multinomial(usable.softmax(0), 1, generator=self._cpu_generator()))
                place = places[kept]
                self.own.new[row], self.own.met[row] = self.stops.new[place], self.stops.met[place]
                told = [(list(self.stops.new[one]), text.weight) for one, text in zip(places, texts, strict=True)]
                self.checked.particles.append(told)
            self.checked.complete.append(texts[kept].complete)
            self.checked.log_weights.append(weights.logsumexp(0).item() - math.log(self.each))
        if self.each > 1:
            if self.request.streamer is not None:
                self.request.streamer.put(torch.tensor(self.own.fresh(0)))
            if self.target.slots:  # no one row of the cache is the text that was kept
                self.target.select(torch.zeros(1, dtype=torch.long, device=self.ids.device))
                self.target.keep(None, self.target.slots)


def _cuts(processor: Any) -> bool:
    name = type(processor).__name__
    return name.endswith("LogitsWarper") and name != "TemperatureLogitsWarper"
