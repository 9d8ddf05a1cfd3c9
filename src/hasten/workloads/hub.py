"""hf:NAME_OR_PATH: any causal language model or image classifier from a local folder or the hub, with a person's data.

    hf:gpt2(text=notes.txt, task=generate)
    hf:models/vit-small(data=birds.npz, batch=8)

`text` is a UTF-8 file (the standard library's source when left out); `data` is an `.npz` with `images` [n, H, W] or
[n, H, W, 3] (uint8 or float in 0..1) and `labels` [n], or `digits`. The last tenth is held out.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.workloads import language, needle, text
from hasten.workloads.base import Metric, Workload


def from_hub(name: str, options: dict[str, Any]) -> Workload:
    """The workload for a model, chosen by the architecture that its config names.

    Raises:
        UsageError: no such model here or on the hub, or it is neither a causal LM nor an image classifier.
    """
    if not name:
        raise UsageError("hf: needs a model: hf:NAME_OR_PATH, for example hf:gpt2 or hf:./my-model")
    names = " ".join(read_config(name).architectures or [])
    if "ForImageClassification" in names:
        return HubImages.from_options({"model": name, **options})
    if "ForCausalLM" in names or "LMHeadModel" in names:
        return HubText.from_options({"model": name, **options})
    raise UsageError(
        f"{name} is a {names or 'model without architectures in its config'}: hf: takes causal language models and "
        "image classifiers; for others write a workload of your own (file.py:factory)"
    )


@functools.cache
def read_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = (
            "the folder has no usable config.json"
            if pathlib.Path(name).exists()
            else "it is no local folder, and the hub can't be reached or has no such model"
        )
        raise UsageError(
            f"the model {name!r} can't be loaded: {where}. Give a folder with config.json and weights, "
            f"or a hub name while online ({str(error).splitlines()[0][:120]})"
        ) from None


class _FromHub:
    """What both kinds share."""

    model: str

    def __str__(self) -> str:
        inner = str(super().__str__())
        rest = inner.partition("(")[2].removesuffix(")")
        kept = [part for part in rest.split(", ") if part and not part.startswith("model=")]
        return f"hf:{self.model}" + (f"({', '.join(kept)})" if kept else "")

    @classmethod
    def title(cls) -> str:
        return "hf"

    def _load(self, kind: str) -> nn.Module:
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the weights of {self.model!r} can't be loaded: {str(error).splitlines()[0][:160]}"
            ) from None


@dataclasses.dataclass(frozen=True)
class HubText(_FromHub, language.LanguageModel):
    model: str = option("", "folder or hub name")
    text: str = option("", "UTF-8 text file; the standard library's source when empty")
    draft_model: str = option("", "folder or hub name of a smaller model with the same tokenizer, for drafting")
    lr: float = option(1e-4, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.1, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(0.0, "nats per token on held-out text at which training stops", least=0)
    scratch: bool = option(False, "train from fresh weights of the same architecture")

    @property
    def metric(self) -> Metric:
        return language.RECALL if self.task == "needle" else Metric("loss per token", "lower", "nat")

    def problems(self) -> list[str]:
        problems = []
        if self.task == "train" and self.target == 0:
            problems.append("task=train needs target=..., the loss per token at which the clock stops")
        if self.text and not pathlib.Path(self.text).is_file():
            problems.append(f"the text file {self.text} does not exist")
        return problems

    def tokens(self, held_out: bool) -> np.ndarray:
        return _tokens(self.model, self.text, held_out)

    def encode(self) -> needle.Encode | None:
        tokenizer = _tokenizer(self.model)
        if tokenizer is None:
            return None
        return lambda content: np.asarray(tokenizer(content.decode(), add_special_tokens=False)["input_ids"], np.int64)

    def trained(self) -> nn.Module:
        return self._load("AutoModelForCausalLM").eval().to(self.device())

    def draft(self) -> nn.Module | None:
        if not self.draft_model:
            return None
        ours, theirs = _tokenizer(self.model), _tokenizer(self.draft_model)
        if (ours and ours.get_vocab()) != (theirs and theirs.get_vocab()):
            raise UsageError(
                f"{self.draft_model} has another tokenizer than {self.model}: a draft's tokens must mean the same"
            )
        return HubText(model=self.draft_model)._load("AutoModelForCausalLM").eval().to(self.device())

    def build(self, seed: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if not self.scratch:
            return self._load("AutoModelForCausalLM").to(self.device())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(read_config(self.model)).to(self.device())


@functools.cache
def _tokenizer(model: str) -> Any:
    """The model's tokenizer; None where it has none and 256 ids, which are bytes."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        if getattr(read_config(model), "vocab_size", 0) != 256:
            raise UsageError(f"{model} has no tokenizer that can be loaded: save one beside the model") from None
        return None


@functools.cache
def _tokens(model: str, file: str, held_out: bool) -> np.ndarray:
    """Token ids of one part of the text; bytes where the model has no tokenizer and 256 ids."""
    if file:
        content = pathlib.Path(file).read_text(errors="replace")
        cut = len(content) * 9 // 10
        content = content[cut:] if held_out else content[:cut]
    else:
        content = text.stream(held_out)[:2_000_000].tobytes().replace(b"\0", b"").decode(errors="replace")
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return np.frombuffer(content.encode(), dtype=np.uint8).astype(np.int64)
    ids = np.asarray(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not len(ids):
        raise UsageError(f"the text {file or 'of the standard library'} gives no tokens for {model}")
    return ids


@dataclasses.dataclass(frozen=True)
class HubImages(_FromHub, Workload):
    model: str = option("", "folder or hub name")
    task: str = option("classify", "what is done", choices=("classify",))
    data: str = option("digits", "an .npz with images and labels, or digits")
    batch: int = option(16, "images in one request", least=1)
    examples: int = option(256, "held-out images that quality is measured on", least=8)

    @property
    def metric(self) -> Metric:
        return Metric("accuracy", "higher")

    def tasks(self) -> tuple[str, ...]:
        return ("classify",)

    def trained(self) -> nn.Module:
        return self._load("AutoModelForImageClassification").eval().to(self.device())

    def _images(self, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return _images(self.model, self.data, held_out)

    def requests(self, seed: int) -> list[torch.Tensor]:
        pixels, _ = self._images(True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        return list(pixels[order[: 16 * self.batch]].to(self.device()).split(self.batch))

    @torch.inference_mode()
    def serve(self, handle: Any, request: torch.Tensor) -> torch.Tensor:
        return handle.model(pixel_values=request).logits

    @torch.inference_mode()
    def quality(self, handle: Any) -> np.ndarray:
        pixels, labels = (part[: self.examples].to(self.device()) for part in self._images(True))
        right = [
            handle.model(pixel_values=x).logits.argmax(-1) == y
            for x, y in zip(pixels.split(16), labels.split(16), strict=True)
        ]
        return torch.cat(right).double().cpu().numpy()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        return [{"pixel_values": part.to(self.device())} for part in self._images(False)[0][:64].split(16)]


@functools.cache
def _images(model: str, data: str, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [n, channels, size, size] in -1..1 and labels [n], resized to what the model takes."""
    if data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8) / 16
    else:
        try:
            content = np.load(data)
            images, labels = content["images"], content["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{data} can't be read as an .npz with 'images' and 'labels': {error}") from None
    images = np.asarray(images, dtype=np.float32) / (255 if np.asarray(images).dtype == np.uint8 else 1)
    cut = len(images) * 9 // 10
    part = slice(cut, None) if held_out else slice(0, cut)
    pixels = torch.from_numpy(images[part])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    config = read_config(model)
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
    pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bilinear")
    pixels = pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels[:, :channels]
    return pixels * 2 - 1, torch.from_numpy(np.asarray(labels[part])).long()
