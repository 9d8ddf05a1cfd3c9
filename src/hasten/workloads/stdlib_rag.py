"""stdlib-rag: questions behind passages of the standard library, of which the same come again and again in new order.

A prompt is a header, some passages drawn from a small pool (a few of them much more often than others) and a question:
`quote` repeats some bytes from inside one of the passages, and the answer is what follows them there; `continue` is the
text that follows the last passage in its file; `both` takes turns. `needle` asks for the code that a line of one of
the passages gives to a key. The models are those of stdlib-lm: `long` was trained to find needles, while `target` makes
little use of text that is far away, so that its quality shows little of what happens to passages.

Quality is the mean loss of the true answer, for needles the mean probability of its bytes (recall), after `warm`
prompts that fill whatever the arm keeps between requests. An arm that stores contexts is given them apart; any other
gets the whole prompt, with `between=prefix` behind the longest beginning that it shares with one of its latest prompts
(an exact prefix cache).
"""

import dataclasses
import functools
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads import language, models, needle, text, weights
from hasten.workloads.base import Metric, Workload

HEADER = bytes([text.DOCUMENT]) + b"# Passages of the standard library, then a question.\n"
LATEST = 24  # prompts that a prefix cache holds


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: token ids, int64, without a batch dimension."""

    prefix: torch.Tensor
    contexts: list[torch.Tensor]
    question: torch.Tensor
    answer: torch.Tensor

    @property
    def prompt(self) -> torch.Tensor:
        return torch.cat([self.prefix, *self.contexts, self.question])


@dataclasses.dataclass(frozen=True)
class StdlibRAG(Workload):
    task: str = option("ask", "what is done", choices=("ask",))
    model: str = option("target", "12 layers, or 4 that find needles in a long text", choices=("target", "long"))
    kind: str = option("both", "what questions ask for", choices=("both", "quote", "continue", "needle"))
    passages: int = option(5, "passages in a prompt", least=1)
    passage: int = option(320, "bytes of a passage", least=32)
    pool: int = option(12, "passages there are", least=2)
    question: int = option(64, "bytes of a question, other than for a needle", least=2)
    new: int = option(8, "bytes that are generated, other than for a needle", least=2)
    scored: int = option(64, "bytes of the true answer that quality is measured on, other than a needle's", least=2)
    examples: int = option(48, "held-out questions that quality is measured on", least=8, most=4096)
    warm: int = option(20, "prompts before those, which are not scored", least=0)
    between: str = option("nothing", "what a plain arm keeps between requests", choices=("nothing", "prefix"))

    @classmethod
    def title(cls) -> str:
        return "stdlib-rag"

    @property
    def metric(self) -> Metric:
        return language.RECALL if self.kind == "needle" else Metric("bits per byte", "lower", "bit")

    def problems(self) -> list[str]:
        found = []
        if self.passages > self.pool:
            found.append("a prompt has at most as many passages as the pool")
        if self.question + self.scored >= self.passage:
            found.append("a question and its answer fit into a passage: make passage larger")
        if len(HEADER) + self.passages * self.passage + self.question + max(self.new, self.scored) > self.context:
            found.append(f"a prompt and its answer are at most {self.context} bytes, the model's context")
        return found

    @property
    def context(self) -> int:
        return models.LONG_CONTEXT if self.model == "long" else models.CONTEXT

    def tasks(self) -> tuple[str, ...]:
        return ("ask",)

    def trained(self) -> nn.Module:
        return weights.load_weights(models.stdlib_llama(self.model), self.model).to(self.device())

    def requests(self, seed: int) -> list[Asked]:
        return self.ask(256, 2000 + seed)

    def ask(self, count: int, seed: int) -> list[Asked]:
        """Requests drawn with a seed, from the same pool of passages always."""
        pool = _pool(self.pool, self.passage, self.question + self.scored, self.kind == "needle")
        rng, device = np.random.default_rng(seed), self.device()
        popular = 1 / np.arange(1, self.pool + 1)
        asked = []
        for i in range(count):
            drawn = rng.choice(self.pool, self.passages, replace=False, p=popular / popular.sum())
            which = pool[drawn[-1]]
            if self.kind == "needle":
                found = pool[rng.choice(drawn)].needle
                question, answer = b"\n" + found.question, found.code
            else:
                following = which.following
                if self.kind == "quote" or (self.kind == "both" and i % 2 == 0):
                    source = pool[rng.choice(drawn)].text
                    start = rng.integers(0, self.passage - self.question - self.scored)
                    following = source[start : start + self.question + self.scored]
                question, answer = following[: self.question], following[self.question :]
            contexts = [pool[one].text for one in drawn]
            ids = [torch.tensor(list(part), device=device) for part in (HEADER, question, answer, *contexts)]
            asked.append(Asked(ids[0], ids[3:], ids[1], ids[2]))
        return asked

    def serve(self, handle: Any, request: Asked) -> torch.Tensor:
        new = len(request.answer) if self.kind == "needle" else self.new
        if hasattr(handle.host, "shelf"):
            question = request.question[None]
            out = handle.generate(
                question, contexts=request.contexts, prefix=request.prefix, max_new_tokens=new, min_new_tokens=new,
                do_sample=False,
            )  # fmt: skip
            return out[:, question.shape[1] :]
        if self.between == "prefix":
            return _behind_prefix(handle, request.prompt[None], len(request.question), new)
        return language.generate(handle, request.prompt[None], new)

    @torch.inference_mode()
    def quality(self, handle: Any) -> np.ndarray:
        asked = self.ask(self.warm + self.examples, 31)
        scored = asked[self.warm :]
        stores, found = hasattr(handle.host, "shelf"), []
        if stores:
            handle.host.shelf.clear()
            for one in asked[: self.warm]:
                handle.host.read(one.contexts, one.prefix)
        for one in scored:
            ids = torch.cat([one.question, one.answer[:-1]])[None]
            if stores:
                cache = handle.host.read(one.contexts, one.prefix)
            else:
                cache, ids = handle.host.new_cache(), torch.cat([one.prompt, one.answer[:-1]])[None]
            given = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
            logits = handle.model(**given, logits_to_keep=len(one.answer)).logits[0].float()
            right = logits.log_softmax(-1).gather(1, one.answer[:, None])
            found.append(right.exp().mean() if self.kind == "needle" else -right.mean() * language.NATS_TO_BITS)
        return torch.stack(found).double().cpu().numpy()


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage, what follows it in its file, and the needle in its middle if one was planted."""

    text: bytes
    following: bytes
    needle: needle.Needle


@functools.cache
def _pool(count: int, length: int, more: int, planted: bool) -> list[Passage]:
    """Passages of `length` bytes that begin with a line, each with the `more` bytes that follow it in its file."""
    fitting = [one for one in text.documents(True) if len(one) > 2 * (length + more)]
    rng = np.random.default_rng(53)
    found = []
    for place in rng.choice(len(fitting), count, replace=False):
        document, hidden = fitting[place], needle.Needle.draw(rng)
        lines = np.flatnonzero(document[: len(document) - length - more - 1] == 10) + 1
        start = int(rng.choice(lines)) if len(lines) else 1
        end = start + length - (needle.LINE if planted else 0)
        part = document[start:end]
        if planted:
            part = needle.plant(part, [(len(part) // 2, needle.as_bytes(hidden.line))])[0]
        found.append(Passage(part.tobytes(), document[end : end + more].tobytes(), hidden))
    return found


_latest: weakref.WeakKeyDictionary[Any, list[tuple[torch.Tensor, list[Any]]]] = weakref.WeakKeyDictionary()


def _behind_prefix(handle: Any, prompt: torch.Tensor, question: int, new: int) -> torch.Tensor:
    """Generates behind the longest beginning that the prompt shares with a kept one; then keeps its own.

    A prompt that was there before up to its question is passed over: timing asks the same again, which no user does.
    """
    held, best, length = _latest.setdefault(handle, []), None, 0
    for ids, layers in held:
        same = int((ids != prompt[0, : len(ids)]).int().argmax()) if not torch.equal(ids, prompt[0]) else len(ids)
        if length < same < prompt.shape[1] - question:
            best, length = layers, same
    cache = handle.host.new_cache()
    for index, (keys, values) in enumerate(best or ()):
        cache.update(keys[:, :, :length], values[:, :, :length], index)
    out = handle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        past_key_values=cache,
    )  # fmt: skip
    held.append((prompt[0], [(layer.keys, layer.values) for layer in cache.layers]))
    del held[:-LATEST]
    return out[:, prompt.shape[1] :]


WORKLOAD = StdlibRAG
