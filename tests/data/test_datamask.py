import pytest
import torch

from conformance.optim import lines
from conformance.selection import begin, examples_of, loader, outcome, run_of, same_when_resumed
from hasten.core.errors import PlanError, UsageError
from hasten.data.base import Examples
from hasten.data.datamask import DataMask, _unit, datamask, embeddings_of, greedy, learn, objective, picks

SMALL = {"fraction": 0.2, "prune": 0.2, "steps": 10, "groups": 8, "part": 0.5}


def points(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return _unit(torch.randn(n, d, generator=generator)), torch.rand(n, generator=generator)


def cases():
    for n, d, groups, size, balance, diversity in (
        (20, 6, 5, 4, 0.3, "pairwise"),
        (9, 1, 3, 2, 0.0, "pairwise"),
        (15, 4, 2, 15, 0.7, "pairwise"),
        (12, 5, 4, 3, 0.3, "facility"),
        (7, 3, 6, 2, 1.0, "facility"),
    ):
        e, q = points(n, d)
        masks = torch.rand(groups, n, generator=torch.Generator().manual_seed(1)).topk(size, dim=1).indices
        if size == n:  # equal masks have no advantage; rounding would be divided by rounding
            masks = masks[:1]
        yield {"args": (e, q, masks, balance, diversity), "kwargs": {}, "tolerance": 2e-4}
    e, q = points(16, 4, seed=2)
    masks = torch.rand(4, 16).topk(5, dim=1).indices
    yield {"args": (e.half(), q.bfloat16(), masks, 0.5, "pairwise"), "kwargs": {}, "tolerance": 2e-4}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": SMALL}


def test_the_gradient_is_that_of_the_expected_worth():
    # All masks of two among four at even odds: the gradient of E f in the logits is cov(M_i, f), here by enumeration.
    e, q = points(4, 3)
    pairs = torch.combinations(torch.arange(4), 2)
    gradient, worth = datamask(e, q, pairs, 0.4, "pairwise")
    members = torch.zeros(6, 4, dtype=torch.float64).scatter_(1, pairs, 1.0)
    expected = ((worth - worth.mean())[:, None] * members).mean(0) / worth.std(correction=0)
    torch.testing.assert_close(gradient, expected)
    assert abs(float(gradient.sum())) < 1e-12  # every mask holds two examples: the normaliser of softmax falls away


@pytest.mark.parametrize("diversity", ["pairwise", "facility"])
def test_learning_comes_near_to_greedy_and_far_above_chance(diversity):
    e, q = points(200, 8)
    random = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:20]
    learnt = learn(
        e, q, 20, balance=0.3, diversity=diversity, steps=150, groups=64, eta=4.0, part=0.3,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    best = greedy(e, q, 20, balance=0.3, diversity=diversity)
    low, middle, high = (objective(e, q, one, 0.3, diversity) for one in (random, learnt, best))
    assert low + 0.6 * (high - low) < middle <= high * 1.05
    assert len(learnt.unique()) == 20


def test_lazy_greedy_takes_the_same_examples():
    e, q = points(60, 5)
    plain, lazy = (list(picks(e, q, 15, balance=0.2, diversity="facility", lazy=lazy)) for lazy in (False, True))
    assert plain == lazy
    assert plain[0] == max(range(60), key=lambda i: 0.2 * float(q[i]) / 15 + 0.8 * float((e @ e[i] + 1).mean()))


def test_copies_are_left_out_where_variety_counts():
    unique = torch.eye(12)
    e = torch.cat([unique, unique[:1].repeat(48, 1)])
    kept = learn(
        e, torch.full((60,), 0.5), 12, balance=0.0, diversity="pairwise", steps=200, groups=64, eta=4.0, part=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert int(((kept > 0) & (kept < 12)).sum()) >= 10


def dataset(n=100, **attributes):
    data = torch.utils.data.TensorDataset(*loader().dataset[:n])
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


def test_quality_and_embeddings_of_the_dataset_decide():
    quality = torch.arange(100.0).flip(0)
    data = dataset(quality=quality, embeddings=torch.randn(100, 4, generator=torch.Generator().manual_seed(0)))
    run = run_of("", loader=torch.utils.data.DataLoader(data, batch_size=8))
    examples = examples_of(run)
    chosen = DataMask(fraction=0.1, prune=0.5, balance=1.0, steps=60, groups=32).choose(examples, run)
    assert len(chosen) == 10 and chosen.max() < 50 and float(chosen.float().mean()) < 15
    assert float(DataMask(quality="none").scores(examples, run).std()) == 0
    by_loss = DataMask(quality="loss").scores(examples, run)
    assert by_loss.min() == 0 and by_loss.max() == 1


def test_blocks_share_the_budget():
    run = run_of("")
    chosen = DataMask(fraction=0.2, prune=0.0, block=60, steps=5).choose(examples_of(run), run)
    assert len(chosen) == len(chosen.unique()) == 40


def test_tokens_are_embedded_by_their_runs():
    rows = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [9, 8, 7, 6], [1, 2, 3, 4]])
    e = embeddings_of(Examples("x", torch.utils.data.DataLoader(rows), torch.device("cpu")), "x", 64, 2)
    torch.testing.assert_close(e[0], e[3])
    assert float(e[0] @ e[1]) > float(e[0] @ e[2]) + 0.5
    run = run_of("", loader=lines())
    assert embeddings_of(examples_of(run), "x", 32, 2).shape == (400, 32)


def test_resumed_in_the_middle_is_the_same_bit_for_bit(tmp_path):
    same_when_resumed(DataMask(**SMALL), tmp_path)


def test_bad_options_and_data_are_named():
    with pytest.raises(PlanError, match="lower prune"):
        DataMask(fraction=0.7, prune=0.4)
    with pytest.raises(UsageError, match="fewer than two"):
        begin("data/datamask(fraction=0.005)")
    for attributes, message in (
        ({"quality": [1.0, 2.0]}, "`quality` must be finite numbers"),
        ({"embeddings": torch.ones(100)}, "`embeddings` must be finite numbers"),
    ):
        data = torch.utils.data.DataLoader(dataset(**attributes), batch_size=8)
        with pytest.raises(UsageError, match=message):
            begin("data/datamask(steps=1)", loader=data)
    with pytest.raises(UsageError, match="dataset's `quality`"):
        begin("data/datamask(quality=dataset)")
