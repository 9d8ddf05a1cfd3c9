"""S2D2: a block-diffusion model drafts a block's masks in parallel and checks them itself, as a model of blocks of one.

With blocks of one token such a model is autoregressive. One pass over [drafted text ; a mask for each column], in which
the mask of column i sees the text before i and itself, gives p_i, the law of token i given all on its left. Over the
first contiguous span of masks, from the left, the draft x_i with law q_i stays with probability min(1, p_i(x_i) /
q_i(x_i)); the first that does not is drawn from norm(max(p_i - q_i, 0)), and the rest stays masked (arXiv 2603.25702,
and official code). A step is checked where its routing policy expects that to be worth a second pass:

    span        the span has at least `least_span` tokens
    score       s >= score_threshold,   s = sum_k prod_{i <= k} a_i - cost   (dynamic: cost times the tokens that are
                surer than `threshold`),   a_i = exp(-H(q_i) / log V), or 1 where q_i's margin is above 0.05
    hysteresis  s > on switches it on, s < off switches it off

Otherwise, and where the schedule decides more, all that are surer than `threshold` are decided, or the plain order's.

Shapes: p, q [B, C, V], drafts [B, C], span [B, C] bool, u [B, C], e [B, V]; returns chosen [B, C] and tokens [B, C].

Departures: any batch size (code: 1). At temperature 0 the draft stays if it is p's choice, and p's choice replaces it,
as in the limit of low temperatures; the code draws there too. Sureness is the model's own probability, whatever the
temperature. Keys of decided text are cached for the check, drafts see blocks as the call says (the code can let both
see tokens one by one: `draft_ver`, `cache_ver`). The bandit policy, the tempered ratio and further estimators are left
out. Where scores are those of the next token (Fast-dLLM v2) the check is a causal pass over the drafted text alone.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._denoising import Denoising, Guess, State, check_host
from hasten.decode._denoising_loop import best, rows_of
from hasten.decode._sampling import exponential
from hasten.hosts.context import Context

CARD = Card(
    title="S2D2: Fast Decoding for Diffusion LLMs via Training-Free Self-Speculation",
    paper="2603.25702",
    seams=("denoise.order",),
    effects=("time", "steps", "quality"),
    lossless=False,
    claim="4.7x over autoregressive decoding, SDAR-8B",
    claimed=4.7,
    identity={"score_threshold": 1e9, "threshold": 1.0},
    experiment=("stdlib-denoiser(task=continue, block=16, blockwise=true)", "decode/s2d2"),
    when="A model trained on blocks of several sizes, one too, and passes that cost little more for more tokens.",
    when_not="A model that never saw blocks of one, large batches, or drafts that are nearly always refused.",
    hosts=("diffusion_lm",),
)

MARGIN = 0.05


def naive_s2d2(p: Tensor, q: Tensor, drafts: Tensor, span: Tensor, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance row by row.

    Args:
        p: the check's law at each column, [B, C, V]; q: the draft's; drafts: [B, C]; span: [B, C], what is checked.
        u: uniform numbers [B, C]; e: exponential numbers [B, V], a draw from w being argmax of w / e.

    Returns:
        chosen [B, C], which columns are decided, and tokens [B, C].
    """
    chosen, tokens = torch.zeros(span.shape, dtype=torch.bool), drafts.clone()
    for b in range(len(drafts)):
        for c in range(drafts.shape[1]):
            if not span[b, c]:
                continue
            chosen[b, c] = True
            x = int(drafts[b, c])
            if u[b, c].item() * q[b, c, x].item() < p[b, c, x].item():
                continue
            weights = [max(a - d, 0.0) for a, d in zip(p[b, c].tolist(), q[b, c].tolist(), strict=True)]
            if sum(weights) == 0:
                weights = p[b, c].tolist()
            race = [weight / wait for weight, wait in zip(weights, e[b].tolist(), strict=True)]
            tokens[b, c] = race.index(max(race))
            break
    return chosen, tokens


def s2d2(p: Tensor, q: Tensor, drafts: Tensor, span: Tensor, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """As `naive_s2d2`, all rows at once."""
    index = drafts[..., None]
    refused = span & ~(u * q.gather(-1, index)[..., 0] < p.gather(-1, index)[..., 0])
    count = refused.cumsum(1)
    chosen = span & (count - refused.long() == 0)
    at = refused.int().argmax(1)[:, None, None].expand(-1, 1, p.shape[-1])
    p_BV, q_BV = p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
    rest = (p_BV - q_BV).clamp(min=0)
    # p equal to q up to rounding leaves nothing over, and is refused with a probability of the order of rounding
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_BV)
    return chosen, torch.where(refused & chosen, (rest / e).argmax(-1, keepdim=True), drafts)


@dataclasses.dataclass(frozen=True)
class S2D2(Denoising):
    """Checks the first span of drafted tokens with the same model, where that is expected to be worth it."""

    policy: str = option("score", "what decides whether a step is checked", choices=("span", "score", "hysteresis"))
    least_span: int = option(1, "masks in the span for a check (policy=span); 1 checks always", least=1)
    score_threshold: float = option(0.0, "least score for a check (policy=score)")
    on: float = option(1.0, "score above which checks begin (policy=hysteresis)")
    off: float = option(-5.0, "score below which checks end (policy=hysteresis)")
    cost: float = option(1.0, "c, what a check costs in tokens", least=0)
    penalty: str = option("static", "cost as it is, or times the sure tokens", choices=("static", "dynamic"))
    estimate: str = option("entropy", "what tells whether a draft will stay", choices=("entropy", "margin"))
    threshold: float = option(0.85, "probability above which tokens are decided unchecked", above=0, most=1)

    def problems(self) -> list[str]:
        return [] if self.on > self.off else [f"on={self.on} has to be above off={self.off}"]

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Tells the host who chooses.

        Raises:
            UsageError: the model is no masked-diffusion language model, or its attention takes no cache of places.
        """
        check_host(self.name, host)
        host.check_cache(self.name)
        return super().install(host, context)

    def choose(self, state: State, guess: Guess) -> tuple[Tensor, Tensor]:
        notes = state.facts.setdefault(self.name, {"on": torch.zeros(len(state.tokens), dtype=torch.bool)})
        masked, some = state.open, state.open.any(0).nonzero()[:, 0]
        begin, end = int(some[0]), int(some[-1]) + 1
        rows, at = guess.open.nonzero(as_tuple=True)
        places = guess.columns[rows, at] - begin
        drafted = torch.zeros_like(masked[:, begin:end])
        drafts, chance = state.tokens[:, begin:end].clone(), torch.zeros(drafted.shape, device=drafted.device)
        rank = torch.full_like(chance, -torch.inf)
        logits = guess.logits.new_zeros(*drafted.shape, guess.logits.shape[-1])
        drafted[rows, places], drafts[rows, places] = True, guess.tokens[rows, at]
        chance[rows, places], logits[rows, places] = guess.chance[rows, at], guess.logits[rows, at]
        rank[rows, places] = guess.confidence(state.confidence, state)[rows, at]

        span = first_span(masked[:, begin:end], drafted)
        sure = drafted & (chance > self.threshold)
        checked = self.route(notes, logits.div(state.temperature or 1.0), span, sure)
        chosen = torch.zeros_like(drafted)
        if bool(checked.any()):
            verdict = verify(notes, state, drafts, begin, end)
            p, q = law(verdict, state.temperature), law(logits, state.temperature)
            u = torch.rand(drafts.shape, device=p.device, generator=state.generator)
            chosen, drafts = s2d2(p, q, drafts, span & checked[:, None], u, exponential(p[:, 0], state.generator))
        chosen |= confident(rank, drafted & ~chosen, sure, short(state.quota, chosen))
        tokens = state.tokens.clone()
        tokens[:, begin:end] = drafts
        picked = torch.zeros_like(masked)
        picked[:, begin:end] = chosen
        return picked.gather(1, guess.columns) & guess.open, tokens.gather(1, guess.columns)

    def route(self, notes: dict[str, Any], logits: Tensor, span: Tensor, sure: Tensor) -> Tensor:
        """Which rows are checked, [B] bool."""
        length = span.sum(1)
        if self.policy == "span":
            return length >= self.least_span
        q = logits.softmax(-1)
        if self.estimate == "margin":
            two = q.topk(2, -1).values
            stays = (two[..., 0] - two[..., 1] > MARGIN).float()
        else:
            stays = (torch.special.entr(q).sum(-1) / -math.log(q.shape[-1])).exp()
        expected = torch.where(span, stays, 1.0).cumprod(1).mul(span).sum(1)
        score = expected - self.cost * (1 if self.penalty == "static" else sure.sum(1))
        if self.policy == "score":
            return (score >= self.score_threshold) & (length > 0)
        was = notes["on"].to(score.device)
        now = torch.where(was, score >= self.off, score > self.on)
        notes["on"] = torch.where(length > 0, now, was)
        return now & (length > 0)


def first_span(masked: Tensor, drafted: Tensor) -> Tensor:
    """The first contiguous run of masks in each row, as far as all have a draft, [B, C] bool."""
    behind = masked.cumsum(1) > 0
    return behind & ((behind & ~(masked & drafted)).cumsum(1) == 0)


def law(logits: Tensor, temperature: float) -> Tensor:
    """[..., V]: the probabilities at a temperature, all on the likeliest token at 0."""
    if temperature:
        return (logits / temperature).softmax(-1)
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


def short(quota: list[int], chosen: Tensor) -> list[int]:
    """What each row still has to decide."""
    return [max(0, want - have) for want, have in zip(quota, chosen.sum(1).tolist(), strict=True)]


def confident(rank: Tensor, ready: Tensor, sure: Tensor, wanted: list[int]) -> Tensor:
    """All sure columns where these are as many as wanted, else the first by rank; none for rows that want none."""
    if not any(wanted):
        return torch.zeros_like(ready)
    least = torch.tensor(wanted, device=ready.device)[:, None]
    sure = ready & sure
    surest = best(rank.masked_fill(~ready, -torch.inf), wanted)
    return torch.where(sure.sum(1, keepdim=True) >= least, sure, surest) & (least > 0)


def verify(notes: dict[str, Any], state: State, drafts: Tensor, begin: int, end: int) -> Tensor:
    """The model's logits as one of blocks of one token, for the columns from `begin` to `end`, [B, end - begin, V].

    The cache holds a place for each column's token and, behind these, for a mask of each column that may be checked.
    Keys of what is decided in all rows, up to the first mask, are computed once.
    """
    host, shift = state.host, int(state.host.shifted)
    length, device = state.tokens.shape[1], drafts.device
    tokens = state.tokens.clone()
    tokens[:, begin:end] = drafts
    if "cache" not in notes:
        slots = torch.arange(length if shift else begin, length, device=device)
        notes |= {"first": begin, "done": 0, "slots": slots, "sees": one_by_one(state, slots)}
        notes["cache"] = host.place_cache(length + len(slots))
        at = torch.arange(length + len(slots), device=device)
    else:
        # keys before a place that is computed again were those of decided tokens
        masks = torch.arange(begin, end, device=device) - notes["first"] + length
        clean = torch.arange(notes["done"], end - 1, device=device)
        at = clean if shift else torch.cat([clean, masks])
    wanted = (torch.arange(begin, end, device=device) - 1) if shift else None
    if wanted is None:
        wanted = torch.arange(begin, end, device=device) - notes["first"] + length
    place = torch.full((length + len(notes["slots"]),), -1, device=device)
    place[at] = torch.arange(len(at), device=device)
    hidden = tokens.new_full((len(tokens), len(notes["slots"])), host.mask_token)
    every = len(at) == len(place)
    logits = host.scores(
        torch.cat([tokens, hidden], 1),
        positions=torch.cat([state.positions, state.positions[..., notes["slots"]]], -1),
        at=None if every else at,
        keep=place[wanted],
        cache=notes["cache"],
        mask=rows_of(notes["sees"], None if every else at),
    ).float()
    notes["done"] = max(0, begin - shift)
    state.extra.append(len(at) * len(tokens))
    logits[..., host.mask_token] = -torch.inf
    return logits


def one_by_one(state: State, slots: Tensor) -> Tensor:
    """Which keys each token sees, and each mask in a slot, as with blocks of one; [1 or B, 1, N, N] bool."""
    column = torch.cat([torch.arange(state.tokens.shape[1], device=slots.device), slots])
    token = torch.arange(len(column), device=slots.device) < state.tokens.shape[1]
    before = (column[None] < column[:, None]) & token[None]
    if state.real is not None:
        before = before & torch.cat([state.real, state.real[:, slots]], 1)[:, None]
    sees = before | torch.eye(len(column), dtype=torch.bool, device=slots.device)
    return sees.view(-1, 1, len(column), len(column))


METHOD = S2D2
