"""The hosts on which every attention method is held to the common tests: a decoder, else a ViT or a DiT."""

import importlib.util
import pathlib
from typing import Any

import torch

PROMPT, REST = 40, 6
TESTS = pathlib.Path(__file__).parents[1] / "attention"


def decoder() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tokens(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, one padded."""
    ids = torch.randint(1, 61, (2, PROMPT + REST), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


@torch.no_grad()
def decode(handle: Any) -> tuple[torch.Tensor, ...]:
    """Logits of a forward, of a prompt in chunks and of tokens after it, then what `generate` writes."""
    ids, mask = tokens()
    whole = handle.model(ids, attention_mask=mask, use_cache=False).logits
    cache, out, start = handle.host.new_cache(), [], 0
    for end in (PROMPT - 9, PROMPT, PROMPT + 3, PROMPT + 4, PROMPT + 5, PROMPT + 6):
        part = handle.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        out.append(part.logits[:, -1])
        start = end
    written = handle.model.generate(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], max_new_tokens=5, do_sample=False)
    return whole, torch.stack(out), written


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=4,
        num_channels=1, num_labels=5, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


@torch.no_grad()
def classify(handle: Any) -> torch.Tensor:
    images = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    return handle.model(pixel_values=images).logits


def dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=2, out_channels=2, num_layers=3, sample_size=12,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def denoise(handle: Any) -> torch.Tensor:
    sample = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(3))
    return handle.model(sample, timestep=torch.tensor([5, 9]), class_labels=torch.tensor([1, 3])).sample


SUBJECTS = {"decoder": (decoder, decode), "vit": (vit, classify), "denoiser": (dit, denoise)}


def subject(method_class: type) -> dict[str, Any]:
    """On the first kind of host that the method's card names; its test file has its small options, `SMALL`."""
    import sys

    name = method_class.title().split("/")[1]
    spec = importlib.util.spec_from_file_location(f"small_{name}", TESTS / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    card = sys.modules[method_class.__module__].CARD
    build, run = SUBJECTS[(card.hosts or ("decoder",))[0]]
    context = {}
    if "calibration" in card.needs:
        ids = tokens(7)[0]
        context["calibration"] = [ids, ids.flip(1)]
    return {"model": build, "options": module.SMALL, "context": context, "run": run}
