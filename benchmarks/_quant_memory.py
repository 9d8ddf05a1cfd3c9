"""Peak memory of calibrating, over that of the model and its largest block. Joined to the family quant."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from hasten.bench import memory
from hasten.bench.figures import Figure, Reading, figure

PLANS = ("quant/gptq(bits=4)", "prune/wanda(sparsity=0.7)", "prune/slicegpt(keep=0.75)")


def arm(plan: str) -> Iterator[str]:
    """Builds a random Llama of 85M weights and applies a plan; measured in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hasten

    def build(depth: int, width: int) -> torch.nn.Module:
        config = LlamaConfig(
            hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth, num_attention_heads=12,
            vocab_size=512, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    ids = [torch.randint(1, 512, (4, 256)) for _ in range(4)]
    hasten.apply(build(1, 96), plan, calibration=ids[:1])  # modules are imported and kernels built
    yield "prepared"
    model = build(12, 768)
    yield "model"
    hasten.apply(model, plan, calibration=ids)
    yield "plan"


def peak(plan: str) -> Reading:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    here = str(pathlib.Path(__file__).parent)
    sys.path.insert(0, here)
    try:
        found = memory.probe(f"{pathlib.Path(__file__).stem}:arm", {"plan": plan})
    finally:
        sys.path.remove(here)
    block = LlamaDecoderLayer(LlamaConfig(hidden_size=768, intermediate_size=2048, num_attention_heads=12), 0)
    largest = sum(parameter.nbytes for parameter in block.parameters())
    weights = largest * 12 + 768 * 512 * 4
    facts: dict[str, Any] = {"plan": plan, "peak_mb": found.phases["plan"].peak / 1e6, "model_mb": weights / 1e6,
                             "block_mb": largest / 1e6}  # fmt: skip
    return Reading(found.phases["plan"].peak / (weights + largest), facts=facts)


def figures(quick: bool) -> Iterator[Figure]:
    for plan in PLANS[:1] if quick else PLANS:
        name = plan.partition("(")[0].replace("/", "_")
        yield figure(
            f"calibration_memory_{name}",
            lambda plan=plan: peak(plan),
            unit="of the model and its largest block",
            against=f"peak memory of {plan}, 85M weights",
            goal=1.3,
            better="lower",
        )
