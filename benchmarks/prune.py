"""Products with zeros left out beside PyTorch's dense ones: blocks, single weights, inactive ReLU neurons."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.bench.figures import Figure, Reading, figure, race
from hasten.core.errors import HastenError
from hasten.kernels import bitmap, block_sparse, csr, relu_ffn

WIDTH, HIDDEN, TOKENS = 768, 3072, 128  # the feed-forward shape of BERT-base and GPT-2
LARGE = (2048, 5632)  # that of TinyLlama
ROWS = 16  # of a block
SIDE, MATRICES = 4096, 4  # 67 MB each in fp32: no weight is in the cache when its turn comes
CURVE = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def need(found: str) -> None:
    if found != "native":
        raise HastenError("the native kernel can't be built here: install a C++ compiler")


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Arms that compute different things are not compared."""
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= tolerance:
        raise HastenError(f"the two products differ by {error:.1%}")


@functools.cache
def blocks(rows: int, columns: int, sparsity: float, r: int = ROWS) -> Tensor:
    """A weight [rows, columns] that is zero but for random blocks of r x 1."""
    make = torch.Generator().manual_seed(0)
    kept = torch.rand(-(-rows // r), columns, generator=make) >= sparsity
    return torch.randn(rows, columns, generator=make) * kept.repeat_interleave(r, 0)[:rows]


def inputs(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def block_product(
    sparsity: float,
    bits: int,
    seconds: float,
    *,
    sizes: tuple[int, int] = (WIDTH, HIDDEN),
    tokens: int = TOKENS,
    r: int = ROWS,
) -> Reading:
    """Both products of a feed-forward layer, up and down, against F.linear in fp32."""
    need(block_sparse.path())
    width, hidden = sizes
    weights = blocks(hidden, width, sparsity, r), blocks(width, hidden, sparsity, r)
    given = inputs(tokens, width), inputs(tokens, hidden)
    packed = [block_sparse.pack(weight, r, bits=bits) for weight in weights]

    def one(x: Tensor, weight: Tensor, held: Any) -> Tensor:
        values, columns, starts, scales, sums = held
        return block_sparse.linear(x, values, columns, starts, None, scales, sums, rows=len(weight))

    def ours() -> list[Tensor]:
        return list(map(one, given, weights, packed))

    def dense() -> list[Tensor]:
        return list(map(F.linear, given, weights))

    for found, wanted in zip(ours(), dense(), strict=True):
        check(found, wanted, 0.02 if bits == 8 else 1e-5)
    share = sum(t.nbytes for held in packed for t in held if t is not None) / sum(w.nbytes for w in weights)
    reading = race(dense, ours, seconds=seconds)
    return reading.but(sparsity=sparsity, bits=bits, block=f"{r}x1", tokens=tokens, bytes_share=share)


def curve(measure: Callable[[float], Reading]) -> Reading:
    """The lowest sparsity of the curve from which on the interval of the speed lies above 1; all speeds are facts."""
    found = {sparsity: measure(sparsity) for sparsity in CURVE}
    pays = [s for s in CURVE if all((found[other].low or 0) > 1 for other in CURVE if other >= s)]
    speeds = {f"speed_{s:g}": [one.value, one.low, one.high] for s, one in found.items()}
    return Reading(min(pays, default=float("inf")), facts=speeds)


def bitmap_product(sparsity: float, dtype: torch.dtype, seconds: float) -> Reading:
    """One row of x times several matrices in turn, against F.linear in fp32."""
    need(bitmap.path())
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=make) * (torch.rand(SIDE, SIDE, generator=make) >= sparsity)
    dense = [weight.clone() for _ in range(MATRICES)]
    first = bitmap.pack(weight, dtype)
    packed = [[None if t is None else t.clone() for t in first] for _ in range(MATRICES)]
    x = inputs(1, SIDE)

    def ours() -> list[Tensor]:
        return [bitmap.linear(x, *parts[:3], None, parts[3]) for parts in packed]  # type: ignore[arg-type]

    check(ours()[0], F.linear(x, weight), 0.02 if dtype is torch.int8 else 5e-3 if dtype is torch.bfloat16 else 1e-5)
    held = sum(t.nbytes for t in first if t is not None)
    found = race(lambda: [F.linear(x, each) for each in dense], ours, seconds=seconds)
    return found.but(sparsity=sparsity, values=str(dtype).removeprefix("torch."), bytes_share=held / weight.nbytes)


def outliers(share: float, seconds: float) -> Reading:
    """The time of a dense fp32 product with one row over that of adding a sparse one to it."""
    need(csr.path())
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=make) * (torch.rand(SIDE, SIDE, generator=make) < share)
    parts, x, y = csr.compress(weight, torch.float16), inputs(1, SIDE), torch.zeros(1, SIDE)
    check(csr.product(x, *parts), F.linear(x, weight), 1e-3)
    return race(lambda: F.linear(x, weight), lambda: csr.add(y, x, *parts), seconds=seconds).but(share=share)


def relu_layer(sparsity: float, tokens: int, gated: bool, seconds: float, sizes: tuple[int, int] = LARGE) -> Reading:
    """A feed-forward layer with random weights and a threshold that leaves a share of the neurons inactive."""
    need(relu_ffn.path())
    width, hidden = sizes
    make = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(hidden, width, generator=make) / width**0.5 for _ in range(2))
    down, x = torch.randn(width, hidden, generator=make) / hidden**0.5, inputs(tokens, width)
    stored = down.t().contiguous()
    threshold = float(F.linear(x, gate).quantile(sparsity))

    def dense() -> Tensor:
        z = F.linear(x, gate)
        a = torch.where(z > threshold, z, 0)
        return F.linear(a * F.linear(x, up) if gated else a, down)

    def ours() -> Tensor:
        return relu_ffn.relu_ffn(x, gate, stored, up if gated else None, threshold=threshold)

    check(ours(), dense(), 1e-4)
    shares: dict[str, Any] = {"sparsity": sparsity, "tokens": tokens, "gated": gated, "matrices_bound": None}
    kept = 1 - sparsity
    if tokens == 1:
        shares["matrices_bound"] = 3 / (1 + 2 * kept) if gated else 2 / (1 + kept)
    return race(dense, ours, seconds=seconds).but(**shares)


def figures(quick: bool) -> Iterator[Figure]:
    seconds, each = (10, 4) if quick else (90, 30)
    base, shape = "torch fp32 dense", f"{TOKENS} tokens, {WIDTH} to {HIDDEN} and back"
    large, one = f"{LARGE[0]} to {LARGE[1]} and back", f"{SIDE}x{SIDE}, one row"

    def block(name: str, bits: int, goal: float | None, about: str, r: int = ROWS, **options: Any) -> Figure:
        against = f"{base}, 80% zeros in {r}x1, {bits} bits, {about}"
        return figure(name, lambda: block_product(0.8, bits, seconds, r=r, **options), goal=goal, against=against)

    yield block("block_sparse_80", 32, 3.0, shape)
    yield block("block_sparse_80_int8", 8, 5.0, shape)
    yield block("block_sparse_80_4x1_int8", 8, None, shape, r=4)
    yield block("block_sparse_80_large", 32, 3.0, f"512 tokens, {large}", sizes=LARGE, tokens=512)
    yield block("block_sparse_80_one", 32, None, f"one token, {large}", sizes=LARGE, tokens=1)

    def pays(name: str, measure: Callable[[float], Reading], about: str) -> Figure:
        against = f"{base}, {about}"
        return figure(name, lambda: curve(measure), unit="sparsity", better="lower", goal=0.6, against=against)

    yield pays("block_sparse_pays_from", lambda s: block_product(s, 32, each), f"{ROWS}x1, {shape}")
    yield pays("block_sparse_pays_from_int8", lambda s: block_product(s, 8, each), f"{ROWS}x1, 8 bits, {shape}")
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        kind = str(dtype).removeprefix("torch.")
        measure = functools.partial(bitmap_product, 0.7, dtype, seconds)
        yield figure(f"bitmap_70_{kind}", measure, goal=1.5, against=f"{base}, 70% zeros, {one}")
    yield pays("bitmap_pays_from", lambda s: bitmap_product(s, torch.float32, each), one)

    def relu(name: str, tokens: int, gated: bool, goal: float | None, about: str) -> Figure:
        against = f"{base}, 90% of the neurons inactive, {about}, {large}"
        return figure(name, lambda: relu_layer(0.9, tokens, gated, seconds), goal=goal, against=against)

    yield relu("relu_sparse_ffn", 1, True, 2.0, "gated, one token (at most 2.5)")
    yield relu("relu_sparse_ffn_plain", 1, False, 1.5, "no gate, one token (at most 1.8)")
    yield relu("relu_sparse_ffn_four", 4, True, None, "gated, four tokens")
    yield figure("csr_outliers", lambda: outliers(0.005, seconds), against=f"{base}, 0.5% kept, {one}")
