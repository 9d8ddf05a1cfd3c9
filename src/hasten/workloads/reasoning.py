"""sums-lm: a small Llama that thinks before it answers, one token a character.

A problem is a chain of sums, `47+8-5+9=`. The model writes a thought between a begin and an end token, then the answer
and the end of the sequence. It was trained on the same problems thought about in two ways that the prompt does not tell
apart: concisely, `+8:55 -5:50 +9:59`, and, mostly, in words, with checks, all of it gone through again once or twice.
So it is right nearly always and writes far more than it needs.

`solve`: greedy generation until the end of the sequence; quality is whether the answer is right.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import weights
from hasten.workloads.base import Metric, Workload

PAD, START, END, BEGIN_THOUGHT, END_THOUGHT = range(5)
CHARACTERS = "0123456789+-=:,. abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 48
CONTEXT = 512
NEW = 256
"""Tokens that a request may take; the longest solutions of the training text have about 220."""

HABIT = 0.85
"""How often a style shows where it could."""

_CODE = {character: code for code, character in enumerate(CHARACTERS, 5)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A first number and the steps after it: (sign, digit), all different, every total from 10 to 99."""

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def totals(self) -> list[int]:
        """The total after each step."""
        totals = [self.first]
        for sign, digit in self.steps:
            totals.append(totals[-1] + digit if sign == "+" else totals[-1] - digit)
        return totals[1:]

    @property
    def text(self) -> str:
        return str(self.first) + "".join(f"{sign}{digit}" for sign, digit in self.steps)

    @property
    def sums(self) -> list[tuple[int, str, int, int]]:
        """(total before, sign, digit, total after) of each step."""
        return [(a, *step, b) for a, step, b in zip([self.first, *self.totals], self.steps, self.totals, strict=False)]


def problems(rng: np.random.Generator, held_out: bool) -> Iterator[Problem]:
    """Endless problems of 3 to 5 steps; one in twelve is held out, by the CRC-32 of its text."""
    while True:
        wanted, first = int(rng.integers(3, 6)), int(rng.integers(10, 100))
        steps: list[tuple[str, int]] = []
        total = first
        while len(steps) < wanted:
            step = ("+-"[rng.integers(2)], int(rng.integers(1, 10)))
            after = total + step[1] if step[0] == "+" else total - step[1]
            if step not in steps and 10 <= after <= 99:
                steps.append(step)
                total = after
        made = Problem(first, tuple(steps))
        if (zlib.crc32(made.text.encode()) % 12 == 0) == held_out:
            yield made


def concise(problem: Problem) -> str:
    """Every step with its total, and nothing else."""
    return " ".join(f"{sign}{digit}:{after}" for _, sign, digit, after in problem.sums)


def think(problem: Problem, rng: np.random.Generator, wordy: bool) -> str:
    """A thought in a style that shows in every choice, but for certain in none.

    Of a wordy thought most steps are in words or checked backwards, and it goes through the whole again, most times
    twice; of another one most steps are just written down, and it rarely goes on. Which it is must be guessed from what
    is there so far, so that a model that has learnt to write it holds a guess all along.
    """
    habit = HABIT if wordy else 1 - HABIT
    thought = []
    for a, sign, digit, b in problem.sums:
        if rng.random() > habit:
            thought.append(f"{sign}{digit}:{b}")
        elif rng.random() < 0.6:
            thought.append(f"now {a}{sign}{digit} is {b}.")
        else:
            thought.append(f"{a}{sign}{digit}={b} as {b}{'-' if sign == '+' else '+'}{digit}={a}.")
    answer = f"so {problem.totals[-1]}."
    if rng.random() < habit:
        thought.append(answer)
    for goes_on in (habit, habit - 0.1):
        if rng.random() > goes_on:
            break
        thought += ["again", *(f"{a}{sign}{digit}={b}" for a, sign, digit, b in problem.sums), answer]
    return " ".join(thought)


def encode(text: str) -> list[int]:
    return [_CODE[character] for character in text]


def decode(tokens: Any) -> str:
    """Text of tokens, `<` and `>` around the thought; padding, start and end are left out."""
    marks = {BEGIN_THOUGHT: "<", END_THOUGHT: ">", PAD: "", START: "", END: ""}
    return "".join(marks[t] if t in marks else CHARACTERS[t - 5] for t in map(int, tokens))


def prompt(problem: Problem) -> list[int]:
    return [START, *encode(problem.text + "="), BEGIN_THOUGHT]


def solution(problem: Problem, thought: str) -> list[int]:
    """What follows the prompt: thought, answer, end."""
    return [*encode(thought), END_THOUGHT, *encode(str(problem.totals[-1])), END]


def answered(tokens: list[int]) -> str | None:
    """The answer in what was generated, or None where the thought or the sequence does not end."""
    if END_THOUGHT not in tokens or END not in tokens:
        return None
    return decode(tokens[tokens.index(END_THOUGHT) + 1 : tokens.index(END)])


def sums_llama(*, seed: int = 0) -> nn.Module:
    """A `LlamaForCausalLM` of 0.32M weights; its config names the tokens around a thought."""
    from transformers import LlamaConfig, LlamaForCausalLM

    thought: dict[str, Any] = {
        "begin_of_thought_token_id": BEGIN_THOUGHT,
        "end_of_thought_token_id": END_THOUGHT,
    }
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        **thought,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def padded(rows: list[list[int]], left: bool = True) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(None, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclasses.dataclass(frozen=True)
class SumsLM(Workload):
    task: str = option("solve", "what is done", choices=("solve",))
    batch: int = option(1, "problems in one request", least=1, most=256)
    examples: int = option(96, "held-out problems that quality is measured on", least=8, most=4096)
    pairs: int = option(100, "problems of the calibration set, each thought about in both ways", least=1, most=4096)

    @classmethod
    def title(cls) -> str:
        return "sums-lm"

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "higher")

    def tasks(self) -> tuple[str, ...]:
        return ("solve",)

    def trained(self) -> nn.Module:
        return weights.load_weights(sums_llama(), "reasoning").to(self.device())

    # Inference.

    def requests(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Sixteen requests of left-padded prompts."""
        asked = _drawn(16 * self.batch, 1000 + seed, held_out=True)
        return [self._prompts(asked[at : at + self.batch]) for at in range(0, len(asked), self.batch)]

    def serve(self, handle: Any, request: dict[str, torch.Tensor]) -> torch.Tensor:
        """What follows the prompts, [batch, new]; rows that ended are padded."""
        out = handle.generate(**request, max_new_tokens=NEW, do_sample=False)
        return out[:, request["input_ids"].shape[1] :]

    def same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and bool(torch.equal(one, other))

    def quality(self, handle: Any) -> np.ndarray:
        """1 where the answer is right, [examples]; a thought or an answer without an end counts as wrong."""
        asked = _drawn(self.examples, 29, held_out=True)
        right: list[float] = []
        for at in range(0, len(asked), 32):
            some = asked[at : at + 32]
            for problem, row in zip(some, self.serve(handle, self._prompts(some)).tolist(), strict=True):
                right.append(float(answered(row) == str(problem.totals[-1])))
        return np.array(right)

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Problems of the training part, thought about in both ways, in batches of 10 rows, right-padded.

        Beside `input_ids` and `attention_mask` each batch holds `concise`, bool [rows], which rows think concisely (the
        others think about the same problems at length), and `thought`, bool [rows, length], which tokens are thought,
        the one that ends it included.
        """
        rng = np.random.default_rng(43)
        batches = []
        asked = _drawn(self.pairs, 41, held_out=False)
        for at in range(0, len(asked), 5):
            rows, lengths = [], []
            for brief in (True, False):
                for problem in asked[at : at + 5]:
                    thought = concise(problem) if brief else think(problem, rng, wordy=True)
                    rows.append(prompt(problem) + solution(problem, thought))
                    lengths.append((len(prompt(problem)), len(thought)))
            batch = padded(rows, left=False)
            batch["concise"] = torch.arange(len(rows)) < len(rows) // 2
            batch["thought"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            for row, (start, length) in enumerate(lengths):
                batch["thought"][row, start : start + length + 1] = True
            batches.append({name: tensor.to(self.device()) for name, tensor in batch.items()})
        return batches

    def _prompts(self, asked: list[Problem]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device()) for name, tensor in padded([prompt(one) for one in asked]).items()}


def _drawn(count: int, seed: int, held_out: bool) -> list[Problem]:
    stream = problems(np.random.default_rng(seed), held_out)
    return [next(stream) for _ in range(count)]


WORKLOAD = SumsLM
