"""The cache that evicts: what it frees, what it computes afterwards, and where it refuses."""

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import hasten.api
from hasten.core.errors import UsageError
from hasten.hosts import kept, recognise
from hasten.kv.base import KeptCache, whole
from hasten.kv.cake import CAKE

SHAPES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"num_key_value_heads": 1}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"rotary_pct": 0.5}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_positions": 128}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(name="llama", **changes):
    model, config, own = CONFIGS[name]
    shapes = dict(SHAPES)
    if name in ("gpt2", "opt"):
        del shapes["intermediate_size"]
    if name == "gpt2":
        del shapes["max_position_embeddings"]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**shapes | own | changes)).eval()
    with torch.no_grad():  # attention far from uniform, so that the choice of tokens matters
        for path, weight in built.named_parameters():
            if weight.ndim == 2 and any(part in path for part in ("q_proj", "k_proj", "query_key_value", "c_attn")):
                weight.mul_(8)
    return built


def tokens(rows, count, seed=1):
    return torch.randint(1, 53, (rows, count), generator=torch.Generator().manual_seed(seed))


def applied(model, **options):
    return hasten.api.apply(model, CAKE(**{"keep": 0.4, "window": 4, "every": 2} | options))


SHOWN: dict[int, torch.Tensor] = {}


def reference(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention by loops over the whole text; kv heads see the columns named in SHOWN, [batch, kv heads, columns]."""
    out = torch.zeros_like(query)
    batch, heads, new, dim = query.shape
    columns = key.shape[2]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // key.shape[1])
            for q in range(new):
                sees = torch.arange(columns) <= columns - new + q
                if attention_mask is not None:
                    sees &= attention_mask[b, 0, q]
                if module.layer_idx in SHOWN:
                    sees &= SHOWN[module.layer_idx][b, g]
                weights = (key[b, g, sees] @ query[b, h, q] * (dim**-0.5 if scaling is None else scaling)).softmax(0)
                out[b, h, q] = weights @ value[b, g, sees]
    return out.transpose(1, 2), None


@pytest.fixture
def referee(monkeypatch):
    """A function that makes a copy of a model which attends by `reference`."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "reference", reference)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "reference", transformers.masking_utils.sdpa_mask)

    def make(model):
        other = copy.deepcopy(model)
        other.set_attn_implementation("reference")
        return other

    yield make
    SHOWN.clear()


def shown(cache, columns):
    for index, layer in enumerate(cache.layers):
        SHOWN[index] = torch.zeros(*layer.shape, columns, dtype=torch.bool)
        for row in range(layer.batch_size):
            for head, held in enumerate(columns_of(layer, row)):
                assert len(held.unique()) == len(held)
                SHOWN[index][row, head, held] = True


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True], ids=["even", "heads"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_after_eviction_is_attention_over_the_kept_tokens(name, heads, referee):
    model, ids = build(name), tokens(1, 40)
    other, full = referee(model), DynamicCache()
    handle = applied(model, heads=heads)
    cache = handle.host.new_cache()
    start = 0
    for end in (30, 31, 32, 33, 36, 37, 38, 39, 40):
        SHOWN.clear()
        got = model(ids[:, start:end], past_key_values=cache).logits
        if start:
            shown(cache, end)
            assert not SHOWN[0].all()
        want = other(ids[:, start:end], past_key_values=full).logits
        assert torch.allclose(got, want, atol=2e-5), (name, end, (got - want).abs().max())
        assert cache.get_seq_length() == end
        start = end
    for layer in cache.layers:
        mean = layer.real().float().mean(-1) if layer.ragged else layer.real()
        assert (mean <= layer.counts + 2).all()
    assert any(layer.ragged for layer in cache.layers) == (heads and cache.layers[0].shape[1] > 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["even", "heads", "masked"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padded_rows_equal_single_rows(name, kind, monkeypatch):
    heads = kind == "heads"
    if kind == "masked":  # what happens where the kernel can't be built
        monkeypatch.setattr(kept, "path", lambda *tensors: "torch")
    model, ids, pads = build(name), tokens(3, 46), (0, 13, 21)
    handle = applied(model, heads=heads)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    batch, alone = handle.host.new_cache(), [handle.host.new_cache() for _ in pads]
    start = 0
    for end in (38, 39, 40, 41, 44, 45, 46):
        places = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        got = model(ids[:, start:end], attention_mask=mask[:, :end], position_ids=places, past_key_values=batch).logits
        for row, (pad, cache) in enumerate(zip(pads, alone, strict=True)):
            want = model(ids[row : row + 1, max(pad, start) : end], past_key_values=cache).logits
            assert torch.allclose(got[row, -want.shape[1] :], want[0], atol=2e-5), (row, end)
            for layer, single in zip(batch.layers, cache.layers, strict=True):
                mine, its = columns_of(layer, row), columns_of(single, 0)
                assert all(torch.equal(one - pad, other) for one, other in zip(mine, its, strict=True))
        start = end


def columns_of(layer, row):
    """The columns that each head of a row holds."""
    shown = torch.arange(layer.length) >= (layer.length - layer.real()[row]).view(-1, 1)
    return [one[seen] for one, seen in zip(layer.columns()[row], shown.expand(layer.shape[1], -1), strict=True)]


def stored_bytes(cache):
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@torch.no_grad()
def test_bytes_are_freed_and_budgets_sum_up():
    model, ids = build(num_hidden_layers=4), tokens(1, 100)
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    full = stored_bytes(plain)
    cache = applied(model, keep=0.25, window=8).host.new_cache()
    model(ids, past_key_values=cache)
    assert sum(layer.length for layer in cache.layers) == 0.25 * 100 * 4
    assert stored_bytes(cache) == cache.nbytes == full // 4
    assert len({layer.length for layer in cache.layers}) > 1  # layers want different shares
    for layer in cache.layers:
        assert torch.equal(layer.columns()[:, :, -8:], torch.arange(92, 100).expand(1, 2, 8))
        assert layer.scores is None and not layer.queries


@torch.no_grad()
def test_a_budget_in_tokens_holds_from_the_prompt_through_decoding():
    model, ids = build(), tokens(2, 60)
    cache = applied(model, budget=20).host.new_cache()
    model(ids[:, :15], past_key_values=cache)
    assert [layer.length for layer in cache.layers] == [15, 15, 15]
    for at in range(15, 60):
        model(ids[:, at : at + 1], past_key_values=cache)
        assert all(layer.length == min(at + 1, 22 - (at + 1) % 2) for layer in cache.layers)
    model = build()
    growing = applied(model, budget=20, decode=False).host.new_cache()
    for part in (ids[:1, :40], ids[:1, 40:50], ids[:1, 50:51]):
        model(part, past_key_values=growing)
    assert sum(layer.length for layer in growing.layers) == 3 * (20 + 11)


@torch.no_grad()
def test_the_peak_of_the_prompt_is_the_budget_and_one_layer(monkeypatch):
    model, ids, stored = build(num_hidden_layers=8), tokens(1, 80), []
    whole_layer = 80
    look = KeptCache.observe

    def observe(self, layer, *args):
        stored.append(sum(one.length for one in self.layers))
        look(self, layer, *args)
        stored.append(sum(one.length for one in self.layers))

    monkeypatch.setattr(KeptCache, "observe", observe)
    cache = applied(model, keep=0.2).host.new_cache()
    model(ids, past_key_values=cache)
    total = 0.2 * 80 * 8
    assert stored[-1] == total
    assert max(stored[1::2]) <= total + 8 and max(stored[0::2]) <= total + 8 + whole_layer < 0.4 * 8 * 80


def steps(model, ids, mask, cache):
    """Logits of a prompt of 40 tokens and of each of the tokens after it."""
    ends = [40, *range(41, ids.shape[1] + 1)]
    return [
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        for start, end in zip([0, *ends], ends, strict=False)
    ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_keeping_all_changes_no_bit(name, dtype):
    model, ids = build(name).to(dtype), tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    handle, plain = applied(model, keep=1.0), DynamicCache()
    cache = handle.host.new_cache()
    got = steps(model, ids, mask, cache)
    handle.undo()
    want = steps(model, ids, mask, plain)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_generate_greedy_sampled_beams_and_continued():
    model, ids = build(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    plain = {beams: model.generate(ids, num_beams=beams, **greedy) for beams in (1, 3)}
    whole_cache = applied(model, keep=1.0)
    for beams, want in plain.items():
        assert torch.equal(model.generate(ids, num_beams=beams, **greedy), want)
    whole_cache.undo()
    handle = applied(model)
    out = handle.generate(ids, return_dict_in_generate=True, **greedy)
    assert out.sequences.shape == (2, 52) and out.past_key_values.get_seq_length() == 51
    assert torch.equal(handle.generate(ids, **greedy), out.sequences)
    for options in ({"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}):
        assert handle.generate(ids, **greedy | options).shape[1] == 52
    longer = torch.cat([mask, mask.new_ones(2, 12)], dim=1)
    rest = greedy | {"attention_mask": longer, "max_new_tokens": 3}
    assert handle.generate(out.sequences, past_key_values=out.past_key_values, **rest).shape == (2, 55)
    handle.undo()
    assert torch.equal(model.generate(ids, **greedy), plain[1])


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True], ids=["even", "heads"])
def test_a_prompt_in_chunks_keeps_the_same_tokens(heads):
    model, ids = build(), tokens(2, 44)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    handle = applied(model, heads=heads)
    once, chunks = handle.host.new_cache(), handle.host.new_cache(prompt=40)
    model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=once)
    for end in (7, 14, 21, 38, 40):
        model(ids[:, chunks.get_seq_length() : end], attention_mask=mask[:, :end], past_key_values=chunks)
    for one, other in zip(once.layers, chunks.layers, strict=True):
        assert one.real().tolist() == other.real().tolist()
        assert all(torch.equal(*pair) for pair in zip(columns_of(one, 1), columns_of(other, 1), strict=True))
        slots = int(one.real()[1].min())
        assert torch.allclose(one.keys[1][:, -slots:], other.keys[1][:, -slots:], atol=1e-5)
    step = {"input_ids": ids[:, 40:41], "attention_mask": mask[:, :41]}
    assert torch.allclose(
        model(**step, past_key_values=once).logits, model(**step, past_key_values=chunks).logits, atol=1e-5
    )
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(handle.generate(ids, prefill_chunk_size=9, **greedy), handle.generate(ids, **greedy))


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True], ids=["even", "heads"])
def test_tokens_are_taken_back_or_refused(heads):
    model, ids = build(), tokens(1, 60)
    handle = applied(model, heads=heads)
    cache, other = handle.host.new_cache(), handle.host.new_cache()
    for one in (cache, other):
        model(ids[:, :40], past_key_values=one)
        model(ids[:, 40:43], past_key_values=one)
    model(ids[:, 43:48], past_key_values=cache)
    cache.crop(-4)
    model(ids[:, 43:44], past_key_values=other)
    assert cache.get_seq_length() == other.get_seq_length() == 44
    for at in range(50, 55):
        got = model(ids[:, at : at + 1], past_key_values=cache).logits
        assert torch.allclose(got, model(ids[:, at : at + 1], past_key_values=other).logits, atol=1e-5)
    with pytest.raises(UsageError, match="can't be taken back"):
        cache.crop(-30)
    with pytest.raises(UsageError, match="negative"):
        cache.crop(5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True], ids=["even", "heads"])
def test_rows_can_be_reordered_and_repeated(heads):
    model, ids = build(), tokens(2, 45)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    handle, order = applied(model, heads=heads), torch.tensor([1, 0, 1])
    cache, moved = handle.host.new_cache(), handle.host.new_cache()
    for one in (cache, moved):
        model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=one)
    moved.reorder_cache(order)
    for at in range(40, 45):
        want = model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        got = model(ids[order, at : at + 1], attention_mask=mask[order, : at + 1], past_key_values=moved).logits
        assert torch.allclose(got, want[order], atol=1e-5)
    moved.batch_repeat_interleave(2)
    assert moved.batch_size == 6 and moved.layers[0].counts.shape == (6,)
    moved.reset()
    assert moved.get_seq_length() == 0 and moved.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True], ids=["even", "heads"])
def test_a_mask_of_ones_own_hides_evicted_neighbours_too(heads, referee):
    model, ids = build(), tokens(1, 34)
    other, full = referee(model), DynamicCache()
    cache = applied(model, heads=heads).host.new_cache()
    model(ids[:, :30], past_key_values=cache)
    other(ids[:, :30], past_key_values=full)
    mask = torch.ones(1, 1, 4, 34, dtype=torch.bool).tril(30)
    hidden = cache.layers[0].columns()[0, 0, :3]
    mask[..., hidden] = False
    got = model(ids[:, 30:], attention_mask=mask, past_key_values=cache).logits
    shown(cache, 34)
    want = other(ids[:, 30:], attention_mask=mask, past_key_values=full).logits
    assert torch.allclose(got, want, atol=2e-5)


@torch.no_grad()
def test_a_model_that_lost_an_attention():
    model, ids = build(), tokens(1, 40)
    host = recognise(model)
    host.drop(0, "attention")
    hasten.api.apply(model, CAKE(keep=0.5, window=4), host=host)
    cache = host.new_cache()
    model(ids, past_key_values=cache)
    assert [layer.length for layer in cache.layers] and sum(layer.length for layer in cache.layers) == 2 * 20
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


def refused(model, match):
    with pytest.raises(UsageError, match=match):
        hasten.api.apply(model, "kv/cake")
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_models_that_are_refused():
    mistral = transformers.MistralConfig(**SHAPES, num_key_value_heads=2, sliding_window=16)
    refused(transformers.MistralForCausalLM(mistral), "sliding")
    layers = ["full_attention", "sliding_attention", "full_attention"]
    qwen = transformers.Qwen2Config(**SHAPES, use_sliding_window=True, sliding_window=8, layer_types=layers)
    refused(transformers.Qwen2ForCausalLM(qwen), "sliding")
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=50)
    refused(transformers.T5ForConditionalGeneration(t5), "encoder-decoder")
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    refused(transformers.BloomForCausalLM(bloom), "AttentionInterface")


def test_uses_that_are_refused():
    model, ids = build(), tokens(2, 20)
    handle = applied(model)
    with pytest.raises(UsageError, match="cache_implementation"):
        handle.generate(ids, max_new_tokens=2, cache_implementation="static")
    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(UsageError, match="past_key_values"):
        handle.generate(ids, max_new_tokens=2, past_key_values=static)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    with pytest.raises(UsageError, match="left"), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=handle.host.new_cache())
    cache = handle.host.new_cache()
    keys = torch.randn(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    with pytest.raises(UsageError, match="observed"):
        cache.update(keys, keys, 0)


def test_whole_numbers_keep_their_sum():
    shares = torch.tensor([[1.6, 2.0], [1.7, 0.5], [1.7, 0.5]])
    assert whole(shares).tolist() == [[1, 2], [2, 1], [2, 0]]
