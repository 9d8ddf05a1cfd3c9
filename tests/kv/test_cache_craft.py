"""Cache-Craft: its scores, redone tokens against a full prefill, the store's limits, and what it refuses."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hasten.api
from conformance.kv import build
from conformance.kv_contexts import parts
from hasten.core.errors import UsageError
from hasten.kv._contexts import Entry, Store
from hasten.kv.cache_craft import CacheCraft, cache_craft


def attention(num_layers, heads, n, end, seed=0, dtype=torch.float32):
    scores = torch.randn(num_layers, heads, n, end, generator=torch.Generator().manual_seed(seed))
    scores[..., end - n :].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1).to(dtype)


def cases():
    def case(shape, bounds, places, before, alpha, dtype=torch.float32):
        given = (torch.tensor(bounds).reshape(-1, 2), torch.tensor(places, dtype=torch.int64), before, alpha)
        return {"args": (attention(*shape, dtype=dtype), *given), "grad": False, "tolerance": 1e-9}

    yield case((2, 3, 5, 17), [(2, 7), (7, 12)], [0, 1], 2, 1.0)
    yield case((1, 2, 7, 30), [(0, 9), (9, 14), (14, 23)], [2, -1, 0], 3, 0.7)
    yield case((3, 1, 4, 29), [(1, 5), (5, 11), (11, 17), (17, 25)], [3, 1, 0, 2], 4, 1.4)
    yield case((2, 2, 6, 9), [], [], 0, 1.0)
    yield case((2, 2, 6, 9), [], [], 2, 1.0)
    yield case((2, 4, 3, 11), [(0, 8)], [-1], 1, 5.0, torch.bfloat16)


def test_scores_of_a_worked_example():
    """Attention of 0.5 to two passages of 4 tokens and 0.5 to itself: a = 2 x 1/16, b = 1/4 over both tokens."""
    weights = torch.zeros(1, 1, 2, 10)
    weights[..., :8] = 0.5 / 8
    weights[0, 0, 0, 8] = 0.5
    weights[0, 0, 1, 8:] = 0.25
    bounds = torch.tensor([[0, 4], [4, 8]])
    want = 1 / (1 + math.exp(-0.125 / 0.25))
    for places, overlap in (([0, 1], 1.0), ([1, 0], 0.0), ([0, -1], 0.5), ([-1, -1], 0.0)):
        cci, found, cfo, chosen = cache_craft(weights, bounds, torch.tensor(places), 2, 1.0)
        assert cci == pytest.approx(want) and found == pytest.approx(overlap)
        assert cfo == pytest.approx(want * (1 - overlap)) and chosen.sum() == math.ceil(float(cfo) * 2)


def question_logits(handle, names, prefix=True):
    text = parts()
    head = text["prefix"] if prefix else None
    cache = handle.host.read([text[name] for name in names], head)
    return handle.model(text["question"][None], past_key_values=cache).logits


def whole_logits(model, names, prefix=True):
    text = parts()
    pieces = [text["prefix"]] * prefix + [text[name] for name in names] + [text["question"]]
    return model(torch.cat(pieces)[None]).logits[:, -len(text["question"]) :]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [True, False])
def test_redoing_almost_all_is_a_full_prefill(prefix):
    """Redone tokens see the right keys at the right places: with all of them redone nothing old is left."""
    handle = hasten.api.apply(build(), "kv/cache_craft(recompute=0.999)")
    for names in (["first", "second", "third"], ["third", "first"], ["second", "third", "first"]):
        wanted = whole_logits(handle.model, names, prefix)
        torch.testing.assert_close(question_logits(handle, names, prefix), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_same_order_again_needs_nothing():
    handle = hasten.api.apply(build(), "kv/cache_craft")
    names = ["first", "second", "third"]
    wanted = question_logits(handle, names)
    forwards = []
    handle.model.model.register_forward_hook(lambda *_: forwards.append(1))
    torch.testing.assert_close(question_logits(handle, names), wanted, rtol=0, atol=1e-6)
    question_logits(handle, names[:2])
    assert len(forwards) == 2 and handle.report["kv/cache_craft"]["tokens_recomputed"] == 0


@torch.no_grad()
def test_more_redone_is_closer_to_a_full_prefill():
    error = []
    for share in (0.0, 0.4, 0.8):
        handle = hasten.api.apply(build(), f"kv/cache_craft(recompute={share})")
        question_logits(handle, ["first", "second", "third"])
        names = ["second", "third", "first"]
        error.append(float((question_logits(handle, names) - whole_logits(handle.model, names)).norm()))
    assert error[0] > error[1] > error[2] > 0


@torch.no_grad()
def test_only_chosen_tokens_pass_through_the_layers():
    handle = hasten.api.apply(build(), "kv/cache_craft(recompute=0.25)")
    question_logits(handle, ["first", "second", "third"])
    seen = []
    handle.model.model.layers[1].mlp.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
    text = parts()
    with FlopCounterMode(display=False) as counted:
        handle.host.read([text["second"], text["third"], text["first"]], text["prefix"])
    with FlopCounterMode(display=False) as full:
        handle.model(torch.cat([text["prefix"], text["second"], text["third"], text["first"]])[None])
    assert seen[0] == 3 + 4 + 3, "a quarter of each passage, rounded up"
    assert counted.get_total_flops() < 0.5 * full.get_total_flops()
    facts = handle.report["kv/cache_craft"]
    assert (facts["tokens_read"], facts["tokens_reused"], facts["tokens_recomputed"]) == (41, 5 + 36, 10)


@torch.no_grad()
def test_watching_in_parts_sees_the_same(monkeypatch):
    facts, text = [], parts()
    for scores in (2**25, 4 * 26 * 5):
        monkeypatch.setattr("hasten.kv.cache_craft.SCORES", scores)
        handle = hasten.api.apply(build(), "kv/cache_craft")
        question_logits(handle, ["first", "second", "third"])
        name = [text[one].numpy().tobytes() for one in ("prefix", "third")]
        facts.append(handle.host.shelf.store.get((*name, 0)).facts)
    torch.testing.assert_close(facts[0].inter, facts[1].inter)
    assert facts[0].intra == pytest.approx(facts[1].intra) and facts[0].bounds == [(5, 17), (17, 26)]
    rows = facts[0].inter.sum(1)
    assert (rows > 0).all() and (rows < 3 * 4).all(), "three layers of four heads, part of whose weight is here"


@torch.no_grad()
def test_rows_are_composed_alone_and_padded():
    handle, text = hasten.api.apply(build(), "kv/cache_craft"), parts()
    lists = [[text["second"], text["first"]], [text["third"], text["first"], text["second"]]]
    question = text["question"].repeat(2, 1)
    options = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    question_logits(handle, ["first", "second", "third"])
    both = handle.generate(question, contexts=lists, prefix=text["prefix"], **options)
    for row, contexts in enumerate(lists):
        alone = handle.generate(question[:1], contexts=contexts, prefix=text["prefix"], **options)
        for one, other in zip(both.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[row], other[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_passage_that_needs_all_redone_becomes_a_variant():
    handle = hasten.api.apply(build(), "kv/cache_craft(renew=0.3, variants=2)")
    question_logits(handle, ["first", "second"])
    names = ["third", "second"]
    wanted = whole_logits(handle.model, names)
    torch.testing.assert_close(question_logits(handle, names), wanted, rtol=0, atol=1e-5)
    read = handle.report["kv/cache_craft"]["tokens_read"]
    for order in (names, ["first", "second"]):
        question_logits(handle, order)
    assert handle.report["kv/cache_craft"]["tokens_read"] == read, "both variants are there"
    question_logits(handle, ["third", "first", "second"])
    assert len(handle.host.shelf.store) <= 1 + 2 * 3


def entry(tokens):
    return Entry(torch.zeros(tokens, dtype=torch.int64), torch.zeros(1, 1, tokens, 8), torch.zeros(1, 1, tokens, 8), 0)


def test_the_store_holds_its_limit_and_lets_the_least_useful_go():
    store = Store(4 * entry(10).nbytes)
    held = {name: entry(10) for name in "abcd"}
    for name, one in held.items():
        store.put(name, one)
        store.used(one, {"a": 30, "b": 10, "c": 0, "d": 20}[name])
    store.put("e", entry(10))
    assert "c" not in store and store.nbytes == store.limit and store.evicted == 1
    store.put("f", entry(25))
    assert {name for name in "abdef" if name in store} == {"a", "f"}, "the least worth per byte left first"
    store.put("whole", entry(41))
    assert "whole" not in store and "a" in store, "what is larger than the store is not kept, and nothing leaves for it"
    for name in "ghijklmnop":
        store.put(name, entry(10))
        store.used(store.get(name), 10)
    assert "a" not in store, "worth of long ago does not last for ever"
    store.clear()
    assert len(store) == store.nbytes == 0


@torch.no_grad()
def test_a_small_store_reads_again_and_stays_right():
    handle = hasten.api.apply(build(), "kv/cache_craft(store=0.006)")
    for _ in range(2):
        for names in (["first", "second", "third"], ["third", "second"], ["first"]):
            found = question_logits(handle, names)
            assert torch.isfinite(found).all()
            assert handle.host.shelf.nbytes <= 0.006 * 2**20
    assert handle.report["kv/cache_craft"]["evicted"] > 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["kv/cache_craft(recompute=0.999)", "kv/ape(temperature=1.0, scale=1.0)"])
def test_layers_without_attention_have_no_place_in_the_cache(method):
    text, calibration = parts(), [{"input_ids": torch.randint(1, 61, (2, 20))}]
    handle = hasten.api.apply(build(), f"prune/llm_drop(keep=0.7) + {method}", calibration=calibration)
    found = question_logits(handle, ["third"])
    assert len(handle.host.cache_layers) < 3
    pieces = [text["prefix"], text["third"], text["question"]]
    wanted = handle.model(torch.cat(pieces)[None], use_cache=False).logits[:, -len(text["question"]) :]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_angles_that_change_are_refused_before_anything_is_changed():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=61,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(UsageError, match="fixed angles"):
        hasten.api.apply(model, CacheCraft())
    assert model.config._attn_implementation == "sdpa"
    hasten.api.apply(model, "kv/ape")
