"""ZeroQuant: integers are what is multiplied, for every class of layer, and what the paper says of outliers."""

import pytest
import torch
from torch import nn

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError, UsageError
from hasten.kernels import int8
from hasten.quant._int8 import Int8, Int8Linear, rowwise
from hasten.quant._linear import QuantLinear
from hasten.quant.base import densify
from hasten.quant.zeroquant import zeroquant
from standins import timm


def problem(tokens, columns, rows, dtype=torch.float32):
    make = torch.Generator().manual_seed(tokens + columns)
    return torch.randn(tokens, columns, generator=make).to(dtype), torch.randn(rows, columns, generator=make)


def cases():
    for tokens, columns, rows in [(1, 1, 1), (3, 37, 5), (17, 64, 18), (2, 130, 33)]:
        yield {"args": problem(tokens, columns, rows), "grad": False, "tolerance": 1e-5}
    x, weight = problem(4, 50, 6)
    x[1], weight[2] = 0, 0
    yield {"args": (x, weight), "grad": False, "tolerance": 1e-5}
    yield {"args": problem(5, 70, 9, torch.bfloat16), "grad": False, "tolerance": 1e-2}


def test_scales_of_their_own_keep_small_tokens():
    """What the paper shows for tokens: one scale for all of them loses the small ones."""
    x, weight = problem(20, 256, 64)
    x = x * torch.logspace(-2, 1, 20)[:, None]
    exact = x @ weight.T
    own = (zeroquant(x, weight) - exact).norm(dim=1) / exact.norm(dim=1)
    codes, scales = rowwise(weight)
    step = x.abs().max() / 127
    shared = int8.linear(x, int8.pack(codes), scales * step, int8.sums(codes), scale=step.view(1))
    assert own.max() < 0.015 and ((shared - exact).norm(dim=1) / exact.norm(dim=1))[0] > 0.5


def test_range_search_lowers_the_error():
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(0)) ** 3
    errors = [(codes * scales[:, None] - weight).square().sum() for codes, scales in
              (rowwise(weight, 4), rowwise(weight, 4, shrink=60))]  # fmt: skip
    assert errors[1] < 0.95 * errors[0]
    assert torch.equal(rowwise(torch.zeros(2, 5))[0], torch.zeros(2, 5, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_and_back(dtype, tmp_path):
    model = common.build().to(dtype)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
        handle = hasten.apply(model, "quant/zeroquant")
        after = model(ids).logits
        layers = [part for part in model.modules() if isinstance(part, Int8Linear)]
        assert len(layers) == 14 and not any(isinstance(part, QuantLinear) for part in model.modules())
        assert after.dtype == dtype and not torch.equal(after, before)
        assert (after - before).float().norm() < 0.05 * before.float().norm()
        loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
        assert all(torch.equal(one, other) for one, other in
                   zip(model.state_dict().values(), loaded.model.state_dict().values(), strict=True))  # fmt: skip
        if dtype == torch.float32:  # conversion to bfloat16 rounds the rotary frequencies, which no file holds
            assert torch.equal(loaded.model(ids).logits, after)
        densify(loaded.host)
        assert not any(isinstance(part, Int8Linear) for part in loaded.model.modules())
        assert (loaded.model(ids).logits - before).float().norm() < 0.05 * before.float().norm()
        assert torch.equal(handle.undo()(ids).logits, before)
    facts = handle.report["quant/zeroquant"]
    assert facts["weight_bytes_after"] < facts["weight_bytes_before"]
    assert "simulated" not in facts or int8.path() == "torch"


def test_four_bits_and_groups_use_packed_codes():
    for plan in ("quant/zeroquant(bits=4)", "quant/zeroquant(group=32)"):
        model = common.build()
        hasten.apply(model, plan)
        layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
        assert len(layers) == 14 and all(layer.activations == 8 for layer in layers)


def test_convolutions_and_vision():
    net = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 10)).eval()
    vit = timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5).eval()
    for model, x in ((net, torch.randn(4, 3, 6, 6)), (vit, torch.randn(4, 3, 16, 16))):
        with torch.no_grad():
            before = model(x)
            hasten.apply(model, "quant/zeroquant")
            assert (model(x) - before).norm() < 0.05 * before.norm()
        assert any(isinstance(part, Int8Linear) for part in model.modules())


def test_conversion_keeps_scales_exact():
    codes, scales = rowwise(torch.randn(20, 70))
    layer = Int8(codes, scales, "static", torch.full((1,), 0.01)).layer(torch.randn(20), torch.float32)
    again = layer.to(torch.bfloat16)
    assert again.scales.dtype == torch.float32 and torch.equal(again.scales, scales)
    assert again.bias.dtype == torch.bfloat16 and again.divisors.dtype == torch.float32
    assert again(torch.randn(3, 70).bfloat16()).dtype == torch.bfloat16


def test_damaged_files_and_wrong_options():
    codes, scales = rowwise(torch.randn(20, 70))
    layer = Int8(codes, scales).layer(None, torch.float32)
    state = layer.state_dict()
    state["packed"] = torch.full_like(state["packed"], -128)
    with pytest.raises(UsageError, match="damaged"):
        Int8Linear.empty(**layer.shape()).load_state_dict(state)
    with pytest.raises(UsageError, match="divisors"):
        Int8Linear.empty(**layer.shape() | {"inputs": "static"})
    with pytest.raises(PlanError, match="4, 8, 16"):
        hasten.apply(common.build(), "quant/zeroquant(bits=3)")
