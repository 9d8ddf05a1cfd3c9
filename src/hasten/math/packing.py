"""Codes of 2, 3, 4, 6 or 8 bits packed into bytes, in the layout that the low-bit kernels read directly.

A row of codes is cut into units, a unit into one or two planes: 6 bits are a plane of the four low bits, then one of
the two high bits; 3 bits are two low ones, then the high one. A whole unit's first plane has 64 bytes.

    bits   planes   columns of a unit   bytes of a unit
    2      2        256                 64
    3      2, 1     256                 64 + 32
    4      4        128                 64
    6      4, 2     128                 64 + 32
    8      8        64                  64

In a plane of 2, 4 or 8 bits and P bytes, byte `i` holds the columns i, i + P, i + 2P, ... of the unit, from the lowest
bits up. In a plane of 1 bit, bit `i % 8` of byte `i // 8` is column i: 64 columns are one little-endian word. So an
`and` and a shift give 64 neighbouring columns (32 in the second plane of 6 bits, whose bytes serve four runs of 32) as
as many neighbouring bytes: the operand of products of unsigned with signed bytes, with the columns in their order.

A row ends with half a unit (half the columns, half the bytes of each plane) where that is enough; missing columns are
zero codes.
"""

import torch
from torch import Tensor

from hasten.math.shapes import Int

FIRST = 64  # bytes of a whole unit's first plane
BITS = (2, 3, 4, 6, 8)
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


def unit(bits: int) -> int:
    """Columns of a whole unit."""
    return FIRST * 8 // _PLANES[bits][0]


def padded(columns: int, bits: int) -> int:
    """Columns of a packed row: up to the next half unit."""
    half = unit(bits) // 2
    return -(-columns // half) * half


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return padded(columns, bits) * bits // 8


def _cuts(columns: int, bits: int) -> list[tuple[int, int]]:
    """(first column, columns) of each unit of a row; the last may be a half."""
    whole, end = unit(bits), padded(columns, bits)
    return [(start, min(whole, end - start)) for start in range(0, end, whole)]


def _place(column: int, plane: int, width: int) -> tuple[int, int]:
    """The byte of the plane and the bit of the byte where a column of a unit of `width` columns starts."""
    if plane == 1:
        return column // 8, column % 8
    size = width * plane // 8
    return column % size, column // size * plane


def naive_pack(codes: Int[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows bytes"]:
    """`pack` written as loops over the codes."""
    rows, columns = codes.shape
    packed = torch.zeros(rows, row_bytes(columns, bits), dtype=torch.uint8)
    for row in range(rows):
        for start, width in _cuts(columns, bits):
            base = start * bits // 8
            taken = 0  # bits of the code that earlier planes hold
            for plane in _PLANES[bits]:
                for column in range(start, min(start + width, columns)):
                    byte, place = _place(column - start, plane, width)
                    packed[row, base + byte] |= (int(codes[row, column]) >> taken) % 2**plane << place
                base += width * plane // 8
                taken += plane
    return packed


def pack(codes: Int[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows bytes"]:
    """Packs codes (0 to 2^bits - 1, any integer type); the result is uint8 on the same device."""
    assert bits in BITS, bits
    rows, columns = codes.shape
    wide = torch.zeros(rows, padded(columns, bits), dtype=torch.uint8, device=codes.device)
    wide[:, :columns] = codes
    whole = padded(columns, bits) // unit(bits) * unit(bits)
    parts = [_pack_units(wide[:, :whole], bits, unit(bits)), _pack_units(wide[:, whole:], bits, unit(bits) // 2)]
    return torch.cat(parts, dim=1)


def _pack_units(codes: Tensor, bits: int, width: int) -> Tensor:
    codes_RUC = codes.unflatten(1, (-1, width)) if codes.shape[1] else codes.view(codes.shape[0], 0, width)
    planes, taken = [], 0
    for plane in _PLANES[bits]:
        part_RUC = (codes_RUC >> taken) & (2**plane - 1)
        slots = 8 // plane
        part_RUBS = part_RUC.unflatten(2, (-1, 8)) if plane == 1 else part_RUC.unflatten(2, (slots, -1)).mT
        places = torch.arange(0, 8, plane, device=codes.device, dtype=torch.uint8)
        planes.append((part_RUBS << places).sum(dim=3, dtype=torch.uint8))
        taken += plane
    return torch.cat(planes, dim=2).flatten(1)


def naive_unpack(packed: Int[Tensor, "rows bytes"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """`unpack` written as loops over the codes."""
    codes = torch.zeros(packed.shape[0], columns, dtype=torch.uint8)
    for row in range(packed.shape[0]):
        for start, width in _cuts(columns, bits):
            base, taken = start * bits // 8, 0
            for plane in _PLANES[bits]:
                for column in range(start, min(start + width, columns)):
                    byte, place = _place(column - start, plane, width)
                    codes[row, column] |= (int(packed[row, base + byte]) >> place) % 2**plane << taken
                base += width * plane // 8
                taken += plane
    return codes


def unpack(packed: Int[Tensor, "rows bytes"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """The codes, uint8, of rows packed by `pack` from `columns` columns."""
    assert packed.shape[1] == row_bytes(columns, bits), (packed.shape, bits, columns)
    whole = padded(columns, bits) // unit(bits) * unit(bits) * bits // 8
    units, rest = packed[:, :whole], packed[:, whole:]
    codes = [_unpack_units(units, bits, unit(bits)), _unpack_units(rest, bits, unit(bits) // 2)]
    return torch.cat(codes, dim=1)[:, :columns].contiguous()


def _unpack_units(packed: Tensor, bits: int, width: int) -> Tensor:
    bytes_RUB = packed.reshape(packed.shape[0], packed.shape[1] * 8 // (width * bits), width * bits // 8)
    codes, base, taken = packed.new_zeros(()), 0, 0
    for plane in _PLANES[bits]:
        size = width * plane // 8
        places = torch.arange(0, 8, plane, device=packed.device, dtype=torch.uint8)
        parts_RUBS = (bytes_RUB[..., base : base + size, None] >> places) & (2**plane - 1)
        codes = codes | (parts_RUBS if plane == 1 else parts_RUBS.mT).flatten(2) << taken
        base += size
        taken += plane
    return codes.flatten(1)
