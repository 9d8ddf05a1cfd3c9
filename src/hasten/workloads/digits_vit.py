"""digits-vit: a `ViTForImageClassification` on scikit-learn's digits.

`classify` uses the bundled trained weights (8 blocks of width 96) at 32x32 pixels, 257 tokens. `train` starts 4 blocks
of width 64 from scratch at 16x16, 65 tokens, and stops at a held-out cross-entropy, which moves smoothly where accuracy
jumps.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import weights
from hasten.workloads.base import Metric, Workload, warm_cosine
from hasten.workloads.digits import CLASSES, digits

TRAIN_SIDE, SERVE_SIDE = 16, 32


def digits_vit(side: int, *, layers: int = 8, width: int = 96, seed: int = 0) -> nn.Module:
    """Patches of 2x2 pixels, one class token; randomly initialised."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


@dataclasses.dataclass(frozen=True)
class DigitsViT(Workload):
    task: str = option("classify", "what is done", choices=("classify", "train"))
    batch: int = option(32, "images in one request", least=1, most=359)
    rows: int = option(64, "images of a training batch", least=1, most=1024)
    steps: int = option(300, "steps of the baseline's schedule in training", least=10)
    lr: float = option(4e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.3, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(0.7, "held-out cross-entropy in nats at which training stops", above=0)

    tunable = {"lr": (5e-4, 2e-2), "warmup": (0.02, 0.5)}

    @classmethod
    def title(cls) -> str:
        return "digits-vit"

    @property
    def metric(self) -> Metric:
        if self.task == "train":
            return Metric("cross-entropy", "lower", "nat")
        return Metric("accuracy", "higher")

    def tasks(self) -> tuple[str, ...]:
        return ("classify", "train")

    # Training.

    def build(self, seed: int) -> nn.Module:
        return digits_vit(TRAIN_SIDE, layers=4, width=64, seed=seed).to(self.device())

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        images, labels = digits(False, TRAIN_SIDE)
        data = torch.utils.data.TensorDataset(images.to(self.device()), labels.to(self.device()))
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(
            data, batch_size=self.rows, shuffle=True, drop_last=True, generator=generator
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, self.warmup)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(model(pixel_values=images).logits, labels, reduction="none")

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        images, labels = (part.to(self.device()) for part in digits(True, TRAIN_SIDE))
        return nn.functional.cross_entropy(model(pixel_values=images).logits, labels, reduction="none").cpu().numpy()

    # Inference.

    def trained(self) -> nn.Module:
        return weights.load_weights(digits_vit(SERVE_SIDE), "digits_vit").to(self.device())

    def requests(self, seed: int) -> list[torch.Tensor]:
        images, _ = digits(True, SERVE_SIDE)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen = images[order[: len(images) // self.batch * self.batch]]
        return list(chosen.to(self.device()).split(self.batch))

    @torch.inference_mode()
    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        return handle.model(pixel_values=request).logits

    @torch.inference_mode()
    def quality(self, handle: Any) -> np.ndarray:
        images, labels = (part.to(self.device()) for part in digits(True, SERVE_SIDE))
        right = [
            handle.model(pixel_values=x).logits.argmax(-1) == y
            for x, y in zip(images.split(self.batch), labels.split(self.batch), strict=True)
        ]
        return torch.cat(right).double().cpu().numpy()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        images, _ = digits(False, SERVE_SIDE)
        return [{"pixel_values": part.to(self.device())} for part in images[:128].split(32)]


WORKLOAD = DigitsViT
