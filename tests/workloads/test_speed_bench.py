"""speed-bench: diverse prompts by category, at several concurrencies."""

import collections
import gzip
import json

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads.speed_bench import SpeedBench, diverse


def test_prompts_are_real_text_evenly_from_the_categories():
    work = hasten.workload("speed-bench(count=12, prompt=64, new=4, concurrency=4)")
    names = collections.Counter(name for name, _ in work.chosen())
    assert len(names) == 6 and set(names.values()) == {2}
    from hasten.workloads import text

    source = text.stream(True).tobytes()
    assert all(ids.astype(np.uint8).tobytes() in source for _, ids in work.chosen())
    requests = work.requests(0)
    assert [len(one["input_ids"]) for one in requests] == [4, 4, 4]
    other = work.requests(1)[0]["input_ids"]
    assert torch.equal(work.requests(0)[0]["input_ids"], requests[0]["input_ids"])
    assert not torch.equal(other, requests[0]["input_ids"])


def test_diverse_texts_are_unlike_each_other():
    near = ["def add(a, b): return a + b  # " + str(n) for n in range(30)]
    far = ["the rain in Spain", "0, 17, 34, 51, 68", "import os, sys, re"]
    assert set(far) < set(diverse(near + far, 4)) and len(diverse(near, 5)) == 5


def test_drafting_on_it_is_exact_and_counted_by_category():
    work = SpeedBench(count=6, prompt=48, new=6, concurrency=3)
    plain = hasten.apply(work.trained(), "")
    fast = hasten.apply(work.trained(), "decode/speculative", draft=work.draft())
    assert all(work.same(work.serve(plain, one), work.serve(fast, one)) for one in work.requests(0))
    assert work.quality(fast).tolist() == [1.0] * 6
    found = work.by_category(fast)
    assert len(found) == 6 and all(0 <= one["acceptance"] <= 1 <= one["length"] for one in found.values())


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"category": "math", "turns": [f"What is {n} plus {n}?", "And twice that?"]} for n in range(6)]
    rows.append({"category": "prose", "prompt": "Write a story about a lighthouse keeper."})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    work = hasten.workload(f"speed-bench(prompts='{file}', count=4, new=3, category=math)")
    assert {name for name, _ in work.chosen()} == {"math"} and str(hasten.workload(str(work))) == str(work)
    batch = work.batch(work.chosen()[:2] + [("x", np.arange(5, 9))])
    assert batch["attention_mask"][2].tolist()[-4:] == [1, 1, 1, 1] and batch["attention_mask"][2, 0] == 0
    with pytest.raises(UsageError, match="count=5 asks for more"):
        hasten.workload(f"speed-bench(prompts='{file}', count=5, category=prose)").chosen()
    with pytest.raises(UsageError, match="no prompt of the category 'code'"):
        hasten.workload(f"speed-bench(prompts='{file}', category=code)").chosen()
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(
        gzip.compress("\n".join(json.dumps({"question": f"How far is {n}?"}) for n in range(3)).encode())
    )
    found = hasten.workload(f"speed-bench(prompts='{packed}', count=3)").chosen()
    assert {name for name, _ in found} == {""} and bytes(found[0][1].astype(np.uint8)).startswith(b"How far")
    file.write_text('{"turns": []}\n')
    with pytest.raises(UsageError, match="line 1 of .* is no prompt"):
        hasten.workload(f"speed-bench(prompts='{file}')").chosen()
    with pytest.raises(PlanError, match="needs as many prompts"):
        hasten.workload("speed-bench(concurrency=64, count=8)")
    with pytest.raises(PlanError, match="does not exist"):
        hasten.workload("speed-bench(prompts=nowhere.jsonl)")
