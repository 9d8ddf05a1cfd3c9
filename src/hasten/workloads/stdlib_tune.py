"""stdlib-tune: a small trained model of stdlib-lm is fine-tuned on source code written otherwise: tabs and CRLF.

Each four spaces of the library's source are one tab, and each line ends in two bytes, as some editors write it. The
model has hardly seen either and begins at 4.83 bits a byte. The shift has few dimensions, as fine-tuning on one task
has: steps without gradients can follow it too, and the comparison with those is what the workload is for. Such steps
are cheap and many, so that a run may take 500 times the baseline's time.

The baseline is AdamW with a constant rate after a short rise. Of 0.0003, 0.001, 0.003 and 0.01 the rate 0.001 came to
the lowest loss in 8 steps (3.64 bits; the others to 3.91, 4.12 and 5.64), and is past the target after one or two.
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, text, weights
from hasten.workloads.base import Metric


@dataclasses.dataclass(frozen=True)
class StdlibTune(language.LanguageModel):
    task: str = option("train", "what is done", choices=("train",))
    model: str = option("draft", "the trained model: 2 layers of width 128, or 12 of 192", choices=("draft", "target"))
    length: int = option(128, "bytes of a training example", least=8, most=models.CONTEXT)
    rows: int = option(2, "examples of a training batch", least=1, most=1024)
    steps: int = option(500, "most steps of a run", least=10)
    lr: float = option(1e-3, "learning rate of the baseline's AdamW", above=0)
    warmup: int = option(2, "steps in which the rate rises, before it stays", least=1)
    target: float = option(4.5, "bits per byte on held-out text at which training stops", above=0)

    per_nat = language.NATS_TO_BITS
    tunable: ClassVar[dict[str, tuple[float, float]]] = {"lr": (1e-4, 1e-2)}
    limit: ClassVar[float] = 500.0
    evaluate_every: ClassVar[int] = 2

    @classmethod
    def title(cls) -> str:
        return "stdlib-tune"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def tokens(self, held_out: bool) -> np.ndarray:
        return rewritten(held_out)

    def build(self, seed: int) -> nn.Module:
        """The trained model; the seed changes the order of the batches only."""
        return weights.load_weights(models.stdlib_llama(self.model), self.model).to(self.device()).train()

    def schedule(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.warmup)


@functools.cache
def rewritten(held_out: bool) -> np.ndarray:
    """One part of the library's source with tabs and CRLF, uint8 [bytes]."""
    narrow = text.stream(held_out).tobytes()
    return np.frombuffer(narrow.replace(b"    ", b"\t").replace(b"\n", b"\r\n"), dtype=np.uint8)


WORKLOAD = StdlibTune
