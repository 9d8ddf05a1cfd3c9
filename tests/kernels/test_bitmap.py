"""The bitmap product: every path, dtype of values and instruction set agrees with the equation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.errors import UsageError
from hasten.kernels import bitmap, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
KINDS = [torch.float32, torch.bfloat16, torch.int8]
SHAPES = [(1, 1, 1, 1.0), (3, 33, 17, 0.3), (1, 70, 129, 0.2), (9, 48, 64, 1.0), (2, 16, 40, 0.0), (20, 600, 50, 0.5)]


def weight(rows, width, density):
    make = torch.Generator().manual_seed(rows + width)
    dense = torch.randn(rows, width, generator=make) * (torch.rand(rows, width, generator=make) < density)
    dense[rows // 2] = 0  # an empty row
    return dense


def inputs(count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def wanted(x, packed, bias):
    dense = bitmap.expand(*packed, width=x.shape[-1]).double()
    return x.double() @ dense.T + (0 if bias is None else bias.double())


def close(found, expected, tolerance=3e-6):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-12


@pytest.mark.parametrize("dtype", KINDS)
def test_paths_agree_with_the_equation(dtype):
    for count, rows, width, density in SHAPES[:5]:
        values, bits, starts, scales = packed = bitmap.pack(weight(rows, width, density), dtype)
        bitmap.check(*packed, rows=rows, width=width)
        x, bias = inputs(count, width), inputs(1, rows)[0]
        for run in (bitmap.naive_linear, bitmap.linear, bitmap.slab_linear):
            for added in (bias, None):
                assert close(run(x, values, bits, starts, added, scales), wanted(x, packed, added))


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "plain"])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_instruction_set(dtype, isa):
    if isa == "AVX512" and native.capability() != isa:
        pytest.skip("this CPU has no AVX-512")
    for _, rows, width, density in SHAPES:
        values, bits, starts, scales = packed = bitmap.pack(weight(rows, width, density), dtype)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 19):
            x, bias = inputs(count, width), inputs(1, rows)[0]
            found = bitmap.native_linear(x, values, bits, starts, bias, scales, isa=isa)
            assert close(found, wanted(x, packed, bias))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 0), (torch.bfloat16, 4e-3), (torch.int8, 0.02)])
def test_packing_keeps_the_weight(dtype, error):
    dense = weight(50, 77, 0.3)
    values, bits, starts, scales = bitmap.pack(dense, dtype)
    back = bitmap.expand(values, bits, starts, scales, width=77)
    assert (back - dense).norm() <= error * dense.norm()
    assert len(values) == int((dense != 0).sum()) + bitmap.PADDING and bits.shape == (50, 10)


def test_without_a_kernel_slabs_are_the_same(monkeypatch):
    values, bits, starts, scales = packed = bitmap.pack(weight(600, 50, 0.4), torch.int8)
    x = inputs(3, 50)
    monkeypatch.setattr(bitmap, "library", lambda isa=None: None)
    assert bitmap.path() == "torch"
    assert close(bitmap.linear(x, values, bits, starts, None, scales), wanted(x, packed, None))


@needs_compiler
def test_threads_agree_bit_for_bit():
    values, bits, starts, _ = bitmap.pack(weight(203, 256, 0.3))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bitmap.native_linear(inputs(1, 256), values, bits, starts, None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_keeps_its_dtype(dtype, tolerance):
    values, bits, starts, _ = packed = bitmap.pack(weight(40, 96, 0.4))
    x, bias = inputs(6, 96).to(dtype), inputs(1, 40)[0].to(dtype)
    found = bitmap.linear(x.view(2, 3, 96), values, bits, starts, bias)
    assert found.dtype == dtype and found.shape == (2, 3, 40)
    assert close(found.view(6, 40), wanted(x.float(), packed, bias.float()), tolerance)


@pytest.mark.parametrize("dtype", KINDS)
def test_gradient_of_the_input(dtype):
    values, bits, starts, scales = packed = bitmap.pack(weight(600, 96, 0.4), dtype)
    x, upstream = inputs(3, 96).requires_grad_(), inputs(3, 600)
    bitmap.linear(x, values, bits, starts, None, scales).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ bitmap.expand(*packed, width=96), rtol=1e-4, atol=1e-4)


def test_operator_is_sound_and_counts_its_work():
    values, bits, starts, scales = bitmap.pack(weight(48, 96, 0.4), torch.int8)
    torch.library.opcheck(torch.ops.hasten.bitmap_linear, (inputs(3, 96), values, bits, starts, None, scales))
    with FlopCounterMode(display=False) as counter:
        bitmap.linear(inputs(3, 96), values, bits, starts, None, scales)
    assert counter.get_total_flops() == 2 * 3 * int(starts[-1])
    assert bitmap.linear(torch.empty(0, 7, 96), values, bits, starts, None, scales).shape == (0, 7, 48)


def test_what_is_no_bitmap_is_refused():
    values, bits, starts, scales = bitmap.pack(weight(50, 77, 0.5), torch.int8)
    for wrong, word in (
        ((values, bits, starts), "a scale for each row"),
        ((values, bits.flip(0), starts, scales), "as many as its starts say"),
        ((values, bits[:, :-1], starts, scales), "bits must be"),
        ((values[:-1], bits, starts, scales), "of padding are needed"),
        ((values, bits | 128, starts, scales), "beyond the last column"),
        ((values.double(), bits, starts, scales), "bits uint8 and starts int64"),
    ):
        with pytest.raises(UsageError, match=word):
            bitmap.check(*wrong, rows=50, width=77)
    with pytest.raises(UsageError, match="float32, bfloat16 or int8"):
        bitmap.pack(torch.zeros(2, 2), torch.float16)
