"""llama2c: published small story models in llama2.c's format, on TinyStories; files of the folder HASTEN_DATA.

    model         weights  tokens                          files
    stories260k   0.26M    512 (byte pairs)                lm_stories260K/{stories260K,tok512}.bin
    tok105        0.94M    105 (characters)                lm_babyllama_char/{tok105_model5000.bin,tok105.vocab}
    tok361        0.97M    361 (characters and bytes)      lm_babyllama_char/{tok361_model5000.bin,tok105.vocab}
    relu_sparse   0.26M    1,024, context 64, from 8 bits  lm_relu_sparse_q8/{model_qint80,tok1024}.bin

`relu_sparse` has activations of which most are zero (`relu_llama`). The text is
tinystories_sample/tinystories_sample.txt.gz; every tenth story is held out from calibration and from training here.
The models' own training may have seen it. Windows start anywhere in the stream of stories, as in llama2.c's training.
"""

import dataclasses
import functools
import gzip
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import language, llama2c_files, needle
from hasten.workloads.base import Metric
from hasten.workloads.data_folder import data_file

TEXT = "tinystories_sample/tinystories_sample.txt.gz"
SEPARATOR = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Published:
    """Files of a model, and the tokens of a prompt and of what follows that suit its context."""

    weights: str
    tokens: str
    prompt: int = 192
    new: int = 64


MODELS = {
    "stories260k": Published("lm_stories260K/stories260K.bin", "lm_stories260K/tok512.bin"),
    "tok105": Published("lm_babyllama_char/tok105_model5000.bin", "lm_babyllama_char/tok105.vocab"),
    "tok361": Published("lm_babyllama_char/tok361_model5000.bin", "lm_babyllama_char/tok105.vocab"),
    "relu_sparse": Published("lm_relu_sparse_q8/model_qint80.bin", "lm_relu_sparse_q8/tok1024.bin", 40, 24),
}


@dataclasses.dataclass(frozen=True)
class Llama2C(language.LanguageModel):
    model: str = option("stories260k", "the published model", choices=tuple(MODELS))
    prompt: int = option(0, "tokens of a prompt; 0: what suits the model's context", least=0)
    new: int = option(0, "tokens generated and scored after it; 0: what suits the model's context", least=0)
    target: float = option(0.0, "nats per token on held-out text at which training stops", least=0)

    def __post_init__(self) -> None:
        suits = MODELS.get(self.model, MODELS["stories260k"])
        for name in ("prompt", "new"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(suits, name))
        super().__post_init__()

    @classmethod
    def title(cls) -> str:
        return "llama2c"

    @property
    def metric(self) -> Metric:
        return language.RECALL if self.task == "needle" else Metric("loss per token", "lower", "nat")

    def problems(self) -> list[str]:
        problems = []
        if min(self.prompt, self.new) < 2:
            problems.append("prompt and new are at least 2 tokens each, or 0")
        if self.task == "train" and self.target == 0:
            problems.append("task=train needs target=..., the loss per token at which the clock stops")
        try:
            context = llama2c_files.read_shape(data_file(MODELS[self.model].weights)).context
        except UsageError:
            return problems  # what is missing is said where the file is needed
        if self.task != "train" and self.prompt + self.new > context:
            problems.append(f"prompt and new together are at most {context} tokens, the context of {self.model}")
        if self.task == "train" and self.length > context:
            problems.append(f"length is at most {context} tokens, the context of {self.model}")
        return problems

    def tokens(self, held_out: bool) -> np.ndarray:
        return _tokens(self.model, data_file(MODELS[self.model].tokens), data_file(TEXT), held_out)

    def tokenizer(self) -> Any:
        """The model's tokenizer, a transformers fast tokenizer."""
        return _tokenizer(self.model, data_file(MODELS[self.model].tokens))

    def encode(self) -> needle.Encode:
        words = self.tokenizer()
        return lambda content: np.asarray(words(content.decode(), add_special_tokens=False)["input_ids"], np.int64)

    def trained(self) -> nn.Module:
        file = data_file(MODELS[self.model].weights)
        shape, state = llama2c_files.read_weights(file)
        if len(self.tokenizer()) != shape.words:
            raise UsageError(f"{file} has {shape.words} tokens and {MODELS[self.model].tokens} {len(self.tokenizer())}")
        model = self._empty(shape)
        model.load_state_dict(state)
        return model.eval().to(self.device())

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self._empty(llama2c_files.read_shape(data_file(MODELS[self.model].weights))).to(self.device())

    def _empty(self, shape: llama2c_files.Shape) -> nn.Module:
        if self.model != "relu_sparse":
            return llama2c_files.llama(shape)
        from hasten.workloads.relu_llama import ReLULlamaForCausalLM

        return ReLULlamaForCausalLM(llama2c_files.config(shape))


@functools.cache
def _tokenizer(model: str, file: pathlib.Path) -> Any:
    if model.startswith("tok"):
        return llama2c_files.tokenizer(llama2c_files.read_characters(file, with_bytes=model == "tok361"))
    return llama2c_files.tokenizer(llama2c_files.read_pieces(file))


@functools.cache
def _tokens(model: str, file: pathlib.Path, text: pathlib.Path, held_out: bool) -> np.ndarray:
    """The ids of one part's stories after each other, each beginning with <s>."""
    try:
        content = gzip.decompress(text.read_bytes()).decode()
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{text} can't be read as UTF-8 text packed by gzip: {error}") from None
    stories = [story.strip() for story in content.split(SEPARATOR)]
    part = [story for place, story in enumerate(stories) if story and (place % 10 == 9) == held_out]
    if model == "tok105":  # it has no token for a line's end and was trained with spaces
        part = [" ".join(story.split("\n")) for story in part]
    if not part:
        raise UsageError(f"{text} has too few stories ({len(stories)}): both parts need some")
    return np.concatenate([np.asarray(ids, np.int64) for ids in _tokenizer(model, file)(part)["input_ids"]])


WORKLOAD = Llama2C
