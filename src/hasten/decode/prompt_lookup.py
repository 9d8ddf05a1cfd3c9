"""Prompt lookup (LLMA): what followed the latest tokens earlier in the text is copied as candidates, without a draft.

With the text x_1..x_t of one row (prompt and what was generated), n going down from the longest to the shortest match:

    at the latest j < t with x_{j-n+1..j} = x_{t-n+1..t}:    candidates x_{j+1}, x_{j+2}, ..., x_{j+k}

One pass of the target checks them; the tokens are the target's own. An index of n-grams for each row takes a token in
constant time, so that the text is never searched.

Shapes: a row's text is a list of token ids; returns a list of at most k candidates.

Departures: the reference is the row's own text, as in transformers' `prompt_lookup_num_tokens`, whose defaults of n and
k are taken (the paper's code copies from given documents, n from 5 down to 1, k = 20, at the first occurrence; so does
transformers within the text). A copy that reaches the end of the text goes on with its own tokens, so that a text that
repeats itself is copied in full. In a batch a row without a match gets filling, which is checked and not counted.
"""

import dataclasses
from typing import Any

import torch

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.decode._proposals import Proposal, Proposer
from hasten.decode.base import Drafting

CARD = Card(
    title="Inference with Reference: Lossless Acceleration of Large Language Models",
    paper="2304.04487",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="over 2x with the tokens of greedy decoding, where outputs repeat much of a reference, as in search engines "
    "and multi-turn conversations",
    claimed=2.0,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=("stdlib-lm(task=generate)", "decode/prompt_lookup(match=12, shortest=4)"),
    when="The output repeats what is in the prompt: summaries, edits of code, questions about documents, long chats.",
    when_not="Free text with little repetition, short prompts, or small tokens (bytes) without a longer `match`: then "
    "most copies are refused and their checking is lost.",
    hosts=("decoder",),
)


def naive_prompt_lookup(text: list[int], match: int, shortest: int, candidates: int, first: bool = False) -> list[int]:
    """Searches the text from its end for the longest match.

    Args:
        text: token ids of one row.
        match, shortest: most and fewest tokens that must agree; `candidates`: how many are copied.
        first: take the first occurrence in the text, not the latest.

    Returns:
        the candidates, none where nothing matches.
    """
    for n in range(match, shortest - 1, -1):
        places = range(len(text) - n)
        for start in places if first else reversed(places):
            if text[start : start + n] == text[len(text) - n :]:
                grown = list(text)
                for i in range(candidates):
                    grown.append(grown[start + n + i])
                return grown[len(text) :]
    return []


def prompt_lookup(text: list[int], match: int, shortest: int, candidates: int, first: bool = False) -> list[int]:
    """As `naive_prompt_lookup`, by an index that was built token by token."""
    index = Index(match, shortest, first)
    index.add(text)
    return index.follow(candidates)


class Index:
    """A row's text, and for each n-gram in it the place after its latest (or first) occurrence that was followed."""

    def __init__(self, match: int, shortest: int, first: bool = False) -> None:
        self.text: list[int] = []
        self.first = first
        self.tables: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(match, shortest - 1, -1)}

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self.text)  # the n-grams that end here are now followed by this token
            for n, places in self.tables.items():
                if end >= n:
                    gram = tuple(self.text[end - n :])
                    if not self.first or gram not in places:
                        places[gram] = end
            self.text.append(token)

    def follow(self, count: int) -> list[int]:
        """The tokens after the longest match of the text's end."""
        size = len(self.text)
        for n, places in self.tables.items():
            at = places.get(tuple(self.text[size - n :])) if size >= n else None
            if at is not None:
                copied = self.text[at : at + count]
                while len(copied) < count:
                    copied.append(copied[at + len(copied) - size])
                return copied
        return []


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafting):
    """Copies candidates from the row's own text."""

    match: int = option(2, "most tokens at the text's end that an earlier place must agree with", least=1, most=64)
    shortest: int = option(1, "fewest tokens that must agree; below that nothing is drafted", least=1)
    candidates: int = option(10, "tokens copied from the place that was found", least=1, most=64)
    first: bool = option(False, "copies from the first occurrence, not from the latest")

    def problems(self) -> list[str]:
        return [f"shortest={self.shortest} is above match={self.match}"] if self.shortest > self.match else []

    @property
    def longest(self) -> int:
        return self.candidates

    def proposer(self, run: Any) -> "Copier":
        return Copier(run, self)


class Copier(Proposer):
    """Drafts by copying; holds one index for each row of the batch."""

    def __init__(self, run: Any, method: PromptLookup) -> None:
        super().__init__(run)
        texts = (
            run.ids.tolist()
            if run.real is None
            else [ids[on].tolist() for ids, on in zip(run.ids, run.real, strict=True)]
        )
        self.indices = [Index(method.match, method.shortest, method.first) for _ in texts]
        for index, text in zip(self.indices, texts, strict=True):
            index.add(text)
        self.prompts = [len(text) for text in texts]

    def propose(self, most: int) -> Proposal:
        run = self.run
        found = []
        for row in run.rows if most else ():
            index, new = self.indices[row], run.stops.new[row]
            index.add(new[len(index.text) - self.prompts[row] :])
            found.append(index.follow(min(most, run.method.candidates)))
        width = max(map(len, found), default=0)
        if not width:
            return self.none()
        lengths = [len(copied) for copied in found]
        tokens = [copied or [0] * width for copied in found]
        return Proposal(torch.tensor(tokens, device=run.ids.device), lengths=lengths)


METHOD = PromptLookup
