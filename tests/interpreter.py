"""Tests of Triton kernels: in Triton's interpreter on the CPU, and the same ones compiled on a GPU.

The interpreter must be chosen before Triton is imported, so `run` starts it in a process of its own:

    @interpreter.kernel                       a test of `interpreter.DEVICE`; marked `gpu` unless it is interpreted
    def test_values(): ...

    def test_in_the_interpreter():
        interpreter.run(__file__)
"""

import os
import subprocess
import sys

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INSIDE else "cuda"


def kernel(test):
    """Marks a test that runs kernels on DEVICE."""
    return test if INSIDE else pytest.mark.gpu(test)


def run(file, seconds=200):
    """The file's tests, interpreted; skips where Triton is absent or this is the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if INSIDE:
        pytest.skip("this is the interpreter")
    about = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=about, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def compiled(kernel, arguments, constants, capability=90, warps=4):
    """The PTX of a kernel for an NVIDIA GPU that need not be here.

    Args:
        arguments: Triton's names of types by argument, such as `*fp16` and `i32`; a pointer, and an `i32` whose name
            ends in `!`, is a multiple of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    even = [name for name, kind in arguments.items() if kind[0] == "*" or kind[-1] == "!"]
    kinds = {name: arguments.get(name, "constexpr").rstrip("!") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={name: constants.get(name) for name in names if name not in arguments},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]
