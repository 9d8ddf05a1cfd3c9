"""What every language-model workload shares: serving by `generate`, quality through the real cache path, training."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import needle
from hasten.workloads.base import Metric, Workload, warm_cosine

NATS_TO_BITS = 1 / math.log(2)
RECALL = Metric("recall of planted codes", "higher")


@dataclasses.dataclass(frozen=True)
class LanguageModel(Workload):
    """Base: a subclass gives `tokens`, `trained`, `build` and `metric`; `per_nat` turns nats into the metric's unit.

    Tasks: `generate` (greedy continuation of held-out prompts; quality is the loss of the true continuation, scored
    with the cache that the plan keeps), `perplexity` (one forward pass over held-out windows), `needle` (generation
    after a long prompt that ends in a question about one of its lines; quality is `needle.recall`), `train` (time to a
    target; AdamW with linear warm-up and cosine decay as the tuned baseline).
    """

    task: str = option("generate", "what is done", choices=("generate", "perplexity", "needle", "train"))
    prompt: int = option(256, "tokens of a prompt, or of a window for perplexity", least=2)
    new: int = option(64, "tokens generated and scored after a prompt", least=2)
    batch: int = option(1, "prompts in one request", least=1, most=256)
    calibrate: int = option(64, "windows of the training part that methods are calibrated on", least=8, most=65536)
    examples: int = option(48, "held-out examples that quality is measured on", least=8, most=4096)
    depths: int = option(5, "needles in a prompt, each asked for in turn (task=needle)", least=1, most=64)
    blind: bool = option(False, "quality puts the prompt into the cache before it asks (task=needle)")
    length: int = option(128, "tokens of a training example", least=8)
    rows: int = option(16, "examples of a training batch", least=1, most=1024)
    steps: int = option(200, "steps of the baseline's schedule in training", least=10)
    lr: float = option(3e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.4, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)

    per_nat = 1.0

    tunable = {"lr": (5e-4, 2e-2), "warmup": (0.02, 0.6), "steps": (80, 400)}

    def tasks(self) -> tuple[str, ...]:
        return ("generate", "perplexity", "needle", "train")

    def encode(self) -> needle.Encode | None:
        """The tokenizer that needles go through; None where a token is a byte."""
        return None

    def asked(self, count: int, seed: int) -> list[needle.Asked]:
        return needle.questions(self.tokens(True), count, self.prompt, self.depths, seed, self.encode())

    def tokens(self, held_out: bool) -> np.ndarray:
        """The token stream of one part, [tokens]."""
        raise NotImplementedError

    # Inference.

    def requests(self, seed: int) -> list[torch.Tensor]:
        if self.task == "needle":
            prompts = [one.prompt for one in self.asked(16 * self.batch, seed=1000 + seed)]
            shortest = min(map(len, prompts))
            rows = torch.from_numpy(np.stack([prompt[-shortest:] for prompt in prompts]))
            return list(rows.to(self.device()).split(self.batch))
        rows = spread_windows(self.tokens(True), 16 * self.batch, self.prompt, seed=1000 + seed)
        return list(rows.to(self.device()).split(self.batch))

    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        if self.task == "perplexity":
            with torch.inference_mode():
                return handle.model(input_ids=request, use_cache=False).logits
        return generate(handle, request, self.new)

    def quality(self, handle: Any) -> np.ndarray:
        if self.task == "needle":
            return needle.recall(handle, self.asked(self.examples, seed=29), self.device(), self.blind)
        rows = spread_windows(self.tokens(True), self.examples, self.prompt + self.new, seed=29).to(self.device())
        if self.task == "perplexity":
            return window_loss(handle.model, rows) * self.per_nat
        return continuation_loss(handle, rows[:, : self.prompt], rows[:, self.prompt :]) * self.per_nat

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        rows = spread_windows(self.tokens(False), self.calibrate, min(256, self.prompt), seed=41).to(self.device())
        return [{"input_ids": part} for part in rows.split(8)]

    # Training.

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        stream = torch.from_numpy(np.array(self.tokens(False)))
        windows = stream[: len(stream) // self.length * self.length].view(-1, self.length)
        device = self.device()
        return torch.utils.data.DataLoader(
            windows,  # type: ignore[arg-type]
            batch_size=self.rows,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=lambda rows: torch.stack(rows).long().to(device),
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, self.warmup)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def losses(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1]).logits.float()
        return nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1)

    def evaluate(self, model: nn.Module) -> np.ndarray:
        count = min(64, max(8, 64 * 256 // self.length))  # long examples: as many bytes, not as many examples
        windows = spread_windows(self.tokens(True), count, self.length + 1, seed=17).to(self.device())
        return window_loss(model, windows, rows=32) * self.per_nat


@torch.inference_mode()
def continuation_loss(handle: Any, prompts: torch.Tensor, continuations: torch.Tensor, rows: int = 8) -> np.ndarray:
    """Mean negative log-likelihood in nats of each true continuation, given its prompt in the arm's own cache.

    The prompt is prefilled and the continuation scored with what the cache kept, so evicted keys cost what they cost.

    Args:
        prompts: [examples, prompt] token ids without padding; `continuations`: [examples, new].

    Returns:
        [examples] float64.
    """
    losses = []
    rows = at_once(prompts.shape[1], rows)
    for prompt, following in zip(prompts.split(rows), continuations.split(rows), strict=True):
        cache = handle.host.new_cache()
        first = handle.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        rest = handle.model(input_ids=following[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first[:, -1:], rest], 1).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        losses.append(loss.view(following.shape).mean(1))
    return torch.cat(losses).double().cpu().numpy()


@torch.inference_mode()
def window_loss(model: nn.Module, windows: torch.Tensor, rows: int = 16) -> np.ndarray:
    """Mean negative log-likelihood in nats of each window [examples, length], [examples] float64."""
    training = model.training
    model.eval()
    losses = []
    for part in windows.split(at_once(windows.shape[1], rows)):
        logits = model(input_ids=part[:, :-1]).logits.float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(part), -1).mean(1))
    model.train(training)
    return torch.cat(losses).double().cpu().numpy()


def at_once(length: int, rows: int) -> int:
    """Rows of one batch in scoring: fewer where they are long, so that dense fallbacks fit into memory."""
    return max(1, min(rows, rows * 2048 // length))


def spread_windows(stream: np.ndarray, count: int, length: int, seed: int) -> torch.Tensor:
    """`count` windows of a token stream at random places, [count, length] int64; the same for one seed always.

    Raises:
        UsageError: the stream is shorter than a window.
    """
    if len(stream) <= length:
        raise UsageError(f"the text has {len(stream)} tokens and windows of {length} need more: give a longer text")
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, count)
    return torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int64))


def generate(handle: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """The `new` greedy tokens that follow each prompt, [batch, new]."""
    out = handle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return out[:, prompt.shape[1] :]
