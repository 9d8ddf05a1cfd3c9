"""PEARL: the round's rule, its law, and a draft that runs ahead. Its process has tests of its own (test_overlap.py)."""

import itertools

import pytest
import scipy.stats
import torch
from transformers import LogitsProcessorList

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError
from hasten.decode import pearl
from hasten.decode._ahead import Ahead, Order, goes_ahead
from hasten.decode.base import speculation

SERIAL = "decode/pearl(candidates=4, overlap=false)"


def numbers(rows, most, words, seed, peaked=1.0, dtype=torch.float32):
    """Distributions, candidates and random numbers of a round whose rows are in both modes."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(rows, most + 1, words, generator=generator) * peaked).softmax(-1)
    q = (torch.randn(rows, most + 1, words, generator=generator) * peaked + 2 * p.log()).softmax(-1)
    drafts = torch.randint(0, words, (rows, most + 1), generator=generator)
    lengths = torch.randint(0, 2, (rows,), generator=generator) * most
    u = torch.rand(rows, most + 1, generator=generator)
    e = torch.empty(rows, words).exponential_(generator=generator)
    p, q = p.to(dtype), q.to(dtype)
    return p, drafts[:, :most], q[:, :most], lengths, drafts[:, most], q[:, most], u, e


def cases():
    yield {"args": numbers(1, 3, 7, 0)}
    yield {"args": numbers(17, 4, 5, 1)}
    yield {"args": numbers(9, 0, 11, 2)}  # nothing is pending in any row
    yield {"args": numbers(6, 1, 4, 3, peaked=3.0)}
    yield {"args": numbers(8, 3, 6, 4, dtype=torch.bfloat16)}
    p, pending, q, lengths, late, q_late, u, e = numbers(5, 2, 9, 5)
    yield {"args": (p, pending, p[:, :2].clone(), lengths.fill_(2), late, p[:, 2].clone(), u, e)}  # all is accepted


def subject():
    """Without the process, which is no business of the common tests and takes seconds to start."""
    return {"model": target, "options": {"overlap": False}, "context": {"draft": noisy(target(), 0.1)}, "run": run}


def exact():
    return "decode/pearl(candidates=3, overlap=false)", {}


def test_modes_by_hand():
    """A row in pre-verify, one whose late token stays, one whose late token and one whose pending token is refused."""
    p = torch.full((4, 3, 3), 1 / 3)
    q = torch.full((4, 2, 3), 1 / 3)
    q_late = torch.full((4, 3), 1 / 3)
    p[0, 0] = p[2, 2] = p[3, 1] = torch.tensor([0.0, 0.0, 1.0])
    pending, late = torch.tensor([[1, 1]] * 4), torch.tensor([0, 0, 0, 0])
    lengths = torch.tensor([0, 2, 2, 2])
    tokens, accepted = pearl.pearl(p, pending, q, lengths, late, q_late, torch.full((4, 3), 0.5), torch.ones(4, 3))
    assert accepted.tolist() == [0, 2, 2, 1]
    assert tokens.tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 2], [1, 2, 0]]
    told = [(int(n), int(row[n])) for n, row in zip(accepted, tokens, strict=True)]
    assert [goes_ahead(*one, int(had), [0, 1, 1]) for one, had in zip(told, lengths, strict=True)] == [0, 1, 0, 0]


WORDS, DEEP = 5, 3


def small(noise=0.0):
    model = target(vocab_size=WORDS, num_hidden_layers=1, eos_token_id=None)
    model.lm_head.weight.data *= 0.6
    return noisy(model, noise)


@torch.no_grad()
def fit(prompt=(1, 3, 2), rows=2000, candidates=2):
    """The p value of a chi-square test of sampled triples against the target's joint law."""
    model = small()
    chains = list(itertools.product(range(WORDS), repeat=DEEP))
    ids = torch.tensor([[*prompt, *chain] for chain in chains])
    logits = model(ids).logits[:, len(prompt) - 1 : -1]
    chances = logits.softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0].prod(1)
    fast = hasten.apply(model, f"decode/pearl(candidates={candidates}, overlap=false)", draft=small(0.8))
    out = fast.generate(torch.tensor([prompt] * rows), max_new_tokens=DEEP + 3, do_sample=True, top_k=0, seed=0)
    assert 0.1 < speculation(fast.host).counters.acceptance < 0.95
    place = {chain: number for number, chain in enumerate(chains)}
    seen = torch.zeros(len(chains))
    for chain in out[:, len(prompt) : len(prompt) + DEEP].tolist():
        seen[place[tuple(chain)]] += 1
    often = chances * rows >= 5
    observed = [*seen[often].tolist(), seen[~often].sum().item()]
    expected = [*(chances[often] * rows).tolist(), (chances[~often].sum() * rows).item()]
    scale = sum(observed) / sum(expected)
    return scipy.stats.chisquare(observed, [one * scale for one in expected]).pvalue


@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_the_joint_law_is_the_targets(candidates):
    assert fit(candidates=candidates) > 1e-3


def late_stays(p, pending, q, lengths, late, q_late, u, e):
    return _pearl(p, pending, q, lengths, late, q_late, u.scatter(1, lengths[:, None], -1.0), e)


def late_is_redrawn_from_p(p, pending, q, lengths, late, q_late, u, e):
    tokens, accepted = _pearl(p, pending, q, lengths, late, q_late, u, e)
    own = p.gather(1, lengths[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0]
    last = tokens.gather(1, lengths[:, None])[:, 0]
    refused = (accepted == lengths) & (last != late)
    again = torch.where(refused, (own / e).argmax(-1), last)
    return tokens.scatter(1, lengths[:, None], again[:, None]), accepted


def late_is_judged_one_place_early(p, pending, q, lengths, late, q_late, u, e):
    at = lengths[:, None, None].expand(-1, 1, p.shape[-1])
    wrong = p.scatter(1, at, p.gather(1, (at - 1).clamp(min=0)))
    return _pearl(wrong, pending, q, lengths, late, q_late, u, e)


_pearl = pearl.pearl


@pytest.mark.parametrize("wrong", [late_stays, late_is_redrawn_from_p, late_is_judged_one_place_early])
def test_the_test_of_the_law_finds_wrong_late_rules(monkeypatch, wrong):
    monkeypatch.setattr(pearl, "pearl", wrong)
    assert fit() < 1e-6


def order_of(batch, most=4, **more):
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    real = None if bool(mask.all()) else mask
    usual = {"limit": 80, "most": most, "words": 37, "processors": LogitsProcessorList(), "sampled": False, "seed": 0}
    return Order(ids, real, ids, **(usual | more))


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("most", [1, 2, 5])
@torch.no_grad()
def test_a_draft_that_runs_ahead_drafts_as_from_scratch(kind, most):
    """After any verdicts, in rows of both modes and with rows leaving, it writes what the draft alone would write."""
    draft, batch = target(kind), ragged(5, 8, seed=1)
    ahead = Ahead(draft, order_of(batch, most))
    generator = torch.Generator().manual_seed(most)
    places, heard, going, pending = [0, 1, 2, 3, 4], None, None, [0] * 5
    for turn in range(9):
        count = most if turn < 7 else max(1, most - 2)
        ahead.order(heard, going, count)
        made, _ = ahead.collect()
        for row, place in enumerate(places):
            whole = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist() + ahead.written.new[place]
            for token in made[row]:
                assert token == int(draft(torch.tensor([whole])).logits[0, -1].argmax())
                whole.append(token)
        heard = []
        for row in range(len(places)):
            if torch.rand((), generator=generator) < 0.5:
                heard.append((pending[row], made[row][0]))
            else:
                kept = int(torch.randint(0, pending[row] + 1, (), generator=generator))
                heard.append((kept, (made[row][0] + 1 + turn) % 37))
        pending = [
            count - 1 if goes_ahead(*one, had, new) else 0 for one, had, new in zip(heard, pending, made, strict=True)
        ]
        going = [0, 2, 3] if turn == 4 else None
        if going:
            places, pending = [places[row] for row in going], [pending[row] for row in going]


def test_easy_text_is_drafted_on_and_on():
    """A draft that is right: one token in pre-verify, then gamma with every pass, and no length ends the stretch."""
    model = target()
    fast = hasten.apply(model, SERIAL, draft=noisy(model, 0.0))
    out = fast.generate(**ragged(1), max_new_tokens=21, do_sample=False, eos_token_id=None)
    counters = speculation(fast.host).counters
    assert (counters.target_passes, counters.tokens, counters.acceptance) == (6, 21, 1.0)
    assert counters.accepted_at == counters.drafted_at and len(counters.drafted_at) == 4 and out.shape == (1, 30)


def test_a_draft_that_is_always_wrong_costs_no_pass_of_the_target():
    """Pre-verify reads one token and gets one: as many passes as plain decoding has."""
    model = target()
    draft = noisy(model, 0.0)
    draft.lm_head.weight.data.neg_()
    fast = hasten.apply(model, SERIAL, draft=draft)
    fast.generate(**ragged(3), max_new_tokens=15, do_sample=False, eos_token_id=None)
    counters = speculation(fast.host).counters
    assert (counters.target_passes, counters.accepted, counters.drafted) == (15, 0, 3 * 14)


@pytest.mark.parametrize("more", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"eos_token_id": [9, 14]}])
def test_processors_and_stops(more):
    model = target()
    options = {"max_new_tokens": 24, "do_sample": False} | more
    wanted = model.generate(**ragged(4), **options)
    hasten.apply(model, SERIAL, draft=noisy(model, 0.1))
    assert torch.equal(model.generate(**ragged(4), **options), wanted)


def test_options():
    with pytest.raises(PlanError, match="candidates"):
        pearl.Pearl(candidates=0)
    model = target()
    with pytest.raises(PlanError, match="draft"):
        hasten.apply(model, "decode/pearl")
