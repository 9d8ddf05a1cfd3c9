"""Builds a C++ file of this folder with the machine's compiler at first use, and loads it through ctypes.

The shared library is kept in the user's cache folder under a name that holds a hash of the source, the flags and the
compiler, so one cache serves several machines and versions. It links to the OpenMP runtime that PyTorch has loaded: a
second one would keep threads of its own spinning beside PyTorch's.

Environment: HASTEN_CACHE names another cache folder, CXX another compiler, HASTEN_NATIVE=0 turns native kernels off.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import torch

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_VNNI = ("-mavx512vnni", *_AVX512)
FLAGS = {"AMX": ("-mamx-tile", "-mamx-int8", *_VNNI), "AVX512_VNNI": _VNNI, "AVX512": _AVX512, "AVX2": _AVX2}
# words of cpuinfo, beside AVX512
_NEEDS = {
    "AMX": {"amx_tile", "amx_int8", "avx512_vnni"},
    "AVX512_VNNI": {"avx512_vnni"},
}
_COMMON = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
_SECONDS = 120


def cache_folder() -> pathlib.Path:
    """Where built kernels are kept."""
    given = os.environ.get("HASTEN_CACHE")
    if given:
        return pathlib.Path(given)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hasten"


def compiler() -> str | None:
    """The C++ compiler's path, or None where native kernels are off or none is installed."""
    if os.environ.get("HASTEN_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    names = (os.environ.get("CXX"), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def capability() -> str:
    """The instruction set that PyTorch found on this CPU: AVX512, AVX2 or another word."""
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def sets() -> tuple[str, ...]:
    """The instruction sets to build for that run on this CPU, best first, "DEFAULT" (none) last.

    AMX needs the operating system's leave too, which a library asks for itself.
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    line = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    words = set(line[1].split()) if line else set()
    found = capability()
    more = [one for one, needed in _NEEDS.items() if found == "AVX512" and needed <= words]
    below = {"AVX512": ("AVX512", "AVX2"), "AVX2": ("AVX2",)}.get(found, ())
    return (*more, *below, "DEFAULT")


@functools.cache
def library(source: str, defines: tuple[str, ...] = (), isa: str | None = None) -> ctypes.CDLL | None:
    """The loaded library of `source` (a file of this folder), built if it was not; None where it can't be built.

    Args:
        defines: preprocessor definitions, such as `BITS=4`.
        isa: the instruction set to build for; this CPU's where None. A lower one runs too.
    """
    found = compiler()
    if found is None:
        return None
    file = pathlib.Path(__file__).with_name(source)
    options = (*_COMMON, *FLAGS.get(isa or capability(), ()), *("-D" + one for one in defines))
    openmp = _openmp()
    key = "\0".join((_text(file), *options, *openmp, found, _version(found), platform.machine()))
    name = f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    for folder in (cache_folder(), pathlib.Path(tempfile.gettempdir()) / f"hasten-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():  # another's folder could hold another's code
                continue
            if not (folder / name).exists():
                _build(found, file, options, openmp, folder / name)
            return ctypes.CDLL(str(folder / name))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _text(file: pathlib.Path) -> str:
    """The source with the files of its folder that it includes."""
    text = file.read_text()
    included = re.findall(r'^#include "([^"]+)"', text, flags=re.MULTILINE)
    return "\0".join((text, *(_text(file.with_name(name)) for name in included)))


def _build(
    found: str, file: pathlib.Path, flags: tuple[str, ...], openmp: tuple[str, ...], target: pathlib.Path
) -> None:  # fmt: skip
    """Compiles into a folder of its own and moves the result in place, so that processes may build at the same time."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=_SECONDS)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled, linked = f"{folder}/{file.stem}.o", f"{folder}/{target.name}"
        run([found, *flags, *(["-fopenmp"] if openmp else []), "-c", str(file), "-o", compiled])
        run([found, "-shared", compiled, *openmp, "-o", linked])
        os.replace(linked, target)


def _openmp() -> tuple[str, ...]:
    """What to link for OpenMP: the runtime that this process has loaded, else the compiler's own, else nothing."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return () if sys.platform == "darwin" else ("-fopenmp",)
    loaded = {pathlib.Path(line[line.index("/") :]) for line in maps if "/" in line}
    found = sorted(path for path in loaded if path.name.startswith(("libgomp", "libiomp5", "libomp")))
    return (str(found[0]), f"-Wl,-rpath,{found[0].parent}") if found else ("-fopenmp",)


def _version(found: str) -> str:
    return subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
