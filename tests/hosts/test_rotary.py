"""Moved keys are those that the model itself computes further on, for the rotations that people's models have."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)  # fmt: skip

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.rotary import rotary_of

SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128},
}  # fmt: skip


def llama(rope, dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=rope)).to(dtype).eval()


def neighbours():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, num_key_value_heads=2)).eval()


def spread():
    torch.manual_seed(0)
    return GlmForCausalLM(GlmConfig(**SMALL, num_key_value_heads=2, head_dim=8)).eval()


def partial():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, rope_parameters=rope)).eval()


@torch.no_grad()
def keys(model, start, ids):
    places = torch.arange(start, start + ids.shape[1])[None]
    cache = model(ids, position_ids=places, use_cache=True).past_key_values
    return torch.stack([layer.keys[0] for layer in cache.layers])


MODELS = {name: (lambda rope=rope: llama(rope)) for name, rope in ROPES.items()}
MODELS |= {"neighbours": neighbours, "spread": spread, "partial": partial}


@pytest.mark.parametrize("name", MODELS)
def test_moved_keys_are_the_models_own(name):
    model = MODELS[name]()
    rotary = rotary_of(recognise(model), "kv/test")
    ids = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    near, far = keys(model, 3, ids), keys(model, 400, ids)
    assert (near - far).abs().max() > 1e-3
    torch.testing.assert_close(rotary.move(near, 397), far, rtol=0, atol=2e-5)
    torch.testing.assert_close(rotary.move(far, -397), near, rtol=0, atol=2e-5)
    assert rotary.move(near, 0) is near


def test_half_precision_is_rounded_once():
    model = llama(ROPES["default"], torch.bfloat16)
    rotary = rotary_of(recognise(model), "kv/test")
    ids = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    near, far = keys(model, 0, ids), keys(model, 50, ids)
    moved = rotary.move(near, 50)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), far.float(), rtol=2e-2, atol=2e-2 * float(far.abs().max()))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_are_refused(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UsageError, match="when the text gets longer"):
        rotary_of(recognise(llama(rope)), "kv/test")


def test_learned_positions_are_refused():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=64, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UsageError, match="rotary"):
        rotary_of(recognise(GPT2LMHeadModel(config)), "kv/test")
