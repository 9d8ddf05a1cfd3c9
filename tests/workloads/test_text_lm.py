"""text-lm: corpora of a folder made on the spot, a part that is passed over several times, dropout."""

import gzip
import json

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads.text_lm import read

SMALL = "text-lm(rows=4, length=16, steps=10)"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A play of 4,000 letters and three sums, in the files' formats."""
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "tinyshakespeare/input.txt").write_text("abcdefgh" * 500)
    sums = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    content = "\n".join(map(json.dumps, sums)).encode()
    (tmp_path / "gsm8k/train.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    return tmp_path


def test_corpora_are_read_and_their_last_tenth_is_held_out(home):
    workload = hasten.workload("text-lm(corpus=tinyshakespeare, length=16)")
    assert bytes(workload.tokens(False)) + bytes(workload.tokens(True)) == b"abcdefgh" * 500
    assert len(workload.tokens(True)) == 400
    assert bytes(read(home / "gsm8k/train.jsonl.gz")) == b"0 + 1?\n#### 1\n\n1 + 1?\n#### 2\n\n2 + 1?\n#### 3"
    own = hasten.workload(f"text-lm(corpus='{home / 'tinyshakespeare/input.txt'}', goal=2.0)")
    assert np.array_equal(own.tokens(False), workload.tokens(False)) and own.target == 2.0


def test_the_part_has_as_many_windows_as_the_epochs_ask_for():
    workload = hasten.workload("text-lm(rows=4, length=16, steps=50, epochs=10)")
    loader = workload.batches(0)
    assert len(loader.dataset) == 50 * 4 / 10 and len(loader) == 5
    whole = {bytes(row.numpy()) for row in loader.dataset.larger.rows}
    assert len(loader.dataset.larger) > 1000 and all(bytes(row.numpy()) in whole for row in loader.dataset.rows)
    assert hasten.workload(SMALL).batches(0).dataset.larger is None


def test_dropout_is_in_the_model_and_not_in_its_evaluation():
    workload = hasten.workload("text-lm(rows=4, length=16, dropout=0.5)")
    model = workload.build(0)
    batch = next(iter(workload.batches(0)))
    assert not torch.equal(workload.loss(model, batch), workload.loss(model, batch))
    assert np.array_equal(workload.evaluate(model), workload.evaluate(model)) and model.training


def test_one_seed_is_one_run():
    workload = hasten.workload(SMALL)
    assert hasten.workload(str(workload)) == workload
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    assert torch.equal(*first)
    batch = next(iter(workload.batches(3)))
    model = workload.build(3)
    torch.testing.assert_close(workload.losses(model, batch).mean(), workload.loss(model, batch))


def test_what_is_missing_or_wrong_is_named(home, monkeypatch):
    with pytest.raises(PlanError, match="no file novel.txt"):
        hasten.workload("text-lm(corpus=novel.txt)")
    with pytest.raises(PlanError, match="goal=BITS"):
        hasten.workload(f"text-lm(corpus='{home / 'tinyshakespeare/input.txt'}')")
    with pytest.raises(UsageError, match="more epochs"):
        hasten.workload("text-lm(corpus=tinyshakespeare, length=16, rows=8, steps=1000, epochs=2)").batches(0)
    (home / "gsm8k/train.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="can't be read as text"):
        hasten.workload("text-lm(corpus=gsm8k)").batches(0)
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="set HASTEN_DATA"):
        hasten.workload("text-lm(corpus=wikitext2)").batches(0)
