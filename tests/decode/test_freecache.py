"""Frozen prompts and blocks: the cases of the common test, what is computed when, and where freezing is exact."""

import pytest
import torch

import hasten
from conformance import denoising
from hasten.decode._denoising import UNDECIDED, denoise
from hasten.decode.freecache import freecache


def subject():
    return denoising.subject(options={"block": 3})


def decided(rows, length, step, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (rows, length), generator=generator)
    at = torch.randint(0, step, (rows, length), generator=generator)
    return torch.where(kind == 0, -1, torch.where(kind == 1, UNDECIDED, at))


def cases():
    for rows, length, step, seed in ((1, 9, 1, 0), (3, 17, 5, 1), (2, 1, 3, 2), (4, 23, 2, 3)):
        at = decided(rows, length, step, seed)
        late = torch.where(torch.arange(length) < length // 2, at.clamp(max=step - 1), at)
        for table in (at, late, torch.full_like(at, -1)):
            for settle in (False, True):
                yield {"args": (table, length // 3, length, step, 4, settle)}
                yield {"args": (table, 0, length - 1, step, 1, settle)}
                yield {"args": (table, length // 2, length, step, 100, settle)}


def test_a_block_is_frozen_when_its_last_token_is_decided():
    at = torch.tensor([[-1, -1, 0, 2, 1, UNDECIDED, 0, UNDECIDED, -1]])
    columns = [freecache(at, 2, 9, 3, 3, settle)[0].nonzero()[:, 0].tolist() for settle in (False, True)]
    assert columns == [[5, 6, 7], [2, 3, 4, 5, 6, 7]]  # column 3 was decided in the step before
    assert freecache(at, 2, 9, 4, 3, True)[0].nonzero()[:, 0].tolist() == [5, 6, 7]
    assert freecache(at, 2, 9, 3, 4, False)[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7]


def test_the_region_shrinks_block_by_block_and_the_prompt_is_computed_once():
    handle = hasten.apply(denoising.tiny(), "decode/freecache(block=4)")
    ids = denoising.hidden(1)["input_ids"][:, :8]
    seen = []
    handle.host.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    _, counters = denoise(handle.host, ids, max_new_tokens=8, confidence="left")
    assert seen[-8:] == counters.computed == [16, 8, 8, 8, 4, 4, 4, 4]
    _, counters = denoise(handle.host, ids, max_new_tokens=8, block_length=2)  # the call's blocks end a block too
    assert counters.computed == [16, 8, 6, 6, 4, 4, 2, 2]


def test_the_text_on_both_sides_of_a_span_is_computed_once():
    handle = hasten.apply(denoising.tiny(), "decode/freecache")
    assert denoise(handle.host, denoising.hidden(1)["input_ids"])[1].computed == [21, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_blocks_that_see_nothing_behind_them_are_frozen_exactly(kind):
    """With attention to one's own block and those before it a settled block's keys change no more."""
    ids = denoising.hidden(2)["input_ids"][:, :8]
    asked = {"max_new_tokens": 12, "block_length": 4, "blockwise": True}
    wanted = hasten.apply(denoising.tiny(kind), "").generate(ids, **asked)
    handle = hasten.apply(denoising.tiny(kind), "decode/freecache(block=4, settle=true)")
    found, counters = denoise(handle.host, ids, **asked)
    assert torch.equal(found, wanted) and counters.share < 0.5
    unsettled = hasten.apply(denoising.tiny(kind), "decode/freecache(block=4)").generate(ids, **asked)
    assert not torch.equal(unsettled, wanted)  # a mask's keys stay where the last token of a block is


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_does_not_depend_on_its_neighbours(settle, shifted, attention):
    model = denoising.tiny("qwen2", shifted=shifted)
    model.set_attn_implementation(attention)
    handle = hasten.apply(model, f"decode/freecache(block=3, settle={str(settle).lower()})")
    batch = denoising.hidden(3)
    together = handle.generate(batch)
    assert not (together == denoising.MASK).any()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert torch.equal(handle.generate(ids[mask][None])[0], together[row][mask])


def test_it_composes_with_an_order():
    plan = "decode/dimple(threshold=0.3) + decode/freecache(block=3)"
    handle = hasten.apply(denoising.tiny(), plan)
    alone = denoise(hasten.apply(denoising.tiny(), "decode/freecache(block=3)").host, denoising.hidden())[1]
    tokens, counters = denoise(handle.host, denoising.hidden())
    assert counters.forwards < alone.forwards and counters.share < 1
    assert not (tokens == denoising.MASK).any()
