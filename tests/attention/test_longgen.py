"""LongGen: full layers in the middle, windows and sinks or shards around them, in caches that hold no more."""

import pytest
import torch

import hasten
from conformance.attention import check_decoding, decoder, tokens
from hasten.attention.longgen import LongGen, full_layers, longgen, naive_longgen
from hasten.hosts import recognise
from hasten.math.blocks import seen

SMALL = {"block": 4, "local": 2}


def inputs(n, heads=2, kv_heads=2, batch=1, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def cases():
    yield {"args": (*inputs(29, heads=4), 4, 2, 1, 0), "grad": True}
    yield {"args": (*inputs(40), 8, 1, 0, 2), "kwargs": {"scaling": 0.3}, "grad": True}
    yield {"args": (*inputs(33, heads=6, kv_heads=3, batch=2), 4, 1, 2, 0)}
    yield {"args": (*inputs(30, batch=3), 4, 2, 1, 0), "kwargs": {"begin": torch.tensor([0, 7, 12])}, "grad": True}
    yield {"args": (*inputs(25, dtype=torch.float16), 4, 1, 0, 3), "tolerance": 5e-3}


@pytest.mark.parametrize(
    "depth, wanted", [(1, [0]), (2, [1]), (3, [1]), (4, [2]), (6, [2, 3]), (9, [3, 4, 5]), (32, list(range(11, 22)))]
)
def test_the_middle_third_is_full(depth, wanted):
    assert list(full_layers(depth)) == wanted
    assert LongGen().layers(depth) == [i for i in range(depth) if i not in wanted]


def test_a_window_and_a_sink():
    method = LongGen(block=4, local=2, sink=1)
    mask = seen(method.shards(2).blocks(20, 20, None, torch.device("cpu")), 20, 20)[0, 0]
    assert mask[19].nonzero().flatten().tolist() == [*range(4), *range(12, 20)]
    assert mask[15].nonzero().flatten().tolist() == [*range(4), *range(8, 16)]


def test_the_cache_of_the_defaults_is_a_third_of_128k_tokens():
    """The paper's 62% less, of both patterns."""
    for method in (LongGen(), LongGen(pattern="strided", local=1)):
        n, depth = 131072, 32
        places = torch.arange(n)[None, None]
        sparse = method.shards(8).sees(places, torch.tensor([[n]])).double().mean()
        share = (len(full_layers(depth)) + len(method.layers(depth)) * sparse) / depth
        assert share == pytest.approx(0.38, abs=0.025)


def test_a_window_as_long_as_the_text_is_dense_attention():
    q, k, v = inputs(24)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for function in (naive_longgen, longgen):
        torch.testing.assert_close(function(q, k, v, 4, 6, 0, 0), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("options", ["local=2", "local=1, sink=2", "pattern=strided, local=1, stride=3"])
def test_decoding_from_the_truncated_cache_equals_the_pattern_over_the_whole_text(options):
    handle = hasten.apply(decoder(), f"attention/longgen(block=4, {options})")
    check_decoding(handle, [21, *range(22, 47)])


@torch.no_grad()
def test_a_layer_without_attention_has_no_cache_and_the_others_keep_their_own():
    model = decoder()
    recognise(model).drop(0, "attention")
    handle = hasten.apply(model, "attention/longgen(block=4, local=2)")
    ids = tokens()[0]
    whole = handle.model(ids, use_cache=False).logits
    cache = handle.host.new_cache()
    handle.model(ids[:, :30], past_key_values=cache)
    logits = [handle.model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 46)]
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, 30:], rtol=1e-4, atol=1e-5)
    assert [layer.length for layer in cache.layers] == [46, 4 + 8 - 2]  # the middle one, and of the last one its window


@torch.no_grad()
def test_generation_keeps_full_caches_in_the_middle_only():
    model = decoder()
    handle = hasten.apply(model, "attention/longgen(block=4, local=2)")
    ids = torch.randint(1, 61, (1, 160), generator=torch.Generator().manual_seed(0))
    cache = handle.host.new_cache()
    out = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 180)
    first, middle, last = (layer.length for layer in cache.layers)
    assert middle == 179 and first == last <= 4 + 2 * 4
    again = model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False)
    assert torch.equal(out, again)
