"""Copying from the text: the common cases, the longest match, rows of their own, and what repetition saves."""

import random

import pytest
import torch

import hasten
from conformance.decode import ragged, target
from hasten.core.errors import PlanError
from hasten.decode.base import speculation
from hasten.decode.prompt_lookup import Index, PromptLookup, naive_prompt_lookup, prompt_lookup


def exact():
    return "decode/prompt_lookup(candidates=4)", {}


def cases():
    draw = random.Random(0)
    for words, length, match, shortest, candidates, first in (
        (3, 40, 2, 1, 10, False),
        (3, 41, 5, 2, 3, True),
        (2, 17, 16, 1, 7, False),
        (50, 9, 2, 1, 4, False),  # mostly without a match
        (4, 1, 3, 1, 5, False),
        (4, 0, 2, 1, 5, True),
        (1, 6, 2, 2, 9, False),  # copies its own copy
    ):
        yield {"args": ([draw.randrange(words) for _ in range(length)], match, shortest, candidates, first)}


def test_index_grows_with_the_text():
    """Any way of cutting the text into pieces gives the same copies, at every length."""
    draw = random.Random(1)
    text = [draw.randrange(3) for _ in range(60)]
    index, told = Index(4, 1), 0
    while told < len(text):
        size = draw.randrange(1, 5)
        index.add(text[told : told + size])
        told = min(len(text), told + size)
        assert index.follow(6) == naive_prompt_lookup(text[:told], 4, 1, 6)


def test_a_longer_match_goes_before_a_later_one():
    text = [7, 1, 2, 3, 9, 2, 3, 8, 5, 1, 2, 3]
    assert prompt_lookup(text, 3, 1, 2) == [9, 2]  # 1 2 3 is found at the front, though 2 3 occurs later
    assert prompt_lookup(text, 2, 1, 2) == [8, 5]
    assert prompt_lookup(text, 2, 1, 2, first=True) == [9, 2]
    assert prompt_lookup([4, 5, 6], 3, 1, 2) == []
    assert prompt_lookup([1, 2, 1], 2, 2, 3) == []  # one token agrees, two are asked for


def test_first_occurrence_as_in_transformers():
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    draw, found = random.Random(2), 0
    theirs = PromptLookupCandidateGenerator(num_output_tokens=4, max_matching_ngram_size=3, max_length=200)
    for _ in range(60):
        text = [draw.randrange(12) for _ in range(25)]
        ids = theirs.get_candidates(torch.tensor([text]))[0][0].tolist()[25:]
        mine = prompt_lookup(text, 3, 1, 4, first=True)
        assert mine[: len(ids)] == ids and bool(mine) == bool(ids)  # theirs ends with the text
        found += bool(ids)
    assert found > 40


def test_text_that_repeats_takes_few_passes():
    model = target()
    for layer in model.model.layers:  # a model in which each token calls for its successor: soon a cycle
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    made = hasten.generate(model, ids, "decode/prompt_lookup", **options)
    assert torch.equal(made.tokens, plain)
    cycle = len(set(plain[0].tolist()))
    assert made.counters.draft_passes == 0 and made.counters.target_passes <= cycle + 80 // 11 + 1


def test_rows_without_a_match_draft_nothing():
    model = target()
    batch = {"input_ids": torch.tensor([[3, 4, 3, 4, 3], [5, 6, 7, 8, 9]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    fast = hasten.apply(model, "decode/prompt_lookup(candidates=3)")
    fast.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    counters = speculation(fast.host).counters
    assert 3 <= counters.drafted < 2 * 3 * counters.rounds
    alone = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    fast.generate(**alone, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert speculation(fast.host).counters.drafted == 0


def test_padding_is_no_text(monkeypatch):
    model, seen = target(), []
    proposer = PromptLookup.proposer
    monkeypatch.setattr(PromptLookup, "proposer", lambda self, run: seen.append(proposer(self, run)) or seen[-1])
    batch = ragged(4, 9)
    fast = hasten.apply(model, "decode/prompt_lookup(match=3, candidates=3)")
    out = fast.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for index, ids, mask in zip(seen[-1].indices, out, batch["attention_mask"].bool(), strict=True):
        assert ids[:9][mask].tolist() == index.text[: int(mask.sum())]
        assert index.text == ids[int((~mask).sum()) :][: len(index.text)].tolist() and len(index.text) > 9


def test_options_that_do_not_go_together():
    with pytest.raises(PlanError, match="shortest=3 is above match=2"):
        PromptLookup(shortest=3)
