"""MARLIN: symmetric four-bit codes of another method, multiplied at any batch."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.quant._linear import QuantLinear
from hasten.quant.marlin import marlin


def problem(count, columns, rows, group, dtype=torch.float32):
    make = torch.Generator().manual_seed(count + columns)
    codes = torch.randint(0, 16, (rows, columns), generator=make, dtype=torch.uint8)
    scales = torch.rand(rows, -(-columns // group), generator=make) / 10
    return torch.randn(count, columns, generator=make).to(dtype), codes, scales, torch.randn(rows, generator=make)


def cases():
    for count, columns, rows, group in [(1, 1, 1, 128), (1, 150, 5, 128), (3, 40, 6, 32), (17, 70, 3, 64)]:
        yield {"args": problem(count, columns, rows, group), "kwargs": {"group": group}, "tolerance": 2e-5}
    yield {"args": problem(2, 64, 5, 128, torch.bfloat16), "tolerance": 1e-2}


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 33, 64])
def test_every_batch_gives_the_same_rows(count):
    """The kernels change with the batch; each row's result may not, but for rounding."""
    x, codes, scales, bias = problem(64, 512, 40, 128)
    exact = x.double() @ (scales.repeat_interleave(128, 1).double() * (codes.double() - 8)).T + bias
    found = marlin(x[:count], codes, scales, bias)
    assert (found - exact[:count]).norm() < 2e-6 * exact[:count].norm()


def test_gradient_of_the_input():
    x, codes, scales, _ = problem(20, 128, 30, 128)
    x.requires_grad_()
    upstream = torch.randn(20, 30)
    marlin(x, codes, scales).backward(upstream)
    assert torch.allclose(x.grad, upstream @ (scales * (codes.float() - 8)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["quant/gptq", "quant/round_to_nearest"])
def test_codes_are_symmetric_whatever_the_base(base):
    model = common.build()
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
        hasten.apply(model, f"quant/marlin(base={base}, group=16)", calibration=common.calibration())
        assert (model(ids).logits - before).norm() < 0.3 * before.norm()
    layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
    assert len(layers) == 14 and all(bool((part.zeros == 8).all()) and part.bits == 4 for part in layers)
    assert all(part.activations == 32 for part in layers)


def test_a_base_that_does_not_round_uniformly():
    with pytest.raises(PlanError, match="has no option"):
        hasten.apply(common.build(), "quant/marlin(base=quant/bitmod)", calibration=common.calibration())
    with pytest.raises(PlanError, match="4, 16"):
        hasten.apply(common.build(), "quant/marlin(bits=3)", calibration=common.calibration())
