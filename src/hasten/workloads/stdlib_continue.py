"""stdlib-continue: a model trained on the standard library's source goes on with text of another kind, C++ headers.

The model is the bundled `draft` of stdlib-lm (2 layers of width 128; the largest rate of its training was 0.002), the
new text the headers that come with PyTorch, as bytes; every twelfth file, by the CRC-32 of its path, is held out. The
target is a loss on the new text's held-out part; `old_loss` tells what the old text's costs meanwhile.

The baseline goes on at the rate that a finished cosine leaves, `resume` times the largest: the paper's comparison. It
is not the best constant rate: after 150 steps (one seed) 0.1 came to 2.63 bits and 1.0 to 2.57, where the model begins
at 4.1; with resume=1.0 a plan is compared with that one.
"""

import dataclasses
import functools
import pathlib
import zlib

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import language, models, text, weights
from hasten.workloads.base import Metric

_FOLDERS = ("c10", "torch")  # those of ATen are for the most part generated, one like the other


@dataclasses.dataclass(frozen=True)
class StdlibContinue(language.LanguageModel):
    task: str = option("train", "what is done", choices=("train",))
    rows: int = option(8, "examples of a training batch", least=1, most=1024)
    steps: int = option(150, "steps of the run", least=10)
    lr: float = option(2e-3, "largest learning rate of the first training, the optimizer's", above=0)
    resume: float = option(0.1, "the baseline's constant rate as a fraction of lr", above=0, most=10)
    target: float = option(2.68, "bits per byte on held-out headers at which training stops", above=0)

    per_nat = language.NATS_TO_BITS
    tunable = {"lr": (5e-4, 1e-2), "resume": (0.05, 2.0)}

    @classmethod
    def title(cls) -> str:
        return "stdlib-continue"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    def problems(self) -> list[str]:
        return [f"length is at most {models.CONTEXT} bytes"] if self.length > models.CONTEXT else []

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def tokens(self, held_out: bool) -> np.ndarray:
        return headers(held_out)

    def build(self, seed: int) -> nn.Module:
        """The trained model; the seed changes the order of the batches only."""
        return weights.load_weights(models.stdlib_llama("draft"), "draft").to(self.device()).train()

    def schedule(self, step: int, steps: int) -> float:
        return self.resume

    def old_loss(self, model: nn.Module) -> float:
        """Bits per byte on the held-out part of the standard library."""
        windows = language.spread_windows(text.stream(True), 64, self.length + 1, seed=17).to(self.device())
        return float(language.window_loss(model, windows, rows=32).mean() * self.per_nat)


@functools.cache
def headers(held_out: bool) -> np.ndarray:
    """One part of PyTorch's C++ headers joined, uint8 [bytes]; each file begins with the document byte.

    Raises:
        UsageError: this installation of PyTorch has no headers.
    """
    root = pathlib.Path(torch.__file__).parent / "include"
    files = sorted(file for folder in _FOLDERS for file in (root / folder).rglob("*.h"))
    mine = [file for file in files if (zlib.crc32(file.relative_to(root).as_posix().encode()) % 12 == 0) == held_out]
    if not mine:
        raise UsageError(f"{root} holds no C++ headers: install PyTorch from a wheel, which has them")
    opening = bytes([text.DOCUMENT])
    return np.frombuffer(b"".join(opening + file.read_bytes().replace(b"\0", b"") for file in mine), np.uint8)


WORKLOAD = StdlibContinue
