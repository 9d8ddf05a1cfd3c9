"""Two bits with aligned groups of four: where they lie, what they are worth, and the layer that multiplies them."""

import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.quant import aligned2bit as module
from hasten.quant._mixed import MixedLinear
from hasten.quant.aligned2bit import Aligned2Bit, aligned2bit, average_bits, widest
from hasten.quant.base import densify, form_values
from hasten.quant.round_to_nearest import RoundToNearest


def problem(rows, columns, seed=0, tokens=700):
    """A weight with heavy tails, and the Hessian of inputs that are strongly correlated."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=make) / columns**0.5
    x = torch.randn(tokens, columns, generator=make) @ (mix @ mix + 0.1 * torch.eye(columns))
    weight = torch.randn(rows, columns, generator=make) * (0.3 + torch.randn(rows, columns, generator=make).abs())
    return weight / columns**0.5, 2 / tokens * x.t() @ x


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"mse": False}),
            (2, 150, {"block": 2}),
            (1, 200, {"block": 3, "wide": 2, "damp": 0.1, "mse": False}),
        ]
    ):
        yield {"args": problem(rows, columns, seed), "kwargs": options, "tolerance": 1e-4}
    weight, hessian = problem(2, 130, 9)
    yield {"args": (weight.bfloat16(), hessian), "kwargs": {"block": 2}, "tolerance": 1e-4}


def error(weight, found, hessian):
    return float(torch.trace((weight - found) @ hessian @ (weight - found).t()))


def values(form):
    return form_values(form, form.high.shape[1])


def test_every_run_has_its_widest_groups():
    weight = problem(5, 9 * 64)[0]
    weight[:, 70] = 5
    weight[2, 300] = -9
    chosen = widest(weight, 4, 1)
    assert chosen.sum(1).tolist() == [3] * 5 and chosen[:, 1].tolist() == [True, True, True, True, True]
    assert bool(chosen[2, 4]) and bool(chosen[:, 8].all()), "a run of one group has its share, rounded up"
    assert chosen[:, :4].sum(1).eq(1).all() and chosen[:, 4:8].sum(1).eq(1).all()


def test_less_error_than_two_bits_and_than_other_groups_of_four(monkeypatch):
    weight, hessian = problem(64, 512)
    ranged = Aligned2Bit(block=4).quantize(weight, hessian)
    rounded = form_values(RoundToNearest(bits=2, group=64).quantize(weight, None), 512)
    assert error(weight, values(ranged), hessian) < 0.25 * error(weight, rounded, hessian)

    def drawn(weight, block, wide):
        make = torch.Generator().manual_seed(0)
        places = torch.rand(len(weight), 8 // block, block, generator=make).argmax(2)
        return nn.functional.one_hot(places, block).bool().flatten(1)

    monkeypatch.setattr(module, "widest", drawn)
    other = Aligned2Bit(block=4).quantize(weight, hessian)
    assert average_bits(other) == average_bits(ranged)
    assert error(weight, values(ranged), hessian) < 0.93 * error(weight, values(other), hessian)


def test_all_groups_with_four_bits_are_gptq_with_four():
    from hasten.quant.gptq import GPTQ

    weight, hessian = problem(16, 256)
    mine = values(Aligned2Bit(block=2, wide=2).quantize(weight, hessian))
    theirs = form_values(GPTQ(bits=4, group=64, mse=True).quantize(weight, hessian), 256)
    assert error(weight, mine, hessian) == pytest.approx(error(weight, theirs, hessian), rel=0.05)


@pytest.mark.parametrize("columns", [40, 512, 600])
def test_the_form_stands_for_what_the_function_says(columns):
    weight, hessian = problem(20, columns)
    codes, scales, zeros, chosen = aligned2bit(weight, hessian, block=4)
    assert int(codes.max()) > 3 and bool((codes <= torch.where(chosen, 15, 3)[:, torch.arange(columns) // 64]).all())
    spread = torch.arange(columns) // 64
    expected = scales[:, spread] * (codes - zeros[:, spread])
    form = Aligned2Bit(block=4).quantize(weight, hessian)
    assert torch.allclose(values(form), expected, rtol=1e-5, atol=1e-7)
    first, last = form.split([7, 13])
    assert torch.equal(torch.cat([values(first), values(last)]), values(form))
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    layer = Aligned2Bit(block=4, activations=32).quantize(weight, hessian).layer(torch.ones(20), torch.float32)
    assert torch.allclose(layer(x), x @ expected.t() + 1, rtol=1e-4, atol=1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_average_bits():
    weight, hessian = problem(4, 1024)
    assert average_bits(Aligned2Bit().quantize(weight, hessian)) == pytest.approx(2 + 2 / 8 + 32 / 64 + 8 / 512)
    layer = Aligned2Bit().quantize(weight, hessian).layer(None, torch.float32)
    assert 8 * layer.bytes() / weight.numel() == pytest.approx(average_bits(Aligned2Bit().quantize(weight, hessian)))


def test_layer_undo_save_and_dense(tmp_path):
    from conformance import quant as common

    model = common.build()
    handle = hasten.apply(model, "quant/aligned2bit", calibration=common.calibration())
    assert sum(isinstance(part, MixedLinear) for part in model.modules()) == 14
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    ids = torch.randint(1, 61, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
        exact = model(ids).logits
        densify(handle.host)
        assert not any(isinstance(part, MixedLinear) for part in model.modules())
        assert (model(ids).logits - exact).norm() < 0.05 * exact.norm()  # inputs are rounded to 8 bits no more


def test_moving_a_layer_keeps_its_statistics():
    weight, hessian = problem(8, 128)
    layer = Aligned2Bit().quantize(weight, hessian).layer(None, torch.float32)
    before = layer.dense_weight()
    assert torch.equal(layer.to(torch.bfloat16).double().dense_weight(), before)
    state = layer.state_dict()
    state["places"] = torch.full_like(state["places"], 9)
    with pytest.raises(UsageError, match="low bits"):
        MixedLinear.empty(**layer.shape()).load_state_dict(state)


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="at most block"):
        Aligned2Bit(block=2, wide=3)
    with pytest.raises(PlanError, match="2, 16"):
        Aligned2Bit(bits=4)
