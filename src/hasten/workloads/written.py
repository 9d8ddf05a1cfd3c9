"""stdlib-written: stdlib-lm's greedy generation, judged by what is written.

stdlib-lm scores a true continuation with the target's cache, which says nothing about a plan whose text is partly
another model's. Here the target reads what the plan wrote: how likely each byte is to it, relative to the byte that it
would have chosen after the same text. The target's own text has 1, and no text has more, however much it repeats itself
(which makes a text likely in itself); a byte that it finds about as good costs little.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from hasten.core.options import option
from hasten.workloads import language
from hasten.workloads.base import Metric
from hasten.workloads.stdlib_lm import StdlibLM


def _likelihood(rows: np.ndarray) -> float:
    return float(np.exp(np.mean(rows)))


@dataclasses.dataclass(frozen=True)
class StdlibWritten(StdlibLM):
    task: str = option("generate", "what is done", choices=("generate",))

    @classmethod
    def title(cls) -> str:
        return "stdlib-written"

    @property
    def metric(self) -> Metric:
        return Metric("likelihood kept a byte", "higher", aggregate=_likelihood)

    def tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def quality(self, handle: Any) -> np.ndarray:
        """The mean of log p(byte) - log max p over each text, [examples] in nats, at most 0."""
        prompts = language.spread_windows(self.tokens(True), self.examples, self.prompt, seed=29).to(self.device())
        judge, found = self.trained(), []
        for some in prompts.split(8):
            new = language.generate(handle, some, self.new)
            with torch.inference_mode():
                ids = torch.cat([some, new[:, :-1]], 1)
                scores = judge(input_ids=ids, use_cache=False, logits_to_keep=self.new).logits.float()
            kept = scores.gather(2, new[..., None])[..., 0] - scores.amax(-1)
            found.append(kept.mean(1))
        return torch.cat(found).double().cpu().numpy()


WORKLOAD = StdlibWritten
