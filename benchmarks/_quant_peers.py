"""Products with four-bit weights beside those of llama.cpp and torchao. `figures` is joined to the family quant.

Both sides multiply one row of x with the same weights of 4096x4096, with as many threads, in turns. There are 64
matrices in memory of their own, 600 MB of them, so that weights come from memory. Of each peer, the format, layout or
mode that is fastest here is raced. Ours rounds x to eight bits, as llama.cpp does; torchao computes in bfloat16.
"""

import contextlib
import functools
import os
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.bench.figures import Figure, PeerWorker, Reading, figure, peer_python, race
from hasten.core.errors import HastenError
from hasten.kernels import lowbit
from hasten.math import packing

SIDE, BITS, MATRICES = 4096, 4, 64
SHIFT = 64  # rows by which each matrix is rolled against the one before
BLOCK = 32  # weights of a block of Q4_0
REQUIREMENTS = {"llamacpp": ("llama-cpp-python==0.3.36",), "torchao": ("torchao==0.18.0", "torch==2.13.0", "numpy>=2")}
HERE = pathlib.Path(__file__).parent / "peers"
TOLERANCE = {"q4_0": 0.02, "q4_k": 0.1, "eager": 0.05, "compiled": 0.05}  # the last three round the weights again
BUILD = {  # ggml alone, for this CPU; a wheel of it must not be kept where pip would take it for all of llama.cpp
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF "
    f"-DCMAKE_INSTALL_LIBDIR=llama_cpp/lib -DCMAKE_PROJECT_INCLUDE={HERE / 'llamacpp.cmake'}",
    "SKBUILD_CMAKE_SOURCE_DIR": "vendor/llama.cpp/ggml",
    "PIP_NO_CACHE_DIR": "1",
}


@functools.cache
def codes() -> Tensor:
    """uint8 [4096, 4096]."""
    return torch.randint(0, 2**BITS, (SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@functools.cache
def scales(group: int) -> Tensor:
    """fp32 [4096, groups], fp16 numbers."""
    made = torch.rand(SIDE, SIDE // group, generator=torch.Generator().manual_seed(2)) / 100
    return made.half().float()


@functools.cache
def vector() -> Tensor:
    """fp32 [1, 4096]."""
    return torch.randn(1, SIDE, generator=torch.Generator().manual_seed(1))


def dense(group: int) -> Tensor:
    """The weight, fp32, of zeros of 8."""
    return (codes().float() - 8) * scales(group).repeat_interleave(group, 1)


def blocks(group: int) -> np.ndarray:
    """The same weight in ggml's Q4_0, uint8 [4096, 128, 18]: an fp16 scale, then codes i and i + 16 in a byte."""
    parts = codes().view(SIDE, -1, BLOCK)
    scale = scales(group).repeat_interleave(group // BLOCK, 1).half()[..., None].view(torch.uint8)
    return torch.cat([scale, parts[..., :16] | parts[..., 16:] << 4], dim=-1).numpy()


class Ours:
    """The products with all matrices, one after the other."""

    def __init__(self, group: int, shift: int) -> None:
        if lowbit.path(BITS, group) != "native":
            raise HastenError("the native kernel can't be built here: install a C++ compiler")
        packed = packing.pack(codes(), BITS)
        parts = [packed, *lowbit.compact(scales(group), torch.full_like(scales(group), 8.0))]
        rows = range(0, MATRICES * shift, shift) if shift else [0] * MATRICES
        self.weights = [[part.roll(by, 0).clone() for part in parts] for by in rows]
        self.group = group

    def __call__(self) -> list[Tensor]:
        x = vector()
        options: dict[str, Any] = {"bits": BITS, "group": self.group, "columns": SIDE, "activations": 8}
        return [lowbit.linear(x, *parts, **options) for parts in self.weights]

    def bytes(self) -> int:
        return sum(part.nbytes for parts in self.weights for part in parts)


@contextlib.contextmanager
def environment(given: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def peer(name: str) -> Iterator[PeerWorker]:
    with environment(BUILD if name == "llamacpp" else {}):
        python = peer_python(name, REQUIREMENTS[name])
    with PeerWorker(python, HERE / f"{name}.py", seconds=600) as worker:
        yield worker


def against(
    worker: PeerWorker, ours: Ours, folder: pathlib.Path, candidates: Sequence[dict[str, Any]], seconds: float
) -> Reading:
    """The race with the fastest of the peer's candidates, each of them the arguments of its `load`.

    Raises:
        HastenError: the two sides compute different products.
    """
    found = ours()
    expected = torch.cat([found[0], found[-1]])
    vector().numpy().tofile(folder / "x")
    same = {"x": str(folder / "x"), "rows": SIDE, "columns": SIDE, "count": MATRICES}
    times: dict[int, float] = {}
    for index, given in enumerate(candidates):
        if worker.call("load", **given, **same) is None:
            continue
        arm = worker.arm("multiply")
        arm()
        theirs = torch.tensor([worker.call("output", index=one) for one in (0, MATRICES - 1)])
        error = float((theirs - expected).norm() / expected.norm())
        if not error <= TOLERANCE[given.get("kind") or given["mode"]]:
            raise HastenError(f"the products of {label(given)} differ from ours by {error:.1%}")
        times[index] = statistics.median(arm.timed(1).wall for _ in range(5))
    best = min(times, key=lambda index: times[index])
    count = worker.call("load", **candidates[best], **same)
    reading = race(worker.arm("multiply"), ours, seconds=seconds)
    facts = {f"milliseconds_{label(candidates[index])}": 1e3 * time / MATRICES for index, time in times.items()}
    return reading.but(
        peer=label(candidates[best]), group=ours.group, matrices=MATRICES, threads=torch.get_num_threads(),
        milliseconds=1e3 * reading.facts["seconds"] / MATRICES,
        milliseconds_base=1e3 * reading.facts["seconds_base"] / MATRICES,
        gigabytes_per_second=ours.bytes() / reading.facts["seconds"] / 1e9,
        gigabytes_per_second_base=count / reading.facts["seconds_base"] / 1e9, **facts,
    )  # fmt: skip


def label(given: dict[str, Any]) -> str:
    return "_".join(str(given[name]).lower() for name in ("kind", "layout", "mode") if name in given)


def against_llamacpp(group: int, seconds: float) -> Reading:
    ours = Ours(group, SHIFT)
    with peer("llamacpp") as worker, tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        blocks(group).tofile(folder / "q4_0")
        dense(group).numpy().tofile(folder / "q4_k")
        layouts = worker.call("start", threads=torch.get_num_threads())
        candidates = [
            {"kind": kind, "layout": layout, "file": str(folder / kind), "shift": SHIFT}
            for kind in ("q4_0", "q4_k")
            for layout in layouts
        ]
        return against(worker, ours, folder, candidates, seconds)


def against_torchao(group: int, seconds: float) -> Reading:
    ours = Ours(group, 0)
    with peer("torchao") as worker, tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        dense(group).numpy().tofile(folder / "dense")
        modes = worker.call("start", threads=torch.get_num_threads())["modes"]
        candidates = [{"mode": mode, "file": str(folder / "dense"), "group": group} for mode in modes]
        return against(worker, ours, folder, candidates, seconds)


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 40 if quick else 180
    for group in (32, 128):
        yield figure(
            "gemv_int4_against_llamacpp" + ("" if group == BLOCK else f"_{group}"),
            lambda group=group: against_llamacpp(group, seconds),
            against=f"ggml's fastest four bits, 4096x4096, one row; ours with groups of {group}",
            goal=1.0,
        )
    for group in (128,) if quick else (128, 32):
        yield figure(
            "gemv_int4_against_torchao" + ("" if group == 128 else f"_{group}"),
            lambda group=group: against_torchao(group, seconds),
            against=f"torchao's int4 weight-only, bf16, groups of {group}, 4096x4096, one row",
            goal=1.0,
        )
