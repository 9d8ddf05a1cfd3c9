"""Ditto's codebooks: nearer than even steps, one for each block, through the kernel of tables, without any data."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.math.kmeans import exact
from hasten.quant._linear import QuantLinear
from hasten.quant.base import form_values
from hasten.quant.ditto import Ditto, ditto
from hasten.quant.round_to_nearest import RoundToNearest


def weights(rows, columns, seed=0):
    """Heavy tails and rows of different sizes, as trained weights have."""
    make = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=make)
        * torch.randn(rows, columns, generator=make).mul(0.5).exp()
        * (torch.rand(rows, 1, generator=make) + 0.1)
    )


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"block": 64}),
            (4, 37, {"block": 16, "bits": 2}),
            (7, 16, {"block": 64, "bits": 3}),  # four rows share a codebook, then three
            (1, 5, {}),
            (5, 32, {"block": 32, "bits": 3}),
        ]
    ):
        yield {"args": (weights(rows, columns, seed),), "kwargs": options}
    yield {"args": (weights(3, 40, 8).bfloat16(),), "kwargs": {"block": 64, "bits": 3}}
    yield {"args": (torch.zeros(2, 40),), "kwargs": {"block": 32}}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearer_than_even_steps_in_the_same_blocks_and_on_correlated_inputs(bits):
    weight = weights(32, 512)
    make = torch.Generator().manual_seed(1)
    x = torch.randn(400, 512, generator=make) @ (torch.randn(512, 512, generator=make) / 512**0.5)
    found = form_values(Ditto(bits=bits).quantize(weight, None), 512) - weight
    even = form_values(RoundToNearest(bits=bits, group=256).quantize(weight, None), 512) - weight
    assert found.square().sum() < 0.5 * even.square().sum()
    assert (x @ found.t()).square().sum() < 0.5 * (x @ even.t()).square().sum()


def test_blocks_do_not_depend_on_each_other():
    weight = weights(4, 600, 2)
    codes, tables, numbers = ditto(weight)
    assert numbers.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]] and tables.shape == (12, 16)
    alone = ditto(weight[2:3, 256:512].contiguous())
    assert torch.equal(alone[0], codes[2:3, 256:512]) and torch.equal(alone[1][0], tables[7])
    rest = weight[3, 512:]  # 88 weights: the row's last block
    held = tables[11, codes[3, 512:].long()]
    assert (held - rest).square().sum() < 1.02 * exact(rest, None, 16)[1]


def test_short_rows_share_codebooks_and_long_ones_do_not():
    assert ditto(weights(9, 64))[2][:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert ditto(weights(3, 200))[2][:, 0].tolist() == [0, 1, 2]
    form = Ditto(block=0).quantize(weights(3, 40), None)
    assert form.zeros[:, 0].tolist() == [0, 1, 2] and form.group == 64


def test_as_many_different_weights_as_entries_are_exact():
    weight = torch.tensor([-3.0, -0.5, 0.25, 7.0])[torch.randint(0, 4, (6, 300))]
    assert torch.equal(form_values(Ditto(bits=2).quantize(weight, None), 300), weight)


def test_bytes_are_those_of_codes_and_codebooks():
    layer = Ditto().quantize(weights(32, 1024), None).layer(None, torch.float32)
    assert layer.bytes() * 8 == 32 * 1024 * (4 + 16 * 32 / 256 + (32 + 16) / 256)


@pytest.mark.parametrize("shape", [(24, 200), (10, 48), (6, 600)])
def test_product_is_that_of_the_dense_weight(shape):
    layer = Ditto().quantize(weights(*shape), None).layer(torch.randn(shape[0]), torch.float32)
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-4)


def test_convolutions_and_models_without_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 5))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = model.eval()(x)
        handle = hasten.apply(model, "quant/ditto")
        assert handle.report["quant/ditto"]["quantized"] == 2
        assert 0 < (model(x) - before).norm() < 0.2 * before.norm()
        assert torch.equal(handle.undo()(x), before)
    llama = hasten.apply(common.build(), "quant/ditto(ignore=['*.mlp.*'])").model
    assert sum(isinstance(part, QuantLinear) for part in llama.modules()) == 8


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="block must be 0 or a power of two"):
        Ditto(block=100)
    with pytest.raises(PlanError, match="2, 3, 4, 16"):
        Ditto(bits=8)
