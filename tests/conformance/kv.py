"""The host on which every kv method is held to the common tests."""

from typing import Any

import torch

from conformance import kv_contexts
from hasten.kv._contexts import ContextReuse

PROMPT, REST = 40, 6


def build() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def run(handle: Any) -> tuple[torch.Tensor, ...]:
    """Logits of a prompt, of a chunk and of tokens after it, then what `generate` writes; two rows, one padded."""
    ids = torch.randint(1, 61, (2, PROMPT + REST), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache, out, start = handle.host.new_cache(), [], 0
    for end in (PROMPT, PROMPT + 3, PROMPT + 4, PROMPT + 5, PROMPT + 6):
        part = handle.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        out.append(part.logits[:, -1])
        start = end
    written = handle.model.generate(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], max_new_tokens=5, do_sample=False)
    return torch.stack(out), written


def subject(method_class: type) -> dict[str, Any]:
    if issubclass(method_class, ContextReuse):
        return {"model": build, "options": {}, "context": {}, "run": kv_contexts.run}
    return {"model": build, "options": {"keep": 0.5, "window": 4, "every": 2}, "context": {}, "run": run}
