"""What is recognised as what, and what a person reads when it is not."""

import pytest
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts import describe, rebuild, recognise
from hosts.tiny import llama


def test_any_module_with_linears_has_a_host():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2)))
    host = recognise(model)
    assert host.kind == "module" and list(host.linears()) == ["0", "2.0"]
    assert recognise(host) is host
    with pytest.raises(UsageError, match="no residual blocks"):
        _ = host.layers
    with pytest.raises(UsageError, match="model=MODEL"):
        rebuild(host.record())


def test_an_autoencoder_is_a_module_that_can_be_rebuilt():
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
    host = recognise(model)
    built = rebuild(host.record())
    built.load_state_dict(model.state_dict())
    assert host.kind == "module" and type(built) is type(model)


def test_an_encoder_is_no_decoder():
    from transformers import BertConfig, BertForMaskedLM

    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    assert recognise(BertForMaskedLM(BertConfig(**shape))).kind == "module"


def test_a_base_model_without_head_is_a_decoder():
    host = recognise(llama().model)
    assert host.kind == "decoder" and host.lm_head is None and host.blocks_path == "layers"
    with pytest.raises(UsageError, match="CausalLM"):
        host.wrap_generate(lambda inner: inner())


def test_what_is_not_recognised_says_how_to_describe_it():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(UsageError, match="encoder-decoder.*hasten.hosts.describe"):
        recognise(T5ForConditionalGeneration(T5Config(**shape)))
    with pytest.raises(UsageError, match="no linear layers.*hasten.hosts.describe"):
        recognise(nn.PReLU())
    with pytest.raises(UsageError, match="not recognised as a vit, but as a decoder"):
        recognise(llama(), "vit")
    with pytest.raises(UsageError, match="pipeline.unet"):
        recognise("llama")


def test_descriptions_are_checked():
    model = llama()
    with pytest.raises(UsageError, match="decoder or vit"):
        describe(model, kind="denoiser")
    with pytest.raises(UsageError, match='no part .blocks.*layers="model.layers", attention="self_attn", mlp="mlp"'):
        describe(model, layers="blocks")
    with pytest.raises(UsageError, match="is a LlamaModel: layers= names"):
        describe(model, layers="model")
    host = describe(model, layers="model.layers", attention="self_attn", mlp="mlp")
    assert host.attention_name == recognise(model).attention_name and len(host.layers) == 4


def test_a_record_that_does_not_fit_is_refused():
    record = recognise(llama()).record()
    with pytest.raises(UsageError, match="can't be built from its record"):
        rebuild(record | {"num_weights": 3})


def test_capture_sees_every_linear():
    host = recognise(llama())
    seen = {}
    host.capture(
        host.linears(), [{"input_ids": torch.ones(1, 3, dtype=torch.int64)}], lambda p, x: seen.update({p: x.shape})
    )
    assert set(seen) == set(host.linears()) and all(shape[:2] == (1, 3) for shape in seen.values())
