"""stdlib-denoiser: what is asked and judged, on a model with random weights."""

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.workloads.stdlib_denoiser import MASK, StdlibDenoiser, repeated, stdlib_denoiser


def small(**options):
    return hasten.workload("stdlib-denoiser", prompt=24, new=8, examples=8, **options)


def test_infill_hides_a_span_with_text_on_both_sides():
    workload = small(batch=3)
    requests = workload.requests(0)
    assert len(requests) == 16 and requests[0].shape == (3, 32)
    assert (requests[0] == MASK).nonzero()[:, 1].unique().tolist() == list(range(12, 20))
    assert torch.equal(requests[3], workload.requests(0)[3]) and not torch.equal(requests[3], workload.requests(1)[3])
    out = workload.serve(hasten.apply(stdlib_denoiser().eval(), ""), requests[0])
    assert out.shape == (3, 8) and not (out == MASK).any()


def test_quality_of_infilling_is_the_share_of_right_bytes():
    workload = small(batch=4)

    class Knows:
        """Puts the true text in, but for one byte of each row."""

        def generate(self, ids, steps):
            rows = workload.texts(8, seed=29)
            found = rows[[int(i) for row in ids for i in (rows[:, :12] == row[:12]).all(1).nonzero()[:1, 0]]].clone()
            found[:, 12] = MASK
            return found

    assert workload.quality(Knows()).tolist() == [7 / 8] * 8
    assert workload.metric.better == "higher"


def test_quality_of_continuing_is_what_the_target_needs_for_it():
    workload = small(task="continue", block=4, steps=4, batch=8)
    assert workload.requests(0)[0].shape == (8, 24)
    rows = workload.texts(8, seed=29)

    class Says:
        def __init__(self, text):
            self.text = text

        def generate(self, ids, steps, max_new_tokens, block_length, blockwise):
            assert (steps, max_new_tokens, block_length) == (4, 8, 4)
            return torch.cat([ids, self.text], 1)

    true = workload.quality(Says(rows[:, 24:]))
    random = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(0))
    assert true.shape == (8, 2) and workload.metric.better == "lower"
    assert workload.metric.aggregate(true) < 3.5 < 6 < workload.metric.aggregate(workload.quality(Says(random)))


def test_repetition_is_seen():
    rows = np.array([[1, 2, 3, 4] * 5, range(20), [7] * 20])
    assert repeated(rows).tolist() == [1 - 4 / 13, 0, 1 - 1 / 13]
    assert repeated(rows[:, :5]).tolist() == [0, 0, 0]


def test_other_inputs():
    workload = small()
    assert workload.draft().config.vocab_size == 256
    batch = workload.calibration()[0]["input_ids"]
    assert batch.shape == (8, 32) and int(batch.max()) < 256
    assert workload.tasks() == ("infill", "continue")


def test_blockwise_text_is_written_block_by_block():
    workload = small(task="continue", block=4, blockwise=True)
    handle = hasten.apply(stdlib_denoiser().eval(), "")
    lengths = []
    handle.model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    workload.serve(handle, workload.requests(0)[0])
    assert lengths[-8:] == [28] * 4 + [32] * 4


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"prompt": 1000, "new": 64}, "at most 1024 bytes"),
        ({"block": 8}, "block is for task=continue"),
        ({"task": "continue", "new": 10, "block": 4}, "does not divide new=10"),
        ({"task": "continue", "block": 16, "blockwise": True, "prompt": 100}, "blockwise needs a block that divides"),
        ({"steps": 65}, "steps is at most new=64"),
        ({"task": "continue", "block": 16, "steps": 6}, "multiple of the number of blocks, 4"),
    ):
        with pytest.raises(UsageError, match=message):
            StdlibDenoiser(**options)


def test_the_model_fills_in_more_than_chance():
    workload = hasten.workload("stdlib-denoiser(prompt=120, new=8, examples=32, batch=8)")
    assert workload.quality(hasten.apply(workload.trained(), "")).mean() > 0.3
