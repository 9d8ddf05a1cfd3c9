"""The denoising loop: masked positions are filled in step by step, several of them in one forward of the model.

A step asks the cache policy which positions to compute, the model for scores at the open ones (masked, and in the
present block), and the order which of them are decided now. Without methods every position is computed and the most
confident tokens are decided, as many as the schedule says (LLaDA, arXiv 2502.09992).

Letters: B rows, T positions, Q positions computed, C whose scores are seen, V vocabulary.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

UNDECIDED = 1 << 30
CONFIDENCE = ("probability", "margin", "entropy", "random", "left")


@dataclasses.dataclass
class Counters:
    """What one call of generate did.

    Attributes:
        tokens: decided by the model, over all rows.
        forwards: of the model; a forward serves all rows.
        computed: positions computed in each forward, over all rows; `positions`: those that there are.
        committed: tokens decided after each forward, over all rows.
    """

    tokens: int = 0
    forwards: int = 0
    positions: int = 0
    computed: list[int] = dataclasses.field(default_factory=list)
    committed: list[int] = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the positions that was computed, over all forwards."""
        return sum(self.computed) / max(1, self.positions * self.forwards)


@dataclasses.dataclass
class State:
    """One call of generate; methods read it, and keep what is theirs in `facts`.

    Attributes:
        host: where the model is.
        tokens: [B, T], the mask token where nothing is decided yet.
        masked: [B, T] bool, which positions are undecided.
        decided_at: [B, T], the step that decided a position; -1 where it was given, `UNDECIDED` where masked.
        real: [B, T] bool, False at padding; None where there is none. positions: [T] or [B, T].
        sees: [1 or B, 1, T, T] bool, which keys each position sees; None for all that are real.
        begin, end: the columns of the present block. step: forwards so far; block_step: those in this block.
        steps_left: forwards that this block may still have, the coming one included.
        quota: for each row the tokens that the schedule decides in this step.
        temperature: of the tokens, 0 for the likeliest; confidence: what the plain order goes by.
        generator: for every draw.
        extra: positions computed in each further forward of the model that the order made in this step, all rows
            together; the loop counts and empties it.
        ranks: orders that do not depend on the scores, by kind; `rank` makes them.
        facts: the methods' own notes, by name.
    """

    host: Any
    tokens: Tensor
    masked: Tensor
    decided_at: Tensor
    real: Tensor | None
    positions: Tensor
    temperature: float
    confidence: str
    generator: torch.Generator | None
    sees: Tensor | None = None
    begin: int = 0
    end: int = 0
    step: int = 0
    block_step: int = 0
    steps_left: int = 0
    quota: list[int] = dataclasses.field(default_factory=list)
    extra: list[int] = dataclasses.field(default_factory=list)
    ranks: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rank(self, kind: str) -> Tensor:
        """[B, T] float32, the same in all steps: a `random` order of the positions or that from the `left`."""
        if kind not in self.ranks:
            made = torch.empty(self.tokens.shape, device=self.tokens.device)
            if kind == "left":
                made.copy_(-torch.arange(made.shape[1], device=made.device, dtype=made.dtype))
            else:
                made.uniform_(generator=self.generator)
            self.ranks[kind] = made
        return self.ranks[kind]

    @property
    def open(self) -> Tensor:
        """[B, T] bool: undecided and in the present block."""
        inside = torch.zeros_like(self.masked)
        inside[:, self.begin : self.end] = self.masked[:, self.begin : self.end]
        return inside

    def ahead(self) -> Tensor | None:
        """[B, T] bool, what the plain order will decide in the coming step; None where the scores decide that."""
        if self.confidence not in ("random", "left"):
            return None
        return best(self.rank(self.confidence).masked_fill(~self.open, -torch.inf), self.quota)


@dataclasses.dataclass
class Guess:
    """What the model says in one step, a column for each position whose scores are seen.

    Attributes:
        columns: [B, C], the positions. open: [B, C] bool, which of them may be decided; the others are filling.
        logits: [B, C, V] float32, minus infinity at the mask token.
        tokens: [B, C], likeliest or drawn with the temperature; chance: [B, C], their probability at temperature 1.
    """

    columns: Tensor
    open: Tensor
    logits: Tensor
    tokens: Tensor
    chance: Tensor

    def confidence(self, kind: str, state: State) -> Tensor:
        """[B, C], higher is surer; minus infinity where a column is not open.

        Args:
            kind: `probability` of the token, `margin` to the second likeliest, `entropy` (negative), or the ranks of
                `random` or `left`.
        """
        if kind == "probability":
            value = self.chance
        elif kind == "margin":
            two = self.logits.softmax(-1).topk(2, -1).values
            value = two[..., 0] - two[..., 1]
        elif kind == "entropy":
            value = -torch.distributions.Categorical(logits=self.logits, validate_args=False).entropy()
        else:
            value = state.rank(kind).gather(1, self.columns)
        return value.masked_fill(~self.open, -torch.inf)


def best(value_BC: Tensor, quota: list[int]) -> Tensor:
    """[B, C] bool: each row's `quota` highest values, the earlier of equal ones first; none of minus infinity."""
    most = max(quota)
    if most == 1:
        found = value_BC.argmax(-1, keepdim=True)
    else:
        found = value_BC.argsort(dim=-1, descending=True, stable=True)[:, :most]
    chosen = torch.zeros_like(value_BC, dtype=torch.bool)
    if min(quota) == most:
        chosen.scatter_(1, found, True)
    else:
        limit = torch.tensor(quota, device=value_BC.device)[:, None]
        chosen.scatter_(1, found, torch.arange(found.shape[1], device=value_BC.device) < limit)
    return chosen & (value_BC > -torch.inf)


def rows_of(mask: Tensor, at: Tensor | None) -> Tensor:
    """The rows of a mask [1 or B, 1, T, T] that belong to the computed positions, [Q] or [B, Q]."""
    if at is None:
        return mask
    if at.ndim == 1:
        return mask[:, :, at]
    return mask.expand(len(at), -1, -1, -1).gather(2, at[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))


def plain_choice(state: State, guess: Guess) -> tuple[Tensor, Tensor]:
    """The plain order: the most confident open positions, as many as the schedule says."""
    return best(guess.confidence(state.confidence, state), state.quota), guess.tokens


class Loop:
    """One call of generate.

    Args:
        order, policy: the methods that choose and that cache, None for the plain way.
        new_from: the column at which the new text begins; ends: the tokens that end it there; fill: what follows one.
    """

    def __init__(self, state: State, order: Any, policy: Any, new_from: int, ends: tuple[int, ...], fill: int) -> None:
        self.state, self.order, self.policy = state, order, policy
        self.new_from, self.fill = new_from, fill
        self.ends = torch.tensor(ends, device=state.tokens.device) if ends else None
        self.cache = None if policy is None else state.host.place_cache(state.tokens.shape[1])
        self.counters = Counters(positions=state.tokens.numel())

    def run(self, blocks: list[tuple[int, int]], steps: int | None) -> None:
        """Fills in the blocks one after another, each in `steps` forwards, or one a token where None."""
        state = self.state
        for state.begin, state.end in blocks:
            left = self.left()
            state.steps_left = steps or max(left)
            state.block_step = 0
            while max(left):
                state.quota = [-(-count // state.steps_left) for count in left]
                self.step()
                left = self.left()

    def left(self) -> list[int]:
        return self.state.masked[:, self.state.begin : self.state.end].sum(1).tolist()

    def step(self) -> None:
        state = self.state
        guess = self.look()
        choose = plain_choice if self.order is None else self.order.choose
        chosen, tokens = choose(state, guess)
        rows, places = (chosen & guess.open).nonzero(as_tuple=True)
        if not len(rows):  # an order may decline, but every forward gets the text on
            chosen, tokens = plain_choice(state, guess)
            rows, places = chosen.nonzero(as_tuple=True)
        columns = guess.columns[rows, places]
        state.tokens[rows, columns] = tokens[rows, places]
        state.masked[rows, columns] = False
        state.decided_at[rows, columns] = state.step
        extra, state.extra = state.extra, []
        self.counters.forwards += len(extra)
        self.counters.computed += extra
        self.counters.committed += [0] * len(extra) + [len(rows)]
        self.counters.tokens += len(rows)
        state.step += 1
        state.block_step += 1
        state.steps_left = max(1, state.steps_left - 1)
        if self.ends is not None:
            self.finish(self.ends)

    def look(self) -> Guess:
        """One forward, and what it says about the open positions."""
        state, host = self.state, self.state.host
        open_BT, at = state.open, None
        if self.policy is not None and state.step > 0:
            active = self.policy.active(state)
            at = None if active is None else self.places(active, open_BT)
        columns, keep = self.columns(open_BT, at)
        # where later blocks are not seen they are not computed, but a cache holds all positions
        end = state.tokens.shape[1] if state.sees is None or self.cache is not None else state.end
        mask = None if state.sees is None else rows_of(state.sees[:, :, :end, :end], at)
        logits = host.scores(
            state.tokens[:, :end],
            real_BT=None if state.real is None else state.real[:, :end],
            positions=state.positions[..., :end],
            at=at,
            keep=keep,
            cache=self.cache,
            mask=mask,
        )
        self.counters.forwards += 1
        self.counters.computed.append((end if at is None else at.shape[-1]) * len(state.tokens))
        open_BC = open_BT.gather(1, columns)
        if at is not None and at.ndim == 2:  # a place may be named twice there, and the last one has no next
            open_BC[:, 1:] &= at[:, 1:] > at[:, :1]
            open_BC &= at + int(host.shifted) < state.tokens.shape[1]
        logits = logits.float()
        logits[..., host.mask_token] = -torch.inf
        chances = logits.softmax(-1)
        if state.temperature > 0:
            # float64, as in LLaDA: arXiv 2409.02908 shows that coarser noise makes the tokens less varied
            noise = torch.empty_like(logits, dtype=torch.float64).exponential_(generator=state.generator)
            tokens = (logits.double() - state.temperature * noise.log()).argmax(-1)
            chance = chances.gather(-1, tokens[..., None])[..., 0]
        else:
            chance, tokens = chances.max(-1)
        return Guess(columns, open_BC, logits, tokens, chance)

    def columns(self, open_BT: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The positions whose scores are seen, [B, C], and which of the computed ones give them, [C]; None for all."""
        state, shift = self.state, int(self.state.host.shifted)
        if at is not None and at.ndim == 2:
            return (at + shift).clamp(max=state.tokens.shape[1] - 1), None
        wanted = (open_BT[0] if len(open_BT) == 1 else open_BT.any(0)).nonzero()[:, 0]
        if at is None:
            return wanted.expand(len(open_BT), -1), wanted - shift
        place = torch.full((state.tokens.shape[1],), -1, device=at.device)
        place[at] = torch.arange(len(at), device=at.device)
        keep = place[wanted - shift]
        seen = keep >= 0
        return wanted[seen].expand(len(open_BT), -1), keep[seen]

    def places(self, active_BT: Tensor, open_BT: Tensor) -> Tensor | None:
        """The positions to compute, [Q] or [B, Q], from a policy's wish; None for all.

        At least as many open ones as the schedule decides are among them, the first ones where the policy has fewer.
        Where scores are those of the next position, the ones before open positions are computed too.
        """
        state = self.state
        asked = active_BT & open_BT
        short = [max(0, want - have) for want, have in zip(state.quota, asked.sum(1).tolist(), strict=True)]
        if any(short):
            order = torch.arange(open_BT.shape[1], 0, -1, device=open_BT.device, dtype=torch.float32)
            asked = asked | best(order.expand(open_BT.shape).masked_fill(~open_BT | asked, -torch.inf), short)
            active_BT = active_BT | asked
        if state.host.shifted:
            active_BT = active_BT.clone()
            active_BT[:, :-1] |= asked[:, 1:]
        if len(active_BT) == 1 or bool((active_BT == active_BT[:1]).all()):
            at = active_BT[0].nonzero()[:, 0]
            return None if len(at) == active_BT.shape[1] else at
        count = active_BT.sum(1, keepdim=True)
        at = (~active_BT).to(torch.int8).argsort(dim=1, stable=True)[:, : int(count.max())]
        filling = torch.arange(at.shape[1], device=at.device) >= count
        return torch.where(filling, at[:, :1], at)

    def finish(self, ends: Tensor) -> None:
        """Rows whose text has ended, with nothing undecided before its end, are filled up behind it."""
        state = self.state
        new, masked = state.tokens[:, self.new_from :], state.masked[:, self.new_from :]
        ended = (torch.isin(new, ends) & (masked.cumsum(1) == 0)).long()
        over = ended.cumsum(1) - ended > 0  # the first ending token itself stays
        new[over] = self.fill
        state.decided_at[:, self.new_from :][over & masked] = state.step - 1
        masked[over] = False
