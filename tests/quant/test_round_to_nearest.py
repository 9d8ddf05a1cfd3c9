"""Rounding to nearest: its error is at most half a step, and it needs no data."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.quant.round_to_nearest import RoundToNearest, round_to_nearest


def cases():
    make = torch.Generator().manual_seed(0)
    for rows, columns, options in [
        (3, 40, {"group": 32}),
        (2, 33, {"group": 16, "bits": 3, "symmetric": True}),
        (1, 5, {"bits": 2}),
        (2, 70, {"group": 64, "bits": 6}),
    ]:
        yield {"args": (torch.randn(rows, columns, generator=make),), "kwargs": options}
    yield {"args": (torch.randn(2, 40, generator=make).bfloat16(),), "kwargs": {"bits": 8}}
    yield {"args": (torch.zeros(2, 40),), "kwargs": {"bits": 4}}


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_no_weight_moves_by_more_than_half_a_step(bits):
    weight = torch.randn(7, 130, generator=torch.Generator().manual_seed(1))
    form = RoundToNearest(bits=bits, group=64).quantize(weight, None)
    step = form.scales.repeat_interleave(64, 1)[:, :130]
    assert ((form.layer(None, torch.float32).dense_weight() - weight).abs() <= step * 0.5001).all()


def test_zero_is_exact_and_finer_codes_are_nearer():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 5] = 0
    errors = []
    for bits in (2, 3, 4, 6, 8):
        codes, scales, zeros = round_to_nearest(weight, bits=bits, group=32)
        found = scales.repeat_interleave(32, 1) * (codes - zeros.repeat_interleave(32, 1))
        assert (found[:, 5] == 0).all()
        errors.append(float((found - weight).norm()))
    assert errors == sorted(errors, reverse=True)


def test_needs_no_calibration():
    handle = hasten.apply(common.build(), "quant/round_to_nearest(bits=8, group=32)")
    assert handle.report["quant/round_to_nearest"]["quantized"] == 14


def test_convolutional_network_runs_on_codes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 24, 1), torch.nn.Conv2d(24, 24, 3, groups=2), torch.nn.Flatten(),
        torch.nn.Linear(24 * 36, 5),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        handle = hasten.apply(model, "quant/round_to_nearest(bits=8)")
        assert handle.report["quant/round_to_nearest"]["quantized"] == 3  # of the grouped one each group has a weight
        assert 0 < (model(x) - before).norm() < 0.03 * before.norm()
        from hasten.quant.base import densify

        after = model(x)
        densify(handle.host)
        assert type(model[0]) is torch.nn.Conv2d and torch.allclose(model(x), after, atol=0.03)
        assert torch.equal(handle.undo()(x), before)
