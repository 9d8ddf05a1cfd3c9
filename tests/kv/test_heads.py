"""Heads that share their layer's budget: the split, and that memory shrinks with it."""

import pytest
import torch
from transformers import DynamicCache

import hasten
from hasten.hosts.attention import Call
from hasten.kv import base
from hasten.kv._heads import naive_spread, spread
from kv.test_cache import applied, build, columns_of, tokens

CASES = {
    "one head": (1, 1, 9, [4], 0.2),
    "odd": (1, 3, 17, [5], 0.3),
    "rows": (3, 4, 23, [2, 11, 23], 0.2),
    "no floor": (2, 5, 13, [1, 6], 0.0),
    "even": (2, 3, 13, [4, 9], 1.0),
    "nothing": (2, 2, 8, [0, 3], 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_spread_is_its_reference(name, dtype):
    batch, heads, slots, counts, floor = CASES[name]
    scores = torch.randperm(batch * heads * slots, generator=torch.Generator().manual_seed(3)).view(batch, heads, slots)
    scores = (scores % 251).to(dtype) if batch * heads * slots < 251 else scores.to(torch.float32)
    lead = torch.arange(batch)[:, None] * (slots // 4) + torch.arange(heads) % 3  # as heads have after an eviction
    scores = scores.masked_fill(torch.arange(slots) < lead[:, :, None], -torch.inf)
    counts, recent = torch.tensor(counts), torch.arange(batch) + 1
    scores[..., -1] = torch.inf
    want, got = naive_spread(scores, counts, recent, floor), spread(scores, counts, recent, floor)
    assert torch.equal(got, want)
    real = slots - lead
    assert torch.equal(got.sum(1), torch.minimum(counts * heads, real.sum(1))) and (got <= real).all()
    recent = torch.minimum(recent, counts)
    least = recent + (floor * (counts - recent)).long()
    assert (got >= torch.minimum(least[:, None], real)).all()


def test_a_larger_budget_keeps_what_a_smaller_one_keeps():
    scores = torch.randn(2, 4, 60, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3, 9, 0.1])[:, None]
    before = torch.zeros(2, 4)
    for count in range(1, 61):
        shares = spread(scores, torch.tensor([count, count]), torch.tensor([1, 4]), 0.2)
        assert (shares >= before).all()
        before = shares
    assert (before == 60).all()


def test_rows_do_not_depend_on_each_other():
    scores = torch.randn(3, 4, 31, generator=torch.Generator().manual_seed(0)).exp()
    counts, recent = torch.tensor([3, 30, 12]), torch.tensor([2, 1, 4])
    together = spread(scores, counts, recent, 0.2)
    for row in range(3):
        alone = spread(*(one[row : row + 1] for one in (scores, counts, recent)), 0.2)
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_heads_of_different_lengths_take_the_memory_of_their_tokens():
    model, ids = build(num_hidden_layers=4, num_key_value_heads=4), tokens(1, 100)
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    full = sum(one.untyped_storage().nbytes() for layer in plain.layers for one in (layer.keys, layer.values))
    cache = applied(model, keep=0.25, window=8, heads=True).host.new_cache()
    model(ids, past_key_values=cache)
    held = [layer.ragged for layer in cache.layers]
    assert all(len(set(one.lengths[0].tolist())) > 1 for one in held)
    stored = sum(one.untyped_storage().nbytes() for part in held for one in (part.keys, part.values))
    assert stored == cache.nbytes == full // 4
    assert all(layer._keys is None and layer._values is None for layer in cache.layers)
    longest = sum(layer.length for layer in cache.layers)
    assert longest > 1.2 * 0.25 * 100 * 4  # a rectangle would have taken this much more
    free_slots = 4 * 4 * 2 * (64 + 8) * 8 * 4  # layers, heads, pairs, slots, dim, bytes
    for at in range(25):
        model(ids[:, at : at + 1], past_key_values=cache)
        assert cache.nbytes <= full / 4 + free_slots


@torch.no_grad()
def test_rows_of_different_lengths_take_the_memory_of_their_tokens():
    model, ids = build(num_hidden_layers=4), tokens(3, 80)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    cache = applied(model, keep=0.3).host.new_cache()
    model(ids, attention_mask=mask, past_key_values=cache)
    stored = sum(int(layer.real().sum()) * (2 if layer.ragged is None else 1) for layer in cache.layers)
    assert cache.nbytes == stored * 2 * 8 * 4  # pairs, dim, bytes
    assert stored / 2 == (24 + 6 + 24) * 4


@torch.no_grad()
def test_rows_that_leave_take_their_slots_along():
    model, ids = build(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    handle = applied(model, heads=True)
    cache, alone = handle.host.new_cache(), handle.host.new_cache()
    model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    model(ids[1:, 40:60], past_key_values=alone)
    before = cache.nbytes
    cache.batch_select_indices(torch.tensor([1]))
    for layer, single in zip(cache.layers, alone.layers, strict=True):
        assert layer.length == single.length
        for one, other in zip(columns_of(layer, 0), columns_of(single, 0), strict=True):
            assert torch.equal(one - 40, other)
    assert cache.nbytes == alone.nbytes < before / 2
    for at in range(60, 70):
        got = model(ids[1:, at : at + 1], attention_mask=mask[1:, : at + 1], past_key_values=cache).logits
        assert torch.allclose(got, model(ids[1:, at : at + 1], past_key_values=alone).logits, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu():
    ids, outs = tokens(2, 46), []
    for device in ("cpu", "cuda"):
        model = build().to(device)
        cache = applied(model, heads=True).host.new_cache()
        ends = (40, 41, 44, 45, 46)
        parts = [model(ids[:, a:b].to(device), past_key_values=cache) for a, b in zip((0, *ends), ends, strict=False)]
        outs.append(torch.cat([part.logits.cpu() for part in parts], 1))
    assert torch.allclose(*outs, atol=1e-3)


@torch.no_grad()
def test_the_cascade_by_heads_ends_where_one_cut_would(monkeypatch):
    ids, rated = tokens(2, 90), []
    fence = base.fence
    monkeypatch.setattr(base, "fence", lambda *given: rated.append(fence(*given)) or rated[-1])
    model = build(num_hidden_layers=6, num_key_value_heads=4)
    cache = applied(model, keep=0.3, heads=True).host.new_cache()
    model(ids, past_key_values=cache)
    for layer, scores in zip(cache.layers, rated, strict=True):
        shares = spread(scores, layer.counts, layer.recent, 0.2)
        assert torch.equal(layer.real(), shares)
        columns = layer.columns()
        for row in range(2):
            for head in range(4):
                best = scores[row, head].topk(int(shares[row, head])).indices.sort().values
                assert torch.equal(columns[row, head, -len(best) :], best)


def test_generate_with_heads_of_different_lengths():
    model, ids = build(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    handle = applied(model, heads=True)
    greedy = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    out = handle.generate(ids, **greedy)
    alone = handle.generate(ids[:1, 9:], **greedy | {"attention_mask": mask[:1, 9:]})
    assert torch.equal(out[0, 9:], alone[0])
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert handle.generate(ids, **greedy | options).shape[1] == 52


def test_one_head_has_nothing_to_share():
    ids, outs = tokens(1, 40), []
    for heads in ("true", "false"):
        handle = hasten.apply(build("qwen2"), f"kv/cake(keep=0.4, window=4, heads={heads})")
        outs.append(handle.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*outs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("pad", [0, 9])
def test_attention_over_what_is_kept_is_masked_sdpa(dtype, heads, pad):
    """The kernel for runs, and for one token where PyTorch's is slow, against PyTorch's on padded copies."""
    rows = 2 if pad else 1
    model, ids = build().to(dtype), tokens(rows, 43)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    cache = applied(model, heads=heads, decode=False).host.new_cache()
    model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
    model(ids[:, 40:], attention_mask=mask, past_key_values=cache)
    layer, module = cache.layers[1], model.model.layers[1].self_attn
    runs = heads or rows > 1
    assert layer.gathers(3) == runs and layer.gathers(1) == (runs or dtype != torch.float32)
    for new in (1, 3):
        query = torch.randn(rows, 4, new, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        call = Call(module, 1, query, layer.keys, layer.values, None, 0.4, True)
        got, want = layer.attend(call, True), layer.dense(call, layer.mask(query, None, True))
        assert got.dtype == dtype and torch.allclose(
            got.float(), want.float(), atol=1e-5 if dtype.itemsize == 4 else 0.02
        )
