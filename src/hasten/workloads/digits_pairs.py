"""digits-pairs: a small `CLIPModel` on scikit-learn's digits, each paired with a short text that names it.

Texts are made of 17 words ("a picture of the number three"); a text names the digit of its image, so that in a batch
each image has several texts that fit: the loss is the cross-entropy towards all of them, in both directions. `train`
starts a student of width 32 and 2 layers a tower; the teacher, of width 64 and 4 layers, is trained on the spot in some
seconds of one core, once in a process. Quality is the cross-entropy of each held-out image over ten texts, "the digit
zero" to "the digit nine".

The baseline was tuned for the fewest steps to the target: of the rates 0.004, 0.006 and 0.01 with a warm-up of 0.2 over
160 steps, 0.006 came to the lowest cross-entropy (0.20; the others to 0.23 and 0.33). The teacher has about 0.1.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.options import option
from hasten.workloads.base import Supervised, warm_cosine
from hasten.workloads.digits import CLASSES, SIDE, digits

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("<begin>", "<end>", "a", "the", "digit", "number", "picture", "of", *NUMBERS)
TEMPLATES = ("the digit {}", "a {}", "the number {}", "a picture of the digit {}", "a picture of the number {}")
LENGTH = 8
SHAPES = {"student": (32, 2), "teacher": (64, 4)}  # width, layers a tower; heads of width 16


def tokens(text: str) -> list[int]:
    """The words' numbers between begin and end, filled up with end to `LENGTH`."""
    found = [0, *(WORDS.index(word) for word in text.split())]
    return found + [1] * (LENGTH - len(found))


def prompts() -> Tensor:
    """The ten texts that held-out images are told apart by, [10, LENGTH]."""
    return torch.tensor([tokens(TEMPLATES[0].format(word)) for word in NUMBERS])


def digits_clip(size: str, seed: int = 0) -> nn.Module:
    """Two towers of the same shape: patches of 2x2 pixels, and words; projected to 32 channels."""
    from transformers import CLIPConfig, CLIPModel

    width, layers = SHAPES[size]
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 16}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": SIDE, "patch_size": 2, "num_channels": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=32))


@functools.cache
def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Images [1438, 1, 8, 8], texts [1438, LENGTH] and digits [1438] of the training part."""
    images, labels = digits(False)
    choice = torch.randint(len(TEMPLATES), labels.shape, generator=torch.Generator().manual_seed(3))
    texts = [tokens(TEMPLATES[c].format(NUMBERS[n])) for c, n in zip(choice.tolist(), labels.tolist(), strict=True)]
    return images, torch.tensor(texts), labels


def contrast(scores: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image towards all texts of its digit, and of each text towards the images, halved.

    Args:
        scores: [B, B] of images and texts. labels: [B].

    Returns:
        [B]: of pair i, the mean of what image i and text i have.
    """
    same = (labels[:, None] == labels[None]).float()
    wanted = same / same.sum(1, keepdim=True)
    both = [nn.functional.cross_entropy(one.float(), wanted, reduction="none") for one in (scores, scores.T)]
    return (both[0] + both[1]) / 2


@dataclasses.dataclass(frozen=True)
class DigitsPairs(Supervised):
    rows: int = option(64, "pairs of a training batch", least=2, most=1024)
    steps: int = option(160, "steps of the baseline's schedule", least=10)
    warmup: float = option(0.2, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)
    target: float = option(0.25, "held-out cross-entropy in nats at which training stops", above=0)

    tunable = {"lr": (5e-4, 2e-2), "warmup": (0.05, 0.6)}

    @classmethod
    def title(cls) -> str:
        return "digits-pairs"

    def build(self, seed: int) -> nn.Module:
        return digits_clip("student", seed).to(self.device())

    def teacher(self) -> nn.Module:
        model = digits_clip("teacher")
        model.load_state_dict(_teacher_weights())
        return model.eval().to(self.device())

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        return self.columns(seed, *pairs())

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        images, texts, labels = batch
        return contrast(model(input_ids=texts, pixel_values=images).logits_per_image, labels)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        images, labels = (part.to(self.device()) for part in digits(True))
        scores = model(input_ids=prompts().to(self.device()), pixel_values=images).logits_per_image
        return nn.functional.cross_entropy(scores.float(), labels, reduction="none").cpu().numpy()


@functools.cache
def _teacher_weights() -> dict[str, Tensor]:
    """Of the large model after 150 steps of AdamW at 0.002 on the training part."""
    model, steps = digits_clip("teacher", seed=100).train(), 150
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    draw = torch.Generator().manual_seed(5)
    for step in range(steps):
        chosen = torch.randint(len(pairs()[0]), (64,), generator=draw)
        images, texts, labels = (part[chosen] for part in pairs())
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_cosine(step, steps, 0.2)
        loss = contrast(model(input_ids=texts, pixel_values=images).logits_per_image, labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


assert len(NUMBERS) == CLASSES

WORKLOAD = DigitsPairs
