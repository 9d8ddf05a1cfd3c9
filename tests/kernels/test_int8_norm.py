"""The norm that makes int8 codes: both ways agree with the equation but for ties."""

import pytest
import torch

from hasten.core.errors import UsageError
from hasten.kernels import int8_norm, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [(1, 1, 0), (2, 5, 2), (3, 64, 7), (4, 100, 0), (1, 257, 30)]  # tokens, columns, extra


def problem(tokens, columns, extra, shift):
    make = torch.Generator().manual_seed(columns)
    x, gain = torch.randn(tokens, columns, generator=make) + 0.3, torch.rand(columns, generator=make) * 90 + 1
    source = torch.randint(0, columns, (extra,), generator=make) if extra else None
    place = torch.randint(1, 4, (extra,), generator=make) if extra else None
    if extra:
        gain[source] *= 8
    return x, gain, torch.randn(columns, generator=make) * 20 if shift else None, source, place


def nearly(found, expected, share=0.01):
    """Equal but for a few codes, which differ by one."""
    off = (found.int() - expected.int()).abs()
    return found.shape == expected.shape and int(off.max()) <= 1 and float((off > 0).float().mean()) <= share


@pytest.mark.parametrize("tokens, columns, extra", SHAPES)
@pytest.mark.parametrize("shift, centred, most", [(False, False, 127), (True, True, 127), (False, True, 7)])
def test_agrees_with_the_equation(tokens, columns, extra, shift, centred, most):
    parts, options = problem(tokens, columns, extra, shift), {"eps": 1e-5, "centred": centred, "most": most}
    expected = int8_norm.naive_norm(*parts, **options)
    assert expected.shape == (tokens, columns + extra) and expected.dtype == torch.int8
    assert nearly(int8_norm.norm(*parts, **options), expected)
    assert nearly(int8_norm.torch_norm(*parts, **options), expected)


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "DEFAULT"])
def test_instruction_sets(isa):
    if isa not in native.sets():
        pytest.skip(f"no {isa} here")
    x, *parts = problem(300, 515, 9, True)
    options = {"eps": 1e-6, "centred": True, "most": 127}
    expected = int8_norm.torch_norm(x, *parts, **options)
    assert nearly(int8_norm.native_norm(int8_norm.kernel(isa), x, *parts, **options), expected, 1e-3)
    half = int8_norm.native_norm(int8_norm.kernel(isa), x.bfloat16(), *parts, **options)
    assert nearly(half, int8_norm.torch_norm(x.bfloat16(), *parts, **options), 1e-3)


@needs_compiler
def test_threads_agree_bit_for_bit():
    parts, before, found = problem(300, 515, 9, False), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(int8_norm.norm(*parts, eps=1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_columns_of_an_input_add_up_to_its_number():
    x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.5, -1.0]])
    gain = torch.tensor([200.0, 50.0])
    v = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * gain
    y = int8_norm.norm(x, gain, None, torch.tensor([0, 0]), torch.tensor([1, 2]), eps=1e-6)
    total = y[:, 0].int() + y[:, 2].int() + y[:, 3].int()
    assert torch.equal(total, v[:, 0].round().clamp(-381, 381).int())
    assert torch.equal(y[:, 1].float(), v[:, 1].round())


def test_nan_and_empty():
    x = torch.ones(3, 40)
    x[1, 5] = torch.nan
    plain = int8_norm.torch_norm(x, torch.ones(40), None, None, None, eps=1e-6, centred=False, most=127)
    for y in (int8_norm.norm(x, torch.ones(40), eps=1e-6), plain):
        assert (y[1] == -127).all() and (y[0] == 1).all() and (y[2] == 1).all()
    assert int8_norm.norm(torch.ones(0, 7, 40), torch.ones(40), eps=1e-6).shape == (0, 7, 40)
    with pytest.raises(UsageError, match="40"):
        int8_norm.norm(x, torch.ones(39), eps=1e-6)
