"""Masked-diffusion language models: what is recognised, two-way attention, a cache that is rewritten in place."""

import pytest
import torch

import hasten
from conformance.decode import target
from conformance.denoising import KINDS, MASK, hidden, tiny
from hasten.core.errors import UsageError
from hasten.hosts import rebuild, recognise


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_with_a_mask_token_is_one(kind):
    host = recognise(tiny(kind, block_length=4))
    assert host.kind == "diffusion_lm" and host.mask_token == MASK and host.block_length == 4 and host.context == 96
    assert not host.shifted and host.sees_both_ways
    assert len(host.layers) == 2 and len(host.linears()) == 14
    assert recognise(target()).kind == "decoder"
    assert recognise(rebuild(host.record())).kind == "diffusion_lm"


def test_the_models_own_forward_stays_causal():
    model = tiny()
    ids = hidden(1)["input_ids"]
    before, config = model(ids).logits, repr(model.config)
    host = recognise(model)
    both = host.scores(ids)
    assert torch.equal(model(ids).logits, before) and repr(model.config) == config
    assert not torch.allclose(both[:, 0], before[:, 0])
    assert torch.equal(host.forward({"input_ids": ids}).logits, both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_those_of_a_full_mask(kind, attention):
    model = tiny(kind)
    model.set_attn_implementation(attention)
    batch = hidden(3)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    found = recognise(model).scores(ids, real_BT=real, positions=positions)
    model.set_attn_implementation("sdpa")
    mask = real[:, None, None].expand(-1, 1, ids.shape[1], -1)
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    # eager attention has its softmax in float32
    assert torch.allclose(found[real], wanted[real], atol=1e-8 if attention == "sdpa" else 1e-4)


def test_some_scores_only():
    host = recognise(tiny())
    ids = hidden(2)["input_ids"]
    keep = torch.tensor([4, 1, 9])
    assert torch.allclose(host.scores(ids, keep=keep), host.scores(ids)[:, keep])


def test_a_cache_is_written_where_it_is_told():
    host = recognise(tiny())
    ids = hidden(2)["input_ids"]
    cache = host.place_cache(ids.shape[1])
    host.scores(ids, cache=cache)
    keys = cache.layers[0].keys.clone()
    changed = ids.clone()
    changed[:, [3, 5]] = 7
    host.scores(changed, at=torch.tensor([5, 3]), cache=cache)
    moved = (cache.layers[0].keys != keys).any(-1).any(1)
    assert moved.nonzero().tolist() == [[0, 3], [0, 5], [1, 3], [1, 5]]
    keys = cache.layers[0].keys.clone()
    changed[0, 3], changed[1, 9] = 8, 9
    host.scores(changed, at=torch.tensor([[3, 3], [5, 9]]), cache=cache)
    moved = (cache.layers[0].keys - keys).abs().amax((1, 3)) > 1e-9
    assert moved.nonzero().tolist() == [[0, 3], [1, 9]]
    full = host.place_cache(ids.shape[1])
    host.scores(changed, cache=full)
    assert torch.allclose(cache.layers[0].keys, full.layers[0].keys), "the first layer's keys are those of the tokens"


def test_a_described_model_tells_its_config_so_that_it_can_be_saved(tmp_path):
    model = target(vocab_size=41)
    assert recognise(model).kind == "decoder"
    before = model.config.to_dict()
    host = hasten.describe(model, kind="diffusion_lm", mask_token=MASK, shifted=True, block_length=8)
    assert host.mask_token == MASK and host.shifted and host.block_length == 8
    handle = hasten.apply(model, "decode/dimple(threshold=0.3)", host=host)
    batch = hidden()
    wanted = handle.generate(batch)
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    assert loaded.host.shifted and torch.equal(loaded.generate(batch), wanted)
    handle.undo()
    assert model.config.to_dict() == before


def test_a_model_without_a_mask_token_is_told_how_to_name_it():
    with pytest.raises(UsageError, match="no mask token.*mask_token=ID"):
        hasten.describe(target(), kind="diffusion_lm")
    with pytest.raises(UsageError, match="mask token 99 is no token.*37"):
        hasten.describe(target(), kind="diffusion_lm", mask_token=99)
    with pytest.raises(UsageError, match=r"not recognised as a diffusion_lm.*mask_token=ID"):
        recognise(target(), "diffusion_lm")
    with pytest.raises(UsageError, match="describe has no mask_token for a model of the kind decoder"):
        hasten.describe(target(), mask_token=3)


def test_a_model_that_only_looks_back_is_refused():
    class OneWay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()
            self.config = self.inner.config

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids, use_cache=False)

    host = hasten.describe(OneWay(), kind="diffusion_lm", layers="inner.model.layers")
    assert not host.sees_both_ways
    with pytest.raises(UsageError, match="hides later tokens"):
        hasten.apply(host.model, "decode/dimple", host=host)


def test_layers_with_windows_have_no_cache_of_places():
    model = tiny(
        "qwen2", layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=4
    )
    with pytest.raises(UsageError, match="see the whole text.*sliding_attention"):
        hasten.apply(model, "decode/dkv_cache")


def test_a_canvas_of_random_tokens_is_no_such_model():
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 41, "layer_types": ["full_attention"] * 2}
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(text_config=text, vision_config=None))
    for refused in (lambda: recognise(model, "diffusion_lm"), lambda: hasten.describe(model, kind="diffusion_lm")):
        with pytest.raises(UsageError, match="canvas of random tokens.*own generate"):
            refused()
