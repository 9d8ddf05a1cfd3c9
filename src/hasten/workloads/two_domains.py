"""two-domains: one small Llama that must be good at two kinds of text, source code and prose; a token is a byte.

The source is that of Python's standard library (`workloads.text`), the prose is Python's language reference, which
every installation has in `pydoc_data.topics`; the last eighth of each topic is held out. Everything is prepared on the
spot, once a process: a seed model, trained on both for `seed_steps`, and from it two dense models, each trained on for
`dense_steps` on one domain alone. Training begins with the seed model, each batch half of either domain; the dense
models are handed to methods that need a teacher, as a list. Quality is bits per byte over held-out text of both.

The baseline trains the seed model on. Of the rates 0.004, 0.006, 0.008, 0.01 and 0.015, each tried for one order of the
data with a schedule of 150 steps, 0.01 came lowest and reaches the target in about 115 steps (0.006 in 130).
"""

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, text
from hasten.workloads.base import Metric, Supervised, warm_cosine

DOMAINS = ("source", "prose")
PREPARED_RATE = 4e-3


@functools.cache
def prose(held_out: bool) -> np.ndarray:
    """One part of every topic joined, uint8 [bytes]: the last eighth is held out, where no other topic repeats it."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    document = bytes([text.DOCUMENT])
    train = b"".join(document + words[: len(words) * 7 // 8] for words in texts)
    if held_out:
        tails = [words[len(words) * 7 // 8 :] for words in texts]
        return np.frombuffer(b"".join(document + tail for tail in tails if tail not in train), np.uint8)
    return np.frombuffer(train, np.uint8)


def stream(domain: str, held_out: bool) -> np.ndarray:
    return text.stream(held_out) if domain == "source" else prose(held_out)


def small_llama(seed: int) -> nn.Module:
    """Two layers of width 64, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=text.VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=text.DOCUMENT,
        eos_token_id=None,
        pad_token_id=text.DOCUMENT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclasses.dataclass(frozen=True)
class TwoDomains(Supervised):
    length: int = option(64, "bytes of an example", least=8, most=1024)
    rows: int = option(16, "examples of a batch, half of either domain", least=2, most=1024)
    seed_steps: int = option(120, "steps that the seed model was trained on both domains", least=0)
    dense_steps: int = option(150, "steps that each dense model was trained on its domain", least=0)
    steps: int = option(150, "steps of the baseline's schedule", least=10)
    lr: float = option(1e-2, "peak learning rate of the baseline's AdamW", above=0)
    target: float = option(3.55, "bits per byte on held-out text of both domains at which training stops", above=0)

    decay = 0.1
    tunable = {"lr": (1e-3, 2e-2), "warmup": (0.02, 0.4)}

    @classmethod
    def title(cls) -> str:
        return "two-domains"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    def build(self, seed: int) -> nn.Module:
        """The seed model; the seed changes the order of the batches only."""
        return copy.deepcopy(_seed_model(self.length, self.rows, self.seed_steps)).to(self.device())

    def teacher(self) -> Any:
        """The dense models, one a domain."""
        models = _dense_models(self.length, self.rows, self.seed_steps, self.dense_steps)
        return [copy.deepcopy(model).to(self.device()) for model in models]

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        """Batches [rows, length] of byte values; an example is a pair of windows, one of each domain."""
        device = self.device()
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*_windows(self.length)),
            batch_size=self.rows // 2,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=lambda pairs: torch.stack([one for pair in pairs for one in pair]).long().to(device),
        )

    def losses(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """[rows], nats a byte."""
        return _losses(model, batch)

    def evaluate(self, model: nn.Module) -> np.ndarray:
        """Bits per byte of 64 held-out windows, the first half of them source: [64]."""
        parts = [language.spread_windows(stream(domain, True), 32, self.length + 1, seed=17) for domain in DOMAINS]
        windows = torch.cat(parts).to(self.device())
        return language.window_loss(model, windows, rows=64) * language.NATS_TO_BITS


def _losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)


@functools.cache
def _windows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As many windows of each domain, [windows, length] uint8; those of the source spread over all of it."""
    parts = [np.array(stream(domain, False)) for domain in DOMAINS]
    whole = [torch.from_numpy(part[: len(part) // length * length]).view(-1, length) for part in parts]
    fewest = min(map(len, whole))
    chosen = [part[torch.arange(fewest) * len(part) // fewest] for part in whole]
    return chosen[0], chosen[1]


@functools.cache
def _seed_model(length: int, rows: int, steps: int) -> nn.Module:
    return _trained(small_llama(0), torch.cat(_windows(length)), rows, steps, order=101)


@functools.cache
def _dense_models(length: int, rows: int, seed_steps: int, steps: int) -> tuple[nn.Module, ...]:
    seed = _seed_model(length, rows, seed_steps)
    domains = enumerate(_windows(length))
    return tuple(_trained(copy.deepcopy(seed), part, rows, steps, order=102 + place) for place, part in domains)


def _trained(model: nn.Module, windows: torch.Tensor, rows: int, steps: int, order: int) -> nn.Module:
    """The model after some AdamW steps on random windows, on the CPU, the same always."""
    generator = torch.Generator().manual_seed(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PREPARED_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PREPARED_RATE * warm_cosine(step, steps, 0.1)
        batch = windows[torch.randint(len(windows), (rows,), generator=generator)].long()
        _losses(model, batch).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


WORKLOAD = TwoDomains
