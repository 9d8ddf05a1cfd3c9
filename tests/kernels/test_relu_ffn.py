"""The sparse feed-forward layer: every path agrees with the equation, and inactive neurons are not read."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.kernels import native, relu_ffn

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [(1, 17, 1, 5), (1, 64, 200, 48), (3, 33, 130, 17), (8, 40, 70, 96), (6, 16, 515, 16), (11, 20, 30, 20)]


def layer(width, hidden, out, *, gated=True, bias=True, shift=0.0, dtype=torch.float32):
    make = torch.Generator().manual_seed(width + hidden)
    some = lambda *shape: torch.randn(*shape, generator=make).to(dtype)  # noqa: E731
    return {
        "gate": some(hidden, width), "down_t": some(hidden, out), "up": some(hidden, width) if gated else None,
        "gate_bias": (some(hidden) - shift).to(dtype) if bias else None,
        "up_bias": some(hidden) if bias and gated else None, "down_bias": some(out) if bias else None,
    }  # fmt: skip


def tokens(count, width, dtype=torch.float32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)


def close(found, expected, tolerance=1e-5):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-9


ORDER = ("gate", "down_t", "up", "gate_bias", "up_bias", "down_bias")


@pytest.mark.parametrize("threshold, shift", [(0.0, 0.0), (0.0, 9.0), (6.0, 0.0), (0.0, 1e6)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_paths_agree_with_the_equation(gated, bias, threshold, shift):
    for count, width, hidden, out in SHAPES:
        parts, x = layer(width, hidden, out, gated=gated, bias=bias, shift=shift), tokens(count, width)
        expected = relu_ffn.naive_relu_ffn(x, **parts, threshold=threshold)
        ordered = [parts[name] for name in ORDER]
        assert close(relu_ffn.relu_ffn(x, **parts, threshold=threshold), expected)
        for run in (relu_ffn.dense_ffn, relu_ffn.torch_ffn):
            assert close(run(x, *ordered, threshold), expected)


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(dtype, isa):
    if isa == "AVX512" and native.capability() != isa:
        pytest.skip("this CPU has no AVX-512")
    for count, width, hidden, out in SHAPES:
        parts, x = layer(width, hidden, out, dtype=dtype), tokens(count, width)
        ordered = [parts[name] for name in ORDER]
        expected = relu_ffn.dense_ffn(x, *(None if t is None else t.float() for t in ordered), 0.5)
        assert close(relu_ffn.native_ffn(x, *ordered, 0.5, isa=isa), expected)


@needs_compiler
def test_inactive_neurons_are_not_read():
    """NaN in what belongs to a neuron that no token activates does no harm."""
    parts, x = layer(32, 96, 24, bias=False), tokens(2, 32)
    expected = relu_ffn.relu_ffn(x, **parts)
    idle = (x @ parts["gate"].T <= 0).all(0)
    assert idle.any() and not idle.all()
    parts["up"][idle], parts["down_t"][idle] = torch.nan, torch.nan
    assert torch.equal(relu_ffn.relu_ffn(x, **parts), expected)


def test_nan_comes_out():
    parts, x = layer(32, 96, 24), tokens(2, 32)
    x[1, 3] = torch.nan
    found = relu_ffn.relu_ffn(x, **parts)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_keeps_its_dtype(dtype, tolerance):
    parts, x = layer(48, 130, 32, dtype=dtype), tokens(3, 48, dtype)
    found = relu_ffn.relu_ffn(x.view(1, 3, 48), **parts)
    assert close(found.view(3, 32), relu_ffn.naive_relu_ffn(x, **parts), tolerance)


@needs_compiler
def test_threads_agree_bit_for_bit():
    parts, x = layer(48, 700, 32), tokens(3, 48)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(relu_ffn.relu_ffn(x, **parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gradients_of_everything():
    parts, x = layer(16, 40, 12), tokens(3, 16)
    leaves = {name: t.clone().requires_grad_() for name, t in {"x": x, **parts}.items()}
    relu_ffn.relu_ffn(**leaves).square().sum().backward()
    naive = {name: t.clone().requires_grad_() for name, t in {"x": x, **parts}.items()}
    relu_ffn.naive_relu_ffn(**naive).square().sum().backward()
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, naive[name].grad, rtol=1e-4, atol=1e-2)


def test_operator_is_sound_and_counts_at_most():
    parts, x = layer(16, 70, 12), tokens(3, 16)
    ordered = [parts[name] for name in ORDER]
    torch.library.opcheck(torch.ops.hasten.relu_ffn, (x, *ordered, 0.0), test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        relu_ffn.relu_ffn(x, **parts)
    assert counter.get_total_flops() == 2 * 3 * 70 * (16 + 16 + 12)
    assert relu_ffn.relu_ffn(torch.empty(0, 7, 16), **parts).shape == (0, 7, 12)
