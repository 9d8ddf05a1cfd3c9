"""Packed codes: the fast functions agree with the loops, and what is packed comes back."""

import pytest
import torch

from hasten.math import packing


def codes_of(rows, columns, bits):
    make = torch.Generator().manual_seed(columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=make, dtype=torch.uint8)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("columns", [1, 31, 64, 129, 200, 256, 400])
def test_fast_agrees_with_loops_and_round_trips(bits, columns):
    codes = codes_of(2, columns, bits)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, packing.row_bytes(columns, bits))
    assert torch.equal(packed, packing.naive_pack(codes, bits))
    assert torch.equal(packing.unpack(packed, bits, columns), codes)
    assert torch.equal(packing.naive_unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", packing.BITS)
def test_a_wide_row_takes_exactly_its_bits(bits):
    assert packing.row_bytes(4096, bits) == 4096 * bits // 8
    assert packing.pack(codes_of(3, 4096, bits), bits).numel() == 3 * 4096 * bits // 8


def set_bits(columns, bits, **codes):
    """Which bits are set, as {byte: value}, when these columns hold these codes."""
    row = torch.zeros(1, columns, dtype=torch.uint8)
    for column, code in codes.items():
        row[0, int(column.removeprefix("c"))] = code
    packed = packing.pack(row, bits)[0]
    return {int(i): int(packed[i]) for i in packed.nonzero()[:, 0]}


def test_layout_golden():
    """The low nibble of byte 0 is column 0, the high one column 64; a trailing half unit steps by 32."""
    assert set_bits(128, 4, c0=5, c64=9, c1=3, c127=15) == {0: 0x95, 1: 3, 63: 0xF0}
    assert set_bits(64, 4, c0=5, c32=9, c63=1) == {0: 0x95, 31: 0x10}
    assert set_bits(256, 2, c0=1, c64=2, c128=3, c255=3) == {0: 0b111001, 63: 0xC0}
    assert set_bits(256, 3, c0=5, c64=6, c255=4) == {0: 0b1001, 64: 1, 72: 1, 95: 0x80}
    assert set_bits(128, 3, c32=6, c127=4) == {0: 0b1000, 36: 1, 47: 0x80}
    assert set_bits(128, 6, c0=0x2F, c33=0x10, c64=0x31, c127=0x20) == {0: 0x1F, 64: 0x32, 65: 0x04, 95: 0x80}
    assert set_bits(64, 6, c17=0x30, c32=0x25) == {0: 0x50, 32: 0x20, 33: 0x0C}
    assert set_bits(64, 8, c0=200, c63=7) == {0: 200, 63: 7}


def test_any_integer_type_and_non_contiguous_codes():
    codes = codes_of(64, 5, 4).long().t()
    assert torch.equal(packing.unpack(packing.pack(codes, 4), 4, 64).long(), codes)
