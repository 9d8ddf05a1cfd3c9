"""The block-sparse product in Triton: the values of the dense product for fp32 and for codes of eight bits."""

import pytest
import torch

import interpreter
from hasten.kernels import block_sparse
from interpreter import DEVICE

SHAPES = [(1, 5, 17, 4), (1, 40, 200, 16), (3, 33, 130, 16), (2, 7, 300, 1), (20, 64, 64, 32), (70, 70, 90, 5)]


def weight(rows, width, r, bits=32, density=0.3):
    make = torch.Generator().manual_seed(rows)
    kept = torch.rand(-(-rows // r), width, generator=make) < density
    dense = torch.randn(rows, width, generator=make) * kept.repeat_interleave(r, 0)[:rows]
    return [None if part is None else part.to(DEVICE) for part in block_sparse.pack(dense, r, bits=bits)]


def tokens(count, width, dtype=torch.float32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def triton_linear(x, parts, bias=None, *, rows):
    from hasten.kernels import block_sparse_triton

    values, columns, starts, scales, sums = parts
    return block_sparse_triton.linear(x, values, columns, starts, bias, scales, sums, rows)


def close(found, expected, tolerance=2e-6):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@interpreter.kernel
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("count, rows, width, r", SHAPES)
def test_agrees_with_pytorch(bits, count, rows, width, r):
    parts, x, bias = weight(rows, width, r, bits), tokens(count, width), torch.randn(rows, device=DEVICE)
    values, columns, starts, scales, sums = parts
    for given in (None, bias):
        expected = block_sparse.torch_linear(x, values, columns, starts, given, scales, sums, rows)
        assert close(triton_linear(x, parts, given, rows=rows), expected)


@interpreter.kernel
@pytest.mark.parametrize("bits", [8, 32])
def test_agrees_with_the_equation(bits):
    parts, x = weight(10, 40, 4, bits), tokens(3, 40)
    values, columns, starts, scales, sums = (None if part is None else part.cpu() for part in parts)
    expected = block_sparse.naive_linear(x.cpu(), values, columns, starts, None, scales, sums, rows=10)
    assert close(triton_linear(x, parts, rows=10).cpu(), expected)


@interpreter.kernel
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("count", [1, 4])
def test_empty_bands_and_weights(bits, count):
    x = tokens(count, 50)
    dense = torch.zeros(48, 50)
    dense[16:32, 7] = 1
    parts = [None if part is None else part.to(DEVICE) for part in block_sparse.pack(dense, 16, bits=bits)]
    found = triton_linear(x, parts, rows=48)
    assert (found[:, :16] == 0).all() and (found[:, 32:] == 0).all()
    assert torch.allclose(found[:, 16:32], x[:, 7:8].expand(-1, 16), atol=0.02)
    nothing = [None if part is None else part.to(DEVICE) for part in block_sparse.pack(dense * 0, 16, bits=bits)]
    assert (triton_linear(x, nothing, rows=48) == 0).all()
    assert triton_linear(x[:0], parts, rows=48).shape == (0, 48)


@interpreter.kernel
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float64, 2e-6)])
@pytest.mark.parametrize("count", [1, 4])
def test_other_dtypes(dtype, tolerance, count):
    if interpreter.INSIDE and dtype == torch.bfloat16 and count > 1:
        pytest.skip("the interpreter's dot takes bfloat16 for whole numbers")
    parts, x = weight(40, 96, 16), tokens(count, 96, dtype)
    found = triton_linear(x[None], parts, rows=40)
    assert found.dtype == dtype and found.shape == (1, count, 40)
    dense = block_sparse.expand(*parts[:4], rows=40, width=96)
    assert close(found[0], x.double() @ dense.double().T, tolerance)


@interpreter.kernel
def test_broken_tokens_stay_where_they_are():
    parts, x = weight(20, 40, 4, 8), tokens(3, 40)
    x[1, 2] = torch.nan
    found = triton_linear(x, parts, rows=20)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_in_the_interpreter():
    interpreter.run(__file__)


@pytest.mark.parametrize("coded, tile, capability", [(False, 64, 80), (True, 64, 90), (False, 1, 90)])
def test_compiles_for_gpus(coded, tile, capability, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    if interpreter.INSIDE:
        pytest.skip("the interpreter does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from hasten.kernels import block_sparse_triton

    pointers = {"xt": "*i8" if coded else "*bf16", "values": "*i8" if coded else "*fp32", "columns": "*i32",
                "starts": "*i32", "y": "*bf16"}  # fmt: skip
    pointers |= {"scales": "*fp32", "factors": "*fp32"} if coded else {}
    constants = {"R": 16, "TALL": 16, "BM": tile, "BE": 64, "CODED": coded, "BIAS": False}
    given = {**pointers, "count": "i32!", "rows": "i32!"}
    text = interpreter.compiled(block_sparse_triton._product, given, constants, capability)
    assert ("mma" in text) == (tile > 1)
