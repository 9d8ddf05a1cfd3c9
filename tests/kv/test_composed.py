"""A shrunken cache beside methods of other seams."""

import pytest
import torch
from transformers import DynamicCache

import hasten
from conformance.decode import noisy, ragged, target
from conformance.kv import PROMPT, build
from hasten.core.errors import PlanError, UsageError

both = pytest.mark.parametrize("heads", ["false", "true"])


@pytest.mark.parametrize(
    "other", ["prune/llm_drop(keep=0.7)", "prune/unified_layer_skipping(speedup=1.5)", "quant/gptq(bits=8, group=32)"]
)
@both
def test_the_budget_counts_the_layers_that_write(other, heads):
    ids = torch.randint(1, 61, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    handle = hasten.apply(build(), f"{other} + kv/cake(keep=0.5, window=4, heads={heads})", calibration=[ids])
    cache = handle.host.new_cache()
    with torch.no_grad():
        handle.model(ids, past_key_values=cache)
    held = [layer.real().float().mean().item() for layer in cache.layers if layer.length]
    assert len(held) == len(handle.host.cache_layers)
    assert sum(held) == pytest.approx(0.5 * PROMPT * len(held), abs=len(held))
    out = handle.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, PROMPT + 4)
    handle.undo()
    assert not len(handle.host.changes)


@both
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_drafts_are_taken_back(heads, rows, noise):
    """Without further evictions the tokens are those of decoding one by one, in padded rows that reject differently."""
    given = ragged(rows, 60) if rows > 1 else {"input_ids": ragged(4, 60)["input_ids"][:1].clamp(min=3)}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    given |= {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    model, plan = target(), f"kv/cake(keep=0.4, window=8, decode=false, heads={heads})"
    only = hasten.apply(model, plan)
    wanted = only.generate(**given)
    only.undo()
    fast = hasten.apply(model, f"{plan} + decode/speculative(candidates=4)", draft=noisy(model, noise))
    assert torch.equal(fast.generate(**given), wanted)
    fast.undo()


@both
def test_drafts_with_evictions_between_them(heads):
    model = target()
    plan = f"kv/cake(keep=0.4, window=16, every=8, heads={heads}) + decode/speculative(candidates=3)"
    fast = hasten.apply(model, plan, draft=noisy(model, 0.3))
    given = ragged(3, 60)
    out = fast.generate(**given, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert out.shape == (3, 100) and torch.equal(out[:, :60], given["input_ids"])


@both
@torch.no_grad()
def test_a_pattern_for_the_prompt(heads):
    """The prompt's attention is sparse, the cache's choice looks at its last queries, later tokens see what is kept."""
    sparse = "attention/pbs_attn(block=8, segment=16)"
    ids = torch.randint(1, 61, (2, 64), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    handle = hasten.apply(build(), f"{sparse} + kv/cake(keep=0.3, window=4, every=4, heads={heads})")
    cache = handle.host.new_cache()
    prompt = handle.model(ids, attention_mask=mask, past_key_values=cache).logits
    alone = hasten.apply(build(), sparse)
    assert torch.equal(prompt, alone.model(ids, attention_mask=mask, past_key_values=DynamicCache()).logits)
    means = [layer.real().float().view(2, -1).mean(1) for layer in cache.layers]
    assert torch.allclose(sum(means), torch.tensor([64.0, 55.0]) * 0.3 * 3, atol=3)
    written = handle.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    single = handle.generate(ids[1:, 9:], attention_mask=mask[1:, 9:], max_new_tokens=9, do_sample=False)
    assert torch.equal(written[1, 9:], single[0])


def test_two_caches_are_refused():
    with pytest.raises(PlanError, match=r"cache\.keep"):
        hasten.apply(build(), "kv/cake(keep=0.5) + kv/cake(keep=0.2)")


def test_an_attention_that_decodes_with_the_whole_cache_is_refused():
    model = build()
    with pytest.raises(UsageError, match="whole cache"):
        hasten.apply(model, "attention/nsa(length=4, stride=2, block=4, count=4, window=6) + kv/cake(keep=0.5)")
    assert model.config._attn_implementation == "sdpa"
