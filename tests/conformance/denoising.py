"""A tiny masked-diffusion model, and texts with masks in them, for the methods that denoise."""

from typing import Any

import torch
import transformers as hf
from torch import nn

MASK = 40
WORDS = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 96}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),  # LLaDA
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),  # Dream
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),  # SDAR
}


def tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A model in float64, so that forwards of different shapes choose the same tokens; its scores are not near ties."""
    make, config = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config(**(SMALL | {"num_key_value_heads": 2, "mask_token_id": MASK} | WORDS | changes)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.25)
    return model.double().eval()


def hidden(rows: int = 3, length: int = 21, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded texts with masks: a span in the middle, more of them and others scattered in later rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, MASK, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, 8 : 14 + row % 4] = MASK
        ids[row, 17 : 17 + row % 3] = MASK
        ids[row, : row * 2 % 7] = 0
        mask[row, : row * 2 % 7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(handle: Any, **options: Any) -> list[torch.Tensor]:
    """An infill and a sampled continuation."""
    drawn = {"max_new_tokens": 8, "temperature": 0.7, "seed": 0, "block_length": 4}
    prompt = {name: rows[:, :8] for name, rows in hidden().items()}
    return [handle.generate(hidden(), **options), handle.generate(prompt, **(drawn | options))]


def subject(**more: Any) -> dict[str, Any]:
    """What the common tests need; `options` are the method's small ones."""
    return {"model": tiny, "options": {}, "context": {}, "run": run} | more
