"""The bundled workloads' models, each a class that people use, built from a small config without a network."""

from typing import Any

import torch

CONTEXT = 4096
LONG_CONTEXT = 8704  # 8192 and room for what is generated


def stdlib_llama(size: str = "target", *, seed: int = 0) -> torch.nn.Module:
    """A byte-level `LlamaForCausalLM`, random weights: `target` (4.9M weights), `draft` (0.4M), `small` (0.8M), `long`.

    `long` has the shapes of `small` (two `draft` models on top of each other) and positions up to `LONG_CONTEXT`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from hasten.workloads.text import DOCUMENT, VOCABULARY

    shapes: dict[str, dict[str, Any]] = {
        "target": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 6},
        "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
        "draft": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
    }
    shapes["long"] = shapes["small"]
    if size not in shapes:
        raise ValueError(f"stdlib_llama has the sizes {', '.join(shapes)}, not {size!r}")
    config = LlamaConfig(
        **shapes[size],
        num_key_value_heads=shapes[size]["num_attention_heads"] // 2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LONG_CONTEXT if size == "long" else CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0 if size == "long" else 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=DOCUMENT,
        eos_token_id=None,
        pad_token_id=DOCUMENT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
