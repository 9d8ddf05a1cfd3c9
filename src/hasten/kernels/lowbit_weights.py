"""What a weight of packed codes consists of (see `lowbit`), its checks, and its dense form.

Statistics (`scales`, `zeros`) are fp32, or smaller where that loses nothing (`compact`): scales fp16; zeros fp16,
uint8, or one number for the whole weight. With `levels` both are uint8 [rows, groups] and themselves quantized, each
run of 16 groups by the four numbers of `levels` [rows, ceil(groups / 16), 4] (SpQR, arXiv 2306.03078, section 4):

    scale = levels[..., 0] * (scales - levels[..., 1]),    zero = levels[..., 2] * (zeros - levels[..., 3])
"""

from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.math import packing
from hasten.math.shapes import Float, Int

TABLE_BITS = 4
LEVEL_GROUPS = 16  # groups whose statistics share their levels


def check(
    packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group: int, columns: int,
    tables: Tensor | None = None, levels: Tensor | None = None, activations: int = 32,
) -> None:  # fmt: skip
    """Refuses what the kernels can't read safely; the arguments are those of `lowbit.linear`.

    Raises:
        UsageError: a wrong shape, dtype or option, or a table's number that no table has.
    """
    if bits not in packing.BITS or group < 1 or columns < 1 or activations not in (8, 32):
        raise UsageError(f"bits={bits} must be one of {packing.BITS}, group={group} and columns={columns} positive, "
                         f"activations={activations} 8 or 32")  # fmt: skip
    if packed.ndim != 2 or not packed.is_contiguous():
        raise UsageError(f"packed must be a contiguous matrix, uint8 [rows, bytes]; it has shape {list(packed.shape)}")
    rows, groups = packed.shape[0], -(-columns // group)
    whole, width = (rows, groups), packing.row_bytes(columns, bits)
    if packed.dtype != torch.uint8 or packed.shape != (rows, width):
        raise UsageError(f"packed must be uint8 [rows, {width}] for {columns} columns of {bits} bits; "
                         f"it is {packed.dtype} {list(packed.shape)}")  # fmt: skip
    statistic = (torch.uint8,) if levels is not None else (torch.float32, torch.float16)
    zero = (torch.int32,) if tables is not None else (*statistic, torch.uint8)
    expected: list[tuple[str, Tensor | None, Any, tuple[torch.dtype, ...]]] = [
        ("scales", scales, whole, statistic),
        ("zeros", zeros, (1, 1) if zeros.shape == (1, 1) and levels is None else whole, zero),
        ("bias", bias, (rows,), (torch.float32, torch.float16, torch.bfloat16)),
        ("levels", levels, (rows, -(-groups // LEVEL_GROUPS), 4), (torch.float32,)),
    ]
    if tables is not None:
        if bits > TABLE_BITS or activations != 32:
            raise UsageError(f"tables need at most 4 bits and activations=32, not {bits} and {activations}")
        expected.append(("tables", tables, (len(tables), 2**bits), (torch.float32,)))
        if zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) < len(tables):
            raise UsageError(f"zeros must be numbers of tables, 0 to {len(tables) - 1}")
    for name, part, shape, kinds in expected:
        if part is not None and not part.is_contiguous():
            raise UsageError(f"{name} must be contiguous")
        if part is not None and (part.shape != shape or part.dtype not in kinds or part.device != packed.device):
            raise UsageError(f"{name} must be {list(shape)}, {' or '.join(map(str, kinds))}, on {packed.device}; "
                             f"it is {list(part.shape)}, {part.dtype}, on {part.device}")  # fmt: skip


def compact(
    scales: Float[Tensor, "rows groups"], zeros: Float[Tensor, "rows groups"]
) -> tuple[Float[Tensor, "rows groups"], Tensor]:
    """The same numbers in the smallest types that hold them exactly: less to read for every product.

    Scales become fp16 only where every one is an fp16 number; zeros become one number [1, 1] where all are equal,
    uint8 where all are whole numbers from 0 to 255, fp16 where that is exact.
    """
    half = scales.half()
    scales = half if torch.equal(half.float(), scales.float()) else scales.float()
    if zeros.numel() and bool((zeros == zeros[:1, :1]).all()):
        return scales, zeros[:1, :1].float()
    for kind in (torch.uint8, torch.float16):
        small = zeros.to(kind)
        if torch.equal(small.float(), zeros.float()):
            return scales, small
    return scales, zeros.float()


def statistics(scales: Tensor, zeros: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zeros as fp32 [rows, groups] (zeros that are numbers of tables stay int32)."""
    number = zeros.dtype == torch.int32
    if levels is None:
        return scales.float(), (zeros if number else zeros.float()).expand(scales.shape)
    at = torch.arange(scales.shape[1], device=scales.device) // LEVEL_GROUPS
    a, b, c, d = levels.float()[:, at].unbind(-1)
    return a * (scales - b), zeros if number else c * (zeros - d)


def dequantize(
    packed: Int[Tensor, "rows bytes"],
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group: int,
    columns: int,
    tables: Float[Tensor, "count entries"] | None = None,
    levels: Float[Tensor, "rows runs 4"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """The dense weight in fp32."""
    codes = packing.unpack(packed, bits, columns)
    spread = torch.arange(columns, device=packed.device) // group
    scale, zero = (part[:, spread] for part in statistics(scales, zeros, levels))
    return scale * (codes.float() - zero if tables is None else tables.float()[zero.long(), codes.long()])
