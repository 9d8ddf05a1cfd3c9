"""stdlib-lm: a small Llama on the source of Python's standard library, one token a byte.

`generate`, `perplexity` and `needle` use the bundled trained weights: `model=target`, 12 layers and up to 4,096 bytes,
or `model=long`, 4 layers and up to 8,704 bytes, trained to find needles at any distance.

`train` starts a smaller model from scratch, with 4 layers; `model=long` gives it the long model's positions, and
`size=large` takes 12 layers, the shapes of `model=target`, for machines that can train 4.9M weights. Its
baseline was tuned for the fewest steps to the target: of rates from 0.001 to 0.004 and warm-ups from 0.1 to 0.4 of 200
steps, 0.003 with 0.4 came to the lowest loss (2.79 bits; 0.002 with 0.1 to 3.29, 0.002 with 0.3 to 2.85), at the
default length and rows; others need a target of their own.
"""

import dataclasses
import functools
import pathlib

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, needle, text, weights
from hasten.workloads.base import Metric


@dataclasses.dataclass(frozen=True)
class StdlibLM(language.LanguageModel):
    model: str = option("target", "the trained model: 12 layers, or 4 with a long context", choices=("target", "long"))
    text: str = option("", "a file whose bytes are read instead of the library's; its last tenth is held out")
    size: str = option("small", "the model that training starts: 0.8M or 4.9M weights", choices=("small", "large"))
    target: float = option(2.85, "bits per byte on held-out text at which training stops", above=0)

    per_nat = language.NATS_TO_BITS

    @classmethod
    def title(cls) -> str:
        return "stdlib-lm"

    @property
    def metric(self) -> Metric:
        return language.RECALL if self.task == "needle" else Metric("bits per byte", "lower", "bit")

    @property
    def context(self) -> int:
        return models.LONG_CONTEXT if self.model == "long" else models.CONTEXT

    def problems(self) -> list[str]:
        problems, longer = [], "" if self.model == "long" else f"; model=long takes {models.LONG_CONTEXT}"
        if self.task != "train" and self.prompt + self.new > self.context:
            problems.append(f"prompt and new together are at most {self.context} bytes, the model's context{longer}")
        if self.task == "train" and self.length > self.context:
            problems.append(f"length is at most {self.context} bytes, the model's context{longer}")
        if self.model == "long" and self.size == "large":
            problems.append("model=long is small: leave size out")
        if self.task == "needle" and (self.depths + 1) * needle.LINE > self.prompt // 2:
            problems.append(f"{self.depths} needles of {needle.LINE} bytes are too many for a prompt of {self.prompt}")
        if self.text and not pathlib.Path(self.text).is_file():
            problems.append(f"the text file {self.text} does not exist")
        return problems

    def tokens(self, held_out: bool) -> np.ndarray:
        return _bytes_of(self.text, held_out) if self.text else text.stream(held_out)

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """For the long model windows of up to 4,096 bytes of the training part, with needles in them if asked for."""
        if self.model != "long":
            return super().calibration()
        length = min(4096, self.prompt)
        if self.task == "needle":
            rng = np.random.default_rng(41)
            rows = [needle.training_row(self.tokens(False), length, self.depths, rng)[0] for _ in range(8)]
            windows = torch.from_numpy(np.stack(rows).astype(np.int64))
        else:
            windows = language.spread_windows(self.tokens(False), 8, length, seed=41)
        return [{"input_ids": row[None]} for row in windows.to(self.device())]

    def build(self, seed: int) -> nn.Module:
        shape = "long" if self.model == "long" else {"small": "small", "large": "target"}[self.size]
        return models.stdlib_llama(shape, seed=seed).to(self.device())

    def trained(self) -> nn.Module:
        return weights.load_weights(models.stdlib_llama(self.model), self.model).to(self.device())

    def draft(self) -> nn.Module | None:
        if self.prompt + self.new > models.CONTEXT:
            return None
        return weights.load_weights(models.stdlib_llama("draft"), "draft").to(self.device())


@functools.cache
def _bytes_of(file: str, held_out: bool) -> np.ndarray:
    content = np.frombuffer(pathlib.Path(file).read_bytes().replace(b"\0", b""), np.uint8)
    cut = len(content) * 9 // 10
    return content[cut:] if held_out else content[:cut]


WORKLOAD = StdlibLM
