"""Adaptive rejection sampling: text under a constraint of which only the tokens that are drawn are checked.

To draw from p(x) 1[x allowed] / Z a token is drawn from p and checked; one that is refused leaves p, and the next is
drawn from what remains, until one is allowed. The law is that of checking the whole vocabulary and masking. With
weights, further draws give an unbiased estimate of Z; its product over the tokens corrects for what looking one token
ahead distorts: `particles` texts for each prompt are resampled by it (sequential Monte Carlo), and one is kept.

Estimates of Z, n refusals in all, psi the mass refused before the first allowed token and q its chance at its turn:
paper: drawing on to a second allowed token, (1 - psi) / (n + 1); recursive: (1 - psi) times 1 if the next token drawn
is allowed, else q; geometric: drawing on to the allowed token number `draws` and adding, with geometric laws, the
refusals that drawing with replacement would repeat, (draws - 1) / (draws - 1 + n); adaptive: geometric where draws > 2
or max p >= 2/3, else recursive.

Shapes: p [B, V], e [rounds, B, V] exponential numbers; returns tokens [B], log weights [B] and checks [B].

The first estimate is that of the paper's experiments, the others are of the authors' library, which adapts; unlike it
there is no bound on refusals. Tokens without text are refused unasked. A text ends where the model's end-of-sequence
token is drawn and the constraint may end; for a model without one, where a token is refused and it may end; in any case
where it must. Greedy decoding takes the most likely allowed token. Where top-k and the like leave no allowed token, the
draw goes on among those they cut; weighted text is drawn as if they were not there.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._drafting import Drafting, _put, check
from hasten.decode._guided import Checker, Guided, constraint_of, read_constraint
from hasten.decode._json_schema import is_inline
from hasten.decode._loop import Drafter, Request
from hasten.decode._proposals import Proposer
from hasten.hosts.context import Context

CARD = Card(
    title="Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling",
    paper="2504.05410",
    seams=("decode.draft", "decode.sample"),
    effects=("time",),
    lossless=False,
    claim="typically orders of magnitude fewer constraint evaluations than masking the whole vocabulary (abstract)",
    claimed=None,
    identity="none: the constraint is what it is for; against masking under the same constraint the law is the same",
    experiment=(
        "constrained-lm",
        'decode/awrs(schema=\'{"properties": {"name": {"type": "string", "maxLength": 24}, '
        '"line": {"type": "integer"}, "kind": {"enum": ["function", "class"]}}, '
        '"required": ["name", "line", "kind"], "additionalProperties": false}\')',
    ),
    when="A constraint that is dear to check, a large vocabulary or batch, and a model that mostly keeps to the "
    "constraint by itself. The baseline to compare with is token masking: see the workload constrained-lm.",
    when_not="A constraint with few states, whose masks can be made once and kept, or a model that hardly ever meets "
    "the constraint: then nearly all tokens are checked anyway.",
    hosts=("decoder",),
)

Allowed = Callable[[int, int], bool]
"""Whether a row may go on with a token: (row, token)."""
KINDS = ("none", "paper", "recursive", "geometric", "adaptive")
AHEAD = 16
"""Tokens of a row that are sorted at once; more are where all of these are refused."""


def naive_awrs(
    p: Tensor, allowed: Allowed, e: Any, seeds: list[int], weights: str = "none", draws: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row and draw by draw: a token is drawn from what remains of p, checked, and leaves p when refused.

    Args:
        p: probabilities [B, V]; `e`: exponential numbers, e[round] is [B, V], a draw from w being argmax of w / e.
        seeds: of each row, for the geometric numbers.
        weights: how Z is estimated (none: not at all); `draws`: allowed tokens of the geometric estimate.

    Returns:
        tokens [B], -1 where none is allowed; log of the estimate of Z [B], -inf there; tokens checked [B].
    """
    tokens, logs, checks = [], [], []
    for b in range(len(p)):
        left = {v: value for v, value in enumerate(p[b].tolist()) if value > 0}
        known: dict[int, bool] = {}
        kind = weights
        if weights == "adaptive":
            kind = "geometric" if draws > 2 or max(left.values()) >= 2 / 3 else "recursive"
        rng, found, refused, accepted, after = random.Random(seeds[b]), -1, 0, 0, 0.0
        estimate = 1.0
        rounds = {"paper": 2, "geometric": draws}.get(kind, 1)
        for turn in range(rounds):
            while left:
                total = sum(left.values())
                if kind == "geometric" and total < 1 and refused:
                    u, again = rng.random(), 0
                    while u < (1 - total) ** (again + 1):
                        again += 1
                    refused += again
                x = max(left, key=lambda v: left[v] / total / e[turn][b, v].item())
                if x not in known:
                    known[x] = allowed(b, x)
                if known[x]:
                    accepted += 1
                    if turn == 0:
                        found, after = x, total
                    break
                if kind == "recursive":
                    estimate *= 1 - left[x] / total
                refused += 1
                del left[x]
        if found >= 0 and kind == "recursive":
            q, rest = left[found] / after, {v: value for v, value in left.items() if v != found}
            if rest:
                y = max(rest, key=lambda v: rest[v] / e[0][b, v].item())
                known[y] = allowed(b, y)
                estimate *= 1.0 if known[y] else q
        elif kind == "paper":
            estimate = after / (refused + 1)
        elif kind == "geometric" and found >= 0:
            estimate = (draws - 1) / (draws - 1 + refused)
        tokens.append(found)
        logs.append(math.log(estimate) if found >= 0 else -math.inf)
        checks.append(len(known))
    return torch.tensor(tokens), torch.tensor(logs, dtype=torch.float64), torch.tensor(checks)


def awrs(
    p: Tensor, allowed: Allowed, e: Any, seeds: list[int], weights: str = "none", draws: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive_awrs`: all rows are sorted once a round, and the mass that is left is kept by subtraction."""
    turns: list[list[Iterator[tuple[int, float]]]] = [ranked(p, e[0])]
    peaks = p.amax(-1).tolist() if weights == "adaptive" else []

    def turn(b: int, n: int) -> Iterator[tuple[int, float]]:
        while len(turns) <= n:
            turns.append(ranked(p, e[len(turns)]))
        return turns[n][b]

    found = []
    for b in range(len(p)):
        kind = weights
        if weights == "adaptive":
            kind = "geometric" if draws > 2 or peaks[b] >= 2 / 3 else "recursive"
        asked = _Asked(allowed, b)
        if kind == "geometric":
            token, log = _geometric(asked, functools.partial(turn, b), random.Random(seeds[b]), draws)
        else:
            token, log = _first(asked, functools.partial(turn, b), kind)
        found.append((token, log, len(asked.known)))
    tokens, logs, checks = zip(*found, strict=True)
    return torch.tensor(tokens), torch.tensor(logs, dtype=torch.float64), torch.tensor(checks)


def masked(p: Tensor, allowed: Allowed, e: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token masking, the baseline: every token is checked; as `awrs`, with the exact Z and the same token."""
    rows, words = p.shape
    mask = torch.tensor([[allowed(b, v) for v in range(words)] for b in range(rows)], device=p.device)
    left = p * mask
    z = left.double().sum(-1).cpu()
    tokens = torch.where(z > 0, (left / e[0]).argmax(-1).cpu(), -1)
    return tokens, z.log(), torch.full((rows,), words)


class _Asked:
    """The checks of one row, each token once."""

    def __init__(self, allowed: Allowed, row: int) -> None:
        self.allowed, self.row = allowed, row
        self.known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self.known:
            self.known[token] = self.allowed(self.row, token)
        return self.known[token]


def ranked(p: Tensor, e: Tensor) -> list[Iterator[tuple[int, float]]]:
    """Of each row, its tokens with p > 0 in the order in which draws without replacement give them, and their p.

    The order is that of p / e; equal ones come by number.
    """
    keys = p / e
    values, tokens = keys.topk(min(AHEAD, keys.shape[1]))
    chances = p.gather(1, tokens)
    parts = zip(values.tolist(), tokens.tolist(), chances.tolist(), strict=True)
    return [_ranked(p[b], keys[b], *part) for b, part in enumerate(parts)]


def _ranked(
    p: Tensor, keys: Tensor, values: list[float], tokens: list[int], chances: list[float]
) -> Iterator[tuple[int, float]]:
    whole = len(tokens) == len(p)
    given = set()
    for value, token, chance in sorted(zip(values, tokens, chances, strict=True), key=lambda one: (-one[0], one[1])):
        if chance > 0 and (whole or value > values[-1]):  # others may be as good as the last one
            given.add(token)
            yield token, chance
    if not whole:
        for token in keys.sort(descending=True, stable=True).indices.tolist():
            if token not in given:
                chance = p[token].item()
                if chance <= 0:
                    return
                yield token, chance


def _first(asked: _Asked, turn: Callable[[int], Iterator[tuple[int, float]]], kind: str) -> tuple[int, float]:
    """The first allowed token, and the estimates that need no more than one further token or run."""
    left, refused = 1.0, 0
    order = turn(0)
    for token, chance in order:
        if not asked(token):
            left, refused = left - chance, refused + 1
            continue
        left = max(left, chance)
        if kind == "none":
            return token, 0.0
        if kind == "recursive":
            following = next(order, None)
            sure = following is None or asked(following[0])
            return token, math.log(left) + (0.0 if sure else math.log(chance / left))
        for other, _ in turn(1):
            if asked.known.get(other) is False:
                continue
            if asked(other):
                break
            refused += 1
        return token, math.log(left) - math.log(refused + 1)
    return -1, -math.inf


def _geometric(
    asked: _Asked, turn: Callable[[int], Iterator[tuple[int, float]]], rng: random.Random, draws: int
) -> tuple[int, float]:
    """Draws without replacement as draws with it: before each new token some that are refused already come again."""
    gone, refused, found = 0.0, 0, -1
    for n in range(draws):
        for token, chance in turn(n):
            if asked.known.get(token) is False:
                continue
            if gone > 0:
                share = min(gone, 1 - chance)
                refused += int(math.log(max(rng.random(), 1e-300)) / math.log(share))
            if asked(token):
                found = token if n == 0 else found
                break
            gone, refused = gone + chance, refused + 1
        if found < 0:
            return -1, -math.inf
    return found, math.log((draws - 1) / (draws - 1 + refused))


@dataclasses.dataclass(frozen=True)
class AWRS(Drafting):
    regex: str = option("", "a Python regular expression for the whole text, without look-around and back-references")
    schema: str = option("", "a JSON schema that the text follows, inline or a file; without both: any JSON value")
    spaces: int = option(1, "most whitespace bytes in a row inside JSON; indented JSON needs more", least=0)
    tokenizer: str = option("", "folder of the tokenizer; without it the model's own, or a token is a byte")
    masking: bool = option(False, "check the whole vocabulary at every token: the exact baseline")
    weights: str = option("none", "how a token's normaliser is estimated", choices=KINDS)
    draws: int = option(2, "allowed tokens that a geometric estimate waits for", least=2, most=64)
    particles: int = option(
        1, "texts for each prompt, of which one is kept by its weight (paper: 5)", least=1, most=256
    )
    resample: float = option(0.5, "share of effective particles below which they are resampled", least=0, most=1)

    def problems(self) -> list[str]:
        found = []
        if self.regex and self.schema:
            found.append("give regex or schema, not both")
        if self.masking and self.weights != "none":
            found.append("masking knows the normaliser, so that particles have exact weights: leave out weights")
        if self.particles > 1 and self.weights == "none" and not self.masking:
            found.append("particles are chosen by weight: give weights=paper, recursive, geometric or adaptive")
        if self.draws > 2 and self.weights not in ("geometric", "adaptive"):
            found.append("draws are those of geometric estimates: give weights=geometric")
        try:
            if self.regex or is_inline(self.schema):
                read_constraint(self)
        except UsageError as problem:
            found.append(str(problem))
        return found

    constrains = True
    """Texts fit a constraint; workloads that ask for one leave it to the method."""

    @property
    def longest(self) -> int:
        return 0

    @property
    def weighs(self) -> bool:
        """Whether rows have weights: of the chances before top-k and the like cut them."""
        return self.weights != "none" or self.particles > 1

    def proposer(self, run: Any) -> Proposer:
        return Proposer(run)

    def run(self, request: Request) -> Guided:
        if not request.scores.sampled and self.weighs:
            raise UsageError(f"{self.name}: weights are those of sampled text: give do_sample=True, or weights=none")
        return Guided(request)

    def draw(self, p: Tensor, allowed: Allowed, e: Any, seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log weights and checks of one step, as `awrs` returns them."""
        if self.masking:
            return masked(p, allowed, e)
        return awrs(p, allowed, e, seeds, self.weights, self.draws)

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Puts the constrained loop behind `model.generate`.

        Raises:
            UsageError: a constraint that can't be read or that nothing fits, or a model whose tokens are not known
                as bytes; nothing is changed then.
        """
        check(self, host, None)
        checker, record = constraint_of(self, host.model)
        _put(self, host, Drafter(None, checker))
        return record

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        _put(self, host, Drafter(None, Checker.of(self, record)))


METHOD = AWRS
