"""digits-dit: the data, the bundled models, both tasks, and a plan end to end."""

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads.digits import digits
from hasten.workloads.digits_dit import FEATURES, DigitsDiT, frechet, load, psnr, real_features
from hasten.workloads.find import workload


def small(**changes):
    return DigitsDiT(**({"sampling_steps": 14, "batch": 16, "examples": 32} | changes))


def test_the_split_is_fixed_and_disjoint():
    (train, classes), (held_out, other) = digits(False), digits(True)
    assert (len(train), len(held_out)) == (1438, 359)
    assert train.min() == -1 and train.max() == 1
    assert classes.bincount().min() > 120 and other.bincount().min() > 20
    assert digits(True, side=16)[0].shape == (359, 1, 16, 16)
    train.zero_()
    assert digits(False)[0].abs().sum() > 0


def test_the_frechet_distance_of_real_digits_is_small():
    features = load("digits_classifier")[:-1](digits(False)[0]).detach().double().numpy()
    assert features.shape == (1438, FEATURES)
    assert abs(frechet(features)) < 1e-3
    mean, covariance = real_features()
    moved = features + np.eye(FEATURES)[0]  # the same covariance, one apart: distance 1 and the rounding of the mean
    assert frechet(moved) == pytest.approx(1 + 2 * (features.mean(0) - mean)[0], abs=1e-3)
    assert frechet(features * 0 + mean + 1e-9 * features) == pytest.approx(np.trace(covariance), rel=1e-3)


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_the_bundled_models_draw_the_digit_that_is_asked_for(model):
    work = small(sampling_steps=20, model=model)
    handle = hasten.apply(work.trained(), "baseline")
    noise, labels = work.requests(0)[0]
    drawn = work.serve(handle, (noise, labels))
    read = load("digits_classifier").to(drawn)(drawn).argmax(1)
    assert (read == labels).float().mean() > 0.9
    assert torch.equal(drawn, work.serve(handle, (noise, labels)))
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == len(drawn)


def test_quality_of_the_baseline_and_of_a_plan():
    work = small()
    rows = work.quality(hasten.apply(work.trained(), "baseline"))
    assert rows.shape == (32, FEATURES + 1)
    assert (rows[:, -1] == 0).all()
    fast = work.quality(hasten.apply(work.trained(), "diffusion/easycache(warmup=3, tau=0.1)"))
    assert (fast[:, -1] > 0).all() and 15 < psnr(fast) < 60
    assert work.metric.better == "lower"
    assert work.metric.aggregate(fast) == pytest.approx(work.metric.aggregate(rows), rel=0.5)


def test_a_shorter_sampler_is_judged_by_itself():
    """The reference of the distance belongs to the options: two step counts do not share it."""
    for steps in (4, 6):
        work = small(sampling_steps=steps)
        assert (work.quality(hasten.apply(work.trained(), "baseline"))[:, -1] == 0).all()


def test_training_lowers_the_loss():
    work = DigitsDiT(task="train")
    model = work.build(0)
    optimizer = work.optimizer(model)
    before = work.evaluate(model)
    batches = iter(work.batches(0))
    for _ in range(6):
        work.loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = work.evaluate(model)
    assert before.shape == after.shape == (1436,)
    assert after.mean() < before.mean() - 0.02


def test_batches_follow_the_seed():
    work = DigitsDiT(task="train")
    one, same, other = (next(iter(work.batches(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["noise"], other["noise"])
    assert (one["labels"] == 10).any() and 0 < one["level"].min() < one["level"].max() < 1
    loss = work.loss(work.build(0), one)
    assert loss.isfinite() and loss.requires_grad


def test_calibration_fits_the_model():
    work = small()
    (inputs,) = work.calibration()
    with torch.no_grad():
        assert work.trained()(**inputs).sample.shape == inputs["hidden_states"].shape


def test_by_name_with_options():
    assert workload("digits-dit(sampling_steps=20, guidance=1.5)") == DigitsDiT(sampling_steps=20, guidance=1.5)
    with pytest.raises((PlanError, UsageError), match="dit, unet"):
        workload("digits-dit(model=mlp)")
    with pytest.raises((PlanError, UsageError), match="model=dit"):
        workload("digits-dit(task=train, model=unet)")


def test_large_digits_have_more_tokens():
    work = DigitsDiT(task="train", side=24, layers=1, rows=2, steps=10)
    model, batch = work.build(0), next(iter(work.batches(0)))
    assert batch["images"].shape == (2, 1, 24, 24) and model.pos_embed.pos_embed.shape[1] == 144
    assert work.loss(model, batch).isfinite()
    assert work.evaluate(model).shape == (4 * (359 * 64 // 576),)
    with pytest.raises((PlanError, UsageError), match="8x8"):
        workload("digits-dit(side=24)")
