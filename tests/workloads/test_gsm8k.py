"""gsm8k: sums of a folder made on the spot, as bytes and as GPT-2's tokens."""

import gzip
import json
import os

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.workloads import gsm8k
from hasten.workloads._pairs import IGNORED


def sums(count):
    return [
        {"question": f"Ann has {n} eggs and buys 7.", "answer": f"{n}+7=<<{n}+7={n + 7}>>\n#### {n + 7}"}
        for n in range(count)
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Forty sums, and a vocabulary of bytes with one merge."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gpt2_bpe").mkdir()
    lines = ["\n".join(map(json.dumps, sums(count))).encode() for count in (40, 12)]
    (tmp_path / gsm8k.FILES[False]).write_bytes(gzip.compress(lines[0]))
    (tmp_path / gsm8k.FILES[True]).write_bytes(lines[1])
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = {word: place for place, word in enumerate([*letters, "eg", "<|endoftext|>"])}
    (tmp_path / gsm8k.MERGES[0]).write_text(json.dumps(words))
    (tmp_path / gsm8k.MERGES[1]).write_text("#version: 0.2\ne g\n")
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    for cached in (gsm8k._tokenizer, gsm8k._vocabulary, gsm8k._sums):
        cached.cache_clear()
    yield tmp_path
    for cached in (gsm8k._tokenizer, gsm8k._vocabulary, gsm8k._sums):
        cached.cache_clear()


def test_answers_are_trained_on_and_variants_have_one_wrong_number(home):
    workload = hasten.workload("gsm8k(texts=20, examples=8, rows=4, length=96)")
    assert hasten.workload(str(workload)) == workload
    pair = workload.pairs(False, 20)[3]
    text, wrong = (bytes(one[1:]).decode() for one in (pair.tokens, pair.variant))
    assert text == "Ann has 3 eggs and buys 7.\n3+7=<<3+7=10>>\n#### 10" and wrong != text
    assert len(text[: pair.given - 1].splitlines()) == 1 and wrong.startswith(text[: pair.given - 1])
    batch = next(iter(workload.batches(0)))
    assert int((batch["labels"] != IGNORED).sum(1).min()) > 10 and bool((batch["labels"][:, :27] == IGNORED).all())
    model = workload.build(0)
    assert torch.isfinite(workload.loss(model, batch)) and workload.evaluate(model).shape == (8,)


def test_numbers_are_a_little_off():
    rng = np.random.default_rng(0)
    found = {gsm8k.wrong_number("a 12 b 0", rng) for _ in range(60)}
    assert found == {f"a {12 + step} b 0" for step in (-10, -2, -1, 1, 2, 10)} | {f"a 12 b {n}" for n in (1, 2, 10)}
    assert gsm8k.wrong_number("no number", rng) is None


def test_tokens_of_gpt2_are_numbered_anew(home):
    workload = hasten.workload("gsm8k(tokens=bpe, texts=20, examples=8, rows=4, length=96)")
    model = workload.build(0)
    rows = model.get_input_embeddings().weight.shape[0]
    assert 20 < rows < 100
    pairs = workload.pairs(False, 20)
    assert max(max(pair.tokens) for pair in pairs) < rows and gsm8k.UNKNOWN not in pairs[0].tokens
    assert len(pairs[3].tokens) == len("Ann has 3 eggs and buys 7.\n3+7=<<3+7=10>>\n#### 10")  # one merge, one start
    assert torch.isfinite(workload.loss(model, next(iter(workload.batches(0)))))
    assert workload._ids("\u00e9") == [gsm8k.UNKNOWN] * 2


def test_what_is_missing_or_wrong_is_named(home, monkeypatch):
    workload = hasten.workload("gsm8k(texts=20, rows=16, length=16)")
    with pytest.raises(UsageError, match="0 texts of at most 16 tokens"):
        workload.batches(0)
    (home / gsm8k.FILES[True]).write_text('{"question": "?"}')
    with pytest.raises(UsageError, match="question and answer"):
        workload.pairs(True, 1)
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="set HASTEN_DATA"):
        workload.pairs(False, 1)


@pytest.mark.skipif(not os.environ.get("HASTEN_DATA"), reason="HASTEN_DATA is not set")
def test_published_sums_are_read():
    for tokens in ("bytes", "bpe"):
        pairs = hasten.workload(f"gsm8k(tokens={tokens}, texts=64)").pairs(True, 32)
        assert len(pairs) == 32 and all(pair.tokens[: pair.given] == pair.variant[: pair.given] for pair in pairs)
