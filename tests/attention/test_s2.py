"""S2-Attention: the pattern of its authors' library, covered by all heads together; training; a cache of shards."""

import dataclasses

import pytest
import torch

import hasten
from conformance.attention import check_decoding, decoder
from hasten.attention._shards import Shards
from hasten.attention.s2 import S2Attention, naive_s2, offsets, s2
from hasten.math.blocks import seen

SMALL = {"block": 4, "local": 2, "stride": 3}


def inputs(n, heads=2, kv_heads=2, batch=1, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def cases():
    yield {"args": (*inputs(29, heads=4), 4, 2, 3), "grad": True}
    yield {"args": (*inputs(40), 8, 1, 2), "kwargs": {"sink": 1, "scaling": 0.3}, "grad": True}
    yield {"args": (*inputs(33, heads=6, kv_heads=3, batch=2), 4, 1, 4), "kwargs": {"dense_heads": 1}}
    yield {"args": (*inputs(30, batch=3), 4, 2, 3), "kwargs": {"begin": torch.tensor([0, 7, 12])}, "grad": True}
    yield {"args": (*inputs(25, dtype=torch.bfloat16), 4, 1, 2), "tolerance": 2e-2}


def test_the_table_of_two_heads():
    """One local block and every second one, from the first in one head and from the second in the other."""
    table = Shards(4, 1, 0, 2, offsets(2, 2)).table(0, 5, 5)
    wanted = [["1....", "11...", "1.1..", "1.11.", "1.1.1"], ["1....", ".1...", ".11..", ".1.1.", ".1.11"]]
    assert [["".join(".1"[int(x)] for x in row) for row in head] for head in table] == wanted


@pytest.mark.parametrize("kv_heads, stride", [(4, 4), (8, 3), (3, 3)])
def test_the_heads_together_see_the_whole_context(kv_heads, stride):
    table = Shards(4, 1, 0, stride, offsets(kv_heads, stride)).table(0, 12, 12)
    assert torch.equal(table.any(0), torch.ones(12, 12, dtype=torch.bool).tril())
    assert table.all(0).sum() < table.any(0).sum()
    alike = Shards(4, 1, 0, stride, offsets(kv_heads, stride, homogeneous=True)).table(0, 12, 12)
    assert (alike == alike[:1]).all() and not alike[0, 11, 1]


def test_fewer_heads_than_the_stride_spread_their_shards():
    assert offsets(2, 8) == (0, 4) and offsets(4, 8) == (0, 2, 4, 6) and offsets(8, 3) == tuple(range(8))
    assert offsets(4, 2, dense_heads=1) == (0, 1, 2, None)


@pytest.mark.parametrize("past", [0, 4, 5, 11])
@pytest.mark.parametrize("begin", [None, torch.tensor([0, 3, 9])])
def test_chunks_of_a_prompt_see_what_the_whole_prompt_sees(past, begin):
    """Wherever a chunk starts, and however a row is padded."""
    pattern, keys = Shards(4, 2, 1, 3, offsets(2, 3)), 26
    whole = seen(pattern.blocks(keys, keys, begin, torch.device("cpu")), keys, keys, True, begin)
    part = seen(pattern.blocks(keys - past, keys, begin, torch.device("cpu")), keys - past, keys, True, begin)
    assert torch.equal(whole[:, :, past:], part)
    if begin is not None:
        alone = seen(pattern.blocks(17, 17, None, torch.device("cpu")), 17, 17)
        assert torch.equal(whole[2, :, 9:, 9:], alone[0]) and not whole[2, :, :, :9].any()


def test_what_is_kept_is_what_later_queries_see():
    pattern, n = Shards(4, 2, 1, 3, (0, 1, None)), 40
    table = seen(pattern.blocks(n, n, None, torch.device("cpu")), n, n)[0]
    for now in (13, 16, 23, 39):
        kept = pattern.sees(torch.arange(now)[None, None], torch.tensor([[now]]))[0, :, 0]
        assert torch.equal(kept, table[:, now:, :now].any(1))


def test_default_layers_and_options_are_those_of_phi_3_small():
    method = S2Attention()
    assert method.layers(6) == [0, 2, 4] and S2Attention(dense_every=0).layers(3) == [0, 1, 2]
    assert (method.block, method.local, method.stride) == (64, 16, 8)
    assert S2Attention(dense_every=1).idle and not method.idle


def test_with_equal_scores_each_head_averages_its_own_blocks():
    q = torch.zeros(1, 2, 12, 4)
    v = torch.arange(12.0).view(1, 1, 12, 1).expand(1, 2, 12, 1)
    wanted = torch.tensor([[5.5, (0 + 1 + 2 + 3 + 8 + 9 + 10 + 11) / 8], [0, (4 + 5 + 6 + 7 + 8 + 9 + 10 + 11) / 8]])
    for function in (naive_s2, s2):
        out = function(q, q, v, 4, 1, 2)[0, :, 11, 0]
        torch.testing.assert_close(out, wanted[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("plan", ["", ", sink=1, dense_heads=1", ", cache=false"])
def test_decoding_from_shards_equals_the_pattern_over_the_whole_text(plan):
    """A padded row among others, the prompt in parts, tokens one by one across the ends of blocks."""
    handle = hasten.apply(decoder(), f"attention/s2(block=4, local=2, stride=3, dense_every=3{plan})")
    check_decoding(handle, [17, 27, *range(28, 47)])


@torch.no_grad()
def test_the_cache_of_a_sparse_layer_holds_its_shards_only():
    handle = hasten.apply(decoder(), "attention/s2(block=4, local=2, stride=4, dense_every=3)")
    ids = torch.randint(1, 61, (1, 200), generator=torch.Generator().manual_seed(0))
    cache = handle.host.new_cache()
    handle.model(ids[:, :190], past_key_values=cache)
    for i in range(190, 200):
        handle.model(ids[:, i : i + 1], past_key_values=cache)
    sparse, _, dense = (layer.nbytes for layer in cache.layers)
    assert dense >= 200 * 2 * 2 * 8 * 4 and sparse < dense * 0.55  # a quarter, the local blocks and room for new tokens
    kept = cache.layers[0].ragged.lengths[0].tolist()
    assert kept == [int(row.sum()) for row in pattern_of(200)]


def pattern_of(now):
    pattern = S2Attention(block=4, local=2, stride=4).pattern(2)
    return pattern.sees(torch.arange(now)[None, None], torch.tensor([[now]]))[0, :, 0]


def test_training_has_the_gradients_of_the_masked_model():
    """A run's losses and weights against the same model whose dense attention is masked by the pattern."""
    ids = torch.randint(1, 61, (4, 2, 30), generator=torch.Generator().manual_seed(2))

    def weights(plan, change):
        model = decoder().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        run = hasten.training(model, optimizer, list(ids), plan, steps=4)
        change(run.host)
        for batch in run:
            run.backward(run.model(batch, labels=batch).loss)
        return dict(model.named_parameters())

    def masked(host):
        mask = seen(S2Attention(block=4, local=2, stride=3).pattern(2).blocks(30, 30, None, ids.device), 30, 30)
        for layer in (0, 2):
            host.attend_with(layer, lambda call: dataclasses.replace(call, mask=mask.repeat_interleave(2, 1)).dense())

    found = weights("attention/s2(block=4, local=2, stride=3)", lambda host: None)
    wanted, dense = weights("", masked), weights("", lambda host: None)
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-5)
    assert any((weight - dense[name]).abs().max() > 1e-4 for name, weight in found.items())
