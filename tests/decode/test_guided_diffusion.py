"""Guided unmasking: the cases of the common test, a guide that always or never agrees, its cache, and who may guide."""

import pytest
import torch

import hasten
from conformance import decode, denoising
from hasten.core.errors import UsageError
from hasten.decode._denoising import denoise
from hasten.decode.guided_diffusion import guided_diffusion


def guide(**more):
    return decode.target(**({"vocab_size": denoising.MASK, "eos_token_id": None} | more))


def subject():
    return denoising.subject(options={"top": 3}, context={"draft": guide()})


def numbers(rows, columns, seed, dtype=torch.float32, words=9):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, words, generator=generator).to(dtype)
    drafts = scores.argmax(-1)
    other = torch.randint(0, words + 1, drafts.shape, generator=generator)  # words is a token that the guide lacks
    drafts = torch.where(torch.rand(drafts.shape, generator=generator) < 0.3, other, drafts)
    masked, known, judged = (torch.rand(drafts.shape, generator=generator) < chance for chance in (0.8, 0.9, 0.95))
    quota = [min(1 + row % 3, int((masked & known)[row].sum())) for row in range(rows)]
    return scores, drafts, masked, known, judged, quota


def cases():
    for rows, columns, seed in ((1, 7, 0), (5, 13, 1), (4, 1, 2), (3, 30, 3)):
        for top, share in ((1, 0.0), (5, 0.0), (2, 0.5), (9, 1.0)):
            yield {"args": (*numbers(rows, columns, seed), top, share)}
    yield {"args": (*numbers(4, 11, 4, torch.bfloat16), 2, 0.25)}


def test_what_is_decided_up_to_the_first_disagreement():
    scores = torch.tensor([[3.0, 2.0, 0.0]]).expand(2, 4, 3)
    drafts = torch.tensor([[0, 0, 1, 0], [2, 0, 0, 0]])
    masked = torch.tensor([[True, True, True, True], [True, False, True, True]])
    every = torch.ones_like(masked)
    chosen = guided_diffusion(scores, drafts, masked, every, every, [1, 1], 1, 0.0)
    assert chosen.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert guided_diffusion(scores, drafts, masked, every, every, [1, 1], 2, 0.0)[0].all()
    assert guided_diffusion(scores, drafts, masked, every, every, [1, 1], 2, 0.5)[0].tolist() == chosen[0].tolist()


def apply(plan="decode/guided_diffusion", model=None, draft=None):
    return hasten.apply(model or denoising.tiny(), plan, draft=draft or guide())


def test_a_guide_that_always_agrees_needs_one_forward_and_one_that_never_does_one_a_token():
    every = apply(f"decode/guided_diffusion(top={denoising.MASK})")
    counters = denoise(every.host, denoising.hidden(1))[1]
    assert counters.forwards == 1 and counters.committed == [6]
    never = guide()
    never.lm_head.weight.data.zero_()
    never.lm_head.weight.data[0] = 1.0  # always token 0 or, as likely, all others but none alone
    handle = apply(draft=never)
    tokens, counters = denoise(handle.host, denoising.hidden(1), confidence="random", seed=0)
    assert 1 < counters.forwards <= 6 and not (tokens == denoising.MASK).any()


def test_the_guides_cache_gives_what_reading_all_again_gives():
    """The same text as from a loop that asks the guide about the whole row, without a cache."""
    model, small = denoising.tiny(), guide(seed=4)
    handle, ids = apply("decode/guided_diffusion(top=4)", denoising.tiny(), small), denoising.hidden(1)["input_ids"]
    wanted, host = ids.clone(), hasten.apply(model, "").host
    steps = 0
    while bool((wanted == denoising.MASK).any()):
        with torch.no_grad():
            scores = host.scores(wanted)
        scores[..., denoising.MASK] = -torch.inf
        masks = (wanted[0] == denoising.MASK).nonzero()[:, 0].tolist()
        filled = torch.where(wanted == denoising.MASK, scores.argmax(-1), wanted)
        with torch.no_grad():
            said = small(input_ids=filled).logits[0]
        taken = 0
        for i in masks:
            if filled[0, i] not in said[i - 1].topk(4).indices:
                break
            taken += 1
        wanted[0, masks[: max(1, taken)]] = filled[0, masks[: max(1, taken)]]
        steps += 1
    found, counters = denoise(handle.host, ids)
    assert torch.equal(found, wanted) and counters.forwards == steps


@pytest.mark.parametrize("shifted", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(shifted):
    handle = apply("decode/guided_diffusion(top=6)", denoising.tiny("qwen2", shifted=shifted))
    batch = denoising.hidden(3)
    together = handle.generate(batch)
    assert not (together == denoising.MASK).any()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert torch.equal(handle.generate(ids[mask][None])[0], together[row][mask])


def test_text_that_begins_with_a_mask_and_padding_on_the_right():
    handle = apply("decode/guided_diffusion(top=6)")
    begins = torch.tensor([[denoising.MASK, denoising.MASK, 5, 6, denoising.MASK]])
    assert not (handle.generate(begins) == denoising.MASK).any()
    assert not (handle.generate(torch.tensor([[denoising.MASK, 5, 6]])) == denoising.MASK).any()
    ids, mask = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    padded = handle.generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=6)
    assert torch.equal(padded[:, 5:], handle.generate(ids[:, :3], max_new_tokens=6)[:, 3:])


def test_steps_are_kept():
    counters = denoise(apply().host, denoising.hidden(1), steps=2)[1]
    assert counters.forwards <= 2 and sum(counters.committed) == 6


@pytest.mark.parametrize("cache", ["freecache(block=3)", "dkv_cache(refresh=3)", "dkv_cache(variant=greedy, window=1)"])
def test_it_composes_with_a_cache(cache):
    plan = f"decode/guided_diffusion(top=6) + decode/{cache}"
    asked = {"max_new_tokens": 9, "block_length": 3, "temperature": 0.8, "seed": 1}
    for ids in (denoising.hidden(), {name: rows[:, :8] for name, rows in denoising.hidden().items()}):
        options = asked if ids["input_ids"].shape[1] == 8 else {}
        tokens, counters = denoise(apply(plan).host, ids, **options)
        assert counters.share < 1 and not (tokens == denoising.MASK).any()


def test_who_may_guide():
    with pytest.raises(UsageError, match="37 tokens.*40 before its mask"):
        apply(draft=guide(vocab_size=37))
    with pytest.raises(UsageError, match="fills in masks itself"):
        apply(draft=denoising.tiny(seed=1))
    with pytest.raises(UsageError, match="no decoder of transformers"):
        apply(draft=torch.nn.Linear(2, 2))
    model = denoising.tiny()
    with pytest.raises(UsageError, match="the model itself"):
        apply(model=model, draft=model)
    assert not hasattr(model, "guide")
    larger = apply(draft=guide(vocab_size=64))  # padding behind the same tokens
    assert not (larger.generate(denoising.hidden()) == denoising.MASK).any()
