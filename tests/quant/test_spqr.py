"""SpQR against rounding and GPTQ, at equal bits and with planted outliers; what it weighs; what goes wrong."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.quant.base import form_values
from hasten.quant.gptq import GPTQ
from hasten.quant.round_to_nearest import RoundToNearest
from hasten.quant.spqr import SpQR, _kept_range, average_bits, spqr


def problem(rows, columns, seed=0, tokens=400):
    """A weight and the Hessian of inputs that are strongly correlated, as activations are."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=make) / columns**0.5
    x = torch.randn(tokens, columns, generator=make) @ (mix @ mix + 0.1 * torch.eye(columns))
    return torch.randn(rows, columns, generator=make) / columns**0.5, 2 / tokens * x.t() @ x


def planted(rows, columns, seed=0):
    """The same with a few weights that are twenty times as large."""
    weight, hessian = problem(rows, columns, seed)
    make = torch.Generator().manual_seed(seed + 1)
    return torch.where(torch.rand(weight.shape, generator=make) < 0.004, 20 * weight, weight), hessian


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {}),
            (4, 37, {"act_order": False, "bits": 4, "threshold": 0.05}),
            (2, 33, {"damp": 0.1, "statistic_bits": 6}),  # the last group has one column
            (1, 50, {"threshold": 0.5}),
            (3, 34, {"group": 32, "threshold": 0.0, "bits": 2}),
            (2, 290, {"damp": 0.3, "threshold": 0.1}),  # more than 16 groups
        ]
    ):
        yield {"args": planted(rows, columns, seed), "kwargs": options, "tolerance": 1e-3}
    weight, hessian = planted(3, 40, 9)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    yield {"args": (weight.bfloat16(), hessian), "tolerance": 1e-3}
    weight[:, 16:32] = 0
    weight[1] = 0.25
    yield {"args": (weight, hessian), "kwargs": {"act_order": False}, "tolerance": 1e-3}


def error(weight, form, hessian):
    left = weight - form_values(form, weight.shape[1])
    return float(torch.trace(left @ hessian @ left.t()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_far_below_that_of_rounding_with_as_small_groups(bits):
    weight, hessian = problem(64, 256)
    found = error(weight, SpQR(bits=bits).quantize(weight, hessian), hessian)
    assert found < 0.5 * error(weight, RoundToNearest(bits=bits, group=16).quantize(weight, None), hessian)


def test_with_planted_outliers_it_beats_gptq_that_has_more_bits():
    weight, hessian = planted(64, 512)
    form = SpQR().quantize(weight, hessian)
    gptq = GPTQ(bits=4, group=64).quantize(weight, hessian)
    assert average_bits(form, 3, 16, 32) < 4 + 2 * 16 / 64
    assert error(weight, form, hessian) < 0.8 * error(weight, gptq, hessian)
    large = weight.abs() > 8 / 512**0.5
    held = held_places(form, 512)
    assert (held & large).sum() > 0.9 * large.sum() and held.sum() < 0.02 * weight.numel()


def held_places(form, columns):
    return torch.empty_like(found := form.outliers.dense(columns)).index_copy_(1, form.order, found) != 0


def test_held_weights_lower_the_error_and_the_threshold_says_how_many():
    weight, hessian = planted(32, 256, 3)
    forms = [SpQR(threshold=threshold).quantize(weight, hessian) for threshold in (0.05, 0.1, 0.3, 0)]
    shares = [len(form.outliers.values) / weight.numel() for form in forms[:3]]
    assert 0.1 > shares[0] > shares[1] > shares[2] > 0 and forms[3].outliers is None
    errors = [error(weight, form, hessian) for form in forms]
    assert errors[0] < errors[1] < errors[2] < 0.6 * errors[3]


def test_a_group_range_leaves_out_what_spoils_it():
    part = torch.linspace(-1, 1, 16).repeat(3, 1)
    part[0, 4], part[1, 15] = -30, 30
    scale, zero = _kept_range(part, torch.ones(16), 8.0, 3)
    low, high = -zero * scale, (7 - zero) * scale
    assert (scale < 0.3).all() and (low[[0, 1]] - part[2, 0]).abs().max() < 1e-6 and float(high[0]) == pytest.approx(1)
    assert _kept_range(part, torch.ones(16), torch.inf, 3)[0][:2].min() > 4


def test_scales_of_more_bits_are_closer_to_those_of_gptq():
    weight, hessian = problem(32, 512, 4)
    errors = [
        error(weight, SpQR(statistic_bits=bits, threshold=0).quantize(weight, hessian), hessian) for bits in (2, 3, 8)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_average_bits_are_those_in_memory():
    weight, hessian = planted(64, 512)
    form = SpQR(act_order=False).quantize(weight, hessian)
    assert average_bits(form) == pytest.approx(
        8 * form.layer(None, torch.float32).bytes() / weight.numel(), rel=0.02
    )  # and where rows start
    share = len(form.outliers.values) / weight.numel()
    assert average_bits(form, 3, 16, 32) == pytest.approx(3 + 6 / 16 + 64 / 256 + 32 * share)


def test_rows_do_not_depend_on_each_other_but_for_the_threshold():
    weight, hessian = problem(12, 96)
    whole, first = spqr(weight, hessian, threshold=0), spqr(weight[:5].clone(), hessian, threshold=0)
    assert float((whole[0][:5] != first[0]).float().mean()) < 0.01 and torch.allclose(whole[3][:5], first[3], rtol=1e-3)


@pytest.mark.parametrize("options", [{"block": 16}, {"block": 32, "group": 64}, {"group": 128}, {"group": 512}])
def test_blocks_change_nothing(options):
    weight, hessian = planted(8, 300, 5)
    block = options.pop("block", 256)
    one, other = (spqr(weight, hessian, **options, block=size) for size in (block, 128))
    assert float((one[0] != other[0]).float().mean()) < 0.02


def test_products_reorder_their_inputs():
    weight, hessian = planted(24, 200, 6)
    layer = SpQR(activations=32).quantize(weight, hessian).layer(torch.randn(24), torch.float32)
    x = torch.randn(5, 200)
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-4)
    assert (layer(x) - x @ weight.t() - layer.bias).norm() < 0.3 * (x @ weight.t()).norm()


def test_singular_and_zero_hessians():
    weight, _ = problem(4, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for hessian in (x.t() @ x, torch.zeros(64, 64)):
        assert (form_values(SpQR().quantize(weight, hessian), 64) - weight).abs().max() < 0.2


def test_layers_of_one_input_have_their_own_thresholds():
    model = common.build()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(100)
    hasten.apply(model, "quant/spqr", calibration=common.calibration())
    attention = model.model.layers[0].self_attn
    shares = [
        len(one.outlier_values) / (one.in_features * one.out_features) for one in (attention.q_proj, attention.k_proj)
    ]
    assert 0 < shares[0] < 0.1 and 0 < shares[1] < 0.1


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="power of two"):
        SpQR(group=24)
    with pytest.raises(PlanError, match="statistic_bits"):
        SpQR(statistic_bits=1)
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(common.build(), "quant/spqr")
