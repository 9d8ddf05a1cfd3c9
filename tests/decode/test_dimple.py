"""Confident decoding: the cases of the common test, fewer steps, and the plain order where nothing is sure."""

import pytest
import torch

import hasten
from conformance import denoising
from hasten.core.errors import PlanError
from hasten.decode._denoising import denoise
from hasten.decode.dimple import dimple


def subject():
    return denoising.subject(options={"threshold": 0.15})


def numbers(rows, columns, seed, share=0.8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, columns, generator=generator).to(dtype)
    rank = torch.rand(rows, columns, generator=generator)
    open = torch.rand(rows, columns, generator=generator) < share
    quota = [min(row % 3, int(open[row].sum())) for row in range(rows)]
    return confidence, rank, open, quota


def cases():
    for rows, columns, seed, threshold in ((1, 7, 0, 0.5), (5, 13, 1, 0.95), (4, 1, 2, 0.3), (6, 9, 3, 1.0)):
        yield {"args": (*numbers(rows, columns, seed), threshold, False)}
    yield {"args": (*numbers(4, 11, 4, dtype=torch.bfloat16), 0.9, False)}
    yield {"args": (*numbers(3, 5, 5), 0.95, True)}
    yield {"args": (*numbers(3, 5, 6, share=0.0), 0.5, False)}


def test_sure_tokens_go_together_and_else_the_surest():
    confidence = torch.tensor([[0.99, 0.2, 0.96], [0.5, 0.9, 0.95]])
    open = torch.ones(2, 3, dtype=torch.bool)
    chosen = dimple(confidence, confidence, open, [1, 1], 0.95, False)
    assert chosen.tolist() == [[True, False, True], [False, False, True]]  # 0.95 is not above 0.95
    assert dimple(confidence, confidence, open, [1, 1], 0.95, True).all()


def test_steps_fall_with_the_threshold():
    def forwards(threshold):
        handle = hasten.apply(denoising.tiny(), f"decode/dimple(threshold={threshold})")
        return denoise(handle.host, denoising.hidden(1))[1].forwards

    counts = [forwards(threshold) for threshold in (0.05, 0.4, 0.7, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 6


def test_a_row_does_not_depend_on_its_neighbours():
    handle = hasten.apply(denoising.tiny(), "decode/dimple(threshold=0.4)")
    batch = denoising.hidden(3)
    together = handle.generate(batch)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert torch.equal(handle.generate(ids[mask][None])[0], together[row][mask])


def test_all_are_decided_in_the_last_step():
    handle = hasten.apply(denoising.tiny(), "decode/dimple(threshold=0.999)")
    tokens, counters = denoise(handle.host, denoising.hidden(1), steps=3)
    assert counters.forwards == 3 and not (tokens == denoising.MASK).any()


@pytest.mark.parametrize("measure", ["probability", "margin"])
@pytest.mark.parametrize("fallback", ["plain", "margin", "entropy", "random", "left"])
def test_every_measure_and_fallback_fills_in_all(measure, fallback):
    handle = hasten.apply(denoising.tiny(), f"decode/dimple(threshold=0.6, measure={measure}, fallback={fallback})")
    out, again = (handle.generate(denoising.hidden(), seed=3) for _ in range(2))
    assert not (out == denoising.MASK).any() and torch.equal(out, again)


def test_it_composes_with_a_cache_but_not_with_another_order():
    handle = hasten.apply(denoising.tiny(), "decode/dimple(threshold=0.3) + decode/dkv_cache(refresh=3)")
    tokens, counters = denoise(handle.host, denoising.hidden())
    assert counters.share < 1 and counters.forwards < 10 and not (tokens == denoising.MASK).any()
    with pytest.raises(PlanError, match="denoise.order"):
        hasten.apply(denoising.tiny(), "decode/dimple + decode/dimple(threshold=0.5)")
