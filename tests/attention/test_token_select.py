"""TokenSelect: the vote, the cache of choices, and prompts that are read chunk by chunk."""

import pytest
import torch

import hasten
from attention.test_reading import applied, build, logits, one_by_one, tokens
from hasten.attention.token_select import naive_token_select, token_select

SMALL = {"top": 8, "first": 2, "last": 4, "chunk": 8}


def cases():
    for batch, heads, count, begin in ((1, 2, 40, [0]), (3, 4, 33, [0, 11, 27]), (2, 3, 57, [2, 0])):
        scores = torch.randn(batch, heads, count, generator=torch.Generator().manual_seed(count)).mul_(4)
        begin = torch.tensor(begin)
        scores = scores.masked_fill((torch.arange(count) < begin[:, None])[:, None], -torch.inf)
        yield {"args": (scores, begin), "kwargs": {"top": 7, "first": 3, "last": 5}}
        yield {"args": (scores, begin), "kwargs": {"top": 12, "first": 0, "last": 1}}


def test_without_padding_is_padding_of_zero():
    scores = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(3))
    wanted = naive_token_select(scores, torch.zeros(2, dtype=torch.long), 9, 3, 6)
    for one, other in zip(token_select(scores, None, 9, 3, 6), wanted, strict=True):
        assert torch.equal(one, other)


def test_a_head_has_one_vote_however_loud():
    scores = torch.zeros(1, 4, 40)
    scores[0, 0, 10] = 50.0  # one loud head
    scores[0, 1:, 20] = 6.0  # three that agree
    rows, _ = token_select(scores, None, 1, 0, 1)
    assert rows[0, 0].tolist() == [20, 39]


@pytest.mark.parametrize(("theta", "low", "high"), [(-1.0, 0.35, 0.45), (1.0, 0.8, 1.0)])
def test_a_choice_is_read_again_while_queries_stay_alike(theta, low, high):
    handle = applied(f"attention/token_select(top=8, first=2, last=4, theta={theta}, chunk=null)")
    logits(handle, tokens(1, 50), one_by_one(50))
    assert low < handle.report["attention/token_select"]["read"] < high


@torch.no_grad()
def test_a_prompt_is_read_chunk_by_chunk():
    """Each chunk is dense attention over its own choice: the last chunk's queries, followed by hand."""
    handle, ids = applied("attention/token_select(top=6, first=2, last=4, chunk=8)"), tokens(2, 32)
    whole, _ = logits(handle, ids, [32])
    dense, _ = logits(hasten.apply(build(), ""), ids, [32])
    torch.testing.assert_close(whole[:, :16], dense[:, :16], rtol=0, atol=2e-5)  # 2 + 6 + 8 tokens are all there are
    assert (whole - dense)[:, 16:].abs().max() > 0.01
    cache = handle.host.new_cache(32)
    parts, _ = logits(handle, ids, [8, 16, 24, 32], cache=cache)  # the same chunks, in forwards of their own
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_padded_prompts_stay_finite_and_rows_apart():
    handle, ids = applied("attention/token_select(top=6, first=2, last=4, chunk=8)"), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    found, _ = logits(handle, ids, [32, 33, 40], mask)
    assert found.isfinite().all()
    alone, _ = logits(handle, ids[1:], [32, 33, 40])
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=2e-5)
    other = ids.clone()
    other[0, :21] = 7  # what stands in the padding is never seen
    again, _ = logits(handle, other, [32, 33, 40], mask)
    assert torch.equal(again[0, 21:], found[0, 21:])
