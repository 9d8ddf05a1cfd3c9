"""Lossless, proven: greedy tokens are the target's own, sampled ones have its joint distribution, for every method."""

import functools
import importlib.util
import itertools
import pathlib

import pytest
import scipy.stats
import torch

import hasten
from conformance.decode import noisy, ragged, target
from hasten.core import names
from hasten.decode import _drafting, _loop
from hasten.decode.base import speculation

HERE = pathlib.Path(__file__).parent


FIXED = {
    "decode/speculative": ("decode/speculative(candidates=4)", {}),
    "decode/specdec_pp": (
        "decode/specdec_pp(threshold=0.4, tokens=8, epochs=2, layers=1)",
        {"calibration": [ragged(3, 7, seed=5)]},
    ),
}
every = pytest.mark.parametrize(
    "method", [m for m in names.method_files() if m.startswith("decode/") and names.card(m).lossless]
)


@functools.cache
def exact(method):
    """Plan and context of a drafting method that promises the target's own tokens: its tests say how (`exact`)."""
    if method in FIXED:
        return FIXED[method]
    name = method.split("/")[1]
    spec = importlib.util.spec_from_file_location(f"exact_{name}", HERE / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.exact()


GREEDY = {"max_new_tokens": 12, "do_sample": False}


def drafts(method):
    return "draft" in names.card(method).needs


@functools.cache
def written(kind):
    """A model's greedy tokens after 208 prompts: ragged batches of 20, and 8 rows alone."""
    model = target(kind)
    batches = [ragged(20, 9, seed) for seed in range(10)]
    alone = [{"input_ids": row[mask.bool()][None]} for row, mask in zip(*ragged(8, 9, 77).values(), strict=True)]
    return [(batch, model.generate(**batch, **GREEDY)) for batch in [*batches, *alone]]


@every
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_greedy_tokens_are_the_targets(kind, method):
    model, (plan, context) = target(kind), exact(method)
    more = {"draft": noisy(model, 0.1)} if drafts(method) else {}
    fast = hasten.apply(model, plan, **more, **context)
    counted = 0
    for batch, wanted in written(kind):
        assert torch.equal(model.generate(**batch, **GREEDY), wanted)
        counted += speculation(fast.host).counters.accepted
    assert counted > 0, "nothing was ever accepted"
    fast.undo()
    batch, wanted = written(kind)[0]
    assert torch.equal(model.generate(**batch, **GREEDY), wanted)


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.3])
def test_greedy_tokens_whatever_the_draft_is_worth(scale):
    model = target()
    hasten.apply(model, "decode/speculative(candidates=4)", draft=noisy(model, scale))
    for batch, wanted in written("llama")[:3]:
        assert torch.equal(model.generate(**batch, **GREEDY), wanted)


def test_greedy_tokens_with_masks_that_the_model_makes_itself():
    model = target()
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 12)[None].repeat(3, 1) + torch.arange(3)[:, None]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    hasten.apply(model, "decode/speculative", draft=noisy(model, 0.1))
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert torch.equal(got, wanted)


WORDS, DEEP = 5, 3
PROMPTS = ([1, 3, 2, 4], [2, 0])


def small(noise=0.0):
    """A model whose tokens are far from certain, or its noisy copy."""
    model = target(vocab_size=WORDS, num_hidden_layers=1, eos_token_id=None)
    model.lm_head.weight.data *= 0.6
    return noisy(model, noise)


@torch.no_grad()
def law(model, prompt, temperature, top_k):
    """Exact probabilities of the next three tokens, {tokens: probability}, by plain forwards."""
    chains = list(itertools.product(range(WORDS), repeat=DEEP))
    ids = torch.tensor([[*prompt, *chain] for chain in chains])
    logits = model(ids).logits[:, len(prompt) - 1 : -1] / temperature
    if top_k:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    chances = logits.softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0].prod(1)
    return dict(zip(chains, chances.tolist(), strict=True))


def goodness(model, plan, rows, *, temperature=1.0, top_k=0, **context):
    """p values of chi-square tests of sampled triples against their law, one for each prompt of a ragged batch."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]).repeat(rows, 1)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]).repeat(rows, 1)
    fast = hasten.apply(model, plan, **context)
    out = fast.generate(
        ids, attention_mask=mask, max_new_tokens=DEEP + 3, do_sample=True, temperature=temperature, top_k=top_k, seed=0
    )
    counters = speculation(fast.host).counters
    assert 0.05 < counters.acceptance < 0.95, "a draft that is always or never right shows nothing"
    fast.undo()
    values = []
    for place, prompt in enumerate(PROMPTS):
        found = {}
        for chain in out[place :: len(PROMPTS), width : width + DEEP].tolist():
            found[tuple(chain)] = found.get(tuple(chain), 0) + 1
        exact = law(model, prompt, temperature, top_k)
        assert all(exact[chain] > 0 for chain in found), "a token that the target never gives"
        seen, expected, rest = [], [], [0, 0.0]
        for chain, chance in exact.items():
            if chance * rows >= 5:
                seen.append(found.get(chain, 0))
                expected.append(chance * rows)
            else:
                rest = [rest[0] + found.get(chain, 0), rest[1] + chance * rows]
        if rest[1] >= 1:
            seen, expected = [*seen, rest[0]], [*expected, rest[1]]
        total = sum(seen) / sum(expected)
        values.append(scipy.stats.chisquare(seen, [value * total for value in expected]).pvalue)
    return values


@every
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 3}])
def test_sampled_tokens_have_the_targets_joint_law(method, sampling):
    model, (plan, given) = small(), exact(method)
    context = {"draft": small(0.8)} if drafts(method) else {}
    if "calibration" in given:
        context["calibration"] = [{"input_ids": torch.tensor([[1, 2, 3, 4, 2, 0], [4, 1, 0, 2, 1, 3]])}]
    assert min(goodness(model, plan, 1500, **sampling, **context)) > 1e-3


def accept_always(p_BKV, q_BKV, drafts_BK, u_BK, e_BV):
    return _accept(p_BKV, q_BKV, drafts_BK, torch.zeros_like(u_BK) - 1, e_BV)


def redraw_from_the_target(p_BKV, q_BKV, drafts_BK, u_BK, e_BV):
    tokens, accepted = _accept(p_BKV, q_BKV, drafts_BK, u_BK, e_BV)
    again = (p_BKV.gather(1, accepted[:, None, None].expand(-1, 1, p_BKV.shape[-1]))[:, 0] / e_BV).argmax(-1)
    return tokens.scatter(1, accepted[:, None], again[:, None]), accepted


def accept_too_easily(p_BKV, q_BKV, drafts_BK, u_BK, e_BV):
    return _accept(p_BKV, q_BKV, drafts_BK, u_BK * 0.6, e_BV)


_accept = _drafting.accept


@pytest.mark.parametrize("wrong", [redraw_from_the_target, accept_too_easily])
def test_the_test_of_the_law_finds_wrong_rules(monkeypatch, wrong):
    monkeypatch.setattr(_drafting, "accept", wrong)
    model = small()
    assert max(goodness(model, "decode/speculative(candidates=4)", 1500, draft=small(0.8))) < 1e-6


def greedy_choice(weight, generator):
    return weight.argmax(-1)


def first_children(choice_BN, drafts_BN, tree):
    tokens, accepted, path = _accept_tree(choice_BN, drafts_BN, tree)
    wrong = torch.where(accepted[:, None] > 0, drafts_BN[:, :1], tokens[:, :1])  # the first child, whichever was chosen
    return torch.cat([wrong, tokens[:, 1:]], 1), accepted, path


_accept_tree = _drafting.accept_tree


@pytest.mark.parametrize(
    ("method", "place", "wrong"),
    [
        ("decode/prompt_lookup", "draw", greedy_choice),
        ("decode/medusa", "draw", greedy_choice),
        ("decode/rest", "accept_tree", first_children),
    ],
)
def test_the_test_of_the_law_finds_wrong_choices(monkeypatch, method, place, wrong):
    """Chosen candidates, a chain or a tree: the target has to draw at each place, and to take what it drew."""
    monkeypatch.setattr(_drafting, place, wrong)
    monkeypatch.setattr(_loop.Counters, "acceptance", 0.5)  # a wrong rule may accept all
    plan, given = exact(method)
    context = {"calibration": [{"input_ids": torch.tensor([[1, 2, 3, 4, 2, 0], [4, 1, 0, 2, 1, 3]])}]} if given else {}
    assert min(goodness(small(), plan, 1500, **context)) < 1e-6


def test_the_test_of_the_law_finds_blind_acceptance(monkeypatch):
    monkeypatch.setattr(_drafting, "accept", accept_always)
    with pytest.raises(AssertionError, match="always or never"):
        goodness(small(), "decode/speculative(candidates=4)", 100, draft=small(0.8))
    monkeypatch.setattr(_loop.Counters, "acceptance", 0.5)
    assert max(goodness(small(), "decode/speculative(candidates=4)", 1500, draft=small(0.8))) < 1e-6
