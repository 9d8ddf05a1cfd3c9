"""`int8.linear` on a GPU, in Triton: tokens are rounded by one kernel, multiplied and scaled by another.

Held to the equation in Triton's interpreter; not yet run on a GPU, so its block sizes are reasoned, not measured.

The codes, and so the integers that are summed, are those of every other path; sums are int32 from the tensor cores.
The weight is read in the order that the CPU kernels have, [rows / 16][columns / 4][16][4]: 16 rows are one run of
bytes. `sums` is not needed here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hasten.math.shapes import Float, Int

LEAST, MOST = 1e-30, 127  # as in `int8`
_CHUNK = 4096  # numbers of a token that are rounded at a time
_ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away: rounds to nearest, ties to even
_HUGE = tl.constexpr(float("inf"))


@triton.jit
def _encode(
    x, inverses, codes, factors, columns, wide, LEAST: tl.constexpr, MOST: tl.constexpr, GIVEN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Codes int8 [tokens, wide] and factors [tokens] of a token. GIVEN: 0 per token, 1 one scale, 2 many."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHUNK)
    top = tl.zeros((CHUNK,), dtype=tl.float32)
    bad = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(0, columns, CHUNK):
        v = tl.load(x + token * columns + start + k, mask=start + k < columns, other=0).to(tl.float32)
        top = tl.maximum(top, tl.abs(v))
        if GIVEN == 0:
            bad |= tl.where(tl.abs(v) < _HUGE, 0, 1)
        else:
            bad |= tl.where(v == v, 0, 1)
    most = tl.max(top, axis=0)
    broken = tl.max(bad, axis=0) > 0
    some = (most >= LEAST) & (broken == 0)
    whole = tl.where(some, most, 1.0)
    limit = tl.full((), MOST, dtype=tl.float32)
    factor = tl.where(some, tl.div_rn(whole, limit), 0.0)
    inverse = tl.where(some, tl.div_rn(limit, whole), 0.0)
    if GIVEN != 0:
        factor = tl.full((), 1.0, dtype=tl.float32)
    tl.store(factors + token, tl.where(broken, float("nan"), factor))
    for start in range(0, wide, CHUNK):
        v = tl.load(x + token * columns + start + k, mask=start + k < columns, other=0).to(tl.float32)
        if GIVEN == 0:
            v = v * inverse
        elif GIVEN == 1:
            v = v * tl.load(inverses)
        else:
            v = v * tl.load(inverses + start + k, mask=start + k < columns, other=0)
        v = tl.where(v == v, tl.minimum(tl.maximum(v, -limit), limit), 0.0)
        rounded = (v + _ROUND) - _ROUND
        tl.store(codes + token * wide + start + k, rounded.to(tl.int8), mask=start + k < wide)


@triton.jit
def _product(
    codes, packed, scales, factors, bias, y, count, rows, wide,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, FACTORS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y a program. EVEN: `wide` is a multiple of BK."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    some_m, some_n = m < count, n < rows
    x = codes + m.to(tl.int64)[:, None] * wide + k[None, :]
    lane = packed + (n // 16).to(tl.int64) * (16 * wide) + (n % 16) * 4
    w = lane[None, :] + (k // 4 * 64 + k % 4)[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, wide, BK):
        if EVEN:
            one = tl.load(x, mask=some_m[:, None], other=0)
            other = tl.load(w, mask=some_n[None, :], other=0)
        else:
            one = tl.load(x, mask=some_m[:, None] & (start + k < wide)[None, :], other=0)
            other = tl.load(w, mask=some_n[None, :] & (start + k < wide)[:, None], other=0)
        total = tl.dot(one, other, total, out_dtype=tl.int32)
        x += BK
        w += BK * 16
    scale = tl.load(scales + n, mask=some_n, other=0)[None, :]
    if FACTORS:
        scale = tl.load(factors + m, mask=some_m, other=0)[:, None] * scale
    out = total.to(tl.float32) * scale
    if BIAS:
        out += tl.load(bias + n, mask=some_n, other=0).to(tl.float32)[None, :]
    tl.store(
        y + m.to(tl.int64)[:, None] * rows + n[None, :], out.to(y.dtype.element_ty),
        mask=some_m[:, None] & some_n[None, :],
    )  # fmt: skip


def encode(
    x: Float[Tensor, "tokens columns"], wide: int, scale: Float[Tensor, "given"] | None = None
) -> tuple[Int[Tensor, "tokens wide"], Float[Tensor, "tokens"]]:
    """`int8.encode` with the codes as int8, zeros from the last column to `wide`."""
    count, columns = x.shape
    codes = torch.empty(count, wide, dtype=torch.int8, device=x.device)
    factors = torch.empty(count, device=x.device)
    inverses = factors if scale is None else 1 / scale.float()
    with torch.cuda.device_of(x):
        _encode[(count,)](
            x, inverses, codes, factors, columns, wide, LEAST=LEAST, MOST=MOST,
            GIVEN=0 if scale is None else 1 if len(scale) == 1 else 2,
            CHUNK=min(_CHUNK, triton.next_power_of_2(wide)), num_warps=4,
        )  # fmt: skip
    return codes, factors


def linear(
    x: Float[Tensor, "... columns"] | Int[Tensor, "... columns"],
    packed: Int[Tensor, "blocks fours 16 4"],
    scales: Float[Tensor, "rows"],
    sums: Int[Tensor, "rows"],
    bias: Float[Tensor, "rows"] | None = None,
    scale: Float[Tensor, "given"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... rows"]:
    """`int8.linear`; at most 65536 columns, so that sums fit 32 bits."""
    (*outer, columns), rows, wide = x.shape, len(scales), packed.shape[1] * 4
    flat = x.reshape(-1, columns).contiguous()
    count = len(flat)
    wanted = dtype or (torch.float32 if x.dtype is torch.int8 else x.dtype)
    if count == 0 or rows == 0:
        return scales.new_empty(*outer, rows, dtype=wanted)
    dynamic = x.dtype is not torch.int8
    codes, factors = encode(flat, wide, scale) if dynamic else (F.pad(flat, (0, wide - columns)), None)
    held = wanted if wanted in (torch.float16, torch.bfloat16) else torch.float32
    y = torch.empty(count, rows, dtype=held, device=x.device)
    tile_x, tile_w, run, warps = _tiles(count)
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(rows, tile_w), triton.cdiv(count, tile_x))](
            codes, packed, scales, factors, bias, y, count, rows, wide, BM=tile_x, BN=tile_w, BK=run,
            EVEN=wide % run == 0, FACTORS=dynamic, BIAS=bias is not None, num_warps=warps, num_stages=4,
        )  # fmt: skip
    return y.to(wanted).view(*outer, rows)


def _tiles(count: int) -> tuple[int, int, int, int]:
    """Tokens, rows and columns of a tile, and its warps. A few tokens: narrow tiles, so that all of the GPU reads W."""
    if count <= 16:  # noqa: PLR2004
        return 16, 32, 128, 4
    return (64, 64, 64, 4) if count <= 64 else (128, 128, 64, 8)  # noqa: PLR2004
