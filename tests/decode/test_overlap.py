"""The process that a draft has beside the target: same tokens as without, and nothing that hangs or is left over."""

import copy
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hasten
from conformance.decode import noisy, ragged, target
from hasten.core.errors import HastenError
from hasten.decode import _overlap, pearl
from hasten.decode.base import speculation

SERIAL = "decode/pearl(candidates=4, overlap=false)"
BESIDE = "decode/pearl(candidates=4)"
beside = pytest.mark.skipif(os.name != "posix" or _overlap.cores() < 2, reason="needs a second core")


def test_one_core_is_said_and_served(monkeypatch):
    monkeypatch.setattr(_overlap, "cores", lambda: 1.0)
    model = target()
    wanted = model.generate(**ragged(2), max_new_tokens=9, do_sample=False)
    with pytest.warns(UserWarning, match="there is one core only"):
        fast = hasten.apply(model, BESIDE, draft=noisy(model, 0.1))
    assert fast.report["decode/pearl"]["drafting"] == "between the target's passes"
    with pytest.warns(UserWarning, match="one core"):
        assert torch.equal(model.generate(**ragged(2), max_new_tokens=9, do_sample=False), wanted)
    fast.undo()


def test_a_draft_that_no_other_process_can_rebuild_is_served_here():
    model = target()
    draft = noisy(model, 0.1)
    draft.note = lambda: None
    with pytest.warns(UserWarning, match="can't be sent to another process"):
        hasten.apply(model, BESIDE, draft=draft).undo()


@pytest.fixture(scope="module")
def pair():
    """A model with a process beside it; its process is shared by the tests below."""
    model = target()
    fast = hasten.apply(model, BESIDE, draft=noisy(model, 0.1))
    yield fast
    fast.undo()


def worker(handle):
    return _overlap._workers[handle.model.drafter]


REQUESTS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "seed": 3},
    "history": {"do_sample": True, "repetition_penalty": 1.3, "top_k": 9, "seed": 4},
}


@beside
@pytest.mark.parametrize("request_name", REQUESTS)
def test_beside_and_between_give_the_same(pair, request_name):
    other = hasten.apply(target(), SERIAL, draft=noisy(target(), 0.1))
    made = []
    for handle in (pair, other):
        options = {"max_new_tokens": 30, **REQUESTS[request_name]}
        outs = [handle.generate(**ragged(rows, 9, rows), **options) for rows in (1, 4, 2)]
        counters = speculation(handle.host).counters
        made.append((outs, counters.target_passes, counters.draft_passes, counters.drafted, counters.accepted))
    assert made[0][1:] == made[1][1:] and made[0][2] > 0
    assert all(torch.equal(one, two) for one, two in zip(made[0][0], made[1][0], strict=True))
    assert worker(pair).alive and other.model.drafter not in _overlap._workers


@beside
def test_a_call_that_breaks_off_leaves_the_process_in_step(pair, monkeypatch):
    """The target fails, or is interrupted, while the draft is at work: its late answer belongs to nobody."""
    wanted = pair.generate(**ragged(2), max_new_tokens=20, do_sample=False)
    before, inner = worker(pair).process.pid, pair.model.forward
    for problem in (KeyboardInterrupt, ValueError):
        passes = itertools.count()

        def breaks(*args, problem=problem, passes=passes, **options):
            if next(passes) == 3:
                raise problem
            return inner(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(pair.model, "forward", breaks)
            with pytest.raises(problem):
                pair.generate(**ragged(3), max_new_tokens=20, do_sample=False)
        assert torch.equal(pair.generate(**ragged(2), max_new_tokens=20, do_sample=False), wanted)
    assert worker(pair).process.pid == before


@beside
def test_the_target_leaves_a_core_and_has_it_back(pair, monkeypatch):
    seen, inner = set(), pair.model.forward
    monkeypatch.setattr(pearl, "cores", lambda: 4)

    def watched(*args, **options):
        seen.add(torch.get_num_threads())
        return inner(*args, **options)

    torch.set_num_threads(4)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(pair.model, "forward", watched)
            pair.generate(**ragged(1), max_new_tokens=8, do_sample=False)
        assert seen == {3} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


class Script(LogitsProcessor):
    """As if a script defined it: another process looks for it in a main module of its own."""

    def __call__(self, ids, scores):
        return scores * 0.5


@beside
def test_a_request_that_cannot_be_sent_is_served_here(pair, monkeypatch):
    class Local(Script):
        pass

    monkeypatch.setattr(Script, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Script", Script, raising=False)
    options = {"max_new_tokens": 9, "do_sample": False}
    wanted = pair.generate(**ragged(2), **options)
    for processor in (Local(), Script()):
        with pytest.warns(UserWarning, match="logits processors can't be sent"):
            out = pair.generate(**ragged(2), **options, logits_processor=LogitsProcessorList([processor]))
        assert torch.equal(out, wanted) and worker(pair).alive and not worker(pair).busy
    assert torch.equal(pair.generate(**ragged(2), **options), wanted)


@beside
def test_a_draft_that_changed_is_sent_anew(pair):
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    head = pair.model.drafter.model.lm_head.weight
    pair.generate(**ragged(1), **options)
    before, pid = speculation(pair.host).counters.acceptance, worker(pair).process.pid
    with torch.no_grad():
        head.neg_()
    pair.generate(**ragged(1), **options)
    assert speculation(pair.host).counters.acceptance == 0 < before
    with torch.no_grad():
        head.neg_()
    pair.generate(**ragged(1), **options)
    assert speculation(pair.host).counters.acceptance == before and worker(pair).process.pid == pid


def gone(process):
    """Whether a process has ended and was waited for."""
    return process.returncode is not None and not os.path.exists(f"/proc/{process.pid}")


@beside
def test_save_and_load_and_the_end(pair, tmp_path):
    wanted = pair.generate(**ragged(2), max_new_tokens=12, do_sample=True, seed=1)
    loaded = hasten.load_pretrained(pair.save(tmp_path / "saved"))
    assert loaded.model.drafter not in _overlap._workers, "the weights come after the structure: nothing to send yet"
    assert torch.equal(loaded.generate(**ragged(2), max_new_tokens=12, do_sample=True, seed=1), wanted)
    process = worker(loaded).process
    loaded.undo()
    assert gone(process) and worker(pair).alive


@beside
def test_a_copy_has_its_own_process_and_one_that_dies_or_hangs_is_an_error(pair, monkeypatch):
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = pair.generate(**ragged(2), **options)
    model = copy.deepcopy(pair.model)
    assert model.drafter not in _overlap._workers
    assert torch.equal(model.generate(**ragged(2), **options), wanted)
    first = _overlap._workers[model.drafter].process
    assert first.pid != worker(pair).process.pid
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(HastenError, match=r"has ended \(exit code -9\).*overlap=false"):
        model.generate(**ragged(2), **options)
    assert gone(first)
    assert torch.equal(model.generate(**ragged(2), **options), wanted)
    second = _overlap._workers[model.drafter].process
    os.kill(second.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch, pytest.raises(HastenError, match="has not answered for"):
        patch.setattr(_overlap, "PATIENCE", 0.3)
        model.generate(**ragged(2), **options)
    assert gone(second)
    assert torch.equal(pair.generate(**ragged(2), **options), wanted)


SCRIPT = """
    import sys, os, signal, time
    sys.path[:0] = {path!r}
    from torch import nn
    from hasten.decode._overlap import Worker
    worker = Worker(nn.Linear(2, 2))
    print(worker.process.pid, flush=True)
    {end}
"""


@beside
@pytest.mark.parametrize(
    "end",
    [
        "raise RuntimeError('an end')",
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("os.fork() or time.sleep(15)", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_the_interpreter(end):
    """Not the end of a script, which needs no guard of its main module, nor a kill, nor a fork that lives on."""
    text = textwrap.dedent(SCRIPT).format(path=sys.path, end=end)
    made = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid = int(made.stdout.readline())
    made.stdout.close()
    made.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    raise AssertionError("the process lives on")
