"""spoken-digits: strings of clips, made on the spot or of recordings in a folder; padding changes no loss."""

import io
import os
import wave
import zipfile

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads import spoken_digits
from hasten.workloads.spoken_digits import BANDS, END, LETTERS, PAD, WORDS, collate, log_mel, strings


def test_examples_spell_their_digits_and_vary_in_both_lengths():
    data = strings("made", False, 64)
    features, letters = data[0]
    assert features.shape[1] == BANDS and int(letters[-1]) == END
    spelled = "".join(LETTERS[letter] for letter in letters[:-1].tolist())
    assert all(word in WORDS for word in spelled.split(" "))
    assert data.lengths[0].tolist() == [len(features), len(letters)]
    assert bool((data.lengths.amax(0) > 3 * data.lengths.amin(0)).all())
    assert strings("made", False, 64)[5][0].equal(data[5][0])
    held_out = {features.numpy().tobytes() for features, _ in strings("made", True, 64).examples}
    assert not held_out & {features.numpy().tobytes() for features, _ in data.examples}


def test_an_example_has_the_same_loss_in_any_batch():
    workload = hasten.workload("spoken-digits(examples=64)")
    model, data = workload.build(0), strings("made", False, 64)
    order = data.lengths[:, 0].argsort()
    both = workload.losses(model, collate([data[order[0]], data[order[-1]]], torch.device("cpu")))
    alone = [workload.losses(model, collate([data[order[place]]], torch.device("cpu"))) for place in (0, -1)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_tone_is_heard_in_its_band():
    time = torch.arange(4000) / 8000
    low, high = (log_mel(torch.sin(2 * torch.pi * tone * time)) for tone in (300, 3000))
    assert low.shape == (1 + 4000 // 128, BANDS)
    assert 1 <= int(low.mean(0).argmax()) < int(high.mean(0).argmax()) < BANDS


def test_one_seed_is_one_run_and_the_loss_falls():
    workload = hasten.workload("spoken-digits(examples=64, rows=4, steps=20)")
    assert hasten.workload(str(workload)) == workload
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    assert torch.equal(*first)
    model = workload.build(0)
    optimizer = workload.optimizer(model)
    before = workload.evaluate(model).mean()
    for batch in workload.batches(0):
        optimizer.zero_grad()
        workload.loss(model, batch).backward()
        optimizer.step()
    assert workload.evaluate(model).mean() < 0.9 * before
    assert int((batch["letters"] == PAD).sum()) > 0


def recording(samples, rate=8000):
    content = io.BytesIO()
    with wave.open(content, "wb") as stored:
        stored.setnchannels(1)
        stored.setsampwidth(2)
        stored.setframerate(rate)
        stored.writeframes((np.sin(np.arange(samples)) * 9000).astype("<i2").tobytes())
    return content.getvalue()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A recording of each part of each digit."""
    (tmp_path / "fsdd").mkdir()
    with zipfile.ZipFile(tmp_path / spoken_digits.FILE, "w") as archive:
        for digit in range(10):
            for number in (0, 7):
                archive.writestr(f"recordings/{digit}_ann_{number}.wav", recording(600 + 100 * digit + 400 * number))
        archive.writestr("recordings/notes.txt", "no recording")
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    return tmp_path


def test_recordings_are_read_and_numbers_below_five_are_held_out(home):
    training, held_out = (spoken_digits._recorded(home / spoken_digits.FILE, part) for part in (False, True))
    assert [len(clips) for clips in training] == [len(clips) for clips in held_out] == [1] * 10
    assert all(len(a[0]) > len(b[0]) for a, b in zip(training, held_out, strict=True))
    workload = hasten.workload("spoken-digits(data=fsdd, examples=16, rows=4)")
    assert torch.isfinite(workload.loss(workload.build(0), next(iter(workload.batches(0)))))


def test_what_is_missing_or_wrong_is_named(home, monkeypatch):
    with pytest.raises(PlanError, match="made, fsdd"):
        hasten.workload("spoken-digits(data=phone)")
    file = home / spoken_digits.FILE
    workload = hasten.workload("spoken-digits(data=fsdd, examples=17)")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0_ann_7.wav", recording(800))
    with pytest.raises(UsageError, match="no recording of: one, two"):
        workload.batches(0)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0_ann_7.wav", recording(800, rate=16000))
    with pytest.raises(UsageError, match="not mono, 16 bits, 8000 Hz"):
        workload.batches(0)
    file.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="can't be read as a zip"):
        workload.batches(0)
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="set HASTEN_DATA"):
        workload.batches(0)


@pytest.mark.skipif(not os.environ.get("HASTEN_DATA"), reason="HASTEN_DATA is not set")
def test_people_say_each_digit_in_both_parts():
    held_out, training = (
        spoken_digits._recorded(spoken_digits.data_file(spoken_digits.FILE), p) for p in (True, False)
    )
    assert all(len(clips) == 30 for clips in held_out) and all(len(clips) == 90 for clips in training)
