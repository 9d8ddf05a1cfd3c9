"""The host on which every prune method is held to the common tests: a Llama whose sublayers all matter."""

from typing import Any

import torch

from hosts.tiny import llama, padded_batch, write


@torch.no_grad()
def run(handle: Any) -> tuple[torch.Tensor, ...]:
    """Logits of a padded batch, logits of tokens after it through the cache, and what `generate` writes."""
    batch, cache = padded_batch(), handle.host.new_cache()
    first = handle.model(**batch, past_key_values=cache, use_cache=True).logits
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], dim=1)
    rest = handle.model(batch["input_ids"][:, :2], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return first[:, -1], rest, write(handle.model, batch)


SMALL: dict[str, Any] = {"keep": 0.5, "speedup": 2.0, "sparsity": 0.5}


def train(method: Any, seed: int) -> list[torch.Tensor]:
    """Losses and weights of a run with a teacher of the same shape."""
    from conformance import optim

    return optim.outcome(optim.run_of(method, seed, teacher=optim.llama(seed + 1)))


def subject(method_class: type) -> dict[str, Any]:
    if getattr(method_class, "training_only", False):
        return {"train": train, "options": {}}
    small = {name: value for name, value in SMALL.items() if name in method_class.__dataclass_fields__}
    return {"model": llama, "options": small, "context": {"calibration": [padded_batch()]}, "run": run}
