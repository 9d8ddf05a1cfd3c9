"""gsm8k: sums in words with worked answers, each beside an answer with one wrong number; GSM8K of HASTEN_DATA.

A small GPT-2 (`workloads.text_lm`) is trained from scratch on the answers, given the questions; quality is how sure it
is, on held-out sums, of the right digit against the variant's. Files: gsm8k/train.jsonl.gz and gsm8k/test.jsonl, and
for tokens=bpe GPT-2's gpt2_bpe/encoder.json and vocab.bpe. Its ids that occur in the texts used are numbered anew, in
order, so that the model has no rows for the other ones; a token of the held-out part that the training part has not
is id 1.
"""

import dataclasses
import functools
import gzip
import json
import pathlib
import re
from typing import Any

import numpy as np
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads._pairs import Pair, PairWorkload
from hasten.workloads.data_folder import data_file
from hasten.workloads.text_lm import CONTEXT, SIZES, byte_gpt2

FILES = {False: "gsm8k/train.jsonl.gz", True: "gsm8k/test.jsonl"}
MERGES = ("gpt2_bpe/encoder.json", "gpt2_bpe/vocab.bpe")
START, UNKNOWN = 0, 1


@dataclasses.dataclass(frozen=True)
class GSM8K(PairWorkload):
    tokens: str = option("bytes", "what a token is: a byte, or one of GPT-2's", choices=("bytes", "bpe"))
    size: str = option("small", "3 layers of width 96, or 6 of 192", choices=tuple(SIZES))
    length: int = option(384, "tokens of a question and its answer at most", least=16, most=CONTEXT)
    steps: int = option(300, "steps of the baseline's schedule", least=10)
    lr: float = option(3e-3, "peak learning rate of the baseline's AdamW", above=0)
    target: float = option(0.6, "held-out loss of telling right from wrong at which training stops", above=0)

    @classmethod
    def title(cls) -> str:
        return "gsm8k"

    def build(self, seed: int) -> nn.Module:
        vocabulary = 256 if self.tokens == "bytes" else len(_vocabulary(self.texts)) + 2
        return byte_gpt2(self.size, seed=seed, vocabulary=vocabulary).to(self.device())

    def pairs(self, held_out: bool, count: int) -> list[Pair]:
        """The first sums whose text and variant are no longer than `length`."""
        rng = np.random.default_rng(3 + held_out)
        found: list[Pair] = []
        for question, answer in _sums(data_file(FILES[held_out])):
            wrong = wrong_number(answer, rng)
            if wrong is None:
                continue
            given = [START, *self._ids(question + "\n")]
            pair = Pair(given + self._ids(answer), given + self._ids(wrong), len(given))
            if max(len(pair.tokens), len(pair.variant)) <= self.length and pair.tokens != pair.variant:
                found.append(pair)
                if len(found) == count:
                    break
        return found

    def _ids(self, text: str) -> list[int]:
        if self.tokens == "bytes":
            return list(text.encode())
        new = _vocabulary(self.texts)
        return [new.get(token, UNKNOWN) for token in _tokenizer().encode(text).ids]


def wrong_number(answer: str, rng: np.random.Generator) -> str | None:
    """The answer with one of its whole numbers a little off; None where it has none."""
    places = list(re.finditer(r"\d+", answer))
    if not places:
        return None
    place = places[rng.integers(len(places))]
    near = [int(place[0]) + step for step in (-10, -2, -1, 1, 2, 10) if int(place[0]) + step >= 0]
    return answer[: place.start()] + str(near[rng.integers(len(near))]) + answer[place.end() :]


@functools.lru_cache(maxsize=4)
def _sums(file: pathlib.Path) -> tuple[tuple[str, str], ...]:
    """(question, answer) of each line of a file.

    Raises:
        UsageError: the file is not of that form.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        records = [json.loads(line) for line in content.splitlines() if line.strip()]
        return tuple((record["question"], record["answer"]) for record in records)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} can't be read as lines of JSON with question and answer: {error}") from None


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    return ByteLevelBPETokenizer(*(str(data_file(name)) for name in MERGES))


@functools.lru_cache(maxsize=2)
def _vocabulary(texts: int) -> dict[int, int]:
    """New ids, from 2 on, of GPT-2's tokens in the first training sums."""
    content = "\n".join(part for one in _sums(data_file(FILES[False]))[: 2 * texts] for part in one)
    digits = "\n".join(str(number) for number in range(1000))
    return {token: place + 2 for place, token in enumerate(sorted(set(_tokenizer().encode(content + digits).ids)))}


WORKLOAD = GSM8K
