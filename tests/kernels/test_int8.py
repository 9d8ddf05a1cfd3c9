"""The int8 linear: every path and every instruction set makes the same integers, and agrees with the equation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.errors import UsageError
from hasten.kernels import int8, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
every_set = pytest.mark.parametrize("isa", sorted({*native.FLAGS, "DEFAULT"}))
SHAPES = [(1, 1, 1), (1, 64, 16), (2, 5, 3), (3, 63, 17), (5, 65, 33), (7, 200, 50), (17, 127, 40), (49, 300, 31)]
GIVEN = {
    "dynamic": lambda k: None,
    "tensor": lambda k: torch.full((1,), 0.02),
    "column": lambda k: torch.rand(k) + 0.01,
}


def weight(rows, columns, seed=0):
    make = torch.Generator().manual_seed(seed + rows)
    codes = torch.randint(-127, 128, (rows, columns), generator=make, dtype=torch.int8)
    return int8.pack(codes), torch.rand(rows, generator=make) / 100, int8.sums(codes)


def inputs(count, columns):
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1)) * 3
    x[-1] = 0 if count > 2 else x[-1]
    return x


def close(found, expected, tolerance=1e-6):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def run_of(isa):
    if isa not in native.sets() or (run := int8.kernel(isa)) is None:
        pytest.skip(f"no {isa} here")
    return run


@pytest.mark.parametrize("count, columns, rows", SHAPES)
@pytest.mark.parametrize("given", GIVEN)
def test_agrees_with_the_equation(count, columns, rows, given):
    x, packed, bias = inputs(count, columns), weight(rows, columns), torch.randn(rows)
    scale = GIVEN[given](columns)
    expected = int8.naive_linear(x, *packed, bias, scale=scale)
    assert close(int8.linear(x, *packed, bias, scale=scale), expected)
    assert close(int8.torch_linear(x, *packed, bias, scale), expected)
    assert close(int8.linear(x, *packed, scale=scale), expected - bias, 1e-5)


@needs_compiler
@every_set
def test_instruction_sets_make_the_same_integers(isa):
    run = run_of(isa)
    for count, columns, rows in [*SHAPES, (70, 70, 70), (6, 256, 64), (260, 4100, 20)]:
        x, (packed, _, sums) = inputs(count, columns), weight(rows, columns)
        ones = torch.ones(rows)
        whole = torch.randint(-127, 128, (count, columns), dtype=torch.int8)
        exact = whole.int() @ int8.unpack(packed, rows, columns).int().T
        assert torch.equal(int8.native_linear(run, whole, packed, ones, sums, None), exact.float())
        for given in GIVEN.values():
            scale = given(columns)
            codes, factors = int8.encode(x, scale)
            exact = codes.int() @ int8.unpack(packed, rows, columns).int().T
            found = int8.native_linear(run, x, packed, ones, sums, None, scale)
            assert torch.equal(found, exact.float() * factors)


@needs_compiler
@every_set
@pytest.mark.parametrize("columns", [4096, 65536])
def test_the_largest_sums_do_not_saturate(isa, columns):
    """255 * 127 twice is more than 16 bits hold, which is what AVX2's product of bytes adds up in."""
    run = run_of(isa)
    for count in (1, 3, 20):
        for sign in (1, -1):
            codes = torch.full((3, columns), 127 * sign, dtype=torch.int8)
            x = torch.full((count, columns), 127, dtype=torch.int8)
            found = int8.native_linear(run, x, int8.pack(codes), torch.ones(3), int8.sums(codes), None)
            assert torch.equal(found, torch.full((count, 3), float(127 * 127 * sign * columns)))


@needs_compiler
@every_set
def test_threads_and_chunks_agree_bit_for_bit(isa):
    run = run_of(isa)
    x, packed = inputs(75, 33000), weight(50, 33000)  # more tokens than are rounded at a time
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(int8.native_linear(run, x, *packed, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][40:41], int8.native_linear(run, x[40:41], *packed, None))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_keeps_its_dtype(dtype, tolerance):
    packed, x, bias = weight(40, 192), torch.randn(2, 3, 192).to(dtype), torch.randn(40).to(dtype)
    found = int8.linear(x, *packed, bias)
    assert found.dtype == dtype and found.shape == (2, 3, 40)
    assert close(found, int8.linear(x.float(), *packed, bias.float()), tolerance)
    assert int8.linear(x, *packed, dtype=torch.float32).dtype is torch.float32


def test_rounding_costs_about_what_eight_bits_must():
    x, (packed, scales, sums) = torch.randn(30, 512), weight(64, 512)
    dense = int8.unpack(packed, 64, 512).float() * scales[:, None]
    error = (int8.linear(x, packed, scales, sums) - x @ dense.T).norm() / (x @ dense.T).norm()
    step = (x.abs().amax(1) / 127).mean()
    assert 0.3 < float(error / (step / 12**0.5)) < 1.5


def test_outliers_of_static_scales_are_clipped():
    packed, scales, sums = weight(20, 100)
    scale = torch.full((1,), 0.1)
    x = torch.randn(4, 100)
    x[2, 7] = torch.inf
    x[3, 7] = -1e30
    clipped = x.clamp(-12.7, 12.7)
    assert torch.equal(int8.linear(x, packed, scales, sums, scale=scale),
                       int8.linear(clipped, packed, scales, sums, scale=scale))  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
def test_nan_and_infinity_spoil_their_token_only(given):
    packed, x = weight(16, 100), torch.ones(3, 100)
    x[1, 99] = torch.nan
    if given == "dynamic":
        x[2, 0] = -torch.inf
    scale = GIVEN[given](100)
    for y in (int8.linear(x, *packed, scale=scale), int8.torch_linear(x, *packed, None, scale)):
        assert y[0].isfinite().all() and y[1].isnan().all()
        assert given != "dynamic" or y[2].isnan().all()


def test_empty_batch_and_non_contiguous_input():
    packed = weight(40, 96)
    assert int8.linear(torch.empty(0, 7, 96), *packed).shape == (0, 7, 40)
    x = torch.randn(96, 5).t()
    assert torch.equal(int8.linear(x, *packed), int8.linear(x.contiguous(), *packed))


@pytest.mark.parametrize("given", GIVEN)
def test_gradient_of_the_input_is_that_of_the_dense_layer(given):
    packed, scales, sums = weight(300, 96)
    dense = int8.unpack(packed, 300, 96).float() * scales[:, None]
    scale = GIVEN[given](96)
    x, upstream = torch.randn(3, 96, requires_grad=True), torch.randn(3, 300)
    int8.linear(x, packed, scales, sums, scale=scale).backward(upstream)
    expected = upstream @ dense if scale is None else upstream @ dense / scale
    assert close(x.grad, expected, 1e-5)


def test_operator_traces_and_counts_its_operations():
    packed, x = weight(48, 96), torch.randn(3, 96)
    torch.library.opcheck(torch.ops.hasten.int8_linear, (x, *packed, None, None, None))
    torch.library.opcheck(torch.ops.hasten.int8_linear, (x.bfloat16(), *packed, torch.randn(48), torch.ones(1), None))
    with FlopCounterMode(display=False) as counter:
        int8.linear(x, *packed)
    assert counter.get_total_flops() == 2 * 3 * 96 * 48


def test_without_a_compiler_the_torch_path_is_taken_and_said(monkeypatch):
    monkeypatch.setenv("HASTEN_NATIVE", "0")
    int8.kernel.cache_clear()
    native.library.cache_clear()
    try:
        assert int8.path() == "torch" and int8.instruction_set() is None
        packed, x = weight(9, 96), torch.randn(2, 96)
        assert torch.equal(int8.linear(x, *packed), int8.torch_linear(x, *packed, None))
    finally:
        int8.kernel.cache_clear()
        native.library.cache_clear()


def test_what_does_not_go_together_is_refused():
    packed, scales, sums = weight(20, 100)
    x = torch.randn(2, 100)
    for wrong in (
        (x[:, :50], packed, scales, sums),
        (x, packed, scales[:10], sums[:10]),
        (x, packed, scales.double(), sums),
        (x, packed, scales, sums.long()),
        (x, packed, scales, sums[:5]),
        (x, packed, scales, sums, torch.ones(3)),
        (x, packed, scales, sums, None, torch.ones(7)),
        (x, packed.float(), scales, sums),
    ):
        given = {"scale": wrong[5]} if len(wrong) > 5 else {}
        with pytest.raises(UsageError, match="must be"):
            int8.linear(*wrong[:5], **given)
