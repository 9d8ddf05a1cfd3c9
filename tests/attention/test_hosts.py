"""Every attention method on decoders that people bring: Llama, Qwen3, GPT-2, OPT; `generate`, undo, batches."""

import importlib.util
import pathlib

import pytest
import torch

import hasten
from hasten.core import names

HERE = pathlib.Path(__file__).parent
METHODS = [name for name in names.method_files() if name.startswith("attention/")]
DECODERS = [name for name in METHODS if "decoder" in (names.card(name).hosts or ("decoder",))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, eos_token_id=None))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    more = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16, "eos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, **more))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=61, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0,
                       attention_dropout=0.0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return OPTForCausalLM(config)


BY_COLUMN = {"attention/nsa", "attention/tca", "attention/token_select"}  # count blocks or chunks from column 0
MODELS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "opt": opt}


def small(method):
    name = method.split("/")[1]
    spec = importlib.util.spec_from_file_location(f"hosts_{name}", HERE / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return names.load(method)(**module.SMALL)


def built(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[model]().eval()


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", DECODERS)
def test_generates_alone_as_in_a_padded_batch_and_is_undone(method, model):
    net = built(model)
    ids = torch.randint(1, 61, (2, 44), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = net.generate(ids, attention_mask=mask, **options)
    calibration = [ids] if "calibration" in names.card(method).needs else None
    handle = hasten.apply(net, small(method), calibration=calibration)
    both = net.generate(ids, attention_mask=mask, **options)
    alone = net.generate(ids[:1, 9:], attention_mask=mask[:1, 9:], **options)
    if method not in BY_COLUMN:
        assert torch.equal(both[0, 44:], alone[0, 35:]), "a row's result does not depend on its padding"
    assert both.shape == plain.shape
    handle.undo()
    assert torch.equal(net.generate(ids, attention_mask=mask, **options), plain)


@pytest.mark.parametrize("method", DECODERS)
def test_other_hosts_are_refused_in_words(method):
    from hasten.core.errors import PlanError, UsageError

    with pytest.raises((PlanError, UsageError)):
        hasten.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), small(method), calibration=[torch.ones(1, 4)])
