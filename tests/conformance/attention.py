"""The hosts on which every attention method is held to the common tests: a decoder, else a ViT or a DiT."""

import importlib.util
import pathlib
from typing import Any

import torch

from conformance.kv import PROMPT, REST
from conformance.kv import build as decoder

TESTS = pathlib.Path(__file__).parents[1] / "attention"


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


@torch.no_grad()
def check_decoding(handle: Any, ends: list[int]) -> None:
    """A padded row among others, its text in parts that end at `ends` from an own cache: as in one forward."""
    ids, mask = tokens()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = handle.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, start = handle.host.new_cache(), 0
    for end in ends:
        part = slice(start, end)
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, part], "past_key_values": cache}
        logits = handle.model(ids[:, part], **given).logits
        shown = mask[:, part].bool()
        torch.testing.assert_close(logits[shown], whole[:, part][shown], rtol=1e-4, atol=1e-5)
        start = end


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


def check_training_of_a_denoiser(method: Any, mode: str) -> None:
    """Every weight of a DiT's attention gets a finite gradient: `bfloat16`, under `autocast`, or `checkpointing`."""
    from hasten.api import apply

    model = dit()
    handle = apply(model.bfloat16() if mode == "bfloat16" else model, method)
    if mode == "checkpointing":
        handle.model.enable_gradient_checkpointing()
    handle.model.train()
    sample = torch.randn(2, 2, 12, 12, dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        out = handle.model(sample, timestep=torch.tensor([5, 9]), class_labels=torch.tensor([1, 3])).sample
    out.float().square().mean().backward()
    grads = [p.grad for layer in handle.host.layers for p in layer.attention.parameters()]
    assert len(grads) >= 24 and all(grad is not None and grad.isfinite().all() for grad in grads)


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
