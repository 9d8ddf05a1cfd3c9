"""stdlib-written: the target's own text keeps all its likelihood, another's does not, repetition gains nothing."""

import numpy as np
import pytest
import torch

import hasten


class Writes:
    """A handle that writes the same byte for ever."""

    def generate(self, prompt, max_new_tokens, **_):
        return torch.cat([prompt, torch.full((len(prompt), max_new_tokens), 32)], 1)


def test_the_models_own_text_keeps_everything():
    workload = hasten.workload("stdlib-written(examples=8, prompt=96, new=24)")
    own = workload.quality(hasten.apply(workload.trained(), ""))
    assert own.shape == (8,) and np.abs(own).max() < 1e-3
    assert workload.metric.aggregate(own) == pytest.approx(1, abs=1e-3) and workload.metric.better == "higher"
    drafts = workload.quality(hasten.apply(workload.draft(), ""))
    blank = workload.quality(Writes())
    assert (drafts <= 0).all() and (blank <= 0).all()
    assert blank.mean() < drafts.mean() < -0.02


def test_only_generation_is_judged():
    workload = hasten.workload("stdlib-written")
    assert workload.tasks() == ("generate",) and workload.draft() is not None
    with pytest.raises(hasten.core.errors.PlanError, match="task must be one of generate"):
        hasten.workload("stdlib-written(task=needle)")
