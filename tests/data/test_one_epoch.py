import math

import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, outcome, run_of
from hasten.core.errors import UsageError
from hasten.data.one_epoch import advise
from hasten.workloads.find import workload
from hasten.workloads.text_lm import Windows, byte_gpt2


def cases():
    for parameters, tokens, ratio, corpus in (
        (1e6, 5e6, 5.0, math.inf),  # as it should be: nothing changes
        (1e8, 1e8, 5.0, math.inf),
        (3.3e5, 4.1e9, 20.0, math.inf),
        (1e9, 2e8, 5.0, 3e8),  # the corpus is too small
        (7.0, 3.0, 0.25, 2.0),
    ):
        yield {"args": (parameters, tokens, ratio, corpus), "tolerance": 1e-6}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": {}}


def part_of_larger(rows=4, part=8, whole=96, length=32, seed=0):
    """A loader over `part` windows that names `whole` windows."""
    every = Windows(lines(length=length).dataset[:whole].to(torch.uint8))
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(
        Windows(every.rows[:part], larger=every), batch_size=rows, shuffle=True, generator=generator
    )


def test_cost_stays_and_the_ratio_is_as_asked():
    found = advise(1_000_000, steps=1000, batch_tokens=2000, ratio=5.0)
    assert found.ratio == 2.0 and found.tokens / found.parameters == pytest.approx(5.0, rel=1e-4)
    assert found.parameters * found.tokens == pytest.approx(1e6 * 2e6, rel=1e-4)
    assert found.steps == round(found.tokens / 2000) > 1000
    short = advise(1_000_000, steps=1000, batch_tokens=2000, corpus=2.5e6)
    assert short.tokens == 2_500_000 and short.parameters == 800_000
    with pytest.raises(UsageError, match="above 0"):
        advise(0, steps=1, batch_tokens=1)


def test_the_larger_data_is_seen_once():
    run = run_of("data/one_epoch", steps=24, loader=part_of_larger())
    seen = []
    run.on("forward", lambda run, batch: seen.extend(bytes(row.to(torch.uint8).numpy()) for row in batch))
    finish(run)
    assert len(seen) == 96 and set(seen) == {bytes(row.numpy()) for row in part_of_larger().dataset.larger.rows}


def test_dropout_is_off_until_the_run_is_finished():
    model = byte_gpt2("small", dropout=0.3)
    batch = next(iter(part_of_larger()))
    run = run_of("data/one_epoch", steps=2, model=model, loader=part_of_larger())
    assert model.training and torch.equal(language_loss(model, batch), language_loss(model, batch))
    assert run.context.report["data/one_epoch"]["dropout_off"] == 1 + 3 * 3
    finish(run)
    run.finish()
    assert not torch.equal(language_loss(model, batch), language_loss(model, batch))
    left = run_of("data/one_epoch(dropout=true)", steps=2, model=model, loader=part_of_larger())
    assert not torch.equal(language_loss(model, batch), language_loss(model, batch))
    assert "dropout_off" not in left.context.report["data/one_epoch"]


def test_the_size_that_fits_is_noted():
    run = run_of("data/one_epoch", steps=10, loader=part_of_larger())
    noted = run.context.report["data/one_epoch"]
    size = sum(parameter.numel() for parameter in run.model.parameters())
    assert noted["parameters"] == size and noted["tokens_a_weight"] == round(10 * 4 * 32 / size, 3)
    assert noted["advised_tokens"] == 96 * 32 and noted["advised_parameters"] < size  # all that there is


def test_a_run_that_would_repeat_does_not_begin():
    model = llama()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UsageError, match="50 steps need 50 batches and one pass has 24.*steps=24"):
        run_of("data/one_epoch", steps=50, model=model, loader=part_of_larger())
    with pytest.raises(UsageError, match="24 steps need 48 batches"):
        run_of("data/one_epoch", steps=24, loader=part_of_larger(), accumulate=2)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_stream_without_length_stops_at_its_end():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(lines().dataset[:12])

    run = run_of("data/one_epoch", steps=9, loader=torch.utils.data.DataLoader(Stream(), batch_size=4))
    with pytest.raises(UsageError, match="at its end after 3 steps"):
        finish(run)
    run = run_of("data/one_epoch", steps=None, loader=part_of_larger(whole=8))
    assert sum(1 for batch in run if run.backward(language_loss(run.model, batch)) is None) == 2
    with pytest.raises(UsageError, match="no example twice"):
        next(iter(run))


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    losses = finish(run_of("data/one_epoch", steps=12, loader=part_of_larger()))
    half = run_of("data/one_epoch", steps=12, loader=part_of_larger())
    half.slice(language_loss, steps=5)
    half.save(tmp_path / "half")
    resumed = run_of("data/one_epoch", steps=12, model=llama(3), loader=part_of_larger(), resume=tmp_path / "half")
    assert finish(resumed) == losses[5:]


def test_the_experiment_has_ten_times_the_data_for_the_plan():
    work = workload("text-lm(epochs=10, dropout=0.1, steps=100, rows=4, length=16)")
    loader = work.batches(0)
    assert len(loader) * 10 == 100 and len(loader.dataset.larger) >= 100 * 4
