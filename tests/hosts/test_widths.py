"""Sizes of decoders and vision transformers: named, changed with the function kept where that is exact, put back."""

import pytest
import torch

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.axes import KINDS, Axis, mapped, places, reading, towers
from hasten.hosts.widths import Sizes, Widths
from hosts.test_vit import build
from hosts.tiny import DECODERS

MODELS = {name: DECODERS[name] for name in ("llama", "qwen2", "gpt2", "neox_parallel", "opt")}
MODELS |= {name: lambda name=name: build(name) for name in ("hf_vit", "timm_vit", "timm_scaled")}
every = pytest.mark.parametrize("name", MODELS)


def widths_of(name):
    return Widths(recognise(MODELS[name]()))


def repeated(sizes, by=2):
    """Copies: all channels, then all of them again."""
    return {kind: torch.eye(getattr(sizes, kind)).repeat(by, 1) for kind in KINDS}


def averaged(sizes):
    """The mean of channel i and channel i + n / 2."""
    return {kind: torch.eye(max(1, getattr(sizes, kind) // 2)).repeat(1, 2) / 2 for kind in KINDS}


def through(widths, maps):
    return {name: mapped(p, widths.axes(name), maps) for name, p in widths.tensors().items()}


@every
def test_copied_channels_keep_the_function_and_means_lead_back(name):
    widths = widths_of(name)
    model, sizes, wanted = widths.host.model, widths.sizes, widths._output().detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = repr(getattr(model, "config", None))
    widths.put(through(widths, repeated(sizes)))
    assert widths.sizes.width == 2 * sizes.width and widths.sizes.heads == 2 * sizes.heads
    torch.testing.assert_close(widths._output(), wanted, rtol=1e-4, atol=1e-5)
    widths.put(through(widths, averaged(widths.sizes)))
    assert widths.sizes == sizes
    torch.testing.assert_close(widths._output(), wanted, rtol=1e-4, atol=1e-5)
    widths.host.changes.undo()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert repr(getattr(model, "config", None)) == text


@every
def test_half_the_size_is_the_model_that_the_class_builds_at_that_size(name):
    widths = widths_of(name)
    model, depth, path = widths.host.model, widths.sizes.layers, widths.tower.path
    small = through(widths, averaged(widths.sizes))
    gone = tuple(f"{path}.{layer}." for layer in range(1, depth))
    sources = widths.put({key: value for key, value in small.items() if not key.startswith(gone)}, [0])
    assert len(sources) == len(list(model.parameters())) and widths.sizes.layers == 1
    assert torch.isfinite(widths._output()).all()
    widths._output().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if getattr(model, "config", None) is not None:
        fresh = type(model)(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(
            recognise(fresh)._run(widths.host._example()).logits, model.eval()(**widths.host._example()).logits
        )


def test_what_each_dimension_counts():
    llama, gpt2, neox, timm = (widths_of(name) for name in ("llama", "gpt2", "neox_parallel", "timm_vit"))
    assert llama.sizes == Sizes(32, 4, 2, 48, 4) and timm.sizes == Sizes(32, 4, 4, 128, 3)
    reads = Axis("width", reads=True)
    assert llama.axes("model.layers.3.self_attn.k_proj.weight") == (Axis("kv_heads", inner=8), reads)
    assert llama.axes("model.layers.0.mlp.down_proj.weight") == (Axis("width"), Axis("feed_forward", reads=True))
    assert llama.axes("lm_head.weight") == (None, reads) and llama.axes("model.norm.weight") == (Axis("width"),)
    assert gpt2.axes("transformer.h.1.attn.c_attn.weight") == (reads, Axis("heads", False, 3, 8))
    assert gpt2.axes("transformer.ln_f.bias") == (reads,), "the head is tied, so the last norm reads the stream"
    assert neox.axes("gpt_neox.layers.0.attention.query_key_value.bias") == (Axis("heads", inner=24),)
    assert timm.axes("pos_embed") == (None, None, Axis("width")) and timm.axes("head.weight") == (None, reads)


def test_maps_of_readers_and_leading_places():
    copies, means = torch.eye(2).repeat(2, 1), torch.eye(2).repeat(1, 2) / 2
    assert torch.equal(reading(copies), copies / 2) and torch.equal(reading(means), 2 * means)
    chosen = torch.eye(3)[[0, 2]]
    assert torch.equal(reading(chosen), chosen)
    assert places(Axis("heads", False, 3, 2), 12, 6).tolist() == [0, 1, 4, 5, 8, 9]
    assert places(Axis("width"), 3, 5).tolist() == [0, 1, 2] == places(None, 3, 3).tolist()


def test_layouts_of_fused_projections_are_told_by_the_output(monkeypatch):
    import hasten.hosts.axes as axes

    real, asked = axes.Tower.__init__, []

    def wrong_first(self, *args, inner=None, **more):
        asked.append(inner)
        real(self, *args, inner=False if inner is None else inner, **more)

    monkeypatch.setattr(axes.Tower, "__init__", wrong_first)
    neox = widths_of("neox_parallel")
    assert asked == [None, True]
    assert neox.axes("gpt_neox.layers.0.attention.query_key_value.bias") == (Axis("heads", inner=24),)


def test_fractions_that_do_not_fit_are_named():
    widths = widths_of("llama")
    assert widths.check(0.5, 0.25) == Sizes(16, 2, 1, 24, 1)
    with pytest.raises(UsageError, match="4 heads, 2 kv_heads can't be divided"):
        widths.check(0.375)
    with pytest.raises(UsageError, match="4 layers"):
        widths.check(0.5, 0.3)


def test_tensors_that_do_not_go_together_change_nothing():
    widths = widths_of("llama")
    tensors = widths.tensors()
    with pytest.raises(UsageError, match=r"missing or too many: model.norm.weight"):
        widths.put({key: value for key, value in tensors.items() if key != "model.norm.weight"})
    with pytest.raises(UsageError, match="does not fit 32 width"):
        widths.put(tensors | {"model.norm.weight": torch.ones(31)})
    assert not widths.host.changes and widths.sizes == Sizes(32, 4, 2, 48, 4)


def test_models_that_are_not_understood_are_refused():
    with pytest.raises(UsageError, match="GemmaTextScaledWordEmbedding|GemmaRMSNorm"):
        Widths(recognise(DECODERS["gemma"]()))
    with pytest.raises(UsageError, match=r"mixture of experts|counts is not known"):
        Widths(recognise(DECODERS["mixtral"]()))
    with pytest.raises(UsageError, match="is a module"):
        Widths(recognise(torch.nn.Sequential(torch.nn.Linear(3, 3))))


def test_both_towers_of_clip_are_named():
    from transformers import CLIPConfig, CLIPModel

    shape = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"hidden_size": 16, "vocab_size": 20, "max_position_embeddings": 8}
    vision = shape | {"hidden_size": 16, "image_size": 8, "patch_size": 4, "num_channels": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    found = {one.path: one for one in towers(model)}
    assert set(found) == {"text_model.encoder.layers", "vision_model.encoder.layers"}
    reads = Axis("width", reads=True)
    assert found["text_model.encoder.layers"].axes("text_projection.weight") == (None, reads)
    assert found["vision_model.encoder.layers"].axes("visual_projection.weight") == (None, reads)
    assert found["vision_model.encoder.layers"].axes("text_projection.weight") is None
    assert found["vision_model.encoder.layers"].axes("vision_model.embeddings.class_embedding") == (Axis("width"),)
