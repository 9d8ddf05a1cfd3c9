"""`lowbit.linear` on a GPU, in Triton: x times packed codes of 2, 3, 4, 6 or 8 bits, which are the only weight read.

Held to the equation in Triton's interpreter (which has no dot of bfloat16: that is compiled, but was never run) and not
yet run on a GPU, so its block sizes are reasoned, not measured.

A program makes a tile of y of BM rows of x and BN rows of W. It walks over the packed units of its rows, loads STEP
bytes of each row's first plane (neighbours in memory), and shifts out of them, one after the other, runs of STEP
neighbouring columns. With statistics whose group holds whole runs, what is multiplied is

    y[m, n] += scales[n, g] * (sum_k x[m, k] * code[n, k] - zeros[n, g] * sum_k x[m, k])

with fp32 sums; codes are exact in fp16 and bf16, so tensor cores lose nothing. Other groups, and tables, make
the weight of a run first and round it to x's dtype. For one row of x no tensor core is used and the weight is fp32.
Rows of few tiles are cut along the columns (SPLIT) to fill the GPU; the parts are summed in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.lowbit_weights import LEVEL_GROUPS
from hasten.math import packing
from hasten.math.shapes import Float, Int

PROGRAMS = 1024  # wanted at least, several for each multiprocessor of a large GPU
LEAST_UNITS = 4  # packed units of a row that a part of a SPLIT has at least
_RUNS = (64, 32, 16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of x; others are converted to fp32 and back


@triton.jit
def _codes(first, at, column, inside, SIZE: tl.constexpr, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Codes [BN, STEP] of the columns SLOT * SIZE + `column` of a unit at `at` whose first plane has SIZE bytes."""
    PLANE: tl.constexpr = 4 if BITS == 6 else (2 if BITS == 3 else BITS)
    codes = (first >> (SLOT * PLANE)).to(tl.int32) & ((1 << PLANE) - 1)
    c = SLOT * SIZE + column
    if BITS == 3:
        high = tl.load(at[:, None] + SIZE + (c // 8)[None, :], mask=inside[:, None], other=0)
        codes |= ((high.to(tl.int32) >> (c % 8)[None, :]) & 1) << 2
    if BITS == 6:
        high = tl.load(at[:, None] + SIZE + (c % (SIZE // 2))[None, :], mask=inside[:, None], other=0)
        codes |= ((high.to(tl.int32) >> (c // (SIZE // 2) * 2)[None, :]) & 3) << 4
    return codes


@triton.jit
def _statistics(
    scales, zeros, levels, n, g, inside, groups,
    ONE_ZERO: tl.constexpr, LEVELS: tl.constexpr, TABLES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Scales and zeros fp32 of rows n and groups g (of one shape); zeros are numbers of tables with TABLES."""
    inside = inside & (g < groups)
    scale = tl.load(scales + n * groups + g, mask=inside, other=0).to(tl.float32)
    zero = tl.load(zeros + (n * 0 if ONE_ZERO else n * groups + g), mask=inside, other=0)
    if LEVELS:
        at = levels + (n * ((groups + SHARED - 1) // SHARED) + g // SHARED) * 4
        scale = tl.load(at, mask=inside, other=0) * (scale - tl.load(at + 1, mask=inside, other=0))
        if not TABLES:
            zero = tl.load(at + 2, mask=inside, other=0) * (zero.to(tl.float32) - tl.load(at + 3, mask=inside, other=0))
    return scale, zero if TABLES else zero.to(tl.float32)


@triton.jit
def _unit(
    total, x, at, scales, zeros, levels, tables, m, n, rows_x, inside, start, columns, group, groups,
    SIZE: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
    ONE_ZERO: tl.constexpr, LEVELS: tl.constexpr, TABLES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Adds the products with one unit, whose first column is `start`, to `total` [BM, BN]."""
    PLANE: tl.constexpr = 4 if BITS == 6 else (2 if BITS == 3 else BITS)
    for part in range(SIZE // STEP):
        column = part * STEP + tl.arange(0, STEP)
        first = tl.load(at[:, None] + column[None, :], mask=inside[:, None], other=0)
        for slot in tl.static_range(8 // PLANE):
            codes = _codes(first, at, column, inside, SIZE, slot, BITS)
            k = start + slot * SIZE + column
            some = (m < rows_x)[:, None] & (k < columns)[None, :]
            xs = tl.load(x + m.to(tl.int64)[:, None] * columns + k[None, :], mask=some, other=0)
            if EVEN:
                g = n * 0 + (start + slot * SIZE + part * STEP) // group
                scale, zero = _statistics(scales, zeros, levels, n, g, inside, groups, ONE_ZERO, LEVELS, TABLES, SHARED)
                scale, zero = scale[:, None], zero[:, None]
            else:
                g = n[:, None] * 0 + (k // group)[None, :]
                scale, zero = _statistics(
                    scales, zeros, levels, n[:, None], g, inside[:, None], groups, ONE_ZERO, LEVELS, TABLES, SHARED
                )
            what = tl.load(tables + zero * (1 << BITS) + codes) if TABLES else codes.to(tl.float32)
            if BM == 1:
                if not TABLES:
                    what = what - zero
                total += tl.sum(scale * what * xs.to(tl.float32), axis=1)[None, :]
            elif EVEN:
                found = tl.dot(xs, tl.trans(what.to(xs.dtype)), input_precision="ieee")
                if not TABLES:
                    found -= tl.sum(xs.to(tl.float32), axis=1)[:, None] * tl.trans(zero)
                total += tl.trans(scale) * found
            else:
                if not TABLES:
                    what = what - zero
                total += tl.dot(xs, tl.trans((scale * what).to(xs.dtype)), input_precision="ieee")
    return total


@triton.jit
def _product(
    x, packed, scales, zeros, levels, tables, bias, y, rows_x, rows, columns, width, group, groups, units, each,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr,
    EVEN: tl.constexpr, ONE_ZERO: tl.constexpr, LEVELS: tl.constexpr, TABLES: tl.constexpr, BIAS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Program (row tile of W, row tile of x, part): `each` whole units of `units`, the last part also the half unit."""
    PLANE: tl.constexpr = 4 if BITS == 6 else (2 if BITS == 3 else BITS)
    UNIT: tl.constexpr = 512 // PLANE
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    inside = n < rows
    row = packed + n * width
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for unit in range(part * each, tl.minimum(units, part * each + each)):
        total = _unit(
            total, x, row + unit * (UNIT * BITS // 8), scales, zeros, levels, tables, m, n, rows_x, inside,
            unit * UNIT, columns, group, groups, 64, STEP, BITS, BM, EVEN, ONE_ZERO, LEVELS, TABLES, SHARED,
        )  # fmt: skip
    if HALF:  # noqa: SIM102 - known when compiled
        if part == tl.num_programs(2) - 1:
            total = _unit(
                total, x, row + units * (UNIT * BITS // 8), scales, zeros, levels, tables, m, n, rows_x, inside,
                units * UNIT, columns, group, groups, 32, 32 if STEP == 64 else STEP, BITS, BM, EVEN, ONE_ZERO, LEVELS,
                TABLES, SHARED,
            )  # fmt: skip
    if BIAS:  # noqa: SIM102
        if part == 0:
            total += tl.load(bias + n, mask=inside, other=0).to(tl.float32)[None, :]
    place = y + (part.to(tl.int64) * rows_x + m.to(tl.int64)[:, None]) * rows + n[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(m < rows_x)[:, None] & inside[None, :])


def linear(
    x: Float[Tensor, "... columns"],
    packed: Int[Tensor, "rows bytes"],
    scales: Tensor,
    zeros: Tensor,
    bias: Float[Tensor, "rows"] | None,
    bits: int,
    group: int,
    tables: Float[Tensor, "count entries"] | None = None,
    levels: Float[Tensor, "rows runs 4"] | None = None,
) -> Float[Tensor, "... rows"]:
    """`lowbit.linear` of arguments that `lowbit_weights.check` has passed, in x's dtype."""
    *outer, columns = x.shape
    flat = x.reshape(-1, columns).to(x.dtype if x.dtype in _DTYPES else torch.float32).contiguous()
    count, (rows, width) = len(flat), packed.shape
    if count == 0 or rows == 0:
        return x.new_empty(*outer, rows)
    whole = packing.unit(bits)
    units, half = packing.padded(columns, bits) // whole, packing.padded(columns, bits) % whole > 0
    step = next((run for run in _RUNS if group % run == 0), _RUNS[1])
    tile_x, tile_w, warps = _tiles(count)
    tiles = triton.cdiv(rows, tile_w), triton.cdiv(count, tile_x)
    parts = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), units // LEAST_UNITS))
    y = torch.empty(parts, count, rows, dtype=flat.dtype if parts == 1 else torch.float32, device=x.device)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 3}
    with torch.cuda.device_of(x):
        _product[(*tiles, parts)](
            flat, packed, scales, zeros, levels, tables, bias, y, count, rows, columns, width, group, scales.shape[1],
            units, triton.cdiv(units, parts) or 1, BITS=bits, BM=tile_x, BN=tile_w, STEP=step, HALF=half,
            EVEN=group % step == 0, ONE_ZERO=zeros.numel() == 1, LEVELS=levels is not None, TABLES=tables is not None,
            BIAS=bias is not None, SHARED=LEVEL_GROUPS, **options,
        )  # fmt: skip
    return (y[0] if parts == 1 else y.sum(0)).to(x.dtype).view(*outer, rows)


def _tiles(count: int) -> tuple[int, int, int]:
    """Rows of x and rows of W in a tile, and its warps. One row of x: a warp of its own for eight rows of W."""
    if count == 1:
        return 1, 8, 1
    return (16, 64, 4) if count <= 16 else (32, 64, 4) if count <= 32 else (64, 64, 4)  # noqa: PLR2004
