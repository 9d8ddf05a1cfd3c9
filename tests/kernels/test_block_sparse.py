"""The block-sparse product: every path, block and instruction set agrees with the equation."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hasten.core.errors import UsageError
from hasten.kernels import block_sparse, native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
SHAPES = [
    (1, 1, 1, 1.0),
    (3, 33, 17, 0.3),
    (9, 70, 129, 0.2),
    (100, 48, 64, 1.0),
    (17, 16, 40, 0.0),
    (130, 129, 50, 0.1),
]


def weight(rows, width, r, density, c=1):
    make = torch.Generator().manual_seed(rows + width + r)
    kept = torch.rand(-(-rows // r), -(-width // c), generator=make) < density
    kept[len(kept) // 2] = False  # an empty band
    spread = kept.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :width]
    return torch.randn(rows, width, generator=make) * spread


def inputs(count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def wanted(x, packed, bias, rows):
    """The product with the weight that is held, in float64; for codes of eight bits with rounded tokens."""
    values, columns, starts, scales, _ = packed
    dense = block_sparse.expand(values, columns, starts, scales, rows=rows, width=x.shape[1]).double()
    if scales is not None:
        codes, size = block_sparse.round_tokens(x)
        x = codes.double() * size.double()
    return x.double() @ dense.T + (0 if bias is None else bias.double())


def close(found, expected, tolerance=3e-6):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-12


def call(run, x, packed, bias, rows, **more):
    values, columns, starts, scales, sums = packed
    return run(x, values, columns, starts, bias, scales, sums, rows, **more)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("r", [1, 3, 4, 16])
def test_paths_agree_with_the_equation(r, bits):
    for count, rows, width, density in SHAPES[:4]:
        packed = block_sparse.pack(weight(rows, width, r, density), r, bits=bits)
        x, bias = inputs(count, width), torch.randn(rows, generator=torch.Generator().manual_seed(2))
        values, columns, starts, scales, sums = packed
        block_sparse.check(*packed, rows=rows, width=width)
        expected = wanted(x, packed, bias, rows)
        for run in (block_sparse.naive_linear, block_sparse.linear):
            assert close(run(x, values, columns, starts, bias, scales, sums, rows=rows), expected)
        assert close(call(block_sparse.torch_linear, x, packed, bias, rows), expected)
        assert close(call(block_sparse.torch_linear, x, packed, None, rows), expected - bias.double())


@needs_compiler
@pytest.mark.parametrize("isa", ["AVX512", "AVX2", "plain"])
@pytest.mark.parametrize("r", [1, 2, 4, 8, 12, 16, 32, 64])
def test_every_block_and_instruction_set(r, isa):
    if isa == "AVX512" and native.capability() != isa:
        pytest.skip("this CPU has no AVX-512")
    for bits in (32, 8):
        for count, rows, width, density in [*SHAPES, (1, 130, 300, 0.5), (5, 64, 33, 0.5), (300, 40, 70, 0.5)]:
            packed = block_sparse.pack(weight(rows, width, r, density), r, bits=bits)
            x, bias = inputs(count, width), inputs(1, rows)[0]
            expected = wanted(x, packed, bias, rows)
            for vnni in (True, False):
                assert close(call(block_sparse.native_linear, x, packed, bias, rows, isa=isa, vnni=vnni), expected)


@pytest.mark.parametrize("bits, error", [(32, 1e-6), (8, 0.02)])
@pytest.mark.parametrize("block", [(4, 1), (4, 4), (16, 16), (3, 5)])
def test_packing_keeps_the_weight(block, bits, error):
    dense = weight(50, 77, block[0], 0.3, block[1])
    values, columns, starts, scales, sums = block_sparse.pack(dense, *block, bits=bits)
    back = block_sparse.expand(values, columns, starts, scales, rows=50, width=77)
    assert torch.equal(back != 0, (dense != 0) & (back != 0))
    assert (back - dense).norm() <= error * dense.norm()
    if bits == 8:
        padded = F.pad(back, (0, 0, 0, len(scales) - 50))
        assert torch.equal(sums, torch.where(scales > 0, padded.sum(1) / scales, 0).round().int())
        assert len(columns) % 4 == 0


@needs_compiler
def test_threads_agree_bit_for_bit():
    for bits in (32, 8):
        packed = block_sparse.pack(weight(203, 256, 16, 0.3), 16, bits=bits)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append([call(block_sparse.native_linear, inputs(m, 256), packed, None, 203) for m in (1, 3, 70)])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("r", [4, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_wide_weights_and_many_tokens(threads, r):
    """A panel of tokens is cut into slabs, and either panels or weights are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for bits in (32, 8):
            packed = block_sparse.pack(weight(70, 3001, r, 0.2), r, bits=bits)
            for count in (60, 700):
                x = inputs(count, 3001)
                assert close(call(block_sparse.native_linear, x, packed, None, 70), wanted(x, packed, None, 70))
                found = call(block_sparse.native_linear, x, packed, None, 70, vnni=False)
                assert close(found, wanted(x, packed, None, 70))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_keeps_its_dtype(dtype, tolerance):
    values, columns, starts, _, _ = packed = block_sparse.pack(weight(40, 96, 8, 0.4), 8)
    x, bias = inputs(6, 96).to(dtype), inputs(1, 40)[0].to(dtype)
    found = block_sparse.linear(x.view(2, 3, 96), values, columns, starts, bias, rows=40)
    assert found.dtype == dtype and found.shape == (2, 3, 40)
    assert close(found.view(6, 40), wanted(x.float(), packed, bias.float(), 40), tolerance)


@pytest.mark.parametrize("bits", [32, 8])
def test_gradient_of_the_input(bits):
    values, columns, starts, scales, sums = block_sparse.pack(weight(150, 96, 16, 0.4), 16, bits=bits)
    dense = block_sparse.expand(values, columns, starts, scales, rows=150, width=96)
    x, upstream = inputs(3, 96).requires_grad_(), inputs(3, 150)
    block_sparse.linear(x, values, columns, starts, None, scales, sums, rows=150).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dense, rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_come_out_where_they_went_in():
    for bits in (32, 8):
        for count in (3, 40):
            packed = block_sparse.pack(weight(32, 20, 4, 1.0)[:16], 4, bits=bits)
            x = torch.ones(count, 20)
            x[1, 19], x[2, 0] = torch.nan, torch.inf
            y = block_sparse._compute(x, *packed[:3], None, *packed[3:], 16)
            assert y[0].isfinite().all() and not y[1:3, :8].isfinite().any() and y[3:].isfinite().all()


def test_operator_is_sound_and_counts_its_work():
    for bits in (32, 8):
        values, columns, starts, scales, sums = block_sparse.pack(weight(48, 96, 4, 0.4), 4, bits=bits)
        x = inputs(3, 96)
        torch.library.opcheck(
            torch.ops.hasten.block_sparse_linear, (x, values, columns, starts, None, scales, sums, 48)
        )
        with FlopCounterMode(display=False) as counter:
            block_sparse.linear(x, values, columns, starts, None, scales, sums, rows=48)
        assert counter.get_total_flops() == 2 * 3 * values.numel()
    assert block_sparse.linear(torch.empty(0, 7, 96), values, columns, starts, None, scales, sums, rows=48).numel() == 0


def test_what_is_no_weight_is_refused():
    values, columns, starts, scales, sums = block_sparse.pack(weight(50, 77, 4, 0.5), 4, bits=8)
    for wrong, word in (
        ((values, columns, starts), "come with scales and sums"),
        ((values, columns - 1, starts, scales, sums), "outside a width"),
        ((values, columns, starts.flip(0), scales, sums), "must rise from 0"),
        ((values[:-1], columns, starts, scales, sums), "do not fit"),
        ((values, columns, starts, scales[1:], sums), "must have 52 entries"),
        ((values, columns.long(), starts, scales, sums), "columns and starts int32"),
    ):
        with pytest.raises(UsageError, match=word):
            block_sparse.check(*wrong, rows=50, width=77)
    with pytest.raises(UsageError, match="1 to 64 rows"):
        block_sparse.pack(torch.zeros(4, 4), 65)
