"""The low-bit linear: every path agrees with the equation, and the native one reads nothing but the packed bytes."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.errors import UsageError
from hasten.kernels import lowbit, native
from hasten.math import packing

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [(1, 1, 32), (3, 5, 100), (17, 33, 192), (2, 64, 257), (5, 19, 352)]  # count, rows, columns


def weight(rows, columns, bits, group, seed=0):
    make = torch.Generator().manual_seed(seed + rows)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=make, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=make) * 0.1 + 0.01
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=make).float()
    return packing.pack(codes, bits), scales, zeros


def close(found, expected, tolerance=2e-6):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("count, rows, columns", SHAPES)
def test_agrees_with_the_equation(bits, count, rows, columns):
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
    options = {"bits": bits, "group": 64, "columns": columns}
    packed = weight(rows, columns, bits, 64)
    expected = lowbit.naive_linear(x, *packed, bias, **options)
    assert close(lowbit.linear(x, *packed, bias, **options), expected)
    assert close(lowbit.torch_linear(x, *packed, bias, bits, 64), expected)
    assert close(lowbit.linear(x, *packed, **options), expected - bias)


def native_agrees(bits, isa=None):
    """Every way of this kernel, on shapes that end in the middle of units, blocks and groups."""
    run = lowbit.kernel(bits, isa)
    columns = [1, 63, 64, 65, 127, 200, 640]
    for group, width in itertools.product([16, 32, 64, 192, 256], columns):
        for count, rows in [(1, 1), (1, 17), (5, 5)]:
            x = torch.randn(count, width, generator=torch.Generator().manual_seed(width))
            x[:, width // 2 :] *= 30
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
            kinds = ways(rows, width, bits, group)
            for name, (packed, scales, zeros, more) in kinds.items() if width in (65, 640) else [*kinds.items()][:1]:
                dense = lowbit.dequantize(packed, scales, zeros, bits=bits, group=group, columns=width, **more)
                for activations in (32,) if "tables" in more else (32, 8):
                    xs = x if activations == 32 else lowbit.round_activations(x)
                    found = lowbit.native_linear(run, x, packed, scales, zeros, bias, bits, group, **more,
                                                 activations=activations)  # fmt: skip
                    error = (found - (xs.double() @ dense.double().T + bias)).abs()
                    size = xs.double().abs().sum(-1, keepdim=True) * dense.abs().max() + bias.abs()
                    assert bool((error <= 1e-6 * size).all()), (name, group, width, activations)


def ways(rows, columns, bits, group):
    """The same shape with each kind of statistics."""
    packed, scales, zeros = weight(rows, columns, bits, group)
    groups = scales.shape[1]
    make = torch.Generator().manual_seed(columns)
    bytes_of = torch.randint(0, 8, (2, rows, groups), generator=make, dtype=torch.uint8)
    levels = torch.rand(rows, -(-groups // 16), 4, generator=make) * torch.tensor([0.1, -1.0, 1.0, 1.0])
    found = {
        "plain": (packed, scales, zeros, {}),
        "half": (packed, scales.half(), zeros.half() + 0.5, {}),
        "bytes": (packed, scales.half(), zeros.to(torch.uint8), {}),
        "one": (packed, scales, zeros[:1, :1].clone(), {}),
        "levels": (packed, *bytes_of, {"levels": levels}),
    }
    if bits <= 4:
        tables = torch.randn(5, 2**bits, generator=make)
        place = torch.randint(0, 5, (rows, groups), generator=make, dtype=torch.int32)
        found["tables"] = packed, scales, place, {"tables": tables}
        found["table"] = packed, scales, torch.zeros(1, 1, dtype=torch.int32), {"tables": tables[:1].clone()}
        found["tables and levels"] = packed, bytes_of[0], place, {"tables": tables, "levels": levels}
    return found


@needs_compiler
@pytest.mark.parametrize("bits", packing.BITS)
def test_native_agrees(bits):
    native_agrees(bits)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isa", [one for one in native.sets() if one != "AMX"])
@pytest.mark.parametrize("bits", packing.BITS)
def test_native_for_other_instruction_sets(isa, bits):
    native_agrees(bits, isa)


@needs_compiler
def test_threads_share_the_rows_and_agree_bit_for_bit():
    packed = weight(203, 256, 4, 128)
    x = torch.randn(3, 256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lowbit.linear(x, *packed, bits=4, group=128, columns=256))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_half_precision_keeps_its_dtype_and_sums_in_fp32(dtype, tolerance):
    packed = weight(40, 192, 4, 128)
    x, bias = torch.randn(2, 3, 192).to(dtype), torch.randn(40).to(dtype)
    found = lowbit.linear(x, *packed, bias, bits=4, group=128, columns=192)
    expected = x.double() @ lowbit.dequantize(*packed, bits=4, group=128, columns=192).double().T + bias
    assert found.dtype == dtype and found.shape == (2, 3, 40)
    assert close(found, expected, tolerance)


def test_empty_batch_and_non_contiguous_input():
    packed = weight(40, 96, 4, 32)
    options = {"bits": 4, "group": 32, "columns": 96}
    assert lowbit.linear(torch.empty(0, 7, 96), *packed, **options).shape == (0, 7, 40)
    x = torch.randn(96, 5).t()
    assert torch.equal(lowbit.linear(x, *packed, **options), lowbit.linear(x.contiguous(), *packed, **options))


def test_nan_and_infinity_come_out_where_they_went_in():
    packed = weight(16, 100, 4, 32)
    x = torch.ones(2, 100)
    x[1, 99] = torch.nan
    y = lowbit.linear(x, *packed, bits=4, group=32, columns=100)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_gradient_of_the_input():
    packed = weight(70, 96, 4, 32)
    dense = lowbit.dequantize(*packed, bits=4, group=32, columns=96)
    x = torch.randn(3, 96, requires_grad=True)
    upstream = torch.randn(3, 70)
    lowbit.linear(x, *packed, bits=4, group=32, columns=96).backward(upstream)
    assert torch.allclose(x.grad, upstream @ dense, rtol=1e-4, atol=1e-5)


def test_operator_traces_and_counts_its_operations():
    packed = weight(48, 96, 4, 32)
    x = torch.randn(3, 96)
    torch.library.opcheck(torch.ops.hasten.lowbit_linear, (x, *packed, None, 4, 32))
    with FlopCounterMode(display=False) as counter:
        lowbit.linear(x, *packed, bits=4, group=32, columns=96)
    assert counter.get_total_flops() == 2 * 3 * 96 * 48


def every_way(rows=21, columns=200, bits=3, group=32):
    for name, (packed, scales, zeros, more) in ways(rows, columns, bits, group).items():
        for activations in (32,) if "tables" in more else (32, 8):
            yield name, (packed, scales, zeros), {**more, "activations": activations}


@pytest.mark.parametrize("compiler", [True, False])
def test_every_kind_of_statistics_agrees_with_the_equation(compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(lowbit, "kernel", lambda bits, isa=None: None)
    sizes = {"bits": 3, "group": 32, "columns": 200}
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    for name, parts, more in every_way():
        expected = lowbit.naive_linear(x, *parts, **sizes, **more)
        assert close(lowbit.linear(x, *parts, **sizes, **more), expected, 5e-6), (name, more["activations"])


def test_operator_and_gradient_with_every_kind_of_statistics():
    sizes = {"bits": 3, "group": 32, "columns": 200}
    for name, parts, more in every_way(rows=9):
        options = {key: more.get(key) for key in ("tables", "levels")}
        x = torch.randn(2, 200, requires_grad=True)
        lowbit.linear(x, *parts, **sizes, **more).sum().backward()
        expected = lowbit.dequantize(*parts, **sizes, **options).sum(0).expand(2, -1)
        assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4), name
        arguments = (x.detach(), *parts, None, 3, 32, *options.values(), more["activations"])
        torch.library.opcheck(torch.ops.hasten.lowbit_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_eight_bit_activations_keep_to_half_a_step_and_pass_nan_on():
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    x[0, :64], x[1, 70], x[2, 190] = 0, torch.nan, torch.inf
    rounded = lowbit.round_activations(x)
    runs = torch.nn.functional.pad(x, (0, 56)).unflatten(-1, (-1, 64))
    error = torch.nn.functional.pad(rounded - x, (0, 56)).unflatten(-1, (-1, 64)).abs().amax(-1)
    fine = runs.isfinite().all(-1)
    assert bool((error <= runs.abs().amax(-1) / 253)[fine].all())
    packed = weight(16, 200, 4, 64)
    y = lowbit.linear(x, *packed, bits=4, group=64, columns=200, activations=8)
    assert y[0].isfinite().all() and y[3].isfinite().all() and y[1].isnan().all() and y[2].isnan().all()


def test_statistics_are_made_smaller_only_where_that_is_exact():
    scales, zeros = torch.rand(4, 6).half().float(), torch.randint(0, 16, (4, 6)).float()
    for made, kinds in [
        (lowbit.compact(scales, zeros), (torch.float16, torch.uint8)),
        (lowbit.compact(torch.rand(4, 6), zeros + 0.5), (torch.float32, torch.float16)),
        (lowbit.compact(scales, zeros + 0.1), (torch.float16, torch.float32)),
    ]:
        assert tuple(part.dtype for part in made) == kinds
    small = lowbit.compact(scales, torch.full((4, 6), 8.0))
    assert small[1].shape == (1, 1) and torch.equal(small[0].float(), scales)


def test_changed_weights_are_seen():
    packed, scales, zeros = weight(9, 96, 4, 32)
    x, options = torch.randn(2, 96), {"bits": 4, "group": 32, "columns": 96}
    before = lowbit.linear(x, packed, scales, zeros, **options)
    scales.mul_(2)
    assert torch.allclose(lowbit.linear(x, packed, scales, zeros, **options), 2 * before)
    assert torch.allclose(lowbit.linear(x, packed, scales / 2, zeros, **options), before)
    scales.data = scales / 2
    assert torch.allclose(lowbit.linear(x, packed, scales, zeros, **options), before)


@pytest.mark.parametrize(
    "change",
    [
        {"packed": lambda it: it[:, :-1].contiguous()},
        {"packed": lambda it: it.char()},
        {"scales": lambda it: it[:, :1].contiguous()},
        {"scales": lambda it: it.double()},
        {"zeros": lambda it: it.t().contiguous()},
        {"zeros": lambda it: it.t().contiguous().t()},
        {"bias": lambda it: torch.zeros(3)},
        {"levels": lambda it: torch.zeros(9, 1, 4)},
        {"tables": lambda it: torch.zeros(2, 16)},
        {"activations": lambda it: 16},
        {"bits": lambda it: 5},
        {"group": lambda it: 0},
    ],
)
def test_what_does_not_fit_is_refused(change):
    packed, scales, zeros = weight(9, 96, 4, 32)
    given = {"packed": packed, "scales": scales, "zeros": zeros, "bits": 4, "group": 32}
    for name, make in change.items():
        given[name] = make(given.get(name))
    with pytest.raises(UsageError):
        lowbit.linear(torch.randn(2, 96), columns=96, **given)


def test_a_table_that_is_not_there_is_refused():
    packed, scales, _ = weight(9, 96, 4, 32)
    zeros = torch.full((9, 3), 2, dtype=torch.int32)
    with pytest.raises(UsageError, match="numbers of tables"):
        lowbit.linear(
            torch.randn(2, 96), packed, scales, zeros, bits=4, group=32, columns=96, tables=torch.zeros(2, 16)
        )


def test_without_a_compiler_the_torch_path_is_taken_and_said(monkeypatch):
    monkeypatch.setenv("HASTEN_NATIVE", "0")
    lowbit.kernel.cache_clear()
    native.library.cache_clear()
    try:
        assert lowbit.path(4, 128) == "torch"
        packed = weight(9, 96, 4, 32)
        x = torch.randn(2, 96)
        found = lowbit.linear(x, *packed, bits=4, group=32, columns=96)
        assert torch.equal(found, lowbit.torch_linear(x, *packed, None, 4, 32))
    finally:
        lowbit.kernel.cache_clear()
        native.library.cache_clear()


@needs_compiler
def test_kernel_is_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library("lowbit.cpp", ("BITS=8",), "DEFAULT") is not None
        (built,) = tmp_path.glob("lowbit-*.so")
        before = built.stat().st_mtime_ns
        native.library.cache_clear()
        assert native.library("lowbit.cpp", ("BITS=8",), "DEFAULT") is not None
        assert [one.stat().st_mtime_ns for one in tmp_path.iterdir()] == [before]
    finally:
        native.library.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_is_no_error(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        assert native.library("lowbit.cpp", ("BITS=4",)) is None
    finally:
        native.library.cache_clear()
