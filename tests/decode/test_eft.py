"""Emulated fine-tuning: greedy tokens of a plain loop over three models, the exact law of sampled ones, refusals."""

import itertools

import pytest
import scipy.stats
import torch

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode import _drafting, eft
from hasten.decode.base import speculation

GREEDY = {"do_sample": False, "eos_token_id": None}


def models(kind="llama", scale=0.2, **changes):
    """A large model, and a smaller one that agrees with it now and then, before and after fine-tuning."""
    large = target(kind, **changes)
    base = noisy(large, scale)
    return large, base, noisy(base, scale)


def subject():
    large, base, tuned = models()
    return {"model": target, "options": {"candidates": 3}, "context": {"draft": base, "teacher": tuned}, "run": run}


def cases():
    for shape, beta, top_p, dtype in (
        ((1, 7), 1.0, 1.0, torch.float32),
        ((3, 4, 11), 0.5, 0.7, torch.float32),
        ((2, 5, 9), 2.0, 0.3, torch.bfloat16),
        ((6, 13), 0.0, 0.9, torch.float16),
        ((4, 1, 5), 1.5, 1e-6, torch.float32),  # the likeliest token alone is up-scaled
    ):
        generator = torch.Generator().manual_seed(len(shape))
        scores = [torch.randn(shape, generator=generator).mul(3).to(dtype) for _ in range(3)]
        yield {"args": (*scores, beta, top_p), "tolerance": 1e-5, "grad": top_p == 1}


def test_the_emulated_law_by_hand():
    """Section 3: p~ is proportional to p_large p_tuned / p_small."""
    large, tuned, small = (torch.tensor(p) for p in ([0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.5, 0.25]))
    wanted = large * tuned / small
    got = eft.eft(large.log(), tuned.log(), small.log(), 1.0, 1.0).softmax(-1)
    torch.testing.assert_close(got, wanted / wanted.sum())
    assert torch.equal(eft.eft(large.log(), tuned.log(), small.log(), 0.0, 1.0), large.log())


def test_equal_models_emulate_themselves():
    """Fine-tuning nothing leaves the large model; a large model that is the small one gives the tuned one."""
    one, other = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(eft.eft(one, other, other, 1.7, 1.0), one)
    torch.testing.assert_close(eft.eft(one, other, one, 1.0, 0.5).softmax(-1), other.softmax(-1))


def test_outside_top_p_the_weight_is_one():
    """Section 4.5: a token that the tuned model hardly gives is not blown up by p_large / p_small."""
    large, tuned, small = (torch.tensor(p).log() for p in ([0.5, 0.5], [0.999, 0.001], [0.99999, 0.00001]))
    free, kept = (eft.eft(large, tuned, small, 1.0, top_p).softmax(-1)[1].item() for top_p in (1.0, 0.9))
    assert free == pytest.approx(0.98, abs=0.02)
    assert kept == pytest.approx(0.001 / (0.001 + 0.999 * 0.5 / 0.99999), rel=1e-3)  # p_tuned there, not p~ cut to 0


@torch.no_grad()
def plainly(trio, ids, new, beta=1.0, top_p=1.0):
    """Greedy tokens by whole forwards of the three models, one row without padding."""
    large, base, tuned = trio
    for _ in range(new):
        scores = eft.naive_eft(*(model(ids).logits[:, -1] for model in (large, tuned, base)), beta, top_p)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize(("candidates", "beta", "top_p"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (5, 0.6, 0.8)])
def test_greedy_tokens_are_a_plain_loops(kind, candidates, beta, top_p):
    trio, batch = models(kind), ragged(4, 9)
    wanted = [
        plainly(trio, row[mask.bool()][None], 14, beta, top_p)[0, -14:]
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    method = eft.EFT(beta=beta, candidates=candidates, top_p=top_p)
    fast = hasten.apply(trio[0], [method], draft=trio[1], teacher=trio[2])
    assert torch.equal(fast.generate(**batch, max_new_tokens=14, **GREEDY)[:, 9:], torch.stack(wanted))
    counters = speculation(fast.host).counters
    if candidates == 0:
        assert counters.target_passes == 14 and counters.draft_passes == 28 and counters.drafted == 0
    else:
        assert 0 < counters.accepted < counters.drafted and counters.target_passes < 14


def test_rows_end_at_their_own_end_of_sequence():
    trio = models()
    handle = hasten.apply(trio[0], "decode/eft(candidates=0)", draft=trio[1], teacher=trio[2])
    free = handle.generate(**ragged(4), max_new_tokens=20, **GREEDY)
    ends = [int(free[1, 14]), int(free[3, 17])]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": ends}
    wanted = handle.generate(**ragged(4), **options)
    handle.undo()
    handle = hasten.apply(trio[0], "decode/eft(candidates=4)", draft=trio[1], teacher=trio[2])
    assert torch.equal(handle.generate(**ragged(4), **options), wanted)


def test_a_fine_tuning_that_the_large_model_has_is_proposed_well():
    """With large = small the emulated model is the tuned one: every proposal stays."""
    large, _, tuned = models()
    handle = hasten.apply(large, "decode/eft(candidates=4)", draft=noisy(large, 0.0), teacher=tuned)
    out = handle.generate(**ragged(2), max_new_tokens=15, **GREEDY)
    counters = speculation(handle.host).counters
    assert counters.acceptance == 1 and counters.target_passes == 3
    assert torch.equal(out, tuned.generate(**ragged(2), max_new_tokens=15, **GREEDY))


WORDS, DEEP = 5, 3
PROMPTS = ([1, 3, 2, 4], [2, 0])
SAMPLED = {"temperature": 0.8, "top_k": 4}


def uncertain():
    large = target(vocab_size=WORDS, num_hidden_layers=1, eos_token_id=None)
    large.lm_head.weight.data *= 0.6
    return large, noisy(large, 0.5), noisy(large, 0.8)


@torch.no_grad()
def law(trio, prompt):
    """Exact probabilities of the next three tokens, {tokens: probability}."""
    chains = list(itertools.product(range(WORDS), repeat=DEEP))
    ids = torch.tensor([[*prompt, *chain] for chain in chains])
    large, base, tuned = (model(ids).logits[:, len(prompt) - 1 : -1] for model in trio)
    scores = eft.naive_eft(large, tuned, base, 1.0, 0.9) / SAMPLED["temperature"]
    scores = scores.masked_fill(scores < scores.topk(SAMPLED["top_k"], -1).values[..., -1:], -torch.inf)
    chances = scores.softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0].prod(1)
    return dict(zip(chains, chances.tolist(), strict=True))


def goodness(candidates, rows=1500):
    """p values of chi-square tests of sampled triples against their law, one for each prompt of a ragged batch."""
    trio = uncertain()
    exact = [law(trio, prompt) for prompt in PROMPTS]
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]).repeat(rows, 1)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]).repeat(rows, 1)
    plan = f"decode/eft(candidates={candidates}, top_p=0.9)"
    handle = hasten.apply(trio[0], plan, draft=trio[1], teacher=trio[2])
    out = handle.generate(ids, attention_mask=mask, max_new_tokens=DEEP + 3, do_sample=True, seed=0, **SAMPLED)
    assert not candidates or 0.05 < speculation(handle.host).counters.acceptance < 0.95
    values = []
    for place, chances in enumerate(exact):
        found = [tuple(chain) for chain in out[place :: len(PROMPTS), width : width + DEEP].tolist()]
        common = [chain for chain, chance in chances.items() if chance * rows >= 5]
        seen = [found.count(chain) for chain in common]
        expected = [chances[chain] * rows for chain in common]
        seen, expected = [*seen, rows - sum(seen)], [*expected, rows - sum(expected)]
        values.append(scipy.stats.chisquare(seen, expected).pvalue)
    return values


@pytest.mark.parametrize("candidates", [0, 3])
def test_sampled_tokens_have_the_emulated_law(candidates):
    assert min(goodness(candidates)) > 1e-3


def unemulated(large, tuned, small, beta, top_p):
    return large.float()


def one_place_late(self, proposal):
    tuned, small = _read(self, proposal)
    return tuned.roll(1, 1), small


def redrawn(p_BKV, q_BKV, drafts_BK, u_BK, e_BV):
    tokens, accepted = _accept(p_BKV, q_BKV, drafts_BK, u_BK, e_BV)
    again = (p_BKV.gather(1, accepted[:, None, None].expand(-1, 1, p_BKV.shape[-1]))[:, 0] / e_BV).argmax(-1)
    return tokens.scatter(1, accepted[:, None], again[:, None]), accepted


_read, _accept = eft.Tuned.read, _drafting.accept


@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [(eft, "eft", unemulated), (eft.Tuned, "read", one_place_late), (_drafting, "accept", redrawn)],
)
def test_the_test_of_the_law_finds_wrong_rules(monkeypatch, place, name, wrong):
    monkeypatch.setattr(place, name, wrong)
    assert max(goodness(3)) < 1e-6


def test_models_that_do_not_fit_are_refused_before_anything_changes():
    large, base, tuned = models()
    with pytest.raises(PlanError, match="teacher"):
        hasten.apply(large, "decode/eft", draft=base)
    for draft, teacher, problem in (
        (base, base, "teacher is the draft itself"),
        (base, large, "teacher is the model itself"),
        (base, target("gpt2"), "draft is a LlamaForCausalLM and teacher a GPT2LMHeadModel"),
        (base, target(vocab_size=40), "fine-tune without adding tokens"),
        (target(vocab_size=40), tuned, "vocabulary of 37 tokens and the draft one of 40"),
    ):
        with pytest.raises(UsageError, match=problem):
            hasten.apply(large, "decode/eft", draft=draft, teacher=teacher)
    assert not hasattr(large, "drafter")
    with pytest.raises(PlanError, match="top_p must be above 0"):
        hasten.apply(large, "decode/eft(top_p=0)", draft=base, teacher=tuned)
