"""sums-lm: problems and thoughts are what they say, the model is right and wordy, methods find what they need."""

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError
from hasten.workloads import reasoning, weights


def drawn(count, seed=0, held_out=False):
    stream = reasoning.problems(np.random.default_rng(seed), held_out)
    return [next(stream) for _ in range(count)]


def test_problems_are_right_and_in_range():
    for problem in drawn(300):
        assert eval(problem.text) == problem.totals[-1]
        assert 3 <= len(problem.steps) <= 5 and len(set(problem.steps)) == len(problem.steps)
        assert all(10 <= total <= 99 for total in [problem.first, *problem.totals])


def test_no_problem_is_in_both_parts():
    seen = {problem.text for problem in drawn(2000)}
    assert not seen & {problem.text for problem in drawn(500, 1, held_out=True)}


def test_thoughts_hold_every_total_and_fit_the_request():
    rng = np.random.default_rng(0)
    lengths = []
    for problem in drawn(500):
        thoughts = [reasoning.concise(problem), *(reasoning.think(problem, rng, wordy) for wordy in (False, True))]
        for thought in thoughts:
            assert all(str(total) in thought for total in problem.totals)
            solution = reasoning.solution(problem, thought)
            assert reasoning.answered(solution) == str(problem.totals[-1])
            assert f"<{thought}>{problem.totals[-1]}" == reasoning.decode([reasoning.BEGIN_THOUGHT, *solution])
        lengths.append([len(reasoning.solution(problem, thought)) for thought in thoughts])
    shortest, short, long = np.array(lengths).T
    assert long.mean() > 3 * short.mean() > 3 * shortest.mean() and long.max() < reasoning.NEW
    assert reasoning.NEW + 32 < reasoning.CONTEXT


def test_neither_style_is_sure_to_show():
    """A wordy thought may begin as a concise one does, and a concise one in words."""
    rng = np.random.default_rng(0)
    for wordy, least, most in ((True, 0.1, 0.2), (False, 0.8, 0.9)):
        first = [reasoning.think(problem, rng, wordy)[0] in "+-" for problem in drawn(1000)]
        assert least < np.mean(first) < most


def test_an_answer_without_an_end_is_none():
    answer = reasoning.encode("42")
    assert reasoning.answered([reasoning.END_THOUGHT, *answer, reasoning.END, reasoning.PAD]) == "42"
    assert reasoning.answered([reasoning.END_THOUGHT, *answer]) is None
    assert reasoning.answered([*answer, reasoning.END]) is None


def test_requests_are_the_seeds():
    workload = hasten.workload("sums-lm(batch=3)")
    first, again, other = workload.requests(0), workload.requests(0), workload.requests(1)
    assert len(first) == 16 and first[0]["input_ids"].shape[0] == 3
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, again, strict=True))
    assert any(
        one["input_ids"].shape != two["input_ids"].shape or not torch.equal(one["input_ids"], two["input_ids"])
        for one, two in zip(first, other, strict=True)
    )
    for request in first:
        assert (request["input_ids"][:, -1] == reasoning.BEGIN_THOUGHT).all()
        assert torch.equal(request["attention_mask"], (request["input_ids"] != reasoning.PAD).long())


def test_calibration_holds_each_problem_in_both_ways():
    batches = hasten.workload("sums-lm(pairs=12)").calibration()
    assert sum(len(batch["concise"]) for batch in batches) == 24
    for batch in batches:
        half = len(batch["concise"]) // 2
        assert batch["concise"].tolist() == [True] * half + [False] * half
        for one, two in zip(range(half), range(half, 2 * half), strict=True):
            texts = []
            for row in (one, two):
                ids, thought = batch["input_ids"][row], batch["thought"][row]
                first = int(thought.nonzero()[0])
                assert ids[first - 1] == reasoning.BEGIN_THOUGHT
                assert ids[int(thought.nonzero()[-1])] == reasoning.END_THOUGHT
                texts.append(reasoning.decode(ids[:first]))
            assert texts[0] == texts[1]


def test_the_model_is_right_and_wordy():
    """By itself it thinks at length, and what it knows does not need that."""
    workload = hasten.workload("sums-lm(batch=16, examples=48)")
    handle = hasten.apply(workload.trained(), "")
    assert workload.quality(handle).mean() >= 0.9
    request = workload.requests(0)[0]
    out = workload.serve(handle, request)
    assert (out != reasoning.PAD).sum(1).float().mean() > 100
    assert workload.same(out, workload.serve(handle, request)) and not workload.same(out, out[:, :-1])
    record = weights.record("reasoning")
    assert record["command"].startswith("python scripts/make_reasoning_weights.py") and record["accuracy"] >= 0.9


def test_other_methods_calibrate_on_it():
    """The keys that say which thoughts are concise are in nobody's way."""
    workload = hasten.workload("sums-lm(pairs=10)")
    for plan in ("prune/llm_drop(drop=1)", "quant/gptq(bits=8)"):
        handle = hasten.apply(workload.trained(), plan, calibration=workload.calibration())
        assert workload.serve(handle, workload.requests(0)[0]).shape[0] == 1


@pytest.mark.parametrize("plan", ["decode/asc", "decode/thought_temperature"])
def test_thoughts_get_shorter_and_stay_right(plan):
    workload = hasten.workload("sums-lm(batch=16, examples=48, pairs=50)")
    request, tokens, right = workload.requests(3)[0], [], []
    for one in ("", plan):
        calibration = workload.calibration() if one == "decode/asc" else None
        handle = hasten.apply(workload.trained(), one, calibration=calibration)
        tokens.append((workload.serve(handle, request) != reasoning.PAD).sum().item())
        right.append(workload.quality(handle).mean())
    assert tokens[1] < 0.8 * tokens[0]
    assert right[1] > right[0] - 0.05


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="must be one of solve"):
        hasten.workload("sums-lm(task=train)")
