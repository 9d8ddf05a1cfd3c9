"""FlexQ: which layers keep inputs of 8 bits, and what that is worth."""

import pytest
import torch
from torch import nn

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.quant._linear import QuantLinear
from hasten.quant._six import SixBitInputs, SixBitLinear, round_inputs
from hasten.quant.base import densify, form_values
from hasten.quant.flexq import FlexQ, flexq
from hasten.quant.round_to_nearest import RoundToNearest


def problem(rows, columns, outliers=0, seed=0, tokens=50):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=make)
    x[:, :outliers] *= 40
    return torch.randn(rows, columns, generator=make) / columns**0.5, x


def cases():
    for seed, (rows, columns, options) in enumerate([(3, 40, {"group": 32}), (2, 133, {}), (1, 5, {"group": 16})]):
        yield {"args": problem(rows, columns, 1, seed, tokens=6), "kwargs": options}
    weight, x = problem(2, 40, 0, 9, tokens=3)
    weight[0], x[1] = 0, 0
    yield {"args": (weight.bfloat16(), x.half()), "kwargs": {"group": 32}}
    yield {"args": (weight, torch.zeros_like(x)), "kwargs": {"group": 32}}


def test_layers_with_outlying_inputs_keep_8_bits():
    even, x = problem(32, 256)
    assert isinstance(FlexQ().quantize(even, x), SixBitInputs)
    _, outlying = problem(32, 256, outliers=3)
    weight = even.clone()
    weight[:, :3] *= 0.01  # what is large is not what matters: rounding the rest to its scale loses the output
    assert not isinstance(FlexQ().quantize(weight, outlying), SixBitInputs)
    assert not isinstance(FlexQ(activations=8).quantize(even, x), SixBitInputs)
    assert flexq(weight, outlying)[2] > 10 * flexq(even, x)[2]


def test_the_layer_computes_with_6_bit_inputs_and_weights():
    weight, x = problem(16, 200)
    form = FlexQ().quantize(weight, x)
    layer = form.layer(torch.ones(16), torch.float32)
    assert isinstance(layer, SixBitLinear) and "6 bits" in layer.way()
    step = x[:, :128].abs().amax(1, keepdim=True) / 31
    assert torch.allclose((round_inputs(x)[:, :128] / step), (x[:, :128] / step).round(), atol=1e-4)
    assert torch.allclose(layer(x), round_inputs(x) @ form_values(form, 200).t() + 1, rtol=1e-4, atol=1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    part, _ = form.split([10, 6])
    assert torch.equal(part.layer(None, torch.float32).dense_weight(), layer.dense_weight()[:10])


def test_between_rounding_to_4_and_to_8_bits():
    weight, x = problem(32, 256)
    errors = [float((form_values(RoundToNearest(bits=bits).quantize(weight, None), 256) - weight).norm())
              for bits in (8, 4)]  # fmt: skip
    assert 2 * errors[0] < float((form_values(FlexQ().quantize(weight, x), 256) - weight).norm()) < errors[1] / 2


def test_a_model_has_both_kinds_of_layers_and_comes_back(tmp_path):
    model = common.build()
    with torch.no_grad():
        for layer in model.model.layers:  # attention's values get an outlying channel
            layer.self_attn.v_proj.weight[0] *= 100
            layer.self_attn.o_proj.weight[:, 0] *= 0.0001
            layer.self_attn.o_proj.weight[:, 12] *= 0.0001
    ids = torch.randint(1, 61, (4, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(ids).logits
        handle = hasten.apply(model, "quant/flexq(group=32, sensitive=1)", calibration=common.calibration())
        assert all(isinstance(part, SixBitLinear) for part in model.modules() if isinstance(part, QuantLinear))
        everywhere = (model(ids).logits - before).norm()
        handle.undo()
        handle = hasten.apply(model, "quant/flexq(group=32)", calibration=common.calibration())
        kinds = {path.split(".")[-1]: type(part) for path, part in model.named_modules() if hasattr(part, "packed")}
        assert kinds["o_proj"] is QuantLinear and kinds["q_proj"] is kinds["k_proj"] is SixBitLinear
        after = model(ids).logits
        assert 0 < (after - before).norm() < 0.7 * everywhere
        loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
        assert torch.equal(loaded.model(ids).logits, after)
        densify(handle.host)
        assert not any(isinstance(part, QuantLinear) for part in model.modules())


def test_a_convolutional_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        hasten.apply(model, "quant/flexq", calibration=[x])
        assert 0 < (model(x) - before).norm() < 0.1 * before.norm()


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="6, 16"):
        FlexQ(bits=4)
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(common.build(), "quant/flexq")
