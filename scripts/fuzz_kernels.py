"""Runs the native kernels, built with sanitizers, on random weights that are valid, and hands them hostile ones.

    python scripts/fuzz_kernels.py [KERNEL ...] [--seconds 20] [--seed 0] [--isa best]

Each kernel runs in a process of its own, which AddressSanitizer (preloaded, as Python is not built with it) and
UndefinedBehaviorSanitizer watch. They do not see inside masked loads, gathers and tile loads, so in every other case
the kernel's inputs end (or begin) at a page that can't be read, where any such access is fatal. Values are compared
with the PyTorch path. Hostile tensors must be refused with a UsageError before native code sees them.

Exit code 0: nothing found; 1: something was; 2: no sanitizers here.
"""

import argparse
import ctypes
import json
import mmap
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from _fuzz_cases import KERNELS

from hasten.core.errors import UsageError
from hasten.kernels import native

SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fno-fast-math",
            "-fsanitize=address,undefined,float-cast-overflow")  # fmt: skip
LINES = 40  # of a sanitizer's report that are shown
BUILDING = 2.0  # seconds after which a case is taken to have built a kernel, which does not count
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the native kernels under sanitizers.")
    parser.add_argument("kernel", nargs="*", help=f"all by default: {', '.join(KERNELS)}")
    parser.add_argument("--seconds", type=float, default=20, help="for each kernel, after it is built")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, for each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", default="best", help="an instruction set, `best`, or `all` of those that run here")
    parser.add_argument("--begin", type=int, default=0, help="the hostile input to begin with")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := sorted(set(given.kernel) - set(KERNELS)):
        parser.error(f"there is no kernel {unknown[0]!r}; there are: {', '.join(KERNELS)}")
    if given.child:
        return child(given.kernel[0], given, pathlib.Path(given.child))
    libraries = [found for name in ("libasan.so", "libubsan.so") if (found := runtime(name))]
    if len(libraries) < 2:  # noqa: PLR2004
        print("the compiler has no AddressSanitizer here: install g++ with libasan and libubsan", file=sys.stderr)
        return 2
    return max([parent(kernel, given, libraries) for kernel in given.kernel or KERNELS])


def runtime(name: str) -> str | None:
    """A runtime library of the compiler."""
    found = native.compiler()
    if found is None:
        return None
    path = subprocess.run([found, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if pathlib.Path(path).is_absolute() else None


def parent(kernel: str, given: argparse.Namespace, libraries: list[str]) -> int:
    """Fuzzes one kernel in processes of its own and says what was found; a hostile input may end such a process."""
    about = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(libraries), "OMP_NUM_THREADS": "2"}
    failures, begin = 0, given.begin
    while True:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder) / "case.json"
            command = [sys.executable, __file__, kernel, "--child", str(place), "--isa", given.isa]
            command += ["--begin", str(begin), "--seconds", str(given.seconds)]
            command += ["--seed", str(given.seed), "--cases", str(given.cases)]
            done = subprocess.run(command, env=about, capture_output=True, text=True)
            case = json.loads(place.read_text()) if place.is_file() else {}
        if done.returncode == 0:
            print(f"{kernel}: {done.stdout.strip()}", flush=True)
            return min(failures, 1)
        failures += 1
        print(f"{kernel}: FAILED (exit {done.returncode}) in case {case}", done.stdout.strip(), sep="\n")
        print("\n".join(done.stderr.strip().splitlines()[:LINES]), flush=True)
        if "hostile" not in case:
            return 1
        begin = case["index"] + 1


def child(kernel: str, given: argparse.Namespace, place: pathlib.Path) -> int:
    """Runs hostile, then random cases; the one that runs is written down before it begins."""
    native._COMMON = (*native._COMMON, *SANITIZE)
    torch.set_num_threads(2)
    make, hostile = KERNELS[kernel]
    inputs = hostile()
    for index, (what, call) in enumerate(inputs[given.begin :], given.begin):
        place.write_text(json.dumps({"hostile": what, "index": index}))
        try:
            call()
        except UsageError:
            continue
        print("it was taken")
        return 1
    sets = list(native.sets()) if given.isa == "all" else [native.sets()[0] if given.isa == "best" else given.isa]
    count, end = 0, 0.0
    while count < given.cases and (not end or time.monotonic() < end):
        began = time.monotonic()
        problem = one_case(make, given.seed + count, sets[count % len(sets)], place)
        if problem:
            print(problem)
            return 1
        count, took = count + 1, time.monotonic() - began
        if not end:
            end = time.monotonic() + given.seconds
        elif took > BUILDING:
            end += took
    print(f"{count} cases are right, {max(0, len(inputs) - given.begin)} hostile inputs refused")
    return 0


def one_case(make: Any, seed: int, isa: str, place: pathlib.Path) -> str:
    """What is wrong with one random case, if anything is."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    case, inputs, run, expected, tolerance = make(draw, isa)
    place.write_text(json.dumps({"seed": seed, "isa": isa, **case}))
    edge, pages = draw.choice(["heap", "last", "first"]), []
    found = run(*(None if part is None else guarded(part, edge, pages) for part in inputs)).double()
    wanted = expected(*inputs).double()
    for memory in pages:
        _libc.munmap(*memory)
    if found.shape != wanted.shape:
        return f"the shape is {list(found.shape)}, not {list(wanted.shape)}"
    if not same(found, wanted, tolerance):
        error = float((found - wanted).norm() / wanted.norm())
        return f"values differ by {error:.2g}, at most {tolerance:g} may be"
    return ""


def same(found: Any, wanted: Any, tolerance: float) -> bool:
    if not torch.equal(found.isnan(), wanted.isnan()):
        return False
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    return bool((found - wanted).norm() <= tolerance * wanted.norm() + 1e-30)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(part: Any, edge: str, pages: list[Any]) -> Any:
    """A copy of a tensor on the heap, or whose last (or first) byte lies beside a page that can't be read."""
    if edge == "heap" or not part.numel():
        return part.clone()
    page, size = mmap.PAGESIZE, part.numel() * part.element_size()
    whole = -(-size // page) * page
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON
    start = _libc.mmap(None, whole + 2 * page, access, kind, -1, 0)
    _libc.mprotect(start, page, 0)
    _libc.mprotect(start + page + whole, page, 0)
    pages.append((start, whole + 2 * page))
    at = start + page + (whole - size if edge == "last" else 0)
    memory = (ctypes.c_uint8 * size).from_address(at)
    return torch.frombuffer(memory, dtype=part.dtype).view(part.shape).copy_(part)


if __name__ == "__main__":
    raise SystemExit(main())
