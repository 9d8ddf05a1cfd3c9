"""ABQ-LLM: what the bit balance is worth, what blocks learn, and where the balance goes."""

import pytest
import torch
from torch import nn

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import recognise
from hasten.hosts.blockwise import attention_maps, entering, feeding
from hasten.quant._balanced import BalancedLinear
from hasten.quant._linear import QuantLinear
from hasten.quant.abq import ABQ, abq
from hasten.quant.base import densify


def problem(rows, columns, group, seed=0):
    make = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    balance = 1 + torch.rand(columns, generator=make)
    clips = (2 + torch.randn(rows, groups, generator=make) for _ in range(2))
    return torch.randn(rows, columns, generator=make), balance, *clips


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"group": 32}),
            (2, 37, {"group": 16, "bits": 2}),
            (2, 50, {"group": 64, "bits": 2, "bit_balance": False}),
            (1, 5, {"group": 32, "bits": 8}),
        ]
    ):
        yield {"args": problem(rows, columns, options["group"], seed), "kwargs": options}
    weight, *rest = problem(2, 40, 32, 9)
    weight[0] = 0
    yield {"args": (weight.bfloat16(), *rest), "kwargs": {"group": 32, "bits": 3}}


def values(codes, scales, zeros, group):
    spread = torch.arange(codes.shape[1]) // group
    return scales[:, spread] * (codes - zeros[:, spread])


def test_two_bits_have_five_levels_as_many_below_zero_as_above():
    weight, balance, upper, lower = problem(8, 128, 64)
    wide = torch.full_like(upper, 20.0)
    weight[:, ::2] = -weight[:, 1::2]  # symmetric
    balance[:] = 1
    codes, scales, zeros = abq(weight, balance, wide, wide, bits=2, group=64)
    assert codes.unique().tolist() == [0, 1, 2, 3, 4] and (zeros == 2).all()
    four = abq(weight, balance, wide, wide, bits=2, group=64, bit_balance=False)
    assert four[0].unique().tolist() == [0, 1, 2, 3]
    errors = [float((values(*one, 64) - weight).norm()) for one in ((codes, scales, zeros), four)]
    assert errors[0] < 0.85 * errors[1]


def test_clipping_and_balance():
    weight, balance, upper, lower = problem(4, 64, 32)
    half = torch.zeros_like(upper)  # a sigmoid of 1/2
    codes, scales, zeros = abq(weight, balance, half, half, bits=4, group=32)
    parts = (weight * balance).unflatten(1, (-1, 32))
    assert torch.allclose(scales, (parts.amax(2) - parts.amin(2)) / 2 / 15)
    found = values(codes, scales, zeros, 32)
    assert (found.unflatten(1, (-1, 32)).amax(2) <= parts.amax(2) / 2 + scales).all()


def loss_of(model, batches):
    with torch.no_grad():
        return [model(**batch).logits for batch in batches]


def distance(model, batches, wanted):
    return sum(float((a - b).norm()) for a, b in zip(loss_of(model, batches), wanted, strict=True))


def uneven():
    """A Llama some of whose channels are large, as those of trained ones are."""
    model = common.build()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::11] *= 12
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj,
                         layer.mlp.gate_proj):  # fmt: skip
                part.weight[:, ::11] *= 0.5
    return model


@pytest.mark.parametrize("bits", [2, 3])
def test_learning_brings_the_model_nearer_than_rounding(bits):
    model, batches = uneven(), common.calibration()
    wanted = loss_of(model, batches)
    found = {}
    for epochs in (0, 8):
        handle = hasten.apply(model, f"quant/abq(bits={bits}, group=64, epochs={epochs})", calibration=batches)
        found[epochs] = distance(model, batches, wanted)
        report = handle.report["quant/abq"]
        assert report["attention_loss"] and report["left_dense"] == []
        assert report.get("stored_bits") == (3 if bits == 2 else None)
        handle.undo()
        assert distance(model, batches, wanted) == 0
    handle = hasten.apply(model, f"quant/round_to_nearest(bits={bits}, group=64)")
    rounded = distance(model, batches, wanted)
    assert found[8] < 0.9 * rounded and found[8] <= found[0]


def test_norms_take_the_balance_and_other_layers_divide():
    model = uneven()
    before = model.model.layers[0].input_layernorm.weight.clone()
    handle = hasten.apply(model, "quant/abq(bits=3, group=64, epochs=4)", calibration=common.calibration())
    assert handle.report["quant/abq"]["learned_blocks"] == 2
    block = model.model.layers[0]
    assert not torch.equal(block.input_layernorm.weight, before)
    assert type(block.self_attn.q_proj) is type(block.mlp.up_proj) is QuantLinear
    assert type(block.self_attn.o_proj) is type(block.mlp.down_proj) is BalancedLinear
    handle.undo()
    assert torch.equal(model.model.layers[0].input_layernorm.weight, before)


def test_a_norm_that_others_read_stays_and_its_layers_divide():
    model = uneven()
    plan = "quant/abq(bits=3, group=64, epochs=4, ignore=['*.q_proj'])"
    before = model.model.layers[0].input_layernorm.weight.clone()
    hasten.apply(model, plan, calibration=common.calibration())
    block = model.model.layers[0]
    assert type(block.self_attn.q_proj) is nn.Linear and type(block.self_attn.k_proj) is BalancedLinear
    assert torch.equal(block.input_layernorm.weight, before)


def test_save_load_and_dense(tmp_path):
    model = uneven()
    handle = hasten.apply(model, "quant/abq(bits=2, group=64)", calibration=common.calibration())
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    ids = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids).logits
        assert torch.equal(loaded.model(ids).logits, exact)
        densify(handle.host)
        assert not any(isinstance(part, QuantLinear) for part in model.modules())
        assert (model(ids).logits - exact).norm() < 0.05 * exact.norm()


def test_half_precision_and_a_vision_transformer():
    from transformers import ViTConfig, ViTForImageClassification

    model = uneven().bfloat16()
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        hasten.apply(model, "quant/abq(bits=8, group=64, epochs=1)", calibration=common.calibration())
        assert model(ids).logits.dtype == torch.bfloat16
        assert (model(ids).logits - before).norm() < 0.1 * before.norm()
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16,
                       patch_size=4, num_channels=1)  # fmt: skip
    vit, images = ViTForImageClassification(config).eval(), torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        before = vit(pixel_values=images).logits
        hasten.apply(vit, "quant/abq(bits=8, epochs=1)", calibration=[images])
        assert (vit(pixel_values=images).logits - before).norm() < 0.05 * before.norm()


def test_blocks_by_themselves():
    model = common.build()
    host, batches = recognise(model), common.calibration()
    first = entering(host, 0, batches, [])
    with torch.no_grad():
        outputs = [call.run() for call in first]
        second = entering(host, 1, batches, outputs)
        whole = model.model(**batches[0], output_hidden_states=True).hidden_states
    shown = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    assert torch.equal(shown, whole[1]) and torch.equal(second[0].args[0], whole[1])
    assert first[0].rows(outputs[0]).shape == (2 * 24 - 5, 48)
    weights = {path: one for path, one in host.weights().items() if path.startswith("model.layers.0.")}
    groups = [(sorted(path.rsplit(".")[-1] for path in paths), norm) for paths, norm, _ in feeding(first, weights)]
    block = model.model.layers[0]
    assert groups == [
        (["k_proj", "q_proj", "v_proj"], block.input_layernorm), (["o_proj"], None),
        (["gate_proj", "up_proj"], block.post_attention_layernorm), (["down_proj"], None),
    ]  # fmt: skip
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**batches[0], output_attentions=True).attentions[0]
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), attention_maps(host, 0) as maps:
        first[0].run()
    assert torch.allclose(maps[0].exp()[0], eager[0], atol=1e-5)  # the first row has no padding
    assert model.config._attn_implementation == "sdpa"


def test_bad_input():
    with pytest.raises(PlanError, match="2, 3, 4, 6, 8, 16"):
        ABQ(bits=5)
    with pytest.raises(UsageError, match="at least one"):
        hasten.apply(common.build(), "quant/abq", calibration=[])
    model = common.build()
    state = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(UsageError, match="not finite"):
        batch = {"inputs_embeds": torch.full((1, 5, 48), torch.nan)}
        hasten.apply(model, "quant/abq", calibration=[batch])
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
