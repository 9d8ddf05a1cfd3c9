"""stdlib-rag: requests of the kinds that it promises, the same for one seed, and all ways to serve them."""

import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.workloads import stdlib_rag

SMALL = "passages=3, passage=96, pool=6, question=24, new=4, scored=12, examples=8, warm=3"


def text_of(one):
    return bytes(one.tolist())


@pytest.mark.parametrize("kind", ["both", "quote", "continue", "needle"])
def test_answers_follow_from_the_passages(kind):
    workload = hasten.workload(f"stdlib-rag({SMALL}, kind={kind})")
    asked = workload.ask(12, 5)
    assert [text_of(one.prompt) for one in asked] == [text_of(one.prompt) for one in workload.ask(12, 5)]
    assert len({text_of(one.prompt) for one in asked}) > 8
    assert len({text_of(context) for one in asked for context in one.contexts}) <= 6
    for i, one in enumerate(asked):
        contexts = [text_of(context) for context in one.contexts]
        assert [len(context) for context in contexts] == [96] * 3 and len(set(contexts)) == 3
        both = text_of(one.question) + text_of(one.answer)
        if kind == "needle":
            assert any(both[1:] + b"\n" in context for context in contexts)
        elif kind == "quote" or (kind == "both" and i % 2 == 0):
            assert any(both in context for context in contexts)
        else:
            assert not any(both in context for context in contexts)


def test_popular_passages_come_more_often():
    workload = hasten.workload(f"stdlib-rag({SMALL})")
    pool = stdlib_rag._pool(6, 96, 36, False)
    asked = workload.ask(200, 0)
    counts = [sum(text_of(context) == passage.text for one in asked for context in one.contexts) for passage in pool]
    assert counts[0] > 1.3 * counts[-1] and min(counts) > 20


@pytest.mark.parametrize("plan", ["", "kv/ape", "kv/cache_craft", "kv/cache_craft(recompute=1.0)"])
def test_every_arm_serves_and_is_judged(plan):
    workload = hasten.workload(f"stdlib-rag({SMALL})")
    handle = hasten.apply(workload.trained(), plan)
    request = workload.requests(0)[0]
    out = workload.serve(handle, request)
    assert out.shape == (1, 4)
    quality = workload.quality(handle)
    assert quality.shape == (8,) and 0 < quality.mean() < 8
    if plan.startswith("kv/"):
        assert torch.equal(workload.serve(handle, request), workload.serve(handle, request))
    if plan == "kv/cache_craft(recompute=1.0)":
        plain = hasten.apply(workload.trained(), "")
        assert torch.equal(out, workload.serve(plain, request))
        assert abs(workload.quality(plain) - quality).max() < 1e-4


def test_recall_of_needles_is_a_probability():
    workload = hasten.workload(f"stdlib-rag({SMALL}, kind=needle)")
    handle = hasten.apply(workload.trained(), "kv/ape")
    assert workload.metric.better == "higher" and workload.serve(handle, workload.requests(0)[0]).shape == (1, 6)
    quality = workload.quality(handle)
    assert ((quality > 0) & (quality < 1)).all()


def test_a_prefix_cache_changes_no_answer_and_saves_work(monkeypatch):
    workload = hasten.workload(f"stdlib-rag({SMALL}, between=prefix)")
    plain = hasten.workload(f"stdlib-rag({SMALL})")
    handle, seen = hasten.apply(workload.trained(), ""), []
    handle.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first, other = workload.ask(2, 0)
    shared = stdlib_rag.Asked(first.prefix, first.contexts[:2] + other.contexts[:1], other.question, other.answer)
    for request, tokens in ((first, len(first.prompt)), (first, None), (shared, None)):
        seen.clear()
        out = workload.serve(handle, request)
        read = seen[0]
        assert torch.equal(out, plain.serve(handle, request))
        assert tokens is None or read == tokens
    beginning = len(first.prefix) + 2 * 96
    assert read <= len(shared.prompt) - beginning


def test_options_that_cannot_be():
    for options in ("passages=9, pool=4", "passage=40, question=40, scored=8", "passages=12, pool=12, passage=512"):
        with pytest.raises(UsageError):
            hasten.workload(f"stdlib-rag({options})")
    hasten.workload("stdlib-rag(model=long, passages=12, pool=12, passage=512)")
