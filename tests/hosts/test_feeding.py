"""Which norms feed which layers, on the models that people use."""

import pytest
import torch
from torch import nn

from hasten.hosts import Host
from hasten.hosts.feeding import affine_of, norms_before
from hasten.hosts.recognise import recognise
from standins import timm


def decoder(name):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    sizes |= {"intermediate_size": 100, "max_position_embeddings": 64}
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
        "phi": (transformers.PhiConfig, transformers.PhiForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "bert": (transformers.BertConfig, transformers.BertLMHeadModel),
    }
    config, cls = classes[name]
    if name == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
    if name == "gemma":
        sizes |= {"num_key_value_heads": 2, "head_dim": 12}
    torch.manual_seed(0)
    extra = {"is_decoder": True} if name == "bert" else {}
    model = cls(config(**sizes, **extra, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()
    for part in model.modules():  # gains of 1 would hide a wrong formula
        if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
            nn.init.normal_(part.weight, 1, 0.2)
    return model


def feeds_of(model, batch=None):
    host = recognise(model)
    batch = batch or {"input_ids": torch.randint(1, 61, (2, 9))}
    return {feed.path: feed for feed in norms_before(host, batch, [*host.weights()])}


@pytest.mark.parametrize("name, readers", [("llama", [3, 2]), ("gemma", [3, 2]), ("neox", [1, 1]), ("gpt2", [1, 1])])
def test_pre_norm_decoders(name, readers):
    feeds = feeds_of(decoder(name))
    assert [len(feed.readers) for feed in feeds.values()] == readers * 2
    assert all(feed.affine.centred == (name in ("neox", "gpt2")) for feed in feeds.values())


def test_parallel_blocks_read_one_norm_four_times():
    feeds = feeds_of(decoder("phi"))
    assert [len(feed.readers) for feed in feeds.values()] == [4, 4]


def test_post_norm_models_have_none():
    """The residual sum takes the norm's output too."""
    assert feeds_of(decoder("bert")) == {}


def test_vision_transformer():
    vit = timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5).eval()
    host = recognise(vit)
    feeds = norms_before(host, {host.first_input(): torch.randn(2, 3, 16, 16)}, [*host.weights()])
    assert [feed.readers[0].split(".")[-1] for feed in feeds] == ["qkv", "fc1"] * 2


class Leaky(nn.Module):
    def __init__(self, leak):
        super().__init__()
        self.norm, self.a, self.b, self.leak = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), leak

    def forward(self, x):
        h = self.norm(x)
        if self.leak == "view":
            return self.a(h) + self.b(h[..., :])
        if self.leak == "mean":
            return self.a(h) * h.mean()
        if self.leak == "other":
            return self.a(h) + self.a(x)
        return self.a(h) + self.b(h) * h.shape[-1]


@pytest.mark.parametrize("leak, readers", [(None, ("a", "b")), ("view", None), ("mean", None), ("other", None)])
def test_whatever_else_sees_the_output_counts(leak, readers):
    model = Leaky(leak).eval()
    feeds = norms_before(Host(model), {"x": torch.randn(3, 8)}, ["a", "b"])
    assert [feed.readers for feed in feeds] == ([] if readers is None else [readers])


def test_what_a_norm_computes():
    x = torch.randn(5, 16)
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    found = affine_of(norm, x, norm(x))
    assert found.centred and torch.allclose(found(x), norm(x), atol=1e-5)
    rms = nn.RMSNorm(16, eps=1e-3, elementwise_affine=False)
    assert not affine_of(rms, x, rms(x)).centred
    assert affine_of(nn.GroupNorm(4, 16), x, nn.GroupNorm(4, 16)(x)) is None
