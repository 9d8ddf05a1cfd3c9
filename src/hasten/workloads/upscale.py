"""stdlib-upscale: the models of stdlib-lm on text that is no code, for methods that add a small model's fine-tuning.

The text is the documentation in SciPy's modules, one token a byte, which none of the models has seen; a module is held
out when the CRC-32 of its path is divisible by twelve. The draft is stdlib-lm's, the teacher the same model fine-tuned
on this text when it is asked for: AdamW, batches of 16 windows, about 10 seconds of one core, once in a process.

Quality is the loss of the true continuation under the distribution that the plan generates from, whatever that is:
`generate` is led along it by a logits processor, which notes how likely each byte was.
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
import pathlib
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, text, weights
from hasten.workloads.base import Metric, Workload, warm_cosine

ROWS, LENGTH = 16, 128


@dataclasses.dataclass(frozen=True)
class StdlibUpscale(Workload):
    prompt: int = option(256, "bytes of a prompt", least=2)
    new: int = option(64, "bytes generated and scored after a prompt", least=2)
    batch: int = option(1, "prompts in one request", least=1, most=256)
    examples: int = option(48, "held-out examples that quality is measured on", least=8, most=4096)
    tuning: int = option(100, "steps of the draft's fine-tuning", least=1, most=10000)
    lr: float = option(3e-4, "peak learning rate of the fine-tuning", above=0)

    @classmethod
    def title(cls) -> str:
        return "stdlib-upscale"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    def problems(self) -> list[str]:
        if self.prompt + self.new > models.CONTEXT:
            return [f"prompt and new together are at most {models.CONTEXT} bytes, the model's context"]
        return []

    def tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def trained(self) -> nn.Module:
        return weights.load_weights(models.stdlib_llama("target"), "target").to(self.device())

    def draft(self) -> nn.Module:
        return weights.load_weights(models.stdlib_llama("draft"), "draft").to(self.device())

    def teacher(self) -> nn.Module:
        model = self.draft()
        model.load_state_dict(_tuned(self.tuning, self.lr, str(self.device())))
        return model

    def requests(self, seed: int) -> list[torch.Tensor]:
        rows = language.spread_windows(documentation(True), 16 * self.batch, self.prompt, seed=1000 + seed)
        return list(rows.to(self.device()).split(self.batch))

    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        return language.generate(handle, request, self.new)

    def quality(self, handle: Any) -> np.ndarray:
        rows = language.spread_windows(documentation(True), self.examples, self.prompt + self.new, seed=29)
        rows = rows.to(self.device())
        return led_loss(handle, rows[:, : self.prompt], rows[:, self.prompt :]) * language.NATS_TO_BITS


def led_loss(handle: Any, prompts: torch.Tensor, continuations: torch.Tensor, rows: int = 8) -> np.ndarray:
    """Mean negative log-likelihood in nats of each continuation under what `handle.generate` chooses from, [examples].

    A loop that looks at several distributions for a place (a proposal's before its own) is taken at its last one.

    Args:
        prompts: [examples, prompt] token ids; `continuations`: [examples, new].
    """
    from transformers import LogitsProcessorList

    found = []
    for some, following in zip(prompts.split(rows), continuations.split(rows), strict=True):
        leader = _leader(some, following)
        out = handle.generate(
            some,
            attention_mask=torch.ones_like(some),
            max_new_tokens=following.shape[1],
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([leader]),
        )
        assert torch.equal(out[:, some.shape[1] :], following), "the generation was not led"
        found.append(leader.losses.mean(1))
    return torch.cat(found).double().cpu().numpy()


def _leader(prompts: torch.Tensor, following: torch.Tensor) -> Any:
    from transformers import LogitsProcessor

    class Leader(LogitsProcessor):
        """Leaves the true token alone possible, and notes its loss; a row is known by its prompt."""

        def __init__(self) -> None:
            self.places = {tuple(row): place for place, row in enumerate(prompts.tolist())}
            assert len(self.places) == len(prompts), "two prompts are the same"
            self.losses = torch.full(following.shape, math.nan)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            at = input_ids.shape[1] - prompts.shape[1]
            places = [self.places[tuple(row)] for row in input_ids[:, : prompts.shape[1]].tolist()]
            wanted = following[places, at][:, None]
            loss = -scores.float().log_softmax(-1).gather(1, wanted)[:, 0]
            for place, value in zip(places, loss.tolist(), strict=True):
                self.losses[place, at] = value
            return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    return Leader()


@functools.cache
def documentation(held_out: bool) -> np.ndarray:
    """The doc strings of SciPy's modules, long ones only, joined to uint8 [bytes]; a module begins with byte 0."""
    spec = importlib.util.find_spec("scipy")
    assert spec is not None and spec.origin is not None, "SciPy is one of Hasten's dependencies"
    root, parts = pathlib.Path(spec.origin).parent, []
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        if "tests" in inside.parts or text.is_held_out(inside.as_posix()) != held_out:
            continue
        found = re.findall(r'"""(.*?)"""', file.read_text("utf-8", "ignore").replace("\0", ""), re.DOTALL)
        cleaned = [inspect.cleandoc(one) for one in found]
        long = [one for one in cleaned if len(one) > 400]
        if long:
            parts.append(bytes([text.DOCUMENT]) + "\n\n".join(long).encode())
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


@functools.cache
def _tuned(steps: int, lr: float, device: str) -> dict[str, torch.Tensor]:
    """The fine-tuned draft's weights; the same ones for the same options on one machine."""
    model = weights.load_weights(models.stdlib_llama("draft"), "draft").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = language.spread_windows(documentation(False), steps * ROWS, LENGTH, seed=3).to(device)
    for step, ids in enumerate(windows.split(ROWS)):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_cosine(step, steps, warmup=0.1)
        logits = model(input_ids=ids[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


WORKLOAD = StdlibUpscale
