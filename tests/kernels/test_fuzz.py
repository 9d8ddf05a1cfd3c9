"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random and on hostile inputs."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fuzz_kernels.py"
KERNELS = ("lowbit", "lowbit_gemm", "int8", "csr", "block_sparse", "bitmap", "relu_ffn")


def fuzz(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_a_few_cases_of_the_kernel_that_builds_fastest():
    assert "csr: 40 cases are right" in fuzz("csr", "--cases", "40")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_twenty_seconds(kernel):
    assert "are right" in fuzz(kernel, "--seconds", "20")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", ["csr", "int8", "block_sparse", "bitmap", "relu_ffn"])
def test_lower_instruction_sets(kernel):
    assert "are right" in fuzz(kernel, "--seconds", "5", "--isa", "all")


@pytest.mark.slow
def test_a_fault_is_found(tmp_path):
    """A kernel that reads one number too far ends the run with a report."""
    script = tmp_path / "fault.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import torch, fuzz_kernels as f\n"
        "make, hostile = f.KERNELS['csr']\n"
        "def broken(draw, isa):\n"
        "    case, inputs, run, expected, tolerance = make(draw, isa)\n"
        "    x, values, columns, starts = inputs\n"
        "    return case, [torch.randn(1, x.shape[1]), values, columns.int() + 1, starts], run, expected, tolerance\n"
        "f.KERNELS['csr'] = broken, list\n"
        "f.__file__ = __file__\n"
        "raise SystemExit(f.main())\n"
    )
    done = subprocess.run([sys.executable, str(script), "csr", "--cases", "20"], capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 1 and ("heap-buffer-overflow" in done.stdout or "SEGV" in done.stdout), done.stdout
