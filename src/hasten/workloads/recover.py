"""stdlib-recover: a trained model of stdlib-lm that has lost most of its weights and is trained until it is good again.

Its linear layers are pruned by magnitude, each to the same sparsity, and the optimizer puts the zeros back after each
step, so that every arm trains the same sparse model; the teacher is the dense one. The baseline minimises the
cross-entropy alone. Its rate was tuned: of 0.001, 0.003, 0.006 and 0.01, 0.006 came to the lowest loss in 120 steps
(2.00 bits; the others to 2.18, 2.02 and 2.03). The dense model has 1.71 bits, the pruned one 4.19.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, text, weights
from hasten.workloads.base import Metric


@dataclasses.dataclass(frozen=True)
class StdlibRecover(language.LanguageModel):
    task: str = option("train", "what is done", choices=("train",))
    model: str = option("draft", "the trained model: 2 layers of width 128, or 12 of 192", choices=("draft", "target"))
    sparsity: float = option(0.8, "fraction of each linear layer's weights that are zero", above=0, below=1)
    steps: int = option(120, "steps of the baseline's schedule", least=10)
    lr: float = option(6e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.1, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(2.05, "bits per byte on held-out text at which training stops", above=0)

    per_nat = language.NATS_TO_BITS

    @classmethod
    def title(cls) -> str:
        return "stdlib-recover"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    def problems(self) -> list[str]:
        return [f"length is at most {models.CONTEXT} bytes"] if self.length > models.CONTEXT else []

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def tokens(self, held_out: bool) -> np.ndarray:
        return text.stream(held_out)

    def teacher(self) -> nn.Module:
        return weights.load_weights(models.stdlib_llama(self.model), self.model).to(self.device())

    def build(self, seed: int) -> nn.Module:
        """The pruned model; the seed changes the order of the batches only."""
        from hasten.api import apply

        model = self.teacher()
        return apply(model, f"prune/magnitude(sparsity={self.sparsity}, layout=dense)").bake().train()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        made = super().optimizer(model)
        zeros = [
            (part.weight, part.weight == 0)
            for part in model.modules()
            if isinstance(part, nn.Linear) and part.weight.numel() > 2 * int(part.weight.count_nonzero())
        ]

        @torch.no_grad()
        def hold(*_: Any) -> None:
            for weight, zero in zeros:
                weight.masked_fill_(zero, 0)

        made.register_step_post_hook(hold)
        return made


WORKLOAD = StdlibRecover
