"""The low-bit product in Triton: the values of the dense product for every packing, statistic and shape."""

import pytest
import torch

import interpreter
from hasten.kernels import lowbit
from hasten.math import packing
from interpreter import DEVICE

SHAPES = [(1, 5, 100, 64), (3, 17, 200, 16), (17, 33, 257, 48), (40, 3, 1, 32), (2, 70, 64, 7)]


def weight(rows, columns, bits, group, seed=0):
    make = torch.Generator().manual_seed(seed + rows)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=make, dtype=torch.uint8)
    scales = torch.rand(rows, -(-columns // group), generator=make) / 10 + 0.01
    zeros = torch.randint(0, 2**bits, scales.shape, generator=make).float()
    return [part.to(DEVICE) for part in (packing.pack(codes, bits), scales, zeros)]


def tokens(count, columns, dtype=torch.float32):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def triton_linear(x, packed, scales, zeros, bias=None, *, bits, group, tables=None, levels=None):
    from hasten.kernels import lowbit_triton

    return lowbit_triton.linear(x, packed, scales, zeros, bias, bits, group, tables, levels)


def product(x, packed, scales, zeros, **options):
    dense = lowbit.dequantize(packed, scales, zeros, columns=x.shape[1], **options)
    return x.double() @ dense.double().T


def close(found, expected, tolerance=2e-6):
    return (found.double() - expected).norm() <= tolerance * expected.norm()


@interpreter.kernel
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("count, rows, columns, group", SHAPES)
def test_agrees_with_the_dense_product(bits, count, rows, columns, group):
    parts, x = weight(rows, columns, bits, group), tokens(count, columns)
    bias = torch.randn(rows, device=DEVICE)
    expected = product(x, *parts, bits=bits, group=group)
    assert close(triton_linear(x, *parts, bits=bits, group=group), expected)
    assert close(triton_linear(x, *parts, bias, bits=bits, group=group), expected + bias)


@interpreter.kernel
@pytest.mark.parametrize("bits", packing.BITS)
def test_agrees_with_the_equation(bits):
    parts, x = weight(3, 70, bits, 16), tokens(2, 70)
    given = x.cpu(), *(part.cpu() for part in parts)
    expected = lowbit.naive_linear(*given, bits=bits, group=16, columns=70)
    assert close(triton_linear(x, *parts, bits=bits, group=16).cpu(), expected)


@interpreter.kernel
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("bits", [2, 8])
def test_long_rows_are_cut_and_summed(bits, count):
    columns = 12 * packing.unit(bits) + 5
    parts, x = weight(9, columns, bits, 128), tokens(count, columns)
    found = triton_linear(x, *parts, bits=bits, group=128)
    assert close(found, product(x, *parts, bits=bits, group=128))
    assert torch.equal(found, triton_linear(x, *parts, bits=bits, group=128))


@interpreter.kernel
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits, group", [(2, 64), (3, 16), (4, 5)])
def test_tables(bits, group, count):
    packed, scales, _ = weight(21, 150, bits, group)
    make = torch.Generator().manual_seed(5)
    tables = torch.randn(3, 2**bits, generator=make).to(DEVICE)
    which = torch.randint(0, 3, scales.shape, generator=make, dtype=torch.int32).to(DEVICE)
    options = {"bits": bits, "group": group, "tables": tables}
    x = tokens(count, 150)
    assert close(triton_linear(x, packed, scales, which, **options), product(x, packed, scales, which, **options))


@interpreter.kernel
@pytest.mark.parametrize("count", [1, 3])
def test_statistics_that_are_quantized_themselves(count):
    packed, scales, zeros = weight(9, 500, 3, 16)
    make = torch.Generator().manual_seed(6)
    small = [torch.randint(0, 8, zeros.shape, generator=make, dtype=torch.uint8).to(DEVICE) for _ in range(2)]
    levels = (torch.rand(9, 2, 4, generator=make) + 0.1).to(DEVICE)
    x, options = tokens(count, 500), {"bits": 3, "group": 16, "levels": levels}
    assert close(triton_linear(x, packed, *small, **options), product(x, packed, *small, **options))


@interpreter.kernel
def test_small_statistics():
    packed, scales, zeros = weight(9, 96, 4, 32)
    x, half = tokens(2, 96), scales.half()
    for one in (zeros.half(), zeros.byte(), zeros[:1, :1].contiguous()):
        expected = product(x, packed, half, one.expand_as(half), bits=4, group=32)
        assert close(triton_linear(x, packed, half, one, bits=4, group=32), expected)


@interpreter.kernel
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float64, 2e-6)])
@pytest.mark.parametrize("count, group", [(1, 64), (2, 64), (2, 12)])
def test_other_dtypes(dtype, tolerance, count, group):
    if interpreter.INSIDE and dtype == torch.bfloat16 and count > 1:
        pytest.skip("the interpreter's dot takes bfloat16 for whole numbers")
    parts, x = weight(20, 192, 4, group), tokens(count, 192, dtype)
    bias = torch.randn(20, device=DEVICE).to(dtype)
    found = triton_linear(x[None], *parts, bias, bits=4, group=group)
    assert found.dtype == dtype and found.shape == (1, count, 20)
    assert close(found[0], product(x, *parts, bits=4, group=group) + bias.double(), tolerance)


@interpreter.kernel
def test_empty_batch():
    parts = weight(20, 64, 4, 64)
    assert triton_linear(torch.empty(0, 3, 64, device=DEVICE), *parts, bits=4, group=64).shape == (0, 3, 20)


@pytest.mark.gpu
def test_linear_takes_this_path_on_a_gpu():
    parts, x = weight(70, 200, 4, 64), tokens(3, 200)
    assert lowbit.path(4, 64, "cuda") == "triton"
    found = lowbit.linear(x, *parts, bits=4, group=64, columns=200)
    assert torch.equal(found, triton_linear(x, *parts, bits=4, group=64))


@pytest.mark.gpu
def test_one_row_is_faster_than_fp16():
    size, copies = 8192, 8
    parts = [weight(size, size, 4, 128) for _ in range(copies)]
    dense = [torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(copies)]
    x = tokens(1, size, torch.float16)

    def ours():
        for one in parts:
            triton_linear(x, *one, bits=4, group=128)

    def theirs():
        for one in dense:
            torch.nn.functional.linear(x, one)

    times = {}
    for run in (theirs, ours, theirs, ours):
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            run()
        end.record()
        torch.cuda.synchronize()
        times[run] = min(times.get(run, 1e9), begin.elapsed_time(end))
    assert times[theirs] > times[ours]


def test_in_the_interpreter():
    interpreter.run(__file__)


@pytest.mark.parametrize("bits, tile, capability", [(4, (1, 8, 64), 90), (4, (16, 64, 64), 80), (3, (16, 64, 16), 90)])
def test_compiles_for_gpus(bits, tile, capability, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    if interpreter.INSIDE:
        pytest.skip("the interpreter does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from hasten.kernels import lowbit_triton

    pointers = {"x": "*fp16", "packed": "*u8", "scales": "*fp32", "zeros": "*fp32", "y": "*fp16"}
    sizes = {"rows_x": "i32", "rows": "i32!", "columns": "i32!", "width": "i32!", "group": "i32!", "groups": "i32",
             "units": "i32", "each": "i32"}  # fmt: skip
    tiles = dict(zip(("BM", "BN", "STEP"), tile, strict=True))
    flags = {"HALF": True, "EVEN": True, "ONE_ZERO": False, "LEVELS": False, "TABLES": False, "BIAS": False}
    constants = {"BITS": bits, "SHARED": 16, **tiles, **flags}
    text = interpreter.compiled(lowbit_triton._product, {**pointers, **sizes}, constants, capability, 4)
    assert ("mma" in text) == (tile[0] > 1)
