"""constrained-lm: what its arms write is valid, masking and rejection write the same, and masks are what they say."""

import json

import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.core.names import card
from hasten.core.plans import Plan
from hasten.workloads.constrained import RECORD, WRONG, Masks

SMALL = "prompt=48, examples=3, batch=2"


def values(out):
    return [json.loads(bytes(row).rstrip(b"\0")) for row in out.tolist()]


def test_the_experiment_asks_for_the_schema():
    workload, plan = card("decode/awrs").experiment
    assert workload == "constrained-lm" and Plan.parse(plan).methods[0].schema == RECORD


@pytest.mark.parametrize("masks", ["made", "kept"])
def test_masking_and_rejection_write_the_same(masks):
    workload = hasten.workload(f"constrained-lm({SMALL}, masks={masks})")
    plain = hasten.apply(workload.trained(), "")
    fast = hasten.apply(workload.trained(), card("decode/awrs").experiment[1])
    for asked in workload._asked(2, 1, 5):
        wanted = workload.serve(plain, asked)
        assert torch.equal(workload.serve(fast, asked), wanted) and torch.equal(workload.serve(plain, asked), wanted)
        assert set(values(wanted)[0]) == {"name", "line", "kind"}
    checks = vars(plain)["_masks"].checks
    assert 0 < checks <= 256 * (wanted.shape[1] if masks == "made" else 2 * 96)


def test_batches_are_whole_and_padded():
    workload = hasten.workload(f"constrained-lm({SMALL}, new=120)")
    request = workload.requests(0)[0]
    assert request.prompts.shape == (2, 48) and bytes(request.prompts[0].tolist()).endswith(b"record = ")
    for plan in ("", card("decode/awrs").experiment[1], "decode/speculative"):
        handle = hasten.apply(workload.trained(), plan, draft=workload.draft() if "spec" in plan else None)
        state = torch.random.get_rng_state()
        out = workload.serve(handle, request)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(set(value) == {"name", "line", "kind"} for value in values(out))


def test_quality_is_that_of_the_text():
    workload = hasten.workload(f"constrained-lm({SMALL})")
    arms = [hasten.apply(workload.trained(), plan) for plan in ("", card("decode/awrs").experiment[1])]
    found = [workload.quality(arm) for arm in arms]
    assert (found[0] == found[1]).all() and 0.5 < found[0].mean() < 5
    short = hasten.workload("constrained-lm(prompt=48, examples=2, new=10)")
    assert set(short.quality(arms[1]).tolist()) == {WRONG}
    other = hasten.apply(workload.trained(), "decode/awrs(regex='[0-9]{1,4}')")
    assert set(short.quality(other).tolist()) == {WRONG}


def test_masks_are_checked_one_by_one():
    masks = Masks(hasten.workload("constrained-lm").constraint(), kept=True)
    row = masks.row(b'{"')
    assert {byte for byte in range(256) if not row[byte]} == set(b"nlk") and masks.checks == 256
    assert masks.row(b'{"') is row and masks.checks == 256
    assert not masks.row(b'{"x').any() and masks.over(b'{"x') and not masks.over(b"{")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("prompt=4090", "the model's context"),
        ('schema=\'{"type": "integer"}\'', "the schema is one of an object"),
        ("schema=gone.json", "neither JSON nor a file"),
    ],
)
def test_options_that_cannot_be(options, problem):
    with pytest.raises(UsageError, match=problem):
        hasten.workload(f"constrained-lm({options})")
