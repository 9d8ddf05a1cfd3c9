"""OWL beside a uniform sparsity, SliceGPT's speed, and `python benchmarks/_prune_quality.py`: a table of all methods.

The table is out/bench/prune_table.{json,md}: each method that changes a model, at half and 70% of the weights or at
three quarters of the parts, as its options have it.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from hasten.api import Handle, apply
from hasten.bench.figures import Figure, Reading, figure, race
from hasten.workloads.find import workload as find

KEEP, RESAMPLES = 0.75, 4000
LIBRARY = "stdlib-lm(task=perplexity, examples={examples})"
STORIES = "llama2c(model=stories260k, task=perplexity, examples={examples})"


def perplexities(base: np.ndarray, better: np.ndarray, factor: float = 1.0, seed: int = 0) -> Reading:
    """How many times the perplexity of `better` that of `base` is, of losses by example, with a paired percentile
    bootstrap over examples.

    Args:
        factor: nats in a unit of the losses.
    """
    rng = np.random.default_rng(seed)
    gaps = (base - better) * factor
    means = gaps[rng.integers(0, len(gaps), (RESAMPLES, len(gaps)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Reading(float(np.exp(gaps.mean())), float(np.exp(low)), float(np.exp(high)))


def owl(workload: str, sparsity: float) -> Reading:
    """Where the zeros are is all that counts here, so that layers stay dense."""
    work: Any = find(workload)
    batches, options = work.calibration(), f"(sparsity={sparsity}, layout=dense)"
    dense, uniform, weighed = (
        work.quality(apply(work.trained(), plan, calibration=batches))
        for plan in ("", f"prune/wanda{options}", f"prune/owl{options}")
    )
    means = {"dense": dense.mean(), "wanda": uniform.mean(), "owl": weighed.mean()}
    found = perplexities(uniform, weighed, 1 / getattr(work, "per_nat", 1.0))
    return found.but(**{name: float(one) for name, one in means.items()}, metric=work.metric.name, workload=workload)


def llama_85m() -> torch.nn.Module:
    """Twelve layers of width 768, randomly initialised: large enough for products to take most of the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        vocab_size=512, max_position_embeddings=1024, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def sliced(phase: str, seconds: float, tokens: int = 256, new: int = 16) -> Reading:
    """The speed of the sliced model; `share_of_bound` is that of what fewer weights allow, 1 / (weights that stay)."""
    ids = torch.randint(1, 512, (4, 256), generator=torch.Generator().manual_seed(3))
    dense = apply(llama_85m(), "")
    model = llama_85m()
    before = sum(parameter.numel() for parameter in model.parameters())
    narrow = apply(model, f"prune/slicegpt(keep={KEEP})", calibration=[ids])
    narrow.bake()
    after = sum(parameter.numel() for parameter in narrow.model.parameters())
    prompt = ids[:1, : tokens if phase == "prefill" else 16]

    def arm(handle: Handle) -> Callable[[], Any]:
        if phase == "prefill":
            return lambda: _forward(handle.model, prompt)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return lambda: handle.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    found = race(arm(dense), arm(narrow), seconds=seconds)
    return found.but(kept_weights=after / before, share_of_bound=found.value * after / before)


@torch.inference_mode()
def _forward(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=False)


def figures(quick: bool) -> Iterator[Figure]:
    examples, seconds = (96, 40) if quick else (384, 180)
    for suffix, workload in (("", LIBRARY), ("_stories", STORIES)):
        name = workload.format(examples=examples)
        yield figure(
            f"owl_against_uniform_70{suffix}",
            lambda name=name: owl(name, 0.7),  # type: ignore[misc]
            unit="x lower perplexity",
            against=f"prune/wanda with the same 70% in every layer, on {name}",
            goal=1.0,
        )
    for phase, what in (("prefill", "256 tokens at once"), ("decode", "16 tokens one by one")):
        yield figure(
            "slicegpt_speed" + ("" if phase == "prefill" else f"_{phase}"),
            lambda phase=phase: sliced(phase, seconds),  # type: ignore[misc]
            against=f"dense, a random Llama of 85M weights, keep={KEEP}, {what}",
        )


def main() -> None:
    from hasten.bench.method_table import plans, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="*", help="all methods by default")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a plan")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    given = parser.parse_args()
    chosen = given.plan or plans("prune", {"sparsity": (0.5, 0.7), "keep": (0.75,)})
    table("prune", chosen, quality=LIBRARY.format(examples=96), speed="stdlib-lm(task=generate)", out=given.out,
          seconds=given.seconds)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
