"""Delayed caching: the cases of the common test, which positions are computed, and that reading the cache is exact."""

import pytest
import torch

import hasten
from conformance import denoising
from hasten.core.errors import UsageError
from hasten.decode._denoising import UNDECIDED, denoise
from hasten.decode.dkv_cache import dkv_cache


def subject():
    return denoising.subject(options={"refresh": 4})


def decided(rows, length, step, seed):
    """[rows, length]: a third given, a third decided in earlier steps, a third masked."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (rows, length), generator=generator)
    at = torch.randint(0, step, (rows, length), generator=generator)
    return torch.where(kind == 0, -1, torch.where(kind == 1, at, UNDECIDED))


def cases():
    for variant in ("decode", "greedy", "prefill", "pd"):
        for rows, length, step, seed in ((1, 9, 1, 0), (3, 17, 5, 1), (2, 1, 3, 2)):
            at = decided(rows, length, step, seed)
            ahead = (at == UNDECIDED) & (torch.rand(at.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
            yield {"args": (at, None, step, step, 4, variant, 3)}
            yield {"args": (at, ahead, step, step, 4, variant, 2)}
            yield {"args": (at, ahead, step, 8, 4, variant, 0)}
            yield {"args": (at, None, step, step, 7, variant, 0)}


def test_a_token_is_computed_once_more_after_it_was_decided():
    at = torch.tensor([[-1, 0, 1, 2, UNDECIDED, UNDECIDED]])
    active = dkv_cache(at, None, 3, 3, 8, "decode", 0)
    assert active.tolist() == [[False, False, False, True, True, True]]
    assert dkv_cache(at, None, 8, 8, 8, "decode", 0).all()
    assert dkv_cache(at, None, 8, 8, 8, "pd", 0).tolist() == [[False, True, True, True, True, True]]


def test_greedy_computes_what_it_decides_what_was_decided_and_a_window():
    at = torch.full((1, 12), UNDECIDED)
    at[0, :3], at[0, 9] = -1, 4
    ahead = torch.zeros(1, 12, dtype=torch.bool)
    ahead[0, 6] = True
    active = dkv_cache(at, ahead, 5, 5, 8, "greedy", 3)
    assert active[0].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 9]


def record(host):
    """The forwards of a host: how many positions each computed."""
    seen = []
    host.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_model_computes_fewer_positions(kind):
    handle = hasten.apply(denoising.tiny(kind), "decode/dkv_cache(refresh=3)")
    ids = denoising.hidden(1)["input_ids"]
    assert handle.host.sees_both_ways
    seen = record(handle.host)
    _, counters = denoise(handle.host, ids)
    # 6 masks, one a step: all; masks and what was just decided; all; ...
    assert [shape[1] for shape in seen] == counters.computed == [21, 6, 5, 21, 3, 2]


def test_greedy_computes_a_few_positions_only():
    handle = hasten.apply(denoising.tiny(), "decode/dkv_cache(variant=greedy, refresh=4, window=2)")
    for confidence in ("random", "left", "probability"):
        tokens, counters = denoise(handle.host, denoising.hidden(1)["input_ids"], confidence=confidence, seed=0)
        assert counters.computed[::4] == [21, 21] and max(counters.computed[1:4]) <= 4
        assert counters.committed == [1] * 6 and not (tokens == denoising.MASK).any()


def test_reading_the_cache_is_the_forward_over_the_same_keys():
    """Positions whose keys did not change since they were cached give the scores of a full forward."""
    host = hasten.apply(denoising.tiny(), "").host
    ids = denoising.hidden(2)["input_ids"]
    cache = host.place_cache(ids.shape[1])
    wanted = host.scores(ids, cache=cache)
    at = torch.tensor([8, 3, 20])
    assert torch.allclose(host.scores(ids, at=at, cache=cache), wanted[:, at])
    at = torch.tensor([[8, 3, 20], [5, 5, 2]])
    found = host.scores(ids, at=at, cache=cache)
    assert torch.allclose(found, wanted.gather(1, at[..., None].expand(-1, -1, wanted.shape[-1])))
    assert torch.allclose(host.scores(ids, cache=cache), wanted)


def test_refreshing_every_step_is_the_plain_sampler_for_all_variants_that_refresh():
    plain = denoising.run(hasten.apply(denoising.tiny(), ""))
    for variant in ("decode", "greedy"):
        found = denoising.run(hasten.apply(denoising.tiny(), f"decode/dkv_cache(variant={variant}, refresh=1)"))
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("variant", ["decode", "greedy", "prefill", "pd"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_does_not_depend_on_its_neighbours(variant, shifted, attention):
    model = denoising.tiny("qwen2", shifted=shifted)
    model.set_attn_implementation(attention)
    handle = hasten.apply(model, f"decode/dkv_cache(variant={variant}, refresh=3, window=1)")
    batch = denoising.hidden(3)
    together = handle.generate(batch)
    assert not (together == denoising.MASK).any()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert torch.equal(handle.generate(ids[mask][None])[0], together[row][mask])


def test_a_prompt_that_is_computed_once():
    handle = hasten.apply(denoising.tiny(), "decode/dkv_cache(variant=prefill)")
    _, counters = denoise(handle.host, denoising.hidden(1)["input_ids"])
    assert counters.computed == [21, 6, 6, 6, 6, 6]
    shifted = hasten.apply(denoising.tiny(shifted=True), "decode/dkv_cache(variant=prefill)")
    _, counters = denoise(shifted.host, denoising.hidden(1)["input_ids"], confidence="random", seed=1)
    assert counters.computed[1] == 7  # the position that predicts the first mask is computed too


def test_a_model_without_a_cache_of_transformers_is_refused():
    class Remote(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = denoising.tiny(), denoising.tiny().config

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids=input_ids, is_causal=False, attention_mask=attention_mask, use_cache=False)

    host = hasten.describe(Remote(), kind="diffusion_lm", layers="inner.model.layers", mask_token=denoising.MASK)
    with pytest.raises(UsageError, match="computes some positions only.*Qwen3 for SDAR"):
        hasten.apply(host.model, "decode/dkv_cache", host=host)
    wanted = hasten.apply(denoising.tiny(), "").generate(denoising.hidden())
    assert torch.equal(hasten.apply(host.model, "", host=host).generate(denoising.hidden()), wanted)
