"""speed-bench: drafting on diverse prompts of several kinds at several concurrencies, never on synthetic tokens.

The protocol of SPEED-Bench (arXiv 2604.09557): prompts that are unlike each other within each category, acceptance by
category, and throughput at each number of prompts that run together. `prompts` reads its layout and Spec-Bench's (JSON
lines with `category` and `turns`), and files with one prompt a line (`prompt`, `question` or `text`: HumanEval, GSM8K,
MBPP), packed by gzip or not; without it prompts come from the standard library's held-out source, where the category is
what the text goes on with: prose, comments, tables, imports, statements or signatures.

Departures: unlikeness is that of hashed character 4-grams, not of sentence embeddings; the first turn of a conversation
only; every prompt gets the same number of new tokens, so that arms do the same work; a batch begins and ends together.
"""

import ast
import dataclasses
import functools
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import text
from hasten.workloads.base import Metric, Workload
from hasten.workloads.hub import HubText, _tokenizer
from hasten.workloads.models import CONTEXT
from hasten.workloads.stdlib_lm import StdlibLM

FIELDS = ("prompt", "question", "text")
Prompt = tuple[str, np.ndarray]
"""A category and token ids."""


@dataclasses.dataclass(frozen=True)
class SpeedBench(Workload):
    model: str = option("target", "the bundled model, or a folder or hub name")
    draft_model: str = option("", "a smaller model with the same tokenizer; beside the bundled model the bundled draft")
    prompts: str = option("", "JSON lines with category and turns, prompt, question or text; bundled ones when empty")
    category: str = option("", "prompts of this category only")
    concurrency: int = option(1, "prompts that run together", least=1, most=512)
    count: int = option(48, "prompts, evenly from the categories", least=2, most=4096)
    prompt: int = option(192, "tokens of a prompt at most; of a longer one the last are read", least=8)
    new: int = option(64, "tokens generated after each", least=2)

    @classmethod
    def title(cls) -> str:
        return "speed-bench"

    def tasks(self) -> tuple[str, ...]:
        return ("generate",)

    @property
    def metric(self) -> Metric:
        return Metric("tokens as the plain model writes them, up to the first other one", "higher")

    def problems(self) -> list[str]:
        problems = []
        if self.prompts and not pathlib.Path(self.prompts).is_file():
            problems.append(f"the file of prompts {self.prompts} does not exist")
        if self.model == "target" and self.prompt + self.new > CONTEXT:
            problems.append(f"prompt and new together are at most {CONTEXT} bytes, the model's context")
        if self.concurrency > self.count:
            problems.append(f"concurrency={self.concurrency} needs as many prompts: raise count={self.count}")
        if self.model == "target" and self.draft_model:
            problems.append("the bundled model has its own draft: give draft_model beside a model of your own")
        return problems

    def trained(self) -> nn.Module:
        return StdlibLM().trained() if self.model == "target" else HubText(model=self.model).trained()

    def draft(self) -> nn.Module | None:
        return StdlibLM().draft() if self.model == "target" else self._hub().draft()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        return (StdlibLM() if self.model == "target" else self._hub()).calibration()

    def _hub(self) -> HubText:
        return HubText(model=self.model, draft_model=self.draft_model)

    def chosen(self) -> list[Prompt]:
        """The prompts, category after category in turn, each as unlike the others of its category as can be.

        Raises:
            UsageError: the file can't be read, or it has too few prompts (of the category).
        """
        return _chosen(self.model, self.prompts, self.category, self.count, self.prompt)

    def requests(self, seed: int) -> list[dict[str, torch.Tensor]]:
        found = self.chosen()
        order = np.random.default_rng(seed).permutation(len(found))[: len(found) // self.concurrency * self.concurrency]
        parts = order.reshape(-1, self.concurrency)
        return [self.batch([found[place] for place in part]) for part in parts]

    def batch(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """Left-padded ids and mask [prompts, tokens]."""
        longest = max(len(ids) for _, ids in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, words) in enumerate(prompts):
            ids[row, longest - len(words) :] = torch.from_numpy(words)
            mask[row, longest - len(words) :] = 1
        return {"input_ids": ids.to(self.device()), "attention_mask": mask.to(self.device())}

    def serve(self, handle: Any, request: dict[str, torch.Tensor]) -> torch.Tensor:
        out = handle.generate(**request, max_new_tokens=self.new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out[:, request["input_ids"].shape[1] :]

    def quality(self, handle: Any) -> np.ndarray:
        from hasten.api import apply

        plain, rows = apply(self.trained(), ""), []
        for request in self.requests(0):
            same = (self.serve(handle, request) == self.serve(plain, request)).long().cumprod(1)
            rows.append(same.double().mean(1))
        return torch.cat(rows).cpu().numpy()

    def by_category(self, handle: Any) -> dict[str, dict[str, float]]:
        """Of an arm that drafts, for each category: the share of drafted tokens that were accepted (`acceptance`) and
        the tokens that a pass of the target gave a row (`length`)."""
        from hasten.decode.base import speculation

        spec: Any = speculation(handle.host)
        found: dict[str, dict[str, float]] = {}
        prompts = self.chosen()
        for category in sorted({name for name, _ in prompts}):
            drafted = accepted = tokens = passes = 0
            for one in [prompt for prompt in prompts if prompt[0] == category]:
                self.serve(handle, self.batch([one]))
                counters = spec.counters
                drafted, accepted = drafted + counters.drafted, accepted + counters.accepted
                tokens, passes = tokens + counters.tokens, passes + counters.target_passes
            found[category] = {"acceptance": accepted / max(1, drafted), "length": tokens / max(1, passes)}
        return found


@functools.cache
def _chosen(model: str, file: str, category: str, count: int, longest: int) -> list[Prompt]:
    by_name: dict[str, list[str]] = {}
    for name, words in _from_file(pathlib.Path(file)) if file else _from_library(longest):
        if category in ("", name):
            by_name.setdefault(name, []).append(words)
    if not by_name:
        raise UsageError(f"there is no prompt of the category {category!r}" if category else f"{file} holds no prompt")
    orders = {name: diverse(words, -(-count // len(by_name))) for name, words in sorted(by_name.items())}
    turns = range(max(map(len, orders.values())))
    picked = [(name, order[turn]) for turn in turns for name, order in orders.items() if turn < len(order)]
    if len(picked) < count:
        raise UsageError(f"there are {len(picked)} prompts and count={count} asks for more: lower count")
    return [(name, _ids(model, words)[-longest:]) for name, words in picked[:count]]


def _ids(model: str, words: str) -> np.ndarray:
    tokenizer = None if model == "target" else _tokenizer(model)
    if tokenizer is None:
        return np.frombuffer(words.encode(), np.uint8).astype(np.int64)
    return np.asarray(tokenizer(words)["input_ids"], np.int64)


def _from_file(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    raw = file.read_bytes()
    content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    for number, line in enumerate(content.decode().splitlines(), 1):
        try:
            row = json.loads(line)
            turns = row["turns"] if "turns" in row else [next(row[name] for name in FIELDS if name in row)]
            yield str(row.get("category", "")), str(turns[0])
        except (ValueError, KeyError, IndexError, TypeError, StopIteration):
            raise UsageError(
                f"line {number} of {file} is no prompt: give JSON lines with category and turns (a list), or with one "
                f"of {', '.join(FIELDS)}"
            ) from None


def _from_library(longest: int) -> Iterator[tuple[str, str]]:
    for document in text.documents(True):
        source = document[1:].tobytes().decode(errors="ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines(keepends=True)
        starts = np.cumsum([0, *map(len, lines)])
        seen: set[str] = set()
        for name, line in _places(tree, lines):
            at = int(starts[line])
            if at >= longest and f"{name}{at // longest}" not in seen:
                seen.add(f"{name}{at // longest}")
                yield name, source[at - longest : at]


def _places(tree: ast.AST, lines: list[str]) -> Iterator[tuple[str, int]]:
    """A category and the number of the line, from 0, that begins a text of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.body:
            first = node.body[0]
            yield "signature", node.lineno - 1
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if (first.end_lineno or 0) - first.lineno >= 4:
                    yield "prose", first.lineno + 1
            elif isinstance(node, ast.FunctionDef) and len(node.body) > 3:
                yield "statement", node.body[2].lineno - 1
        elif isinstance(node, ast.Dict | ast.List | ast.Tuple) and (node.end_lineno or 0) - node.lineno >= 8:
            yield "table", node.lineno + 2
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield "import", node.lineno - 1
    for number in range(3, len(lines)):
        if all(line.lstrip().startswith("#") for line in lines[number - 2 : number + 2]):
            yield "comment", number


def diverse(texts: list[str], count: int) -> list[str]:
    """Up to `count` texts, each the one least like all before it; the first is the one least like the mean."""
    texts = sorted(set(texts), key=lambda one: zlib.crc32(one.encode()))[:2000]
    vectors = np.zeros((len(texts), 1024), np.float32)
    for row, one in enumerate(texts):
        raw = one.encode()
        places = [zlib.crc32(raw[at : at + 4]) % 1024 for at in range(max(1, len(raw) - 3))]
        np.add.at(vectors[row], places, 1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ (vectors.mean(0) / np.linalg.norm(vectors.mean(0)))
    picked = [int(likeness.argmin())]
    nearest = vectors @ vectors[picked[0]]
    while len(picked) < min(count, len(texts)):
        nearest[picked] = np.inf
        picked.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[picked[-1]])
    return [texts[place] for place in picked]


WORKLOAD = SpeedBench
