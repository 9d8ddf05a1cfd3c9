"""Products of many tokens: int8 weights and activations, and four-bit weights from batch 1 to 64."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.bench.figures import Figure, Reading, figure, race
from hasten.core.errors import HastenError
from hasten.kernels import int8, lowbit, lowbit_gemm, native
from hasten.math import packing

SMALL, LARGE = (512, 2048, 2048), (2048, 4096, 4096)  # tokens, inputs, outputs
SIDE, BITS, GROUP = 4096, 4, 128
BATCHES = (1, 4, 16, 32, 64)
MATRICES = 8  # 0.5 GB in fp32: their turn comes when they are out of the nearest caches, as in a model


@functools.cache
def operands(tokens: int, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.randn(tokens, columns, generator=make), torch.randn(rows, columns, generator=make) / columns**0.5


@functools.cache
def weight(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, packed codes and scales of the int8 weight."""
    dense = operands(1, columns, rows)[1]
    scales = dense.abs().amax(1) / 127
    codes = (dense / scales[:, None]).round().to(torch.int8)
    return codes, int8.pack(codes), scales


def ours(shape: tuple[int, int, int], isa: str | None = None) -> Callable[[], Tensor]:
    tokens, columns, rows = shape
    run = int8.kernel(isa)
    if run is None or (isa is not None and isa not in native.sets()):
        raise HastenError(f"the native kernel can't be built here for {isa or 'this CPU'}")
    x, (codes, packed, scales) = operands(*shape)[0], weight(columns, rows)
    sums = int8.sums(codes)
    return lambda: int8.native_linear(run, x, packed, scales, sums, None)


def gemm_w8a8(seconds: float, shape: tuple[int, int, int] = SMALL, isa: str | None = None) -> Reading:
    """Against the dense fp32 product; rounding the inputs and scaling the outputs are part of ours."""
    x, dense = operands(*shape)[0], operands(1, *shape[1:])[1]
    product = ours(shape, isa)
    check(product(), F.linear(x, dense), 0.02)
    return race(lambda: F.linear(x, dense), product, seconds=seconds).but(instructions=isa or int8.instruction_set())


def int8_peers(shape: tuple[int, int, int]) -> dict[str, Callable[[], Tensor]]:
    """What PyTorch has for the same: its product of int8 matrices with the rounding around it, and its own layer."""
    x, (codes, _, scales) = operands(*shape)[0], weight(*shape[1:])
    turned = codes.t()

    def int_mm() -> Tensor:
        top = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((x / top).round_().to(torch.int8), turned).float() * (top * scales)

    found: dict[str, Callable[[], Tensor]] = {"torch._int_mm, with rounding and scaling": int_mm}
    linear = torch.nn.Linear(shape[1], shape[2], bias=False)
    linear.weight.data = operands(1, *shape[1:])[1]
    try:
        layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})
        layer(x)
        found["torch.ao dynamic int8 linear"] = lambda: layer(x)
    except (RuntimeError, AttributeError):
        pass
    return found


def against_torch_int8(seconds: float, shape: tuple[int, int, int] = SMALL) -> Reading:
    """Against the fastest of PyTorch's int8 products here."""
    peers, product = int8_peers(shape), ours(shape)
    readings = {name: race(peer, product, seconds=seconds / len(peers)) for name, peer in peers.items()}
    for peer in peers.values():
        check(peer(), product(), 0.03)
    best = min(readings, key=lambda name: readings[name].value)
    return readings[best].but(peer=best, all={name: reading.value for name, reading in readings.items()})


@functools.cache
def packed() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and zeros of each four-bit matrix in memory of its own."""
    make = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**BITS, (SIDE, SIDE), dtype=torch.uint8, generator=make)
    scales = torch.rand(SIDE, SIDE // GROUP, generator=make) / 100
    first = packing.pack(codes, BITS), scales.half(), torch.full((1, 1), 8.0)
    return [tuple(part.clone() for part in first) for _ in range(MATRICES)]  # type: ignore[misc]


@functools.cache
def dense() -> list[Tensor]:
    first = lowbit.dequantize(*packed()[0], bits=BITS, group=GROUP, columns=SIDE)
    return [first.clone() for _ in range(MATRICES)]


def int4_batch(seconds: float, batch: int, activations: int) -> Reading:
    """Four-bit weights against fp32 ones at one batch; one point of the curve."""
    if lowbit.path(BITS, GROUP) != "native" or lowbit_gemm.kernel(BITS) is None:
        raise HastenError("the native kernel can't be built here: install a C++ compiler")
    x = torch.randn(batch, SIDE, generator=torch.Generator().manual_seed(1))
    options = {"bits": BITS, "group": GROUP, "columns": SIDE, "activations": activations}

    def product() -> list[Tensor]:
        return [lowbit.linear(x, *parts, **options) for parts in packed()]  # type: ignore[arg-type]

    check(product()[0], F.linear(x, dense()[0]), 1e-5 if activations == 32 else 0.02)  # noqa: PLR2004
    return race(lambda: [F.linear(x, each) for each in dense()], product, seconds=seconds)


def int4_batch_curve(seconds: float) -> Iterator[Figure]:
    """The speed over fp32 from batch 1 to 64, with inputs as they are and rounded to 8 bits."""
    for activations, word in ((32, "exact"), (8, "rounded")):
        for batch in BATCHES:
            yield figure(
                f"int4_batch_{batch}_{word}",
                functools.partial(int4_batch, seconds, batch, activations),
                against=f"torch fp32, 4096x4096, {batch} rows, inputs {word}",
            )


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Arms that compute different things are not compared."""
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= tolerance:
        raise HastenError(f"the two products differ by {error:.1%}")


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 15 if quick else 90
    names = {SMALL: "512x2048x2048", LARGE: "2048x4096x4096", (1, 4096, 4096): "1x4096x4096"}
    for shape, name in names.items():
        yield figure(
            "gemm_w8a8" if shape == SMALL else f"gemm_w8a8_{name}",
            functools.partial(gemm_w8a8, seconds, shape),
            against=f"torch fp32, {name}; rounding included",
            goal=1.8,
        )
    for isa in ("AVX512_VNNI", "AVX2"):
        yield figure(
            f"gemm_w8a8_{isa.lower()}",
            functools.partial(gemm_w8a8, seconds, SMALL, isa),
            against=f"torch fp32 with all that this CPU has, {names[SMALL]}",
        )
    for shape in (SMALL, LARGE):
        yield figure(
            f"gemm_w8a8_{names[shape]}_against_torch",
            functools.partial(against_torch_int8, seconds, shape),
            against=f"the fastest int8 product of PyTorch, {names[shape]}",
        )
    yield from int4_batch_curve(seconds / 2)
