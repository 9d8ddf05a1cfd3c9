"""The quantized layer: memory, dtypes, column order, state."""

import copy

import pytest
import torch
from torch import nn

from hasten.math import packing
from hasten.quant._linear import QuantLinear


def layer(rows=40, columns=96, bits=4, group=32, order=False, bias=True, dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=make)
    scales = torch.rand(rows, groups, generator=make) + 0.1
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=make).float()
    permuted = torch.randperm(columns, generator=make) if order else None
    given = torch.randn(rows, generator=make).to(dtype) if bias else None
    sizes = {"bits": bits, "group": group, "columns": columns, "dtype": dtype}
    return QuantLinear(packing.pack(codes, bits), scales, zeros, given, permuted, **sizes)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", packing.BITS)
def test_is_its_dense_layer(order, bits):
    quantized = layer(bits=bits, order=order)
    dense = quantized.dense()
    x = torch.randn(2, 3, 96)
    assert type(dense) is nn.Linear
    assert torch.allclose(quantized(x), dense(x), rtol=1e-4, atol=1e-4 * 2**bits)


def test_state_round_trips_through_an_empty_layer():
    quantized = layer(order=True, dtype=torch.bfloat16)
    other = QuantLinear.empty(**quantized.shape())
    other.load_state_dict(quantized.state_dict())
    x = torch.randn(5, 96).bfloat16()
    assert torch.equal(other(x), quantized(x)) and torch.equal(copy.deepcopy(other)(x), quantized(x))


def test_memory_is_that_of_the_bits():
    wide = layer(rows=256, columns=1024, bits=4, group=128, bias=False)
    assert wide.bytes() == 256 * 1024 // 2 + (4 + 1) * 256 * 8
    assert wide.bytes() < 0.15 * 4 * 256 * 1024


def test_conversion_keeps_scales_exact():
    quantized = layer()
    before = quantized.scales.clone()
    quantized.to(torch.bfloat16)
    assert torch.equal(quantized.scales, before) and quantized.bias.dtype == torch.bfloat16
    assert quantized(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
    assert quantized.to("meta").scales.dtype == torch.float32


def test_compiles_into_one_graph():
    quantized = layer()
    x = torch.randn(2, 96)
    traced = torch.export.export(quantized, (x,))
    assert torch.equal(traced.module()(x), quantized(x))
