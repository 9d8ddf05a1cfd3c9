"""The int8 product in Triton: the integers of the equation, for every kind of x and scale."""

import pytest
import torch

import interpreter
from hasten.kernels import int8
from interpreter import DEVICE

SHAPES = [(1, 1, 1), (3, 5, 100), (17, 33, 64), (2, 40, 257), (70, 130, 128)]  # tokens, rows, columns


def weight(rows, columns):
    make = torch.Generator().manual_seed(rows)
    codes = torch.randint(-127, 128, (rows, columns), generator=make, dtype=torch.int8)
    scales = torch.rand(rows, generator=make) / 100 + 1e-3
    return [part.to(DEVICE) for part in (int8.pack(codes), scales, int8.sums(codes))]


def tokens(count, columns, dtype=torch.float32):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)


def triton_linear(*given, **options):
    from hasten.kernels import int8_triton

    return int8_triton.linear(*given, **options)


@interpreter.kernel
@pytest.mark.parametrize("count, rows, columns", SHAPES)
@pytest.mark.parametrize("given", ["token", "one", "many"])
def test_same_integers_as_pytorch(count, rows, columns, given):
    parts, x = weight(rows, columns), tokens(count, columns)
    bias = torch.randn(rows, device=DEVICE)
    make = torch.Generator().manual_seed(1)
    scale = {"token": None, "one": torch.tensor([0.02]), "many": torch.rand(columns, generator=make) / 50 + 0.01}[given]
    scale = None if scale is None else scale.to(DEVICE)
    expected = int8.torch_linear(x, *parts, bias, scale)
    assert torch.allclose(triton_linear(x, *parts, bias, scale), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(triton_linear(x, *parts, None, scale), int8.torch_linear(x, *parts, None, scale))


@interpreter.kernel
def test_agrees_with_the_equation():
    parts, x = weight(5, 100), tokens(3, 100)
    expected = int8.naive_linear(x.cpu(), *(part.cpu() for part in parts))
    assert torch.allclose(triton_linear(x, *parts).cpu(), expected, rtol=1e-5)


@interpreter.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    parts, x = weight(33, 96), tokens(4, 96, dtype)
    found = triton_linear(x.view(2, 2, 96), *parts)
    assert found.dtype == dtype and found.shape == (2, 2, 33)
    truncates = interpreter.INSIDE and dtype == torch.bfloat16  # the interpreter does not round to bfloat16
    expected = int8.torch_linear(x, *parts, None)
    assert torch.allclose(found.view(4, 33), expected, rtol=2**-7 if truncates else 0, atol=0)
    assert triton_linear(x, *parts, dtype=torch.float32).dtype == torch.float32


@interpreter.kernel
def test_codes_as_they_are_and_empty_batches():
    parts = weight(33, 70)
    codes = torch.randint(-127, 128, (4, 70), dtype=torch.int8).to(DEVICE)
    assert torch.equal(triton_linear(codes, *parts), int8.torch_linear(codes, *parts, None))
    assert triton_linear(torch.empty(0, 3, 70, device=DEVICE), *parts).shape == (0, 3, 33)


@interpreter.kernel
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of infinity times zero
def test_ties_zero_rows_and_broken_tokens():
    parts, x = weight(9, 128), tokens(5, 128)
    x[0] = torch.arange(128.0) - 0.5
    x[0, 0] = 127.0  # a scale of exactly one: 0.5, 1.5, 2.5 ... are ties
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, torch.inf
    found, expected = triton_linear(x, *parts), int8.torch_linear(x, *parts, None)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert found[2:4].isnan().all() and found[4].isfinite().all() and (found[1] == 0).all()
    scale = torch.tensor([0.02], device=DEVICE)
    found, expected = triton_linear(x, *parts, scale=scale), int8.torch_linear(x, *parts, None, scale)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_in_the_interpreter():
    interpreter.run(__file__)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_tensor_cores_of_int8(capability, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    if interpreter.INSIDE:
        pytest.skip("the interpreter does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from hasten.kernels import int8_triton

    pointers = {"codes": "*i8", "packed": "*i8", "scales": "*fp32", "factors": "*fp32", "y": "*bf16"}
    sizes = {"count": "i32", "rows": "i32!", "wide": "i32!"}
    constants = {"BM": 64, "BN": 64, "BK": 64, "EVEN": True, "FACTORS": True, "BIAS": False}
    text = interpreter.compiled(int8_triton._product, {**pointers, **sizes}, constants, capability)
    assert "s32.s8.s8" in text
    pointers = {"x": "*fp16", "inverses": "*fp32", "codes": "*i8", "factors": "*fp32"}
    constants = {"LEAST": 1e-30, "MOST": 127, "GIVEN": 0, "CHUNK": 4096}
    text = interpreter.compiled(int8_triton._encode, {**pointers, "columns": "i32!", "wide": "i32!"}, constants)
    assert "div.rn.f32" in text
