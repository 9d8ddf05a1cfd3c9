"""text-lm: a small GPT-2 trained from scratch on a named text, one token a byte.

    corpus           bytes   file of the folder HASTEN_DATA
    stdlib           8.5M    none: the source of Python's standard library, which every machine has (the default)
    tinyshakespeare  1.1M    tinyshakespeare/input.txt
    tinystories      2.1M    tinystories_sample/tinystories_sample.txt.gz
    wikitext2        1.1M    wikitext2/valid.txt
    gsm8k            4.0M    gsm8k/train.jsonl.gz, questions and answers
    PATH             any     a file of the person's own

The last tenth of a text is held out (of the library, whole files). `epochs=N` trains on as small a part of the rest as
the schedule's steps pass over N times; the loader's data set then names the whole part as its `larger`, which
`data/one_epoch` trains on. `dropout` is GPT-2's, on embeddings, attention and residuals.

The baseline was tuned on the library in runs of 200 steps: rates of 0.0015, 0.002, 0.003 and 0.006, warm-ups of 0.2 and
0.4. 0.003 with 0.2 and 0.002 with 0.4 came to the lowest loss (3.43 and 3.42 bits; the others to 3.46 and 3.73). The
targets are those of size=small at the default length, rows and steps, which reach 3.27 to 3.42 bits; the base size,
and fewer steps, need a `goal` of their own.
"""

import dataclasses
import functools
import gzip
import json
import pathlib

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import language, text
from hasten.workloads.base import Metric
from hasten.workloads.data_folder import data_file

CONTEXT = 1024
CORPORA = {
    "stdlib": "",
    "tinyshakespeare": "tinyshakespeare/input.txt",
    "tinystories": "tinystories_sample/tinystories_sample.txt.gz",
    "wikitext2": "wikitext2/valid.txt",
    "gsm8k": "gsm8k/train.jsonl.gz",
}
SIZES = {"small": (96, 3, 4), "base": (192, 6, 6)}  # width, layers, heads
TARGETS = {"stdlib": 3.32, "tinyshakespeare": 3.48, "tinystories": 3.27, "wikitext2": 3.3, "gsm8k": 3.4}


class Windows(torch.utils.data.Dataset):
    """Windows of a token stream.

    Attributes:
        rows: [windows, length] uint8. larger: the data set that this one is a part of, or None.
    """

    def __init__(self, rows: torch.Tensor, larger: "Windows | None" = None) -> None:
        self.rows, self.larger = rows, larger

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.rows[place].long()


@dataclasses.dataclass(frozen=True)
class TextLM(language.LanguageModel):
    task: str = option("train", "what is done", choices=("train",))
    corpus: str = option("stdlib", f"one of {', '.join(CORPORA)}, or a file whose bytes are read")
    size: str = option("small", "3 layers of width 96, or 6 of 192", choices=tuple(SIZES))
    length: int = option(64, "bytes of a training example", least=8, most=CONTEXT)
    rows: int = option(8, "examples of a training batch", least=1, most=1024)
    epochs: float | None = option(
        None, "passes that the schedule makes over the part it trains on; none: all of the text", above=0
    )
    steps: int = option(300, "steps of the baseline's schedule", least=10)
    dropout: float = option(0.0, "probability of dropout in training", least=0, below=1)
    lr: float = option(3e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.2, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    goal: float | None = option(None, "bits per byte at which training stops; none: the corpus's own", above=0)

    per_nat = language.NATS_TO_BITS

    @classmethod
    def title(cls) -> str:
        return "text-lm"

    def problems(self) -> list[str]:
        if self.corpus not in CORPORA and not pathlib.Path(self.corpus).is_file():
            return [f"corpus is one of {', '.join(CORPORA)} or a file, and there is no file {self.corpus}"]
        if self.corpus not in CORPORA and self.goal is None:
            return ["a corpus of your own needs a target: goal=BITS"]
        return []

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte", "lower", "bit")

    @property
    def target(self) -> float:
        return self.goal if self.goal is not None else TARGETS[self.corpus]

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def tokens(self, held_out: bool) -> np.ndarray:
        if self.corpus == "stdlib":
            return text.stream(held_out)
        stored = CORPORA.get(self.corpus)
        content = read(data_file(stored) if stored else pathlib.Path(self.corpus))
        cut = len(content) * 9 // 10
        return content[cut:] if held_out else content[:cut]

    def data(self) -> Windows:
        """What is trained on.

        Raises:
            UsageError: the text is too short for a batch, or for `epochs`.
        """
        stream = torch.from_numpy(np.array(self.tokens(False)))
        whole = Windows(stream[: len(stream) // self.length * self.length].view(-1, self.length))
        count = len(whole) if self.epochs is None else max(self.rows, round(self.steps * self.rows / self.epochs))
        if count > len(whole) or len(whole) < self.rows:
            raise UsageError(
                f"the text has {len(whole)} windows of {self.length} bytes, and {max(count, self.rows)} are needed: "
                "take a longer text, fewer steps or more epochs"
            )
        if count == len(whole):
            return whole
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(5))[:count]
        return Windows(whole.rows[chosen], larger=whole)

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        device = self.device()
        return torch.utils.data.DataLoader(
            self.data(),
            batch_size=self.rows,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=lambda rows: torch.stack(rows).to(device),
        )

    def build(self, seed: int) -> nn.Module:
        return byte_gpt2(self.size, self.dropout, seed).to(self.device())


def byte_gpt2(size: str, dropout: float = 0.0, seed: int = 0, vocabulary: int = text.VOCABULARY) -> nn.Module:
    """A `GPT2LMHeadModel` of random weights: `small` (0.5M weights with bytes as tokens) or `base` (2.9M)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers, heads = SIZES[size]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=text.DOCUMENT,
        eos_token_id=text.DOCUMENT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@functools.lru_cache(maxsize=8)
def read(file: pathlib.Path) -> np.ndarray:
    """A text's bytes without NUL, uint8; gzip is unpacked, of `.jsonl` the fields are joined, one a line.

    Raises:
        UsageError: the file can't be read as such.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
            content = "\n\n".join("\n".join(map(str, record.values())) for record in records).encode()
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} can't be read as text: {error}") from None
    return np.frombuffer(content.replace(b"\0", b""), np.uint8)


WORKLOAD = TextLM
