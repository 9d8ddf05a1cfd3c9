"""Long prompts and needles: what is planted is where it says, and the bundled model answers what is asked."""

import json

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads import models, needle, text, weights


def test_training_rows_mark_the_second_code_of_each_pair():
    rng = np.random.default_rng(0)
    for row, answers in (
        needle.training_row(text.stream(False), 700, 5, rng),
        needle.drill_row(text.stream(False), 700, 4, 24, rng),
    ):
        assert len(row) == len(answers) == 700
        whole = row.tobytes()
        ends = np.flatnonzero(answers[:-1] & ~answers[1:])
        assert len(ends) >= 3
        for end in ends:
            line = whole[end + 2 - needle.LINE : end + 1]
            assert line.startswith(needle.OPENING) and line in whole[: end + 2 - needle.LINE]


def test_needles_stand_between_lines_at_their_depths():
    depths = [0.1, 0.5, 0.9]
    hay, needles = needle.haystack(text.stream(True), 2000, depths, np.random.default_rng(3))
    assert hay.shape == (2000,) and hay[-1] == 10
    for depth, one in zip(depths, needles, strict=True):
        place = hay.tobytes().index(b"\n" + one.line)
        assert -needle.LINE <= place - depth * 2000 <= needle.NEAR + needle.LINE


def test_questions_ask_for_every_depth_in_turn():
    asked = needle.questions(text.stream(True), 8, 600, depths=4, seed=5)
    prompts = [one.haystack.astype(np.uint8).tobytes() for one in asked]
    assert len(set(prompts)) == 2 and {len(one.prompt) for one in asked} == {600}
    places = []
    for one, prompt in zip(asked, prompts, strict=True):
        line = np.concatenate([one.question, one.answer]).astype(np.uint8).tobytes()
        assert prompt.count(line) == 1
        places.append(prompt.index(line) / 600)
    assert places[:4] == sorted(places[:4]) and places[0] < 0.3 and places[3] > 0.7
    again = needle.questions(text.stream(True), 8, 600, depths=4, seed=5)
    assert all(np.array_equal(one.prompt, other.prompt) for one, other in zip(asked, again, strict=True))


def test_questions_through_a_tokenizer():
    """Three bytes a token: the code is cut where it happens to be, and the tokens before it are those of the line."""

    def encode(content):
        padded = np.frombuffer(content + b" " * (-len(content) % 3), np.uint8).astype(np.int64)
        return padded.reshape(-1, 3) @ np.array([1, 256, 65536])

    stream = encode(text.stream(True)[:9000].tobytes())
    for one in needle.questions(stream, 4, 200, depths=2, seed=1, encode=encode):
        assert abs(len(one.prompt) - 200) <= 2 and len(one.answer) >= 1
        whole = np.concatenate([one.question, one.answer])
        rows = np.lib.stride_tricks.sliding_window_view(one.haystack, len(whole))
        planted = (rows[:, : len(whole) - 1] == whole[:-1]).all(1)
        assert planted.sum() == 1


def test_the_context_is_a_limit():
    hasten.workload(f"stdlib-lm(model=long, task=perplexity, prompt={models.LONG_CONTEXT - 64})")
    with pytest.raises(PlanError, match="model=long takes 8704"):
        hasten.workload("stdlib-lm(prompt=8192)")
    with pytest.raises(PlanError, match="at most 8704"):
        hasten.workload("stdlib-lm(task=train, model=long, length=9000)")
    with pytest.raises(PlanError, match="too many for a prompt"):
        hasten.workload("stdlib-lm(task=needle, prompt=256, depths=20)")
    with pytest.raises(PlanError, match="does not exist"):
        hasten.workload("stdlib-lm(task=perplexity, text=nowhere.txt)")
    with pytest.raises(UsageError, match="do not fit"):
        needle.haystack(text.stream(True), 100, [0.2, 0.4, 0.6], np.random.default_rng(0))


@pytest.fixture(scope="module")
def handle():
    return hasten.apply(hasten.workload("stdlib-lm(model=long)").trained(), "")


@pytest.mark.parametrize("blind", [False, True])
def test_the_long_model_recalls_codes(handle, blind):
    workload = hasten.workload(f"stdlib-lm(model=long, task=needle, prompt=1024, examples=10, blind={blind}, new=6)")
    recalled = workload.quality(handle)
    assert recalled.shape == (10,) and workload.metric.better == "higher" and recalled.mean() > 0.8
    if blind:
        seen = workload.__class__.from_options({**workload.changed(), "blind": False}).quality(handle)
        assert np.allclose(recalled, seen, atol=1e-3)
    else:
        asked = workload.asked(16, seed=1000)
        out = workload.serve(handle, workload.requests(0)[0])
        assert out.shape == (1, 6)
        assert (out[0].numpy() == asked[0].answer).mean() > 0.5


def test_what_is_evicted_is_not_recalled():
    """The needles leave the cache before they are asked for: what is left is chance."""
    workload = hasten.workload("stdlib-lm(model=long, task=needle, prompt=1024, examples=8, blind=True, depths=2)")
    short = hasten.apply(workload.trained(), "kv/cake(budget=40, window=16)")
    assert workload.quality(short).mean() < 0.4


def test_the_long_model_predicts_long_windows(handle):
    workload = hasten.workload("stdlib-lm(model=long, task=perplexity, prompt=1984, new=64, examples=8)")
    rows = workload.quality(handle)
    assert rows.shape == (8,) and rows.mean() < 2.2
    assert workload.requests(0)[0].shape == (1, 1984)


def test_calibration_of_the_long_model_holds_needles():
    workload = hasten.workload("stdlib-lm(model=long, task=needle, prompt=2048)")
    rows = workload.calibration()
    assert len(rows) == 8 and rows[0]["input_ids"].shape == (1, 2048)
    assert rows[0]["input_ids"].to(torch.uint8).numpy().tobytes().count(needle.OPENING) >= 10
    plain = hasten.workload("stdlib-lm(model=long, prompt=1000)").calibration()
    assert plain[0]["input_ids"].shape == (1, 1000)


def test_training_at_long_lengths():
    workload = hasten.workload("stdlib-lm(task=train, model=long, length=2048, rows=2, target=5.0)")
    model = workload.build(0)
    batch = next(iter(workload.batches(0)))
    assert batch.shape == (2, 2048) and model.config.max_position_embeddings == models.LONG_CONTEXT
    assert torch.isfinite(workload.loss(model, batch[:1])) and workload.target == 5.0
    assert workload.evaluate(model).shape == (8,)


def test_a_text_of_ones_own(tmp_path, handle):
    file = tmp_path / "poem.txt"
    file.write_bytes("The rose is red, the violet's blue. \u00e9\n".encode() * 300)
    workload = hasten.workload(f"stdlib-lm(model=long, task=perplexity, prompt=200, text='{file}', examples=8)")
    assert workload.tokens(True).max() < 256 and len(workload.tokens(True)) < len(workload.tokens(False))
    assert workload.quality(handle).mean() < 7


def test_needles_for_a_model_with_a_tokenizer(tmp_path):
    """A local folder with a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("4", "8"), ("0", "1"), ("1", "2"), ("2", "3")]
    vocabulary = {piece: at for at, piece in enumerate(alphabet + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(kinds.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(vocabulary),
        eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    workload = hasten.workload(f"hf:{tmp_path}(task=needle, prompt=256, depths=2, examples=8, batch=2, new=4)")
    found = workload.quality(hasten.apply(workload.trained(), ""))
    assert found.shape == (8,) and np.allclose(found, 1 / len(vocabulary), atol=0.01)
    request = workload.requests(0)[0]
    assert request.shape[0] == 2 and 250 <= request.shape[1] <= 256
    lengths = {len(one.answer) for one in workload.asked(16, seed=1)}
    assert len(lengths) > 1 and json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_the_record_tells_quality_by_length_and_distance():
    record = weights.record("long")
    assert record["command"].startswith("python scripts/make_long_weights.py")
    assert set(record["bits_per_byte"]) == {"512", "2048", "8192"} and "8192@0.5" in record["needle"]
