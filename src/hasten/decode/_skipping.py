"""A model that shares another's weights and leaves out some of its sublayers, and the search for which."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.decode._writing import read
from hasten.hosts.changes import Changes

Part = tuple[str, int]
"""What can be left out: attention, mlp or block, and of which layer."""

PATIENCE = 4
"""Steps without a gain after which the search ends."""


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the model's own parameters and buffers.

    Raises:
        UsageError: a method stands in the place of a part's forward, which a copy would run on the original.
    """
    taken = next((path for path, part in model.named_modules() if "forward" in vars(part)), None)
    if taken is not None:
        raise UsageError(f"the forward of {taken or 'the model'} is taken over by a method of the plan: leave one out")
    kept = [*model.parameters(), *model.buffers()]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    vars(made).pop("generate", None)
    return made


def host_of(made: nn.Module, host: Any) -> Any:
    """The host of a copy: parts are where they are in the original, whose layers may have other classes by now."""
    found = copy.copy(host)
    found.model, found.changes = made, Changes()
    return found


def skipping(host: Any, skipped: dict[str, list[int]]) -> nn.Module:
    """The draft: a copy of the host's model that shares its weights and has lost these parts.

    Its attribute `cache_of` says which of the model's cache layers each of its own stands for; it is empty where the
    draft needs a cache of its own.
    """
    places = _cache_places(host)
    lost = set(skipped.get("attention", ())) | set(skipped.get("block", ()))
    draft: Any = sharing(host.model)
    own = host_of(draft, host)
    leave_out(own, skipped)
    own.changes.forget()
    sources = [place for layer, place in places.items() if layer not in lost]
    in_order = list(_cache_places(own).values()) == list(range(len(sources)))
    draft.cache_of = sources if in_order else []
    return draft


def leave_out(host: Any, skipped: dict[str, list[int]]) -> None:
    """Takes the parts out of the host's model; layers that have lost both sublayers go as a whole."""
    blocks = set(skipped.get("block", ()))
    for part in ("attention", "mlp"):
        for index in skipped.get(part, ()):
            host.drop(index, part)
    empty = {i for i in range(len(host.layers)) if not (host.has(i, "attention") or host.has(i, "mlp"))}
    if blocks | empty:
        host.keep_layers(i for i in range(len(host.layers)) if i not in blocks | empty)


def _cache_places(host: Any) -> dict[int, int]:
    """Each layer with attention, and the layer of the cache that it writes to."""
    places = {}
    for layer in host.cache_layers:
        held = [vars(part).get(name) for part in host.blocks[layer].modules() for name in ("layer_idx", "layer_id")]
        places[layer] = next((place for place in held if isinstance(place, int)), layer)
    return places


@dataclasses.dataclass
class Found:
    """One set on the search's way: how often its draft agrees, and the speed that this promises."""

    skipped: list[Part]
    agreement: float
    cost: float
    candidates: int
    speed: float


def by_part(skipped: list[Part]) -> dict[str, list[int]]:
    """The indices of the layers that lose each part."""
    return {part: sorted(i for one, i in skipped if one == part) for part in dict(sorted(skipped))}


def speed_of(agrees: Tensor, cost: float, most: int) -> tuple[float, int]:
    """The best speed over plain decoding by drafts of one length, and that length.

    Where the draft agrees with what the model wrote is all that greedy decoding depends on, so its rounds are gone
    through: a round of K candidates keeps those up to the first refusal and one token more, and takes 1 + K c passes.

    Args:
        agrees: bool [B, n], whether the draft's first choice is the model's token.
        cost: c, a pass of the draft in passes of the model.
    """
    best = (0.0, 0)
    for number in range(1, most + 1):
        tokens = rounds = 0
        for row in agrees.tolist():
            at = 0
            while at < len(row):
                run = row[at : at + number]
                at += (run.index(False) if False in run else len(run)) + 1
                rounds += 1
            tokens += min(at, len(row))
        best = max(best, (tokens / (rounds * (1 + number * cost)), -number))
    return best[0], -best[1]


class Search:
    """The greedy search on one host.

    Args:
        texts: (ids [B, T + n], which are real, n), the last n tokens being the model's own.
        unit: sublayer or layer.
        costs: of an attention, an mlp and all beside the layers, in a pass of one token.
        tries: of how many parts, those of least importance first, each step chooses one.
        most: candidates of a draft.
    """

    def __init__(
        self,
        host: Any,
        texts: list[tuple[Tensor, Tensor | None, int]],
        unit: str,
        costs: dict[str, float],
        tries: int,
        most: int,
    ) -> None:
        self.host = host_of(sharing(host.model), host)
        self.texts, self.tries, self.most = texts, tries, most
        depth = range(len(host.layers))
        there = [(part, i) for i in depth for part in ("attention", "mlp") if host.has(i, part)]
        if unit == "sublayer":
            self.costs = {one: costs[one[0]] for one in there}
        else:
            self.costs = {("block", i): sum(costs[part] for part, at in there if at == i) for i in depth}
        self.whole = costs["beside"] + sum(costs[part] for part, _ in there)
        importance = self._importance("block" if unit == "layer" else "")
        self.ranked = sorted(self.costs, key=lambda one: (importance[one], one))

    @torch.no_grad()
    def _importance(self, block: str) -> dict[Part, float]:
        """1 - cos between the residual stream before and after each part, summed over all tokens."""
        found = dict.fromkeys(self.costs, 0.0)

        def see(index: int, part: str, before: Tensor, after: Tensor) -> None:
            turned = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
            found[part, index] += turned[self.host.mask].sum().item()

        batches = [
            {"input_ids": ids} | ({} if real is None else {"attention_mask": real.long()})
            for ids, real, _ in self.texts
        ]
        if block:
            self.host.observe_layers(batches, lambda index, before, after: see(index, block, before, after))
        else:
            self.host.observe_sublayers(batches, see)
        return found

    @torch.no_grad()
    def agrees(self, skipped: list[Part]) -> tuple[Tensor, float]:
        """Whether the draft's first choice is the model's token, [B, n], and the mean probability that it gives it."""
        mark, same, chances = len(self.host.changes), [], []
        leave_out(self.host, by_part(skipped))
        try:
            for ids, real, count in self.texts:
                q = read(self.host.model, ids, real, count).float().softmax(-1)
                tokens = ids[:, -count:]
                same.append(q.argmax(-1) == tokens)
                chances.append(q.gather(2, tokens[..., None]))
        finally:
            self.host.changes.undo(mark)
        return torch.cat(same), torch.cat(chances).mean().item()

    def _stay(self, skipped: list[Part]) -> bool:
        """Whether a token would still see those before it."""
        gone = {index for part, index in skipped if part != "mlp"}
        return any(index not in gone for index in self.host.cache_layers)

    def found(self, skipped: list[Part], agrees: Tensor) -> Found:
        cost = 1 - sum(self.costs[one] for one in skipped) / self.whole
        speed, candidates = speed_of(agrees, cost, self.most)
        return Found(list(skipped), agrees.float().mean().item(), cost, candidates, speed)

    def best(self, number: int | None) -> Found:
        """The set of the highest expected speed, or the last one of `number` parts.

        Raises:
            UsageError: nothing can be left out.
        """
        skipped: list[Part] = []
        way: list[Found] = []
        while number is None or len(skipped) < number:
            left = [one for one in self.ranked if one not in skipped and self._stay([*skipped, one])][: self.tries]
            if not left:
                break
            made = {one: self.agrees([*skipped, one]) for one in left}
            scores = {one: (same.sum().item(), chance) for one, (same, chance) in made.items()}
            skipped.append(max(left, key=lambda one: scores[one]))  # of equals the one of least importance
            way.append(self.found(skipped, made[skipped[-1]][0]))
            ahead = max(range(len(way)), key=lambda i: way[i].speed)
            if number is None and len(way) - 1 - ahead >= PATIENCE:
                break
        if not way:
            raise UsageError("nothing of this model can be left out of a draft: it has a single layer with attention")
        return way[-1] if number is not None else max(way, key=lambda one: one.speed)
