"""Choices of examples and batches by length: every example where it belongs, shards apart, resumes exact."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hasten.core.errors import UsageError
from hasten.data._examples import Examples
from hasten.data._samplers import Buckets, Chosen
from hasten.data.base import attach
from hasten.train import checkpoint
from hasten.train.run import Run


@dataclasses.dataclass
class Low:
    """Chooses the examples whose target is lowest, fewer each time."""

    every: int = 0
    keep: int = 12
    name: str = "data/low"

    def choose(self, examples, run):
        run.state[self.name]["times"] = times = run.state[self.name].get("times", 0) + 1
        targets = torch.cat([batch[1] for batch in examples.batches(7)])
        return targets.argsort()[: self.keep - 4 * (times - 1)]


def neighbours(lengths, generator):
    """Batches of three neighbours in length, in a random order."""
    groups = lengths[:, 0].argsort(stable=True).split(3)
    return [groups[i].tolist() for i in torch.randperm(len(groups), generator=generator)]


class Ragged(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((1 + index % 7,), float(index)), torch.zeros(2)


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True, padding_value=-1)


def data(count=20):
    return TensorDataset(torch.arange(count).float(), torch.arange(count).float().flip(0))


def run_of(method, loader=None, steps=12, resume=None, **options):
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(data(), batch_size=4, shuffle=True) if loader is None else loader
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.0), loader, steps=steps, seed=3, **options)
    run.state[method.name] = {}
    attach(method, run)
    if resume:
        checkpoint.load(run, resume)
    return run


def seen(run, steps):
    found = []
    for batch in run:
        found.append(batch[0].tolist() if isinstance(batch, list) else batch.tolist())
        run.backward(run.model.weight.sum())
        if len(found) == steps:
            break
    return found


def test_only_what_was_chosen_is_seen():
    first, second = seen(run := run_of(Low()), 12)[:3], seen(run_of(Low()), 6)[3:]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(8, 20)) and first != second
    assert run.state["data/low"]["times"] == 1


def test_a_choice_is_made_anew():
    run = run_of(Low(every=1))
    batches = seen(run, 6)
    assert [sorted(sum(part, [])) for part in (batches[:3], batches[3:5], batches[5:])] == [
        list(range(8, 20)), list(range(12, 20)), list(range(16, 20)),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [2, 3, 4])
@pytest.mark.parametrize("method", [Low(), Low(every=1)], ids=["once", "anew"])
def test_resume_goes_on_with_the_same_examples(method, at, tmp_path):
    run = run_of(method, steps=6)
    seen(run, at)
    run.save(tmp_path)
    again = run_of(method, steps=6, resume=tmp_path)
    assert seen(again, 9) == seen(run, 9) and again.done


def test_batches_by_length_hold_every_example_once():
    examples = Examples("data/x", DataLoader(Ragged(), batch_size=3, collate_fn=padded), torch.device("cpu"))
    sampler, passes = Buckets(examples.lengths(), neighbours), []
    loader = examples.loader_over(sampler, batches=True)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        passes.append([batch.tolist() for batch in loader])
        assert sorted({x for batch in passes[-1] for row in batch for x in row if x >= 0}) == list(range(20))
    assert sum(-1 in row for batch in passes[0] for row in batch) <= 5 and passes[0] != passes[1]
    assert len(loader) == 7


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_examples_out(processes):
    parts = []
    for rank in range(processes):
        sampler = Chosen(20, 5, rank, processes)
        sampler.choose(torch.arange(4, 15))
        sampler.set_epoch(2)
        parts.append(list(sampler))
    assert {len(part) for part in parts} == {11 // processes} == {len(sampler)}
    assert len(set(sum(parts, []))) == 11 // processes * processes and set(sum(parts, [])) <= set(range(4, 15))


def test_a_sampler_goes_on_from_its_state():
    sampler = Chosen(20, seed=1)
    sampler.set_epoch(1)
    walk = iter(sampler)
    head = [next(walk) for _ in range(6)]
    again = Chosen(20, seed=1)
    again.load_state_dict(sampler.state_dict())
    again.set_epoch(1)
    rest = list(again)
    assert sorted(head + rest) == list(range(20)) and rest == list(walk)
    assert len(list(again)) == 20, "the next pass begins at its beginning"


def test_what_samplers_refuse():
    state = Chosen(20, processes=2).state_dict()
    with pytest.raises(UsageError, match="of 2 processes, and here are 1"):
        Chosen(20).load_state_dict(state)
    with pytest.raises(UsageError, match="of other examples"):
        Chosen(21, processes=2).load_state_dict(state)
    with pytest.raises(UsageError, match="rank must be from 0 to 1"):
        Chosen(20, rank=2, processes=2)
    with pytest.raises(UsageError, match="the data set has 20 examples"):
        Chosen(20).choose(torch.tensor([20]))
    with pytest.raises(UsageError, match="choose more"):
        Chosen(20, processes=2).choose(torch.tensor([1]))
    with pytest.raises(UsageError, match="other examples"):
        state = Buckets(torch.ones(5, 1), neighbours).state_dict()
        Buckets(torch.ones(4, 1), neighbours).load_state_dict(state)


class Stream(IterableDataset):
    def __iter__(self):
        yield from data()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([torch.zeros(2)], "give a DataLoader over a data set with a length"),
        (DataLoader(Stream(), batch_size=4), "give a DataLoader over a data set with a length"),
        (DataLoader(data(), batch_sampler=[[0, 1]]), "not a batch sampler"),
    ],
    ids=["list", "stream", "batches"],
)
def test_what_a_choice_needs(loader, message):
    with pytest.raises(UsageError, match=message):
        run_of(Low(), loader)


def test_fewer_examples_than_a_batch():
    run = run_of(Low(keep=3), DataLoader(data(), batch_size=4, drop_last=True))
    with pytest.raises(UsageError, match="chose 3 examples, fewer than a batch of 4"):
        seen(run, 1)


def test_examples_are_read_as_the_loader_reads_them():
    examples = Examples("data/x", DataLoader(Ragged(), batch_size=3, collate_fn=padded), torch.device("cpu"))
    assert len(examples) == 20 and examples[3][0].tolist() == [3.0] * 4
    (batch,) = examples.batches(5, [6, 0])
    assert batch.tolist() == [[6.0] * 7, [0.0] + [-1.0] * 6]
    assert examples.lengths()[:3].tolist() == [[1, 2], [2, 2], [3, 2]]
    columns = Examples("data/x", DataLoader(data(), batch_size=3), torch.device("cpu"))
    for quick, plain in zip(columns.batches(7), DataLoader(data(), batch_size=7), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(quick, plain, strict=True))
    bare = Examples("data/x", DataLoader([1, 2, 3]), torch.device("cpu"))
    with pytest.raises(UsageError, match="attribute lengths"):
        bare.lengths()
