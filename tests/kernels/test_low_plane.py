"""The plane of low bits: every path agrees with the equation, and adds to a 2-bit product what 4 bits have more."""

import pytest
import torch

from hasten.core.errors import UsageError
from hasten.kernels import low_plane, lowbit, native
from hasten.math import packing

SHAPES = [(1, 1, 64, 8, 1), (3, 5, 100, 2, 1), (2, 33, 700, 4, 3), (9, 17, 130, 8, 2), (1, 40, 576, 8, 8)]
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")


def plane(rows, columns, block, wide):
    make = torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // 64)
    places = []
    for start in range(0, groups, block):
        here = min(block, groups - start)
        some = torch.rand(rows, here, generator=make).argsort(1)[:, : -(-here * wide // block)]
        places.append(some.sort(1).values)
    places = torch.cat(places, 1).to(torch.uint8)
    codes = low_plane.pack(torch.randint(0, 4, (*places.shape, 64), generator=make))
    return codes, places, (torch.rand(rows, groups, generator=make) + 0.1).half()


def inputs(count, columns, dtype=torch.float32):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("activations", [8, 32])
@pytest.mark.parametrize("count, rows, columns, block, wide", SHAPES)
def test_agrees_with_the_equation(count, rows, columns, block, wide, activations):
    parts, x = plane(rows, columns, block, wide), inputs(count, columns)
    low_plane.check(*parts, block, wide, columns)
    options = {"block": block, "wide": wide, "activations": activations}
    expected = low_plane.naive_product(x, *parts, **options)
    for found in (low_plane.product(x, *parts, **options), low_plane.torch_product(x, *parts, **options)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if activations == 32:
        torch.testing.assert_close(
            x @ low_plane.dense(*parts, block, wide, columns).t(), expected, rtol=1e-4, atol=1e-4
        )


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512_VNNI", "AVX512", "AVX2", "DEFAULT"])
def test_every_instruction_set(isa):
    if isa not in native.sets():
        pytest.skip(f"this CPU has no {isa}")
    for count, rows, columns, block, wide in SHAPES:
        parts, x = plane(rows, columns, block, wide), inputs(count, columns)
        for activations in (8, 32):
            options = {"block": block, "wide": wide, "activations": activations}
            expected = low_plane.torch_product(x, *parts, **options)
            found = low_plane.native_product(x, *parts, **options, isa=isa)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", [8, 32])
def test_with_a_2_bit_product_it_makes_a_4_bit_one(activations):
    make = torch.Generator().manual_seed(0)
    codes, zeros = (
        torch.randint(0, 16, (20, 256), generator=make),
        torch.randint(0, 16, (20, 4), generator=make).float(),
    )
    scales = (torch.rand(20, 4, generator=make) + 0.1).half().float()
    x = inputs(3, 256)
    options = {"group": 64, "columns": 256, "activations": activations}
    expected = lowbit.linear(x, packing.pack(codes, 4), scales, zeros, bits=4, **options)
    found = lowbit.linear(x, packing.pack(codes >> 2, 2), 4 * scales, zeros / 4, bits=2, **options)
    places = torch.arange(4, dtype=torch.uint8).expand(20, -1).contiguous()
    low = low_plane.pack((codes & 3).view(20, 4, 64))
    options = {"block": 4, "wide": 4, "activations": activations}
    found = low_plane.add(found, x, low, places, (4 * scales).half(), **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_gradient_compile_and_half_precision():
    parts = plane(33, 130, 4, 2)
    dense, options = low_plane.dense(*parts, 4, 2, 130), {"block": 4, "wide": 2}
    leaf = inputs(6, 130).view(2, 3, 130).requires_grad_()
    low_plane.product(leaf, *parts, **options).square().sum().backward()
    other = leaf.detach().clone().requires_grad_()
    (other @ dense.t()).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)
    x, y = inputs(2, 130, torch.bfloat16), inputs(2, 33, torch.bfloat16)
    expected = (y.float() + x.float() @ dense.t()).bfloat16()
    torch.testing.assert_close(low_plane.add(y.clone(), x, *parts, **options), expected)
    torch.library.opcheck(torch.ops.hasten.low_plane.default, (inputs(2, 130), *parts, 4, 2, 8),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    x[0, 3] = torch.nan
    assert low_plane.product(x, *parts, **options, activations=8)[0].isnan().any()


def test_hostile_planes_are_refused():
    codes, places, scales = plane(4, 300, 4, 1)
    low_plane.check(codes, places, scales, 4, 1, 300)
    far = places.clone()
    far[0, 1] = 1  # the second run has one group only
    for wrong in [(codes, far, scales), (codes[:, :1], places, scales), (codes, places, scales.float())]:
        with pytest.raises(UsageError, match="low bits"):
            low_plane.check(*wrong, 4, 1, 300)
    with pytest.raises(UsageError, match="1 to block"):
        low_plane.check(codes, places, scales, 4, 5, 300)
