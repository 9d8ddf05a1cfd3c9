"""stdlib-upscale: text that the models have not seen, quality of whatever generates, a draft that learns the text."""

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError
from hasten.workloads import language, upscale

SMALL = "prompt=48, new=12, examples=8, tuning=4"


def test_documentation_is_prose_and_split():
    held, train = upscale.documentation(True), upscale.documentation(False)
    assert 100_000 < len(held) < len(train) / 5
    for part in (held, train):
        letters = bytes(part[:20_000])
        assert sum(chr(c).isalpha() or c == 32 for c in letters) > 0.6 * len(letters)
    assert bytes(held[:2_000]) not in bytes(train)


@pytest.mark.parametrize("plan", ["", "decode/eft(candidates=0)", "decode/eft(candidates=5)", "decode/eft(beta=0)"])
def test_quality_is_the_loss_under_what_is_generated_from(plan):
    """Led by a processor, with drafting or without: as by one forward of the models over the text."""
    workload = hasten.workload(f"stdlib-upscale({SMALL})")
    base, tuned = workload.draft(), workload.teacher()
    model = workload.trained()
    rows = language.spread_windows(upscale.documentation(True), 8, 60, seed=29)
    with torch.no_grad():
        large, small, after = (one(rows[:, :-1]).logits[:, 47:].log_softmax(-1) for one in (model, base, tuned))
    scores = large + after - small if "candidates" in plan else large
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 48:].flatten(), reduction="none")
    wanted = loss.view(8, 12).mean(1).numpy() * language.NATS_TO_BITS
    handle = hasten.apply(model, plan, draft=base, teacher=tuned)
    np.testing.assert_allclose(workload.quality(handle), wanted, rtol=2e-4)


def test_fine_tuning_is_the_same_again_and_helps():
    workload = hasten.workload(f"stdlib-upscale({SMALL}, lr=0.001)")
    one = workload.teacher()
    upscale._tuned.cache_clear()
    other = workload.teacher()
    assert one is not other
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    rows = language.spread_windows(upscale.documentation(True), 16, 128, seed=5)
    before, after = (language.window_loss(model, rows).mean() for model in (workload.draft(), one))
    assert after < before - 0.02


def test_prompts_fit_the_model():
    with pytest.raises(PlanError, match="at most 4096 bytes"):
        hasten.workload("stdlib-upscale(prompt=4000, new=200)")
