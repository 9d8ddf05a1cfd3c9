"""The product of many rows with packed codes: every instruction set agrees with the dense product."""

import pytest
import torch
from torch.nn import functional as F

from hasten.kernels import lowbit_gemm, native
from hasten.kernels.lowbit_weights import dequantize
from hasten.math import packing

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [  # rows of x, of W, columns, group
    (9, 1, 1, 16), (16, 17, 63, 16), (17, 33, 65, 32), (33, 5, 200, 64), (40, 20, 520, 128), (13, 40, 1000, 192),
    (100, 18, 257, 32), (20, 16, 512, 256), (300, 20, 1100, 1152),
]  # fmt: skip


def rounded(x):
    """What activations=8 stands for, in fp32."""
    runs = F.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    most = runs.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    return ((runs * inverse).round() * (most / 127)).flatten(-2)[..., : x.shape[-1]]


def statistics(rows, groups, bits):
    """(scales, zeros) of every kind that is taken."""
    scales, some = torch.rand(rows, groups) / 10 + 0.01, torch.rand(rows, groups) * 2**bits
    yield scales, some
    yield scales.half(), torch.full((1, 1), 3.0)
    yield scales, some.to(torch.uint8)
    yield scales.half(), some.half()


def run_of(bits, isa):
    if isa not in native.sets() or (run := lowbit_gemm.kernel(bits, isa)) is None:
        pytest.skip(f"no {isa} here")
    return run


def close(found, expected, tolerance):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


SETS = ["AMX", "AVX512_VNNI", "AVX512", "AVX2", "DEFAULT"]
PAIRS = [  # each is a library of its own to compile
    pytest.param(isa, bits, marks=[] if isa == native.sets()[0] or bits == 4 else pytest.mark.slow)
    for isa in SETS
    for bits in packing.BITS
]


@needs_compiler
@pytest.mark.parametrize("isa, bits", PAIRS)
def test_agrees_with_the_dense_product(bits, isa):
    run = run_of(bits, isa)
    torch.manual_seed(bits)
    for count, rows, columns, group in SHAPES:
        x, bias, groups = torch.randn(count, columns), torch.randn(rows), -(-columns // group)
        packed = packing.pack(torch.randint(0, 2**bits, (rows, columns)), bits)
        for scales, zeros in statistics(rows, groups, bits):
            weight = dequantize(packed, scales, zeros, bits=bits, group=group, columns=columns).double()
            for activations, seen in ((32, x), (8, rounded(x))):
                found = lowbit_gemm.gemm(x, packed, scales, zeros, bias, bits, group, activations, run=run)
                if found is None:
                    assert activations == 8 and (isa == "DEFAULT" or (bits == 8 and isa in ("AVX512", "AVX2")))
                else:
                    assert close(found, seen.double() @ weight.T + bias, 4e-6)


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4])
def test_tables_and_levels(bits):
    torch.manual_seed(0)
    for count, rows, columns, group in SHAPES[:6]:
        x, groups = torch.randn(count, columns), -(-columns // group)
        packed = packing.pack(torch.randint(0, 2**bits, (rows, columns)), bits)
        sizes = {"bits": bits, "group": group, "columns": columns}
        scales, numbers = torch.rand(rows, groups), torch.randint(0, 5, (rows, groups), dtype=torch.int32)
        tables = torch.randn(5, 2**bits)
        weight = dequantize(packed, scales, numbers, **sizes, tables=tables)
        assert close(lowbit_gemm.gemm(x, packed, scales, numbers, None, bits, group, 32, tables), x @ weight.T, 1e-5)
        small = [torch.randint(0, 256, (rows, groups), dtype=torch.uint8) for _ in range(2)]
        levels = torch.rand(rows, -(-groups // 16), 4)
        weight = dequantize(packed, *small, **sizes, levels=levels)
        found = lowbit_gemm.gemm(x, packed, *small, None, bits, group, 32, None, levels)
        assert close(found, x @ weight.T, 1e-5)


@needs_compiler
@pytest.mark.parametrize("activations", [8, 32])
def test_threads_and_batches_agree_bit_for_bit(activations):
    """A row's result does not depend on the other rows, nor on who computes it."""
    torch.manual_seed(0)
    x, packed = torch.randn(150, 4096), packing.pack(torch.randint(0, 16, (50, 4096)), 4)
    parts = packed, torch.rand(50, 32), torch.full((50, 32), 8.0), None, 4, 128, activations
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lowbit_gemm.gemm(x, *parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # a panel alone may take another tile of rows, but each sum runs over the columns in the same order
    assert torch.equal(found[0][128:], lowbit_gemm.gemm(x[128:], *parts))


@needs_compiler
def test_nan_and_infinity_spoil_their_row_only():
    packed = packing.pack(torch.randint(0, 16, (20, 100)), 4)
    x = torch.ones(12, 100)
    x[3, 99], x[5, 0] = torch.nan, torch.inf
    for activations in (8, 32):
        y = lowbit_gemm.gemm(x, packed, torch.ones(20, 4), torch.full((20, 4), 2.5), None, 4, 32, activations)
        assert not y[[3, 5]].isfinite().any() and y[[0, 1, 2, 4, *range(6, 12)]].isfinite().all()


@needs_compiler
def test_what_is_not_taken():
    packed, statistic = packing.pack(torch.randint(0, 16, (20, 96)), 4), torch.ones(20, 2)
    assert lowbit_gemm.gemm(torch.ones(9, 96), packed, statistic, statistic, None, 4, 48, 32) is None
    numbers = torch.zeros(20, 2, dtype=torch.int32)
    assert lowbit_gemm.gemm(torch.ones(9, 96), packed, statistic, numbers, None, 4, 64, 8, torch.ones(1, 16)) is None


@needs_compiler
def test_half_precision_and_shapes():
    packed, scales, zeros = packing.pack(torch.randint(0, 16, (20, 96)), 4), torch.ones(20, 2), torch.ones(20, 2)
    for dtype in (torch.bfloat16, torch.float16):
        x, bias = torch.randn(3, 5, 96).to(dtype), torch.randn(20).to(dtype)
        found = lowbit_gemm.gemm(x, packed, scales, zeros, bias, 4, 64, 32)
        exact = lowbit_gemm.gemm(x.float(), packed, scales, zeros, bias.float(), 4, 64, 32)
        assert found.dtype is dtype and found.shape == (3, 5, 20) and torch.equal(found, exact.to(dtype))
    assert lowbit_gemm.gemm(torch.ones(0, 96), packed, scales, zeros, None, 4, 64, 8).shape == (0, 20)


@needs_compiler
@pytest.mark.parametrize("activations", [8, 32])
def test_expanded_statistics(activations):
    """One zero for all may come as a view that repeats it."""
    x, packed, scales = torch.randn(10, 300), packing.pack(torch.randint(0, 16, (20, 300)), 4), torch.rand(20, 5)
    one = torch.full((1, 1), 3.0)
    found = lowbit_gemm.gemm(x, packed, scales, one.expand(20, 5), None, 4, 64, activations)
    assert torch.equal(found, lowbit_gemm.gemm(x, packed, scales, one, None, 4, 64, activations))
