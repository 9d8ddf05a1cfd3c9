"""k-means on a line: the global minimum for short rows, close to it for long ones, and rows that have too little."""

import pytest
import torch

from hasten.math.kmeans import PIECES, exact, kmeans, nearest


def numbers(kind, n, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=make)
    if kind == "even":
        return x, None
    if kind == "heavy":  # a few numbers far out, weights over several decades
        return x * torch.randn(n, generator=make).exp(), torch.randn(n, generator=make).mul(2).exp()
    return x, torch.randn(n, generator=make).square() * (torch.rand(n, generator=make) < 0.5)  # half of them weigh 0


def error(x, w, centroids):
    squares = (x.double()[:, None] - centroids.double()).square().amin(1)
    return float(squares.sum() if w is None else (w.double() * squares).sum())


def by_trial(x, w, count):
    """The least error over all ways to cut the sorted numbers into runs."""
    order = x.sort().indices
    x, w = x[order].double(), torch.ones(len(x)).double() if w is None else w[order].double()
    from itertools import combinations

    found = []
    for cuts in combinations(range(1, len(x)), count - 1):
        ends, total = [0, *cuts, len(x)], 0.0
        for a, b in zip(ends, ends[1:], strict=False):
            mass = w[a:b].sum()
            mean = (w[a:b] * x[a:b]).sum() / mass if mass > 0 else 0.0
            total += float((w[a:b] * (x[a:b] - mean).square()).sum())
        found.append(total)
    return min(found)


@pytest.mark.parametrize("kind", ["even", "heavy", "zeros"])
def test_dynamic_programming_finds_what_trying_all_cuts_finds(kind):
    for seed in range(3):
        x, w = numbers(kind, 11, seed)
        centroids, least = exact(x, w, 4)
        assert least == pytest.approx(by_trial(x, w, 4), rel=1e-9)
        assert error(x, w, centroids) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("kind", ["even", "heavy", "zeros"])
@pytest.mark.parametrize("count", [1, 4, 8, 16])
def test_short_rows_get_the_global_minimum(kind, count):
    rows = [numbers(kind, PIECES, seed) for seed in range(4)]
    x = torch.stack([row for row, _ in rows])
    w = None if kind == "even" else torch.stack([weight for _, weight in rows])
    found = kmeans(x, w, count)
    assert torch.equal(found, found.sort(1).values)
    for row in range(4):
        weight = None if w is None else w[row]
        assert error(x[row], weight, found[row]) <= exact(x[row], weight, count)[1] * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("kind", ["even", "heavy", "zeros"])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_long_rows_come_within_two_percent_and_beat_scikit_learn(kind, count):
    from sklearn.cluster import KMeans

    ours, theirs = 0.0, 0.0
    for seed in range(3):
        x, w = numbers(kind, 700, seed)
        least = exact(x, w, count)[1]
        found = error(x, w, kmeans(x[None], None if w is None else w[None], count)[0]) / least
        assert found < 1.02
        fitted = KMeans(count, n_init=1, random_state=seed, max_iter=50).fit(x[:, None].double().numpy(), None, w)
        ours, theirs = ours + found, theirs + error(x, w, torch.tensor(fitted.cluster_centers_[:, 0])) / least
    assert ours < theirs + 0.01


def test_rows_are_independent_of_each_other():
    x, w = torch.randn(150, 90), torch.rand(150, 90)
    whole = kmeans(x, w, 8)
    assert torch.equal(whole[70:75], kmeans(x[70:75], w[70:75], 8)) and torch.equal(
        whole, kmeans(x, w * 8, 8)
    )  # a power of two


def test_rows_with_few_numbers_no_weight_or_no_spread():
    few = torch.tensor([[2.0, -1.0, 2.0, -1.0], [3.0, 3.0, 3.0, 3.0]])
    found = kmeans(few, None, 4)
    assert found.tolist() == [[-1, 2, 2, 2], [3, 3, 3, 3]]
    assert nearest(few, found).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    x = torch.randn(3, 40)
    assert torch.equal(kmeans(x, torch.zeros(3, 40), 4), kmeans(x, None, 4))
    long = torch.zeros(2, 300)
    long[1, 7] = 5
    assert kmeans(long, None, 4).tolist() == [[0, 0, 0, 0], [0, 5, 5, 5]]
    assert kmeans(torch.randn(2, 1), None, 4).isfinite().all()
    assert kmeans(torch.randn(0, 5), None, 4).shape == (0, 4)


def test_weights_over_thirty_decades_leave_the_centroids_in_order_and_in_range():
    make = torch.Generator().manual_seed(3)
    x = torch.randn(40, 500, generator=make, dtype=torch.float64)
    w = torch.randn(40, 500, generator=make, dtype=torch.float64).mul(12).exp()
    w[:, ::7] *= 1e-25
    found = kmeans(x, w, 16)
    assert torch.equal(found, found.sort(1).values)
    assert (found >= x.amin(1, keepdim=True).float()).all() and (found <= x.amax(1, keepdim=True).float()).all()
    assert error(x[0], w[0], found[0]) <= 1.02 * exact(x[0], w[0], 16)[1] + 1e-6 * float(w[0].sum())


def test_a_number_between_two_centroids_is_the_lower_ones():
    assert nearest(torch.tensor([[-5.0, 1.0, 1.1, 9.0]]), torch.tensor([[0.0, 2.0]])).tolist() == [[0, 0, 1, 1]]
