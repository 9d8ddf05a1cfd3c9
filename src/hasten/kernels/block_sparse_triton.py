"""`block_sparse.linear` on a GPU, in Triton: one program multiplies the kept columns of one band with a tile of tokens.

Held to the equation in Triton's interpreter (which has no dot of bfloat16: that is compiled, but was never run) and not
yet run on a GPU, so its block sizes are reasoned, not measured.

x is transposed first, so that a column of W picks a run of neighbouring numbers. fp32 values are rounded to x's dtype
for the tensor cores (x of fp32: exact products, fp32 sums); codes of eight bits are summed in int32. Bands lower than
16 rows fill a part of the smallest tile of a tensor core only: r of 16 and more pays best. One token is multiplied
without tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels import block_sparse
from hasten.math.shapes import Float, Int

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of x; others are converted to fp32 and back


@triton.jit
def _product(
    xt, values, columns, starts, scales, factors, bias, y, count, rows,
    R: tl.constexpr, TALL: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A tile [TALL, BM] of y transposed; xt is [columns, tokens]. TALL: R up to a power of two."""
    band = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    i = tl.arange(0, TALL)
    begin, end = tl.load(starts + band), tl.load(starts + band + 1)
    total = tl.zeros((TALL, BM), dtype=tl.int32 if CODED else tl.float32)
    for first in range(begin, end, BE):
        e = first + tl.arange(0, BE)
        column = tl.load(columns + e, mask=e < end, other=0).to(tl.int64)
        some = (i < R)[:, None] & (e < end)[None, :]
        place = e.to(tl.int64)
        if CODED:
            w = tl.load(values + (place // 4 * (4 * R) + place % 4)[None, :] + (i * 4)[:, None], mask=some, other=0)
        else:
            w = tl.load(values + (place * R)[None, :] + i[:, None], mask=some, other=0)
        here = (e < end)[:, None] & (m < count)[None, :]
        xs = tl.load(xt + (column * count)[:, None] + m[None, :], mask=here, other=0)
        if BM == 1:
            row = tl.trans(xs)
            total += tl.sum(w.to(total.dtype) * row.to(total.dtype), axis=1)[:, None]
        elif CODED:
            total = tl.dot(w, xs, total, out_dtype=tl.int32)
        else:
            total = tl.dot(w.to(xs.dtype), xs, total, input_precision="ieee")
    n = band * R + i
    inside = (i < R) & (n < rows)
    out = total.to(tl.float32)
    if CODED:
        scale = tl.load(scales + n, mask=inside, other=0)[:, None]
        out *= scale * tl.load(factors + m, mask=m < count, other=0)[None, :]
    if BIAS:
        out += tl.load(bias + n, mask=inside, other=0).to(tl.float32)[:, None]
    place = y + m.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(place, out.to(y.dtype.element_ty), mask=inside[:, None] & (m < count)[None, :])


def linear(
    x: Float[Tensor, "... width"],
    values: Tensor,
    columns: Int[Tensor, "n"],
    starts: Int[Tensor, "bands+1"],
    bias: Float[Tensor, "rows"] | None,
    scales: Float[Tensor, "padded"] | None,
    sums: Int[Tensor, "padded"] | None,
    rows: int,
) -> Float[Tensor, "... rows"]:
    """`block_sparse.linear` of a weight that `block_sparse.check` has passed, in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    count, r, bands = len(flat), values.shape[1], len(starts) - 1
    if count == 0 or rows == 0:
        return x.new_empty(*x.shape[:-1], rows)
    dtype = x.dtype if x.dtype in _DTYPES else torch.float32
    factors = None
    if scales is None:
        flat = flat.to(dtype)
    else:
        codes, factors = block_sparse.round_tokens(flat.float())
        flat = codes.nan_to_num(0.0).to(torch.int8)
    y = torch.empty(count, rows, dtype=dtype, device=x.device)
    tile, warps = _tile(count)
    tall = max(1 if tile == 1 else 16, triton.next_power_of_2(r))
    with torch.cuda.device_of(x):
        _product[(bands, triton.cdiv(count, tile))](
            flat.t().contiguous(), values, columns, starts, scales, factors, bias, y, count, rows, R=r, TALL=tall,
            BM=tile, BE=128 if tile == 1 else 64, CODED=scales is not None, BIAS=bias is not None, num_warps=warps,
            num_stages=3,
        )  # fmt: skip
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def _tile(count: int) -> tuple[int, int]:
    """Tokens of a tile, and its warps."""
    if count == 1:
        return 1, 2
    return (16, 4) if count <= 16 else (64, 4) if count <= 64 else (128, 4)  # noqa: PLR2004
