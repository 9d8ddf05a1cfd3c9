"""DELTA: which pages a Delta layer chooses, and which layers it chooses for."""

import pytest
import torch

from hasten.attention.delta import DELTA, delta, naive_delta
from hasten.core.errors import PlanError

SMALL = {"budget": 16, "recent": 4, "page": 4, "full": 1, "choose": [1]}


def attention(batch, heads, tokens, begin, seed=0, dtype=torch.float32):
    weights = torch.randn(batch, heads, tokens, generator=torch.Generator().manual_seed(seed)).mul_(3)
    hidden = torch.arange(tokens) < begin[:, None]
    return weights.masked_fill(hidden[:, None], -torch.inf).softmax(-1).to(dtype)


def cases():
    for batch, heads, tokens, begin in ((1, 2, 64, [0]), (3, 4, 47, [0, 11, 40]), (2, 1, 33, [3, 30])):
        begin = torch.tensor(begin)
        small = {"budget": 16, "recent": 4, "page": 4}
        yield {"args": (attention(batch, heads, tokens, begin), begin), "kwargs": small}
        yield {"args": (attention(batch, heads, tokens, begin, 1), begin), "kwargs": {**small, "recent": 9, "page": 3}}
    yield {"args": (attention(1, 2, 50, begin[:1], dtype=torch.bfloat16), begin[:1]), "kwargs": small}


@pytest.mark.parametrize("tokens", [16, 41, 64])
def test_without_padding_is_padding_of_zero(tokens):
    weights = attention(2, 3, tokens, torch.zeros(2, dtype=torch.long))
    wanted = naive_delta(weights, torch.zeros(2, dtype=torch.long), 16, 4, 4)
    for one, other in zip(delta(weights, None, 16, 4, 4), wanted, strict=True):
        assert torch.equal(one, other)


def test_one_head_suffices_and_the_end_is_always_read():
    weights = torch.full((1, 8, 160), 1e-4)
    weights[0, 5, 77] = 0.9  # one head of eight looks there
    rows, counts = delta(weights, None, 48, 16, 16)
    chosen = set(rows[0, 0, : counts[0, 0]].tolist())
    assert set(range(64, 80)) | set(range(144, 160)) <= chosen and len(chosen) == 48


def test_the_papers_layers():
    assert DELTA().places(28) == (2, 14, 22)
    assert DELTA().places(12) == (2, 6, 9) and DELTA().places(4) == (2, 3)
    assert DELTA(choose=[3]).places(28) == (3,)


def test_options():
    with pytest.raises(PlanError, match="no page left"):
        DELTA(budget=128)
    with pytest.raises(PlanError, match="a page at least"):
        DELTA(recent=8)
