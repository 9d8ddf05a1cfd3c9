"""The attention of vision models taken over: each call shown with its grid, answered, and given back bit for bit."""

import copy

import pytest
import torch

import standins
from conformance.attention import dit
from hasten.core.errors import UsageError
from hasten.hosts import recognise

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VIT, image_size=16, patch_size=4, num_labels=7))


def hf_dino():
    """Register tokens, layer scale and rotary positions."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**VIT, image_size=16, patch_size=4, num_register_tokens=2))


def timm_vit():
    return standins.timm().models.VisionTransformer(
        img_size=(16, 24), patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7, qk_norm=True, reg_tokens=2
    )


def timm_rope():
    transformer = standins.timm().models.Eva
    return transformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7,
                       use_rot_pos_emb=True, attn_type="rope")  # fmt: skip


def wan():
    """Video: tokens in frames, rows and columns; a second attention of each block looks at a text."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip


def unet():
    """Attention at two levels of a picture, each followed by attention to a text."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
    )  # fmt: skip


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "hf_vit": (hf_vit, lambda: {"pixel_values": noise(2, 3, 16, 16)}, 1, [(4, 4)] * 3),
    "hf_dino": (hf_dino, lambda: {"pixel_values": noise(2, 3, 16, 16)}, 3, [(4, 4)] * 3),
    "timm_vit": (timm_vit, lambda: {"x": noise(2, 3, 16, 24)}, 3, [(4, 6)] * 3),
    "timm_rope": (timm_rope, lambda: {"x": noise(2, 3, 16, 16)}, 1, [(4, 4)] * 3),
    "dit": (
        dit,
        lambda: {
            "hidden_states": noise(2, 2, 12, 12),
            "timestep": torch.tensor([5, 9]),
            "class_labels": torch.tensor([1, 3]),
        },
        0,
        [(6, 6)] * 3,
    ),
    "wan": (
        wan,
        lambda: {
            "hidden_states": noise(2, 4, 3, 4, 6),
            "timestep": torch.tensor([5, 9]),
            "encoder_hidden_states": noise(2, 5, 16),
        },
        0,
        [(3, 2, 3)] * 3,
    ),
    "unet": (
        unet,
        lambda: {"sample": noise(2, 2, 8, 8), "timestep": 7, "encoder_hidden_states": noise(2, 5, 12)},
        0,
        [(8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8), (8, 8)],
    ),
}
every = pytest.mark.parametrize("name", list(MODELS))


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


@torch.no_grad()
def run(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@every
def test_every_call_is_shown_with_its_grid_and_given_back_bit_for_bit(name):
    model, inputs = build(name), MODELS[name][1]()
    host, wanted, calls = recognise(model), run(model, inputs), []
    assert len(host.layers) == len(MODELS[name][3])

    def see(call):
        calls.append(call)
        return call.dense()

    for layer in range(len(host.layers)):
        host.attend_with(layer, see)
    assert torch.equal(run(model, inputs), wanted)
    assert [call.grid for call in calls if call.grid] == MODELS[name][3]
    assert {call.layer for call in calls} == set(range(len(host.layers)))
    for call in calls:
        assert call.query.shape == call.key.shape and not call.causal and call.mask is None and call.dropout == 0
        assert call.prefix == MODELS[name][2] and call.range() == (None, None)
        scores = call.query @ call.key.mT * call.scaling
        torch.testing.assert_close(scores.softmax(-1) @ call.value, call.dense(), rtol=1e-4, atol=1e-5)


@every
def test_another_answer_changes_the_model_its_copies_too_and_is_undone(name):
    model, inputs = build(name), MODELS[name][1]()
    host, wanted = recognise(model), run(model, inputs)
    state = {path: vars(part).copy() for path, part in model.named_modules()}
    host.attend_with(1, lambda call: call.value.mean(2, keepdim=True).expand_as(call.query))
    changed = run(model, inputs)
    assert not torch.equal(changed, wanted)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(run(twin, inputs), changed)
    with pytest.raises(UsageError, match="taken over already"):
        host.attend_with(1, lambda call: call.dense())
    for parameter in model.parameters():
        parameter.data.div_(1.5)
    host.changes.undo()
    torch.testing.assert_close(run(model, inputs), wanted)
    for path, part in model.named_modules():
        assert vars(part).keys() == state[path].keys() and "forward" not in vars(part)
        assert not part._forward_hooks and not part._forward_pre_hooks


@pytest.mark.parametrize("name", ["hf_vit", "dit"])
def test_gradients_flow_through_the_answer(name):
    model, inputs = build(name), MODELS[name][1]()
    host = recognise(model)

    def loss():
        model.zero_grad()
        out = model(**inputs)[0]
        out.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    wanted = loss()
    for layer in range(3):
        host.attend_with(layer, lambda call: call.dense())
    assert all(torch.equal(a, b) for a, b in zip(loss(), wanted, strict=True))


def test_a_picture_of_another_size_has_another_grid():
    model, seen = build("dit"), []
    host = recognise(model)
    host.attend_with(0, lambda call: (seen.append(call.grid), call.dense())[1])
    inputs = MODELS["dit"][1]()
    run(model, inputs)
    run(model, inputs | {"hidden_states": noise(2, 2, 8, 8)})
    assert seen == [(6, 6), (4, 4)]


def test_what_cannot_be_taken_over_is_said():
    host = recognise(build("hf_vit"))
    with pytest.raises(UsageError, match="layers 0 to 2"):
        host.attend_with(3, lambda call: call.dense())
    host.set_forward(0, lambda x: x)
    with pytest.raises(UsageError, match="leave those methods out"):
        host.attend_with(0, lambda call: call.dense())
    host.attend_with(1, lambda call: call.dense())
    with pytest.raises(UsageError, match="taken over"):
        host.split_block(1)

    model = build("hf_vit")
    model.set_attn_implementation("eager")
    host = recognise(model)
    host.attend_with(0, lambda call: call.dense())
    with pytest.raises(UsageError, match="set_attn_implementation"):
        run(model, MODELS["hf_vit"][1]())
    model = build("timm_vit")
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(UsageError, match="set_fused_attn"):
        recognise(model).attend_with(0, lambda call: call.dense())
