"""BitMoD against uniform rounding and against single data types."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.quant.base import form_values
from hasten.quant.bitmod import BitMoD, bitmod, data_types
from hasten.quant.round_to_nearest import RoundToNearest


def weight(rows, columns, seed=0):
    """Nearly normal weights, with heavy tails as trained ones have."""
    make = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=make) * (1 + torch.randn(rows, columns, generator=make).abs()) / 8


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"group": 32}),
            (2, 37, {"group": 16, "bits": 3}),
            (1, 5, {"bits": 3, "scale_bits": 32}),
            (2, 70, {"group": 64, "bits": 4, "scale_bits": 32}),
        ]
    ):
        yield {"args": (weight(rows, columns, seed),), "kwargs": options}
    yield {"args": (weight(2, 40, 9).bfloat16(),), "kwargs": {"group": 32}}
    still = weight(2, 48, 10)
    still[0], still[1, :16] = 0, 0
    yield {"args": (still,), "kwargs": {"group": 16, "bits": 3}}


def test_the_data_types_are_those_of_the_paper():
    assert data_types(3).tolist() == [
        [-4, -2, -1, 0, 1, 2, 3, 4], [-4, -3, -2, -1, 0, 1, 2, 4],
        [-4, -2, -1, 0, 1, 2, 4, 6], [-6, -4, -2, -1, 0, 1, 2, 4],
    ]  # fmt: skip
    assert data_types(4)[2].tolist() == [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert data_types(4).shape == (4, 16)


@pytest.mark.parametrize("bits", [3, 4])
def test_values_of_a_data_type_come_back_exactly_and_choose_it(bits):
    tables = data_types(bits)
    codes, scales, kinds = bitmod(0.25 * tables, bits=bits, group=16)
    assert kinds[:, 0].tolist() == [0, 1, 2, 3] and torch.equal(scales, torch.full((4, 1), 0.25))
    assert torch.equal(0.25 * tables[kinds.long()[:, 0]].gather(1, codes.long()), 0.25 * tables)


@pytest.mark.parametrize("bits", [3, 4])
def test_less_error_than_rounding_and_than_any_one_data_type(bits, monkeypatch):
    w = weight(32, 512)
    mixed = float((form_values(BitMoD(bits=bits).quantize(w, None), 512) - w).norm())
    uniform = float((form_values(RoundToNearest(bits=bits).quantize(w, None), 512) - w).norm())
    assert mixed < 0.97 * uniform
    whole = data_types(bits)
    for kind in range(4):
        monkeypatch.setattr("hasten.quant.bitmod.data_types", lambda bits, kind=kind: whole[kind : kind + 1])
        assert mixed < float((form_values(BitMoD(bits=bits).quantize(w, None), 512) - w).norm())


def test_rounded_scales_are_bytes_and_cost_little():
    w = weight(16, 512)
    exact, rounded = BitMoD(scale_bits=32).quantize(w, None), BitMoD().quantize(w, None)
    assert rounded.scales.dtype == torch.uint8 and int(rounded.scales.max()) == 255 and int(rounded.scales.min()) > 0
    errors = [float((form_values(form, 512) - w).norm()) for form in (exact, rounded)]
    assert errors[1] < 1.01 * errors[0]


def test_the_layer_multiplies_what_the_function_says():
    w = weight(20, 200)
    codes, scales, kinds = bitmod(w, bits=3, group=64)
    spread = torch.arange(200) // 64
    expected = scales[:, spread] * data_types(3)[kinds[:, spread].long(), codes.long()]
    layer = BitMoD(bits=3, group=64).quantize(w, None).layer(None, torch.float32)
    assert torch.allclose(layer.dense_weight(), expected, rtol=1e-5, atol=1e-7)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ expected.t(), rtol=1e-4, atol=1e-4)


def test_save_and_load(tmp_path):
    model = common.build()
    handle = hasten.apply(model, "quant/bitmod(bits=3, group=32)")
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    ids = torch.randint(1, 61, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="3, 4, 16"):
        BitMoD(bits=2)
    with pytest.raises(PlanError, match="power of two"):
        BitMoD(group=48)
