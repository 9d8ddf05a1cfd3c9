"""The k largest of each row, by counting."""

import pytest
import torch

from hasten.kernels import top_rows as module
from hasten.kernels.top_rows import kernel, naive_top_rows, top_rows

CASES = {
    "random": lambda g: torch.randn(3, 2, 257, generator=g),
    "long": lambda g: torch.randn(2, 3000, generator=g).exp(),
    "equal": lambda g: torch.zeros(2, 70),
    "few values": lambda g: torch.randint(0, 4, (5, 300), generator=g).float(),
    "hidden": lambda g: torch.randn(4, 90, generator=g).masked_fill(torch.arange(90) < 40, -torch.inf),
    "wide range": lambda g: torch.randn(2, 400, generator=g) * 10.0 ** torch.randint(-37, 37, (2, 400), generator=g),
    "signed zeros": lambda g: torch.tensor([[0.0, -0.0, 0.0, -0.0, 1.0, -1.0]]),
    "softmax": lambda g: (30 * torch.randn(2, 500, generator=g)).softmax(-1),
    "one": lambda g: torch.randn(1, 1, generator=g),
}


@pytest.mark.parametrize("name", CASES)
def test_places_are_those_of_the_largest(name):
    assert kernel() is not None, "these tests are of the native path"
    scores = CASES[name](torch.Generator().manual_seed(0))
    n = scores.shape[-1]
    for count in {1, 2, n // 16, n // 3, n - 1, n} & set(range(1, n + 1)):
        assert torch.equal(top_rows(scores, count), naive_top_rows(scores, count))


def test_pytorch_finds_the_same_numbers(monkeypatch):
    scores = torch.randn(3, 4, 500, generator=torch.Generator().manual_seed(1))
    wanted = top_rows(scores, 31)
    monkeypatch.setattr(module, "kernel", lambda: None)
    assert torch.equal(top_rows(scores, 31), wanted)


def test_other_floats_and_strides():
    scores = torch.randn(4, 6, 200, generator=torch.Generator().manual_seed(2))
    assert torch.equal(top_rows(scores.bfloat16(), 9), naive_top_rows(scores.bfloat16().float(), 9))
    assert torch.equal(top_rows(scores.transpose(0, 1), 9), naive_top_rows(scores, 9).transpose(0, 1))


def test_threads_share_the_rows():
    scores = torch.randn(8, 8192, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(top_rows(scores, 500).long(), scores.topk(500).indices.sort(-1).values)
    finally:
        torch.set_num_threads(before)
