"""Self-speculation: the cases of the common test, that the check is the model at blocks of one, routing."""

import importlib

import pytest
import torch
import transformers

import hasten
from conformance import denoising
from hasten.core.errors import UsageError
from hasten.decode._denoising import denoise

ALWAYS = "decode/s2d2(policy=span)"
module = importlib.import_module("hasten.decode.s2d2")


def subject():
    return denoising.subject(options={"cost": 0.5})


def numbers(rows, columns, seed, dtype=torch.float32, words=7, near=1.0):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, rows, columns, words, generator=generator)
    p, q = first.softmax(-1).to(dtype), (near * second + (1 - near) * first).softmax(-1).to(dtype)
    drafts = torch.randint(0, words, (rows, columns), generator=generator)
    masked, drafted = (torch.rand(rows, columns, generator=generator) < chance for chance in (0.8, 0.95))
    span = module.first_span(masked, drafted)
    u = torch.rand(rows, columns, generator=generator).to(dtype)
    return p, q, drafts, span, u, torch.empty(rows, words).exponential_(generator=generator)


def cases():
    for rows, columns, seed, near in ((1, 7, 0, 0.3), (6, 13, 1, 0.2), (4, 1, 2, 1.0), (9, 5, 3, 0.0)):
        yield {"args": numbers(rows, columns, seed, near=near)}
    yield {"args": numbers(5, 6, 4, torch.float64, near=0.2)}
    yield {"args": numbers(5, 6, 5, torch.bfloat16, near=0.5)}


def prompt(rows=2, length=8):
    return denoising.hidden(rows)["input_ids"][:, :length]


def blocks(length, **more):
    return {"max_new_tokens": 8, "block_length": length, "blockwise": True} | more


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checked_greedy_text_is_that_of_blocks_of_one(kind, attention):
    model = denoising.tiny(kind)
    model.set_attn_implementation(attention)
    wanted = hasten.apply(model, "").generate(prompt(), **blocks(1))
    handle = hasten.apply(model, ALWAYS)
    for length in (8, 4, 2):
        found, counters = denoise(handle.host, prompt(), **blocks(length))
        assert torch.equal(found, wanted)
        assert counters.tokens == 16 and len(counters.computed) == len(counters.committed) == counters.forwards
        assert counters.committed[::2] == [0] * (counters.forwards // 2)  # a draft decides nothing by itself
    two_way = handle.generate(prompt(), max_new_tokens=8)
    assert torch.equal(two_way, wanted)


def test_a_shifted_model_is_checked_by_a_causal_pass():
    model = denoising.tiny("qwen2", shifted=True)
    wanted = prompt()
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=wanted).logits[:, -1]
        logits[:, denoising.MASK] = -torch.inf
        wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
    handle = hasten.apply(model, ALWAYS)
    assert torch.equal(handle.generate(prompt(), max_new_tokens=8, block_length=4), wanted)


def test_the_check_reads_a_few_columns_after_its_first_pass():
    counters = denoise(hasten.apply(denoising.tiny(), ALWAYS).host, prompt(1), **blocks(2))[1]
    assert counters.computed[1] == 16 + 8 and max(counters.computed[3::2]) <= 2 * 2 + 1


ROWS, HEAT = 4000, 3.0


def drawn(patch=None, monkeypatch=None):
    """Counts of the 16 texts of two tokens, drawn by checking a block of two, and their chances at blocks of one."""
    model = denoising.tiny(vocab_size=5, mask_token_id=4, seed=3)
    ids = torch.tensor([[1, 3, 0, 2]])
    host = hasten.apply(model, "").host
    chances = torch.zeros(4, 4, dtype=torch.float64)
    for first in range(4):
        for column, text in enumerate(([4, 4], [first, 4])):
            tokens = torch.cat([ids, torch.tensor([text])], 1)
            sees = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
            row = host.scores(tokens, mask=sees)[0, 4 + column, :4].detach().double().div(HEAT).softmax(-1)
            chances[first] = row[first] if not column else chances[first] * row
    handle = hasten.apply(model, ALWAYS)
    if patch:
        monkeypatch.setattr(module, "s2d2", patch)
    asked = {"max_new_tokens": 2, "block_length": 2, "blockwise": True, "temperature": HEAT, "seed": 5}
    out = handle.generate(ids.expand(ROWS, -1), **asked)[:, 4:]
    return torch.bincount(out[:, 0] * 4 + out[:, 1], minlength=16).double(), chances.flatten() * ROWS


def statistic(counts, expected):
    assert torch.allclose(expected.sum(), counts.sum()) and bool((expected > 3).all())
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_law_of_a_checked_block_is_that_of_blocks_of_one(monkeypatch):
    right, limit = module.s2d2, 44.3  # chi-square with 15 degrees of freedom, 1 in 10 000

    def keeps_all(p, q, drafts, span, u, e):
        return right(p, q, drafts, span, u * 0, e)

    def draws_anew(p, q, drafts, span, u, e):
        chosen, tokens = right(p, q, drafts, span, u, e)
        return chosen, torch.where(tokens != drafts, (p[:, :1] / e[:, None]).argmax(-1), tokens)

    assert statistic(*drawn()) < limit
    for wrong in (keeps_all, draws_anew):
        assert statistic(*drawn(wrong, monkeypatch)) > limit


def test_routing():
    def count(options):
        handle = hasten.apply(denoising.tiny(), f"decode/s2d2({options})")
        tokens, counters = denoise(handle.host, prompt(1), **blocks(4))
        assert not (tokens == denoising.MASK).any()
        return counters.committed.count(0), counters.forwards

    assert count("policy=span, least_span=9")[0] == 0
    assert count("score_threshold=99")[0] == 0
    assert count("policy=hysteresis, on=99")[0] == 0
    checks, forwards = count("cost=0")
    assert 2 * checks == forwards
    assert count("policy=span, least_span=3")[0] <= checks
    assert count("policy=hysteresis, on=-1, off=-2") == (checks, forwards)
    assert count("estimate=margin, cost=0")[0] > 0 and count("penalty=dynamic")[0] > 0


def test_hysteresis_stays_on():
    method = module.S2D2(policy="hysteresis", on=2.0, off=0.5, cost=0.0)
    notes, sure = {"on": torch.zeros(1, dtype=torch.bool)}, torch.zeros(1, 4, dtype=torch.bool)
    certain = torch.tensor([50.0, 0, 0]).expand(1, 4, 3)
    found = []
    for tokens in (1, 3, 1, 0, 1):
        span = torch.arange(4)[None] < tokens
        found.append(bool(method.route(notes, certain, span, sure)))
    assert found == [False, True, True, False, True]
    assert not method.route(notes, torch.zeros(1, 4, 3), torch.arange(4)[None] < 1, sure)


def test_the_first_span_ends_where_a_draft_is_missing():
    masked = torch.tensor([[False, True, True, False, True], [True, True, True, True, True]])
    drafted = torch.tensor([[False, True, True, False, True], [True, False, True, True, True]])
    wanted = [[False, True, True, False, False], [True, False, False, False, False]]
    assert module.first_span(masked, drafted).tolist() == wanted


@pytest.mark.parametrize("options", ["policy=span", "cost=0.5, threshold=0.3", "policy=hysteresis, on=0.4, off=0"])
def test_a_row_does_not_depend_on_its_neighbours(options):
    handle = hasten.apply(denoising.tiny("qwen2"), f"decode/s2d2({options})")
    batch = denoising.hidden(3)
    together = handle.generate(batch)
    assert not (together == denoising.MASK).any()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert torch.equal(handle.generate(ids[mask][None])[0], together[row][mask])


def test_it_composes_with_a_cache_that_is_exact_blockwise():
    wanted = hasten.apply(denoising.tiny(), "").generate(prompt(), **blocks(1))
    handle = hasten.apply(denoising.tiny(), f"{ALWAYS} + decode/freecache(block=4, settle=true)")
    found, counters = denoise(handle.host, prompt(), **blocks(4))
    assert torch.equal(found, wanted) and min(counters.computed) < 32


def test_steps_are_kept_without_checks():
    handle = hasten.apply(denoising.tiny(), "decode/s2d2(score_threshold=99, threshold=1)")
    assert denoise(handle.host, prompt(1), **blocks(4, steps=4))[1].committed == [2] * 4


def test_failures():
    with pytest.raises(UsageError, match="on=0.0 has to be above off=1.0"):
        hasten.apply(denoising.tiny(), "decode/s2d2(on=0, off=1)")
    with pytest.raises(UsageError, match="works on diffusion_lm models"):
        config = denoising.SMALL | denoising.WORDS
        hasten.apply(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), "decode/s2d2")
