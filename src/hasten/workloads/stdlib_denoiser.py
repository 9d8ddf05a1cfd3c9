"""stdlib-denoiser: a small masked-diffusion language model on the source of Python's standard library, a byte a token.

`infill` hides a span of held-out text and asks for it with the text on both sides; quality is the share of the hidden
bytes that come back right. `continue` writes on after a prompt; quality is the bits per byte that the bundled
autoregressive target needs for what was written. Text that repeats itself is cheap by that measure, so a low figure can
be a bad sign: the second column of a row of quality is the share of its 8-byte strings that occurred in it before.
The model soon repeats blanks where it may choose from the whole span; with `block=8, blockwise=true` it does less so.

The plain serve decides one byte in a forward of all positions, the surest first (LLaDA, arXiv 2502.09992).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, text, weights
from hasten.workloads.base import Metric, Workload

MASK = 256
VOCABULARY = 257
CONTEXT = 1024
STRING = 8


def stdlib_denoiser(*, seed: int = 0) -> nn.Module:
    """A Llama of 0.8M weights that reads in both directions: byte 256 is the mask, blocks are of 16 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        mask_token_id=MASK,
        block_length=16,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class StdlibDenoiser(Workload):
    task: str = option("infill", "what is done", choices=("infill", "continue"))
    prompt: int = option(192, "bytes that are given: half on each side of the span, or all before it", least=2)
    new: int = option(64, "bytes to fill in", least=1)
    batch: int = option(1, "texts in one request", least=1, most=256)
    steps: int | None = option(  # type: ignore[assignment]
        None, "forwards of the plain sampler; one a byte by default", least=1
    )
    block: int | None = option(None, "bytes of the parts that are filled in one after another (task=continue)", least=1)
    blockwise: bool = option(False, "a byte sees its own block and those before it only (task=continue)")
    examples: int = option(48, "held-out examples that quality is measured on", least=8, most=4096)

    @classmethod
    def title(cls) -> str:
        return "stdlib-denoiser"

    @property
    def metric(self) -> Metric:
        if self.task == "infill":
            return Metric("hidden bytes right", "higher")
        return Metric("bits per byte under the target", "lower", "bit", aggregate=_first_column)

    def tasks(self) -> tuple[str, ...]:
        return ("infill", "continue")

    def problems(self) -> list[str]:
        problems = []
        if self.prompt + self.new > CONTEXT:
            problems.append(f"prompt and new together are at most {CONTEXT} bytes, the model's context")
        if self.block is not None and self.task == "infill":
            problems.append("block is for task=continue: infill has one span")
        if self.block is not None and self.new % self.block:
            problems.append(f"block={self.block} does not divide new={self.new}")
        if self.blockwise and (self.block is None or self.prompt % self.block):
            problems.append(f"blockwise needs a block that divides prompt={self.prompt}, the model's are of 1 to 32")
        blocks = 1 if self.block is None else self.new // self.block
        if self.steps is not None and (self.steps > self.new or self.steps % blocks):
            problems.append(f"steps is at most new={self.new} and a multiple of the number of blocks, {blocks}")
        return problems

    @property
    def begin(self) -> int:
        """The column of the first byte to fill in."""
        return self.prompt // 2 if self.task == "infill" else self.prompt

    def texts(self, count: int, seed: int) -> torch.Tensor:
        """Held-out windows, [count, prompt + new]."""
        rows = language.spread_windows(text.stream(True), count, self.prompt + self.new, seed=seed)
        return rows.to(self.device())

    def asked(self, rows: torch.Tensor) -> torch.Tensor:
        """What the model is given of these windows: all with the span hidden, or what comes before it."""
        if self.task == "continue":
            return rows[:, : self.prompt]
        hidden = rows.clone()
        hidden[:, self.begin : self.begin + self.new] = MASK
        return hidden

    def trained(self) -> nn.Module:
        return weights.load_weights(stdlib_denoiser(), "denoiser").to(self.device())

    def requests(self, seed: int) -> list[torch.Tensor]:
        return list(self.asked(self.texts(16 * self.batch, seed=1000 + seed)).split(self.batch))

    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        """The bytes that were filled in, [batch, new]."""
        more: dict[str, Any] = {}
        if self.task == "continue":
            more = {"max_new_tokens": self.new, "block_length": self.block, "blockwise": self.blockwise}
        out = handle.generate(request, steps=self.steps, **more)
        return out[:, self.begin : self.begin + self.new]

    def quality(self, handle: Any) -> np.ndarray:
        """[examples] share of bytes that are right, or [examples, 2] bits per byte and share of repeated strings."""
        rows = self.texts(self.examples, seed=29)
        written = torch.cat([self.serve(handle, self.asked(part)) for part in rows.split(max(16, self.batch))])
        if self.task == "infill":
            right = written == rows[:, self.begin : self.begin + self.new]
            return right.double().mean(1).cpu().numpy()
        return np.stack([self._bits(rows[:, : self.prompt], written), repeated(written.cpu().numpy())], 1)

    @torch.inference_mode()
    def _bits(self, prompts: torch.Tensor, written: torch.Tensor) -> np.ndarray:
        judge = weights.load_weights(models.stdlib_llama("target"), "target").to(self.device())
        bits = []
        for prompt, new in zip(prompts.split(8), written.split(8), strict=True):
            logits = judge(input_ids=torch.cat([prompt, new], 1), logits_to_keep=self.new + 1).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), new.flatten(), reduction="none")
            bits.append(loss.view(new.shape).mean(1) * language.NATS_TO_BITS)
        return torch.cat(bits).double().cpu().numpy()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        length = min(256, self.prompt + self.new)
        rows = language.spread_windows(text.stream(False), 64, length, seed=41).to(self.device())
        return [{"input_ids": part} for part in rows.split(8)]

    def draft(self) -> nn.Module:
        """The bundled autoregressive draft of stdlib-lm, whose 256 tokens are the bytes."""
        return weights.load_weights(models.stdlib_llama("draft"), "draft").to(self.device())


def repeated(rows: np.ndarray) -> np.ndarray:
    """The share of each row's strings of 8 tokens that occurred before in that row, [rows] from [rows, tokens]."""
    shares = []
    for row in rows:
        strings = [row[i : i + STRING].tobytes() for i in range(len(row) - STRING + 1)]
        shares.append(1 - len(set(strings)) / len(strings) if strings else 0.0)
    return np.array(shares)


def _first_column(rows: np.ndarray) -> float:
    return float(np.mean(rows[:, 0]))


WORKLOAD = StdlibDenoiser
