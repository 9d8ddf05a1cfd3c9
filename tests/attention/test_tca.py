"""TCA: which tokens stay, that each head gets what it can lose, and that prefill and cache agree on them."""

import pytest
import torch

import hasten.api
from conformance.attention import decoder, tokens
from hasten.attention.tca import METHOD, configurations, naive_tca, sizes, tca, token_lists
from hasten.core.errors import PlanError, UsageError
from hasten.kernels.block_attention import attention
from hasten.math.blocks import seen

SMALL = {"error": 0.5, "block": 4, "window": 8}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases():
    def case(batch, heads, hk, n, length, *args, dtype=torch.float32, **options):
        q, k = normal(batch, heads, n, 8).to(dtype), 2 * normal(batch, hk, length, 8, seed=1).to(dtype)
        shares = configurations(args[0], 5, 1.0)[torch.arange(hk) % 5]
        return {"args": (q, k, shares, *args), "kwargs": options, "tolerance": 0}

    yield case(1, 2, 2, 1, 40, 4, 8)
    yield case(2, 4, 2, 3, 61, 8, 6)
    yield case(2, 6, 3, 1, 61, 4, 5, begin=torch.tensor([0, 23]))
    yield case(2, 4, 1, 5, 50, 4, 16, begin=torch.tensor([3, 49]), end=torch.tensor([50, 50]))
    yield case(2, 4, 2, 2, 47, 8, 8, dtype=torch.bfloat16, scaling=0.2)
    yield case(1, 2, 1, 2, 9, 8, 8)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_naive_is_fast(case):
    assert torch.equal(naive_tca(*case["args"], **case["kwargs"]), tca(*case["args"], **case["kwargs"]))


def test_redundant_blocks_keep_few_tokens_and_even_ones_many():
    """Of two blocks with the same attention the one that hangs on a single token keeps it alone."""
    k = torch.zeros(1, 1, 24, 1)
    k[0, 0, 0:8, 0] = torch.log(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1]))
    k[0, 0, 8:16, 0] = torch.log(torch.tensor([1e-3, 1e-3, 8, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]))
    shares = torch.tensor([[0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
    keep = tca(torch.ones(1, 1, 1, 1), k, shares, 8, 8, 1.0)[0, 0]
    assert keep.nonzero().flatten().tolist() == [*range(8), 10, *range(16, 24)]


def test_configurations_go_from_few_tokens_to_all():
    found = configurations(64, 16, 1.0)
    kept = found @ sizes(64) / 64
    assert found.shape == (17, 7) and torch.allclose(found.sum(-1), torch.ones(17).double())
    assert (kept.diff() > 0).all() and kept[0] < 0.05 and kept[-1] == 1


def test_lists_hold_the_window_and_the_kept_keys_before_it():
    keep = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    for queries, block, window in ((50, 4, 8), (17, 5, 3), (50, 16, 64)):
        mask = seen(token_lists(keep, queries, block, window), queries, 50)
        at, place = torch.arange(50 - queries, 50)[:, None], torch.arange(50)
        first = 50 - queries + (at - 50 + queries) // block * block
        wanted = (keep[:, :, None] | (place > first - window)) & (place <= at)
        assert torch.equal(mask.expand_as(wanted), wanted)


def test_losing_attention_is_bounded_by_what_is_lost():
    """|o - o'| is at most twice the lost share of attention times the largest value (the bound of section 4.3)."""
    q, k, v = normal(1, 1, 1, 8), 2 * normal(1, 1, 64, 8, seed=1), normal(1, 1, 64, 8, seed=2)
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    for shares in configurations(8, 6, 1.0):
        keep = tca(q, k, shares[None], 8, 8)
        out = attention(q, k, v, token_lists(keep, 1, 1, 8))
        lost = float((weights * ~keep).sum())
        assert float((out - weights @ v).norm()) <= 2 * lost * float(v.norm(dim=-1).max()) + 1e-5


def calibrated(**options):
    ids, mask = tokens(7)
    calibration = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(1)}]
    return hasten.api.apply(decoder(), METHOD(**{**SMALL, **options}), calibration=calibration)


def test_a_larger_budget_for_errors_keeps_fewer_tokens():
    kept = [calibrated(error=e).report["attention/tca"]["kept_before_window"] for e in (0.02, 0.1, 0.3, 0.9)]
    assert kept == sorted(kept, reverse=True) and kept[0] > 2 * kept[-1]
    with pytest.raises(UsageError, match="calibration texts of"):
        calibrated(block=64)


@torch.no_grad()
def test_the_cache_holds_what_prefill_saw_and_stays_small():
    handle, (ids, _) = calibrated(error=0.9), tokens()
    cache = handle.host.new_cache()
    handle.model(ids, past_key_values=cache)
    layer = cache.layers[0]
    columns = layer.columns()
    assert layer.length < ids.shape[1] and (columns[..., -8:] == torch.arange(38, 46)).all()
    lengths = []
    for step in range(40):
        handle.model(ids[:, :1] + step % 3, past_key_values=cache)
        lengths.append(layer.length)
    assert lengths[-1] < 46 and cache.get_seq_length() == 86
    assert max(lengths) - min(lengths[4:]) < 30


@torch.no_grad()
def test_with_everything_kept_generation_is_the_models_own():
    """`error` so small that every head keeps all: the sparse path and the followed cache give the dense tokens."""
    ids, mask = tokens()
    handle = calibrated(error=1e-9)
    assert handle.report["attention/tca"]["kept_before_window"] == 1
    plain = decoder().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(handle.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), plain)


@torch.no_grad()
def test_without_its_cache():
    handle, (ids, _) = calibrated(cache=False, error=0.9), tokens()
    cache = handle.host.new_cache()
    handle.model(ids, past_key_values=cache)
    assert type(cache).__name__ == "DynamicCache" and cache.layers[0].keys.shape[2] == ids.shape[1]
    assert handle.report["attention/tca"]["density"] < 0.95


def test_options():
    with pytest.raises(PlanError, match="power of two"):
        METHOD(block=48)
    assert METHOD(error=0.0).idle
