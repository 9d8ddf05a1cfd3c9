"""The host on which every method of weight quantization is held to the common tests: a Llama with grouped heads."""

from typing import Any

import torch


def build() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def calibration() -> list[dict[str, torch.Tensor]]:
    """Three batches of two rows, the second row padded on the left."""
    make = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    return [{"input_ids": torch.randint(1, 61, (2, 24), generator=make), "attention_mask": mask} for _ in range(3)]


@torch.no_grad()
def run(handle: Any) -> tuple[torch.Tensor, ...]:
    """Logits of two prompts, one padded, then what `generate` writes."""
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    written = handle.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return handle.model(ids, attention_mask=mask).logits, written


def subject(method_class: type) -> dict[str, Any]:
    options = {"group": 32} if "group" in method_class.__dataclass_fields__ else {}
    return {"model": build, "options": options, "context": {"calibration": calibration()}, "run": run}
