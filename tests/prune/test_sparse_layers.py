"""The layers that hold zeros: the same products as a dense layer, saved and loaded, quantized with their zeros."""

import copy
import json

import pytest
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts.sparse import BitmapLinear, BlockSparseLinear
from hasten.hosts.weights import is_held


def dense(rows=50, columns=37, sparsity=0.7, dtype=torch.float32, bias=True):
    make = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=make)
    weight *= (torch.rand(-(-rows // 4), columns, generator=make) >= sparsity).repeat_interleave(4, 0)[:rows]
    return weight.to(dtype), torch.randn(rows, generator=make).to(dtype) if bias else None


def layers(**options):
    weight, bias = dense(**options)
    yield BlockSparseLinear.from_dense(weight, bias, block=(4, 1)), weight, bias
    yield BlockSparseLinear.from_dense(weight, bias, block=(16, 2)), weight, bias
    yield BitmapLinear.from_dense(weight, bias), weight, bias


def x(count=5, columns=37):
    return torch.randn(2, count, columns, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_the_way_back(bias):
    for layer, weight, b in layers(bias=bias):
        assert is_held(layer) and layer.out_features == 50 and layer.in_features == 37
        for count in (1, 3, 30):
            expected = nn.functional.linear(x(count), weight, b)
            torch.testing.assert_close(layer(x(count)), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.dense_weight(), weight) and torch.equal(layer.dense().weight, weight)
        assert (layer.dense().bias is None) == (b is None)


def test_state_dict_round_trip_through_json():
    for first, *_ in layers():
        for layer in (first, first.quantized()):
            shape = json.loads(json.dumps(layer.shape()))
            loaded = type(layer).empty(**shape)
            loaded.load_state_dict(layer.state_dict())
            assert torch.equal(loaded(x()), layer(x())) and loaded.shape() == layer.shape()
            assert loaded.bytes() == layer.bytes() == sum(t.nbytes for t in layer.state_dict().values())
            assert torch.equal(copy.deepcopy(layer)(x()), layer(x()))


def test_eight_bits_keep_the_zeros():
    for layer, weight, bias in layers():
        small = layer.quantized()
        assert small.bytes() < layer.bytes() and is_held(small)
        assert not (small.dense_weight() != 0)[weight == 0].any()
        expected = nn.functional.linear(x(), weight, bias)
        assert (small(x()) - expected).norm() < 0.02 * expected.norm()
        with pytest.raises(UsageError, match="bits"):
            layer.quantized(bits=4)


def test_values_stay_exact_when_the_model_changes_its_dtype():
    for first, *_ in layers():
        for layer in (first, first.quantized()):
            held = {name: t.dtype for name, t in layer.state_dict().items()}
            before = layer.dense_weight()
            layer.to(torch.bfloat16)
            assert torch.equal(layer.dense_weight(), before) and layer.bias.dtype is torch.bfloat16
            assert {n: t.dtype for n, t in layer.state_dict().items() if n != "bias"} == {
                n: kind for n, kind in held.items() if n != "bias"
            }
            assert layer(x().to(torch.bfloat16)).dtype is torch.bfloat16


def test_half_precision_weights():
    for kind in (torch.bfloat16, torch.float16):
        for layer, weight, bias in layers(dtype=kind):
            given = x().to(kind)
            expected = nn.functional.linear(given.float(), weight.float(), bias.float())
            torch.testing.assert_close(layer(given).float(), expected, rtol=2e-2, atol=2e-2)
            assert layer.dense().weight.dtype is kind and torch.equal(layer.dense().weight, weight)
    bitmap = BitmapLinear.from_dense(*dense(dtype=torch.bfloat16))
    assert bitmap.values.dtype is torch.bfloat16


def test_all_zero_and_full_weights():
    for weight in (torch.zeros(20, 17), torch.randn(20, 17)):
        for layer in (BlockSparseLinear.from_dense(weight, None, block=(8, 1)), BitmapLinear.from_dense(weight, None)):
            for one in (layer, layer.quantized()):
                expected = x(columns=17) @ weight.T
                assert (one(x(columns=17)) - expected).norm() <= 0.02 * expected.norm()


def test_gradients_and_compile():
    for layer, weight, _ in layers():
        given = x().requires_grad_()
        layer(given).square().sum().backward()
        other = x().requires_grad_()
        nn.functional.linear(other, weight, layer.bias).square().sum().backward()
        torch.testing.assert_close(given.grad, other.grad, rtol=1e-3, atol=1e-3)
        exported = torch.export.export(nn.Sequential(layer), (x(),))
        torch.testing.assert_close(exported.module()(x()), layer(x()))


def test_damaged_files_are_refused():
    for first, *_ in layers():
        for layer in (first, first.quantized()):
            state = {name: t.clone() for name, t in layer.state_dict().items()}
            state["starts"] = state["starts"].flip(0)
            with pytest.raises(UsageError, match="starts"):
                type(layer).empty(**layer.shape()).load_state_dict(state)
            with pytest.raises(UsageError):
                type(layer).empty(**{**layer.shape(), "rows": 0})
    for wrong in ({"dtype": "int8"}, {"dtype": "nothing"}):
        with pytest.raises(UsageError, match="no dtype"):
            BitmapLinear.empty(**{**BitmapLinear.from_dense(*dense()).shape(), **wrong})


def test_the_way_is_said(monkeypatch):
    for layer, *_ in layers():
        assert layer.way().startswith(("native", "PyTorch"))
    monkeypatch.setattr("hasten.kernels.bitmap.library", lambda isa=None: None)
    monkeypatch.setattr("hasten.kernels.block_sparse.library", lambda isa=None: None)
    for layer, weight, bias in layers():
        assert layer.way() == "PyTorch"
        torch.testing.assert_close(layer(x()), nn.functional.linear(x(), weight, bias), rtol=1e-4, atol=1e-4)
