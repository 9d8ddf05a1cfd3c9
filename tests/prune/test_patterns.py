"""Which weights stay: numbers, places, ties and edges of each pattern."""

import pytest
import torch

from hasten.prune._patterns import block, keep, of, problems


def scores(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (16, 64)])
def test_single_weights(shape, sparsity):
    given = scores(*shape)
    rows, whole = keep(given, sparsity, "unstructured"), keep(given, sparsity, "unstructured", by_row=False)
    assert (~rows).sum(1).tolist() == [int(shape[1] * sparsity)] * shape[0]
    assert int((~whole).sum()) == int(given.numel() * sparsity)
    for row, kept in zip(given, rows, strict=True):
        assert kept.all() or row[~kept].max() < row[kept].min()
    assert whole.all() or given[~whole].max() < given[whole].min()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "5:8", "3:7"])
def test_n_of_m(pattern):
    n, m = of(pattern)
    given = scores(5, 6 * m)
    kept = keep(given, 0.123, pattern)
    assert bool((kept.view(5, 6, m).sum(2) == n).all())
    best = given.view(5, 6, m).topk(n, dim=2).values.sum()
    torch.testing.assert_close(given[kept].sum(), best)


def test_n_of_m_in_a_last_group_of_fewer():
    assert keep(torch.tensor([[1.0, 2, 3, 4, 9]]), 0.5, "2:4").tolist() == [[False, False, True, True, True]]
    assert keep(torch.tensor([[1.0, 2, 3, 4, 7, 9, 8]]), 0.5, "2:4").tolist()[0][4:] == [False, True, True]


@pytest.mark.parametrize(
    ("pattern", "shape"), [("4x1", (8, 10)), ("2x8", (6, 24)), ("16x16", (32, 64)), ("3x5", (9, 5))]
)
def test_blocks_stay_or_go_whole(pattern, shape):
    given = scores(*shape)
    high, wide = block(pattern)
    kept = keep(given, 0.5, pattern)
    parts = kept.view(shape[0] // high, high, shape[1] // wide, wide).transpose(1, 2).flatten(2)
    assert bool((parts.all(2) == parts.any(2)).all())
    assert int((~parts[..., 0]).sum()) == int(parts[..., 0].numel() * 0.5)
    sums = given.view(shape[0] // high, high, shape[1] // wide, wide).sum((1, 3))
    stays = parts[..., 0]
    assert sums[~stays].numel() == 0 or sums[~stays].max() < sums[stays].min()


def test_blocks_that_the_matrix_cuts_off():
    """They count by their mean, and the sparsity by weights: neither first to go nor worth more than they hold."""
    given = torch.ones(5, 7)
    given[4] = 9
    kept = keep(given, 0.5, "4x4")
    assert kept.tolist() == [[True] * 4 + [False] * 3] * 4 + [[True] * 7]
    large = keep(scores(10, 240), 0.5, "8x1")
    assert float((~large).float().mean()) == pytest.approx(0.5, abs=0.005)
    assert 0.3 < float((~large[8:]).float().mean()) < 0.7


def test_of_equal_scores_the_earlier_stays():
    given = torch.ones(2, 8)
    assert keep(given, 0.5, "unstructured").tolist() == [[True] * 4 + [False] * 4] * 2
    assert keep(given, 0.5, "unstructured", by_row=False).tolist() == [[True] * 8, [False] * 8]
    assert keep(given, 0.5, "2:4").tolist() == [[True, True, False, False] * 2] * 2
    assert keep(given, 0.5, "1x2").tolist() == [[True] * 8, [False] * 8]


def test_half_precision_scores_do_not_overflow():
    given = torch.full((16, 16), 60000.0, dtype=torch.float16)
    given[:8] = 30000
    assert keep(given, 0.5, "8x16").tolist() == [[False] * 16] * 8 + [[True] * 16] * 8


@pytest.mark.parametrize(
    ("pattern", "sparsity", "words"),
    [
        ("2:4", 0.6, "means sparsity=0.5"),
        ("4:4", 0.0, "fewer than all"),
        ("0:4", 0.5, "at least one"),
        ("2:128", 0.5, "at most 64"),
        ("16x0", 0.5, "must be unstructured"),
        ("128x1", 0.5, "must be unstructured"),
        ("often", 0.5, "not often"),
        ("16x", 0.5, "must be unstructured"),
    ],
)
def test_problems(pattern, sparsity, words):
    (found,) = problems(pattern, sparsity)
    assert words in found


def test_no_problems():
    for pattern, sparsity in (("2:4", 0.5), ("5:8", 0.375), ("2:4", 0), ("16x1", 0.9), ("unstructured", 0.1)):
        assert problems(pattern, sparsity) == []
