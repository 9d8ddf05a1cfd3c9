"""Recycled Attention: what a full step leaves to those after it, and when the next one is due."""

import pytest
import torch

from attention.test_reading import applied, logits, one_by_one, tokens
from hasten.attention.recycled import naive_recycled, recycled

SMALL = {"budget": 16, "every": 3}


def attention(batch, heads, count, begin, seed=0, dtype=torch.float32):
    weights = torch.randn(batch, heads, count, generator=torch.Generator().manual_seed(seed)).mul_(3)
    hidden = torch.arange(count) < begin[:, None]
    return weights.masked_fill(hidden[:, None], -torch.inf).softmax(-1).to(dtype)


def cases():
    for batch, heads, groups, count, begin in ((1, 2, 1, 40, [0]), (3, 4, 2, 21, [0, 5, 8]), (2, 6, 3, 9, [1, 0])):
        begin = torch.tensor(begin)
        yield {"args": (attention(batch, heads, count, begin), begin, groups), "kwargs": {"budget": 12}}


def test_padding_comes_last():
    begin = torch.tensor([6, 0])
    rows = recycled(attention(2, 4, 10, begin), begin, 2, 8)
    assert (rows[0, :, :4] >= 6).all() and (rows[0, :, 4:] < 6).all()
    assert torch.equal(rows[1], naive_recycled(attention(2, 4, 10, begin), begin, 2, 8)[1])


@pytest.mark.parametrize("plan", ["every=5", "threshold=-1.0, check=1"])
def test_each_new_token_takes_the_place_of_the_least_attended(plan, monkeypatch):
    from hasten.attention import _reading

    seen = []
    mixed = _reading.mixed
    monkeypatch.setattr(_reading, "mixed", lambda look, choice: seen.append((look, choice)) or mixed(look, choice))
    handle, ids = applied(f"attention/recycled(budget=8, {plan})"), tokens(1, 44)
    logits(handle, ids, [40])
    cache = logits(handle, ids, one_by_one(44))[1]
    for step in range(4):
        look, choice = next((look, c) for look, c in seen if look.index == 1 and look.columns == 41 + step)
        rows = choice.rows[0]
        assert rows.shape[-1] == 8
        new = torch.arange(40, 41 + step).flip(0).int()
        assert (rows[:, : step + 1] == new).all()
        first = cache.layers[1].states[0][1][0]
        top = first[0, :, -8:] if first.shape[-1] > 8 else first[0]
        assert torch.equal(rows[:, step + 1 :], top[:, : 7 - step])


def test_a_threshold_makes_a_step_full_when_the_query_turns():
    def read(threshold):
        handle = applied(f"attention/recycled(budget=8, threshold={threshold}, check=1)")
        logits(handle, tokens(2, 56), one_by_one(56))
        return handle.report["attention/recycled"]["read"]

    never, sometimes, always = read(-1.0), read(0.2), read(1.0)
    assert never < 0.25 < sometimes < 1.0
    assert always == 1.0


def test_rows_of_a_batch_decide_for_themselves():
    plan, ids = "attention/recycled(budget=8, threshold=0.2, check=1)", tokens(3, 60)
    together, _ = logits(applied(plan), ids, one_by_one(60))
    for row in range(3):
        alone, _ = logits(applied(plan), ids[row : row + 1], one_by_one(60))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-5)
