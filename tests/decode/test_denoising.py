"""The plain sampler: as LLaDA's loop, written out; what a person asks of it, and what it refuses."""

import pytest
import scipy.stats
import torch

import hasten
from conformance import denoising
from conformance.denoising import MASK, hidden, tiny
from hasten.core.errors import PlanError, UsageError
from hasten.decode._denoising import Denoising, denoise
from hasten.decode._denoising_loop import best


def plain(model=None):
    return hasten.apply(model if model is not None else tiny(), "")


@torch.no_grad()
def llada(model, ids, new, steps, block, blockwise=False):
    """Low-confidence remasking of one row as the paper's algorithm 5 has it, at temperature 0."""
    ids = torch.cat([ids, torch.full((1, new), MASK)], 1)
    start, length = ids.shape[1] - new, ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    if blockwise:
        place = torch.arange(length) // block
        mask = (place[None] <= place[:, None])[None, None]
    for begin in range(start, length, block):
        count, each = block, steps // (new // block)
        for step in range(each):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            logits[:, MASK] = -torch.inf
            chance, token = logits.softmax(-1).max(-1)
            chance[ids[0] != MASK] = -torch.inf
            chance[begin + block :] = -torch.inf
            number = count // each + (step < count % each)
            chosen = chance.topk(number).indices
            ids[0, chosen] = token[chosen]
    return ids


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("new", "steps", "block"), [(12, 12, 12), (12, 6, 4), (14, 6, 7), (10, 4, 10)])
def test_it_is_the_samplers_of_the_paper(kind, new, steps, block):
    model = tiny(kind)
    prompt = hidden(1)["input_ids"][:, :8]
    wanted = llada(model, prompt, new, steps, block)
    got, counters = denoise(plain(model).host, prompt, max_new_tokens=new, steps=steps, block_length=block)
    assert torch.equal(got, wanted)
    assert counters.forwards == steps and counters.tokens == new and counters.share == 1
    assert max(counters.committed) - min(counters.committed) <= 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_that_see_none_behind_them(attention):
    model = tiny("qwen3", block_length=4)
    prompt = hidden(2)["input_ids"][:, :8]
    wanted = [llada(model, row[None], 12, 12, 4, blockwise=True)[0] for row in prompt]
    model.set_attn_implementation(attention)
    got, counters = denoise(plain(model).host, prompt, max_new_tokens=12, blockwise=True)
    assert torch.equal(got, torch.stack(wanted))
    assert counters.computed == [24] * 4 + [32] * 4 + [40] * 4, "later blocks are not computed"
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), prompt], 1)
    padded = {"input_ids": ids, "attention_mask": (torch.arange(12) > 3).long().expand(2, -1)}
    assert torch.equal(plain(model).generate(padded, max_new_tokens=12, blockwise=True)[:, 4:], got)
    for refresh in (1, 3):
        cached = hasten.apply(tiny("qwen3", block_length=4), f"decode/dkv_cache(refresh={refresh})")
        cached.model.set_attn_implementation(attention)
        found, counters = denoise(cached.host, prompt, max_new_tokens=12, blockwise=True)
        assert refresh > 1 or torch.equal(found, got)
        assert (counters.share < 1) == (refresh > 1) and not (found == MASK).any()


def test_a_prompt_that_ends_inside_a_block():
    model = tiny(block_length=4)
    prompt = hidden(1)["input_ids"][:, :6]
    got, counters = denoise(plain(model).host, prompt, max_new_tokens=5, blockwise=True)
    assert counters.computed == [8, 8, 11, 11, 11] and got.shape == (1, 11)
    with pytest.raises(UsageError, match="padded by a multiple of block_length=4"):
        plain(model).generate(hidden(3), blockwise=True)
    with pytest.raises(UsageError, match="block_length=N"):
        plain().generate(prompt, max_new_tokens=4, blockwise=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "left"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(attention, shifted, confidence):
    model = tiny("qwen2", shifted=shifted)
    model.set_attn_implementation(attention)
    handle, batch = plain(model), hidden(3)
    together = handle.generate(batch, confidence=confidence)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        alone = handle.generate(ids[mask][None], confidence=confidence)
        assert torch.equal(alone[0], together[row][mask])
        given = ids != MASK
        assert torch.equal(together[row][given], ids[given]), "what was given stays"


@torch.no_grad()
def test_scores_of_a_shifted_model_are_those_of_the_token_before():
    model = tiny(shifted=True)
    ids = hidden(1)["input_ids"]
    place = int((ids[0] == MASK).nonzero()[0])
    got = plain(model).generate(ids, confidence="left")
    logits = model(input_ids=ids, is_causal=False).logits[0, place - 1]
    logits[MASK] = -torch.inf
    assert got[0, place] == logits.argmax()


def test_infilling_and_writing_on_in_one_call():
    ids = hidden(1)["input_ids"]
    got, counters = denoise(plain().host, ids, max_new_tokens=3)
    assert got.shape == (1, 24) and counters.tokens == 6 + 3 and not (got == MASK).any()


def test_orders_that_are_known_before():
    ids = hidden(2)["input_ids"]
    seen = {}

    class Watch(Denoising):
        def choose(self, state, guess):
            seen.setdefault(state.confidence, []).append(state.ahead())
            chosen = best(guess.confidence(state.confidence, state), state.quota)
            ahead = state.ahead()
            if ahead is not None:
                assert torch.equal(chosen & guess.open, ahead.gather(1, guess.columns))
            return chosen, guess.tokens

    host = plain().host
    host.denoise_order = Watch()
    for confidence in ("random", "left", "probability"):
        denoise(host, ids, confidence=confidence, seed=1)
    assert seen["probability"] == [None] * 8
    first = [part[0].nonzero()[:, 0].tolist() for part in seen["left"]]
    assert first == [[8], [9], [10], [11], [12], [13], [], []]


def test_an_order_that_chooses_nothing_gets_on_plainly():
    class Shy(Denoising):
        def choose(self, state, guess):
            return torch.zeros_like(guess.open), guess.tokens

    host, ids = plain().host, hidden(2)["input_ids"]
    wanted = denoise(host, ids)[0]
    host.denoise_order = Shy()
    assert torch.equal(denoise(host, ids)[0], wanted)


def test_the_law_of_a_sampled_token():
    """One masked token, drawn for 4,000 rows at once, has the frequencies of the softmax."""
    model = tiny(vocab_size=7, mask_token_id=6)
    model.lm_head.weight.data *= 0.4
    ids = torch.tensor([[1, 2, 6, 3]])
    with torch.no_grad():
        logits = model(input_ids=ids, is_causal=False).logits[0, 2]
    logits[6] = -torch.inf
    for temperature in (1.0, 0.5):
        out = plain(model).generate(ids.expand(4000, -1), temperature=temperature, seed=0)[:, 2]
        expected = (logits / temperature).softmax(-1)[:6] * 4000
        seen = out.bincount(minlength=7)
        assert seen[6] == 0
        big = expected > 5
        total = [float(part[big].sum()) for part in (seen[:6], expected)]
        assert scipy.stats.chisquare(seen[:6][big], expected[big] * total[0] / total[1]).pvalue > 1e-3


def test_seeds_and_generators():
    handle, options = plain(), {"max_new_tokens": 12, "temperature": 1.0}
    ids = hidden(1)["input_ids"][:, :8]
    one = handle.generate(ids, seed=4, **options)
    assert torch.equal(one, handle.generate(ids, generator=torch.Generator().manual_seed(4), **options))
    assert not torch.equal(one, handle.generate(ids, seed=5, **options))


def test_the_end_of_a_text_fills_up_what_is_behind_it():
    handle = plain()
    ids = hidden(2)["input_ids"][:, :8]
    free = handle.generate(ids, max_new_tokens=12, block_length=4)
    end = int(free[0, 9])
    got, counters = denoise(handle.host, ids, max_new_tokens=12, block_length=4, eos_token_id=end)
    for row in range(2):
        ends = (free[row, 8:] == end).nonzero()
        stop = 8 + int(ends[0]) if len(ends) else 20
        stop = min(stop, 19)
        assert torch.equal(got[row, 8 : stop + 1], free[row, 8 : stop + 1])
        assert (got[row, stop + 1 :] == 0).all()
    single = denoise(handle.host, ids[:1], max_new_tokens=12, block_length=4, eos_token_id=end)[1]
    assert single.forwards <= 4 and counters.forwards <= 12, "blocks behind the end are not computed"


def test_hasten_generate_gives_tokens_and_counters():
    model = tiny()
    out = hasten.generate(model, hidden(), "decode/dimple(threshold=0.2)")
    assert out.tokens.shape == (3, 21) and 0 < out.counters.forwards < 10
    assert torch.equal(hasten.generate(model, hidden()).tokens, plain(model).generate(hidden()))
    assert not hasattr(hasten.apply(model, "").host, "denoise_order")


def test_what_cant_be_served_is_said_before_anything_runs():
    handle = plain()
    calls = []
    handle.model.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = hidden(1)["input_ids"]
    _ = handle.host.sees_both_ways
    calls.clear()
    full = ids.masked_fill(ids == MASK, 3)
    for inputs, options, message in (
        (full, {}, "nothing to fill in.*max_new_tokens.*40"),
        (ids[:, :0], {"max_new_tokens": 4}, "nothing but masks"),
        (full, {"max_new_tokens": 100}, "121 tokens and the model has 96 positions"),
        (full, {"max_new_tokens": 8, "steps": 9}, "steps=9 is more than the tokens.*8"),
        (full, {"max_new_tokens": 8, "block_length": 3}, "block_length=3 does not divide max_new_tokens = 8"),
        (full, {"max_new_tokens": 8, "block_length": 4, "steps": 5}, "no multiple of the 2 blocks"),
        (full, {"max_new_tokens": -1}, "0 or above"),
        (full, {"max_new_tokens": 8, "do_sample": True}, "no option 'do_sample'.*temperature"),
        (full, {"max_new_tokens": 8, "block_lenght": 4}, "did you mean 'block_length'"),
        (full, {"max_new_tokens": 8, "temperature": -1}, "0 or above, not -1"),
        (full, {"max_new_tokens": 8, "confidence": "luck"}, "one of probability.*not 'luck'"),
        (full, {"max_new_tokens": 8, "seed": 1, "generator": torch.Generator()}, "not both"),
        (full.float(), {"max_new_tokens": 8}, "whole numbers"),
        ({"input_ids": full, "attention_mask": full[:, 1:]}, {"max_new_tokens": 8}, "give one of its shape"),
        (None, {"max_new_tokens": 8}, "give token ids"),
    ):
        with pytest.raises(UsageError, match=message):
            handle.generate(inputs, **options)
    with pytest.raises(UsageError, match="the first of a row can't be a mask"):
        plain(tiny(shifted=True)).generate(torch.tensor([[MASK, 3]]))
    assert not calls


def test_models_that_do_not_denoise_are_refused():
    from conformance.decode import target

    with pytest.raises(PlanError, match="works on diffusion_lm models; this one is a decoder"):
        hasten.apply(target(), "decode/dimple")
    with pytest.raises(PlanError, match="works on decoder models; this one is a diffusion_lm"):
        hasten.apply(tiny(), "decode/speculative", draft=target())


def test_half_precision():
    model = tiny().to(torch.bfloat16)
    for plan in ("", "decode/dimple(threshold=0.3) + decode/dkv_cache(refresh=3)"):
        assert not (hasten.apply(model, plan).generate(hidden()) == MASK).any()


def test_quantized_weights_and_denoising_in_one_plan():
    plan = "quant/gptq(bits=8, group=32) + decode/dimple(threshold=0.2) + decode/dkv_cache(refresh=3)"
    model = denoising.tiny().float()
    handle = hasten.apply(model, plan, calibration=[hidden(4, seed=3)])
    assert not (handle.generate(hidden()) == MASK).any()


def test_the_highest_of_each_row():
    value = torch.tensor([[0.5, -torch.inf, 0.5, 0.9], [-torch.inf] * 3 + [0.1], [3.0, 2.0, 1.0, 0.0]])
    chosen = best(value, [2, 2, 0])
    assert chosen.tolist() == [[True, False, False, True], [False, False, False, True], [False] * 4]
