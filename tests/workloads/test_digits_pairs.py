"""The workload digits-pairs: texts that fit their images, a loss that allows for several, a student that learns."""

import math

import pytest
import torch

from hasten.bench.training import make_run
from hasten.core.plans import Plan
from hasten.workloads import digits_pairs
from hasten.workloads.digits import digits
from hasten.workloads.find import workload


def test_every_text_names_its_digit():
    images, texts, labels = digits_pairs.pairs()
    assert images.shape == (1438, 1, 8, 8) and texts.shape == (1438, digits_pairs.LENGTH)
    first = digits_pairs.WORDS.index("zero")
    assert torch.equal(((texts >= first) * (texts - first)).sum(1), labels) and torch.equal(labels, digits(False)[1])
    assert (texts[:, 0] == 0).all() and (texts[:, -1] == 1).all() and len({*map(tuple, texts.tolist())}) == 50
    assert digits_pairs.prompts().shape == (10, digits_pairs.LENGTH)


def test_all_texts_of_a_digit_are_right():
    labels = torch.tensor([3, 3, 7])
    same = (labels[:, None] == labels[None]).float()
    sure = digits_pairs.contrast(1000 * same, labels)
    torch.testing.assert_close(sure, torch.tensor([math.log(2), math.log(2), 0.0]), atol=1e-5, rtol=0)
    one = digits_pairs.contrast(torch.diag(torch.full((3,), 10.0)), labels)
    assert float(one[0]) > 4 > float(one[2]), "to be sure of one of two texts that are right is wrong"


def test_the_student_learns_and_is_smaller_than_the_teacher():
    pairs = workload("digits-pairs")
    model = pairs.build(0)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, digits_pairs.digits_clip("teacher"))]
    assert sizes[1] > 6 * sizes[0]
    before = pairs.evaluate(model)
    assert before.shape == (359,) and before.mean() == pytest.approx(math.log(10), abs=0.5)
    run = make_run(pairs, Plan(), 0)
    run.slice(pairs.loss, steps=30)
    assert pairs.evaluate(run.model).mean() < 2.0 < before.mean()
    batch = next(iter(pairs.batches(0)))
    losses = pairs.losses(run.model, batch)
    assert losses.shape == (64,) and losses.requires_grad
