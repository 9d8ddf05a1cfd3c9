import pytest
import torch

from conformance.optim import adamw, finish, lines, outcome, run_of
from hasten.core.errors import UsageError
from hasten.data._samplers import Buckets
from hasten.data.bucketing import Bucketing, bucketing, padding
from hasten.workloads.spoken_digits import Speller, SpokenDigits, collate, strings


def cases():
    rng = torch.Generator().manual_seed(0)
    long_tail = (torch.randn(61, 2, generator=rng).exp() * 20).long()
    for lengths, buckets, parts, volume, cost in (
        (long_tail, 6, 2, 300.0, 1.0),
        (long_tail[:, :1], 5, 1, 100.0, 1.0),
        (long_tail[:, :1], 3, 4, 100.0, 0.5),
        (long_tail, 1, 1, 1.0, 2.0),  # no batch fits: one example each
        (torch.tensor([[5, 0], [5, 7], [5, 7], [0, 0]]), 3, 3, 20.0, 1.0),  # equal lengths, and empty ones
        (torch.zeros(4, 2, dtype=torch.int64), 2, 2, 8.0, 1.0),
        (long_tail[:1], 30, 2, 64.0, 0.0),
    ):
        yield {"args": (lengths, buckets, parts, volume, cost), "tolerance": 0.0}


def loader(seed=0, count=96, rows=8):
    return torch.utils.data.DataLoader(
        strings("made", False, count),
        batch_size=rows,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda examples: collate(examples, torch.device("cpu")),
    )


def speller(seed=0):
    torch.manual_seed(seed)
    return Speller(width=16)


LOSS = SpokenDigits().loss


def run(plan, seed=0, **options):
    return run_of(plan, seed, model=speller(seed), loader=loader(seed), optimizer=adamw, **options)


def subject(method_class):
    return {"train": lambda method, seed: outcome(run(method, seed), LOSS), "options": {"buckets": 4}}


def batches(method, lengths, rows=8, seed=0):
    volume = method.fill * rows * method.cost(lengths.amax(0))
    found, sizes = bucketing(lengths, method.buckets, method.parts, volume, method.output_cost)
    return method.deal(found, sizes, torch.Generator().manual_seed(seed))


def test_buckets_hold_equal_totals_and_two_dimensions_pad_less_than_one():
    lengths = strings("made", False, 2000).lengths
    found, _ = bucketing(lengths, 5, 1, 1000.0, 1.0)
    totals = torch.zeros(5).index_add_(0, found, lengths[:, 0].float())
    assert float(totals.max() / totals.min()) < 1.2
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    at_random = padding(lengths, [part.tolist() for part in order.split(8)])
    one = padding(lengths, batches(Bucketing(parts=1, fill=0.4), lengths))
    two = padding(lengths, batches(Bucketing(parts=4, fill=0.4), lengths))
    assert bool((at_random > 0.4).all()) and bool((one < 0.75 * at_random).all())
    assert float(two[1]) < 0.6 * float(one[1]) and float(two[0]) < 0.1
    assert padding(torch.tensor([[2, 4], [4, 2]]), [[0, 1]]).tolist() == [0.25, 0.25]


def test_a_pass_holds_every_example_once_within_the_budget():
    lengths = strings("made", False, 500).lengths
    method = Bucketing(buckets=7, output_cost=2.0)
    made = batches(method, lengths)
    assert sorted(index for batch in made for index in batch) == list(range(500))
    budget = 8 * method.cost(lengths.amax(0))
    assert all(len(batch) * method.cost(lengths[batch].amax(0)) <= budget for batch in made)
    assert 500 / len(made) > 1.5 * 8  # more examples a batch than the loader's, in the memory of its worst one
    again, later = batches(method, lengths), batches(method, lengths, seed=1)
    assert made == again and made != later and {*map(len, made)} == {*map(len, later)}


def test_batches_of_all_processes_share_a_pass():
    lengths = strings("made", False, 300).lengths
    make = lambda lengths, generator: batches(Bucketing(), lengths, seed=generator.initial_seed() % 97)  # noqa: E731
    parts = [list(Buckets(lengths, make, seed=3, rank=rank, processes=2)) for rank in range(2)]
    together = [index for part in parts for batch in part for index in batch]
    assert len(parts[0]) == len(parts[1]) and len(set(together)) == len(together) >= 290


def test_what_it_did_is_noted_and_the_loss_falls():
    trained = run("data/bucketing(buckets=4, fill=0.6)", steps=30)
    losses = finish(trained, LOSS)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    noted = trained.context.report["data/bucketing"]
    assert max(noted["padding"]) < 0.4 and 5 < noted["examples_a_batch"] < 16


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    plan = "data/bucketing(buckets=4)"
    losses = finish(run(plan, steps=14), LOSS)
    half = run(plan, steps=14)
    half.slice(LOSS, steps=8)
    half.save(tmp_path / "half")
    assert (
        finish(run_of(plan, 0, model=speller(3), loader=loader(), steps=14, resume=tmp_path / "half"), LOSS)
        == losses[8:]
    )


def test_lines_of_one_length_are_one_bucket():
    trained = run_of("data/bucketing", steps=3, loader=lines(rows=4))
    seen = []
    trained.on("forward", lambda run, batch: seen.append(batch.shape[0]))
    finish(trained)
    assert set(seen) == {4}


def test_data_without_two_lengths_is_an_error():
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(8, 3))
    with pytest.raises(UsageError, match="an attribute lengths"):
        run_of("data/bucketing", loader=torch.utils.data.DataLoader(data, batch_size=2))
    with pytest.raises(UsageError, match="DataLoader over a data set"):
        run_of("data/bucketing", loader=[torch.zeros(2, 8, dtype=torch.long)])
