"""The sparse product: every path agrees with the equation, and places outside the matrix are refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.errors import UsageError
from hasten.kernels import csr, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [
    (1, 1, 1, 1.0),
    (3, 5, 100, 0.2),
    (4, 33, 17, 0.0),
    (9, 64, 257, 0.05),
    (40, 19, 352, 1.0),
    (1, 700, 64, 0.01),
]


def matrix(rows, width, density, dtype=torch.float32):
    make = torch.Generator().manual_seed(rows + width)
    dense = torch.randn(rows, width, generator=make)
    dense[torch.rand(rows, width, generator=make) >= density] = 0
    dense[rows // 2] = 0  # an empty row
    return dense.to(dtype).float(), csr.compress(dense, dtype)


def inputs(count, width, dtype=torch.float32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count, rows, width, density", SHAPES)
def test_agrees_with_the_equation(count, rows, width, density, dtype):
    dense, parts = matrix(rows, width, density, dtype)
    x = inputs(count, width)
    expected = csr.naive_product(x, *parts)
    torch.testing.assert_close(expected, x @ dense.T, rtol=1e-4, atol=1e-4)
    for found in (csr.product(x, *parts), csr.torch_product(x, *parts)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(csr.expand(*parts, width), dense)


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "plain"])
def test_every_instruction_set(isa):
    if isa == "AVX512" and native.capability() != isa:
        pytest.skip("this CPU has no AVX-512")
    for count, rows, width, density in SHAPES:
        dense, (values, columns, starts) = matrix(rows, width, density)
        x = inputs(count, width)
        for wide in (columns, columns.int()):
            found = csr.native_product(x, values, wide, starts, isa=isa)
            torch.testing.assert_close(found, x @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding(dtype):
    dense, parts = matrix(48, 80, 0.05)
    for count in (1, 7):
        x, y = inputs(count, 80, dtype), inputs(count, 48, dtype)
        expected = (y.float() + x.float() @ dense.T).to(dtype)
        torch.testing.assert_close(csr.add(y.clone(), x, *parts), expected)
        before = y.clone().requires_grad_()
        csr.add(before, x, *parts).sum().backward()
        assert torch.equal(before.detach(), y) and bool((before.grad == 1).all())


def test_gradient_of_the_input():
    dense, parts = matrix(33, 20, 0.3)
    x = inputs(6, 20).view(2, 3, 20)
    grads = []
    for product in (lambda x: csr.product(x, *parts), lambda x: x @ dense.T):
        leaf = x.clone().requires_grad_()
        product(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_operator_is_sound_and_counts_its_work():
    _, parts = matrix(33, 20, 0.3)
    torch.library.opcheck(torch.ops.hasten.csr_product, (inputs(6, 20), *parts))
    with FlopCounterMode(display=False) as counter:
        csr.product(inputs(6, 20), *parts)
    assert counter.get_total_flops() == 2 * 6 * len(parts[0])


def test_no_tokens_and_one_dimension():
    dense, parts = matrix(33, 20, 0.3)
    assert csr.product(torch.empty(2, 0, 20), *parts).shape == (2, 0, 33)
    x = inputs(1, 20)[0]
    for found in (csr.product(x, *parts), csr.torch_product(x, *parts)):
        torch.testing.assert_close(found, x @ dense.T, rtol=1e-4, atol=1e-5)


def test_what_is_no_matrix_is_refused():
    _, (values, columns, starts) = matrix(33, 20, 0.3)
    csr.check(values, columns, starts, rows=33, width=20)
    for wrong, word in (
        ((values, columns, starts[:-1]), "33 rows need 34 starts"),
        ((values[:-1], columns, starts), "as many columns as values"),
        ((values, columns.long(), starts), "must be floats, int32 or uint16"),
        ((values, columns.int() - 1, starts), "outside a width of 20"),
        ((values, columns, starts.flip(0)), "must rise from 0"),
    ):
        with pytest.raises(UsageError, match=word):
            csr.check(*wrong, rows=33, width=20)
    with pytest.raises(UsageError, match="outside a width of 9"):
        csr.check(values, columns, starts, rows=33, width=9)
