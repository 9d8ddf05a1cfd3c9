"""PEARL: the round's rule and its law, a draft that runs ahead, and the process that it has beside the target."""

import copy
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import scipy.stats
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import HastenError, PlanError
from hasten.decode import _overlap, pearl
from hasten.decode._ahead import Ahead, Order, goes_ahead
from hasten.decode.base import speculation

SERIAL = "decode/pearl(candidates=4, overlap=false)"
BESIDE = "decode/pearl(candidates=4)"
beside = pytest.mark.skipif(os.name != "posix" or _overlap.cores() < 2, reason="needs a second core")


def numbers(rows, most, words, seed, peaked=1.0, dtype=torch.float32):
    """Distributions, candidates and random numbers of a round whose rows are in both modes."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(rows, most + 1, words, generator=generator) * peaked).softmax(-1)
    q = (torch.randn(rows, most + 1, words, generator=generator) * peaked + 2 * p.log()).softmax(-1)
    drafts = torch.randint(0, words, (rows, most + 1), generator=generator)
    lengths = torch.randint(0, 2, (rows,), generator=generator) * most
    u = torch.rand(rows, most + 1, generator=generator)
    e = torch.empty(rows, words).exponential_(generator=generator)
    p, q = p.to(dtype), q.to(dtype)
    return p, drafts[:, :most], q[:, :most], lengths, drafts[:, most], q[:, most], u, e


def cases():
    yield {"args": numbers(1, 3, 7, 0)}
    yield {"args": numbers(17, 4, 5, 1)}
    yield {"args": numbers(9, 0, 11, 2)}  # nothing is pending in any row
    yield {"args": numbers(6, 1, 4, 3, peaked=3.0)}
    yield {"args": numbers(8, 3, 6, 4, dtype=torch.bfloat16)}
    p, pending, q, lengths, late, q_late, u, e = numbers(5, 2, 9, 5)
    yield {"args": (p, pending, p[:, :2].clone(), lengths.fill_(2), late, p[:, 2].clone(), u, e)}  # all is accepted


def subject():
    """Without the process, which is no business of the common tests and takes seconds to start."""
    return {"model": target, "options": {"overlap": False}, "context": {"draft": noisy(target(), 0.1)}, "run": run}


def exact():
    return "decode/pearl(candidates=3, overlap=false)", {}


def test_modes_by_hand():
    """A row in pre-verify, one whose late token stays, one whose late token and one whose pending token is refused."""
    p = torch.full((4, 3, 3), 1 / 3)
    q = torch.full((4, 2, 3), 1 / 3)
    q_late = torch.full((4, 3), 1 / 3)
    p[0, 0] = p[2, 2] = p[3, 1] = torch.tensor([0.0, 0.0, 1.0])
    pending, late = torch.tensor([[1, 1]] * 4), torch.tensor([0, 0, 0, 0])
    lengths = torch.tensor([0, 2, 2, 2])
    tokens, accepted = pearl.pearl(p, pending, q, lengths, late, q_late, torch.full((4, 3), 0.5), torch.ones(4, 3))
    assert accepted.tolist() == [0, 2, 2, 1]
    assert tokens.tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 2], [1, 2, 0]]
    told = [(int(n), int(row[n])) for n, row in zip(accepted, tokens, strict=True)]
    assert [goes_ahead(*one, int(had), [0, 1, 1]) for one, had in zip(told, lengths, strict=True)] == [0, 1, 0, 0]


WORDS, DEEP = 5, 3


def small(noise=0.0):
    model = target(vocab_size=WORDS, num_hidden_layers=1, eos_token_id=None)
    model.lm_head.weight.data *= 0.6
    return noisy(model, noise)


@torch.no_grad()
def fit(prompt=(1, 3, 2), rows=2000, candidates=2):
    """The p value of a chi-square test of sampled triples against the target's joint law."""
    model = small()
    chains = list(itertools.product(range(WORDS), repeat=DEEP))
    ids = torch.tensor([[*prompt, *chain] for chain in chains])
    logits = model(ids).logits[:, len(prompt) - 1 : -1]
    chances = logits.softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0].prod(1)
    fast = hasten.apply(model, f"decode/pearl(candidates={candidates}, overlap=false)", draft=small(0.8))
    out = fast.generate(torch.tensor([prompt] * rows), max_new_tokens=DEEP + 3, do_sample=True, top_k=0, seed=0)
    assert 0.1 < speculation(fast.host).counters.acceptance < 0.95
    place = {chain: number for number, chain in enumerate(chains)}
    seen = torch.zeros(len(chains))
    for chain in out[:, len(prompt) : len(prompt) + DEEP].tolist():
        seen[place[tuple(chain)]] += 1
    often = chances * rows >= 5
    observed = [*seen[often].tolist(), seen[~often].sum().item()]
    expected = [*(chances[often] * rows).tolist(), (chances[~often].sum() * rows).item()]
    scale = sum(observed) / sum(expected)
    return scipy.stats.chisquare(observed, [one * scale for one in expected]).pvalue


@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_the_joint_law_is_the_targets(candidates):
    assert fit(candidates=candidates) > 1e-3


def late_stays(p, pending, q, lengths, late, q_late, u, e):
    return _pearl(p, pending, q, lengths, late, q_late, u.scatter(1, lengths[:, None], -1.0), e)


def late_is_redrawn_from_p(p, pending, q, lengths, late, q_late, u, e):
    tokens, accepted = _pearl(p, pending, q, lengths, late, q_late, u, e)
    own = p.gather(1, lengths[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0]
    last = tokens.gather(1, lengths[:, None])[:, 0]
    refused = (accepted == lengths) & (last != late)
    again = torch.where(refused, (own / e).argmax(-1), last)
    return tokens.scatter(1, lengths[:, None], again[:, None]), accepted


def late_is_judged_one_place_early(p, pending, q, lengths, late, q_late, u, e):
    at = lengths[:, None, None].expand(-1, 1, p.shape[-1])
    wrong = p.scatter(1, at, p.gather(1, (at - 1).clamp(min=0)))
    return _pearl(wrong, pending, q, lengths, late, q_late, u, e)


_pearl = pearl.pearl


@pytest.mark.parametrize("wrong", [late_stays, late_is_redrawn_from_p, late_is_judged_one_place_early])
def test_the_test_of_the_law_finds_wrong_late_rules(monkeypatch, wrong):
    monkeypatch.setattr(pearl, "pearl", wrong)
    assert fit() < 1e-6


def order_of(batch, most=4, **more):
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    real = None if bool(mask.all()) else mask
    usual = {"limit": 80, "most": most, "words": 37, "processors": LogitsProcessorList(), "sampled": False, "seed": 0}
    return Order(ids, real, ids, **(usual | more))


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("most", [1, 2, 5])
@torch.no_grad()
def test_a_draft_that_runs_ahead_drafts_as_from_scratch(kind, most):
    """After any verdicts, in rows of both modes and with rows leaving, it writes what the draft alone would write."""
    draft, batch = target(kind), ragged(5, 8, seed=1)
    ahead = Ahead(draft, order_of(batch, most))
    generator = torch.Generator().manual_seed(most)
    places, heard, going, pending = [0, 1, 2, 3, 4], None, None, [0] * 5
    for turn in range(9):
        count = most if turn < 7 else max(1, most - 2)
        ahead.order(heard, going, count)
        made, _ = ahead.collect()
        for row, place in enumerate(places):
            whole = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist() + ahead.written.new[place]
            for token in made[row]:
                assert token == int(draft(torch.tensor([whole])).logits[0, -1].argmax())
                whole.append(token)
        heard = []
        for row in range(len(places)):
            if torch.rand((), generator=generator) < 0.5:
                heard.append((pending[row], made[row][0]))
            else:
                kept = int(torch.randint(0, pending[row] + 1, (), generator=generator))
                heard.append((kept, (made[row][0] + 1 + turn) % 37))
        pending = [
            count - 1 if goes_ahead(*one, had, new) else 0 for one, had, new in zip(heard, pending, made, strict=True)
        ]
        going = [0, 2, 3] if turn == 4 else None
        if going:
            places, pending = [places[row] for row in going], [pending[row] for row in going]


def test_easy_text_is_drafted_on_and_on():
    """A draft that is right: one token in pre-verify, then gamma with every pass, and no length ends the stretch."""
    model = target()
    fast = hasten.apply(model, SERIAL, draft=noisy(model, 0.0))
    out = fast.generate(**ragged(1), max_new_tokens=21, do_sample=False, eos_token_id=None)
    counters = speculation(fast.host).counters
    assert (counters.target_passes, counters.tokens, counters.acceptance) == (6, 21, 1.0)
    assert counters.accepted_at == counters.drafted_at and len(counters.drafted_at) == 4 and out.shape == (1, 30)


def test_a_draft_that_is_always_wrong_costs_no_pass_of_the_target():
    """Pre-verify reads one token and gets one: as many passes as plain decoding has."""
    model = target()
    draft = noisy(model, 0.0)
    draft.lm_head.weight.data.neg_()
    fast = hasten.apply(model, SERIAL, draft=draft)
    fast.generate(**ragged(3), max_new_tokens=15, do_sample=False, eos_token_id=None)
    counters = speculation(fast.host).counters
    assert (counters.target_passes, counters.accepted, counters.drafted) == (15, 0, 3 * 14)


@pytest.mark.parametrize("more", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"eos_token_id": [9, 14]}])
def test_processors_and_stops(more):
    model = target()
    options = {"max_new_tokens": 24, "do_sample": False} | more
    wanted = model.generate(**ragged(4), **options)
    hasten.apply(model, SERIAL, draft=noisy(model, 0.1))
    assert torch.equal(model.generate(**ragged(4), **options), wanted)


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


def test_options():
    with pytest.raises(PlanError, match="candidates"):
        pearl.Pearl(candidates=0)
    model = target()
    with pytest.raises(PlanError, match="draft"):
        hasten.apply(model, BESIDE)


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


@beside
def test_a_request_that_cannot_be_sent_is_served_here(pair):
    class Local(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores * 0.5

    with pytest.warns(UserWarning, match="logits processors can't be sent"):
        pair.generate(**ragged(2), max_new_tokens=9, do_sample=False, logits_processor=LogitsProcessorList([Local()]))
    assert not worker(pair).busy


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
def test_a_copy_has_a_process_of_its_own_which_ends_with_it(pair):
    wanted = pair.generate(**ragged(2), max_new_tokens=12, do_sample=False)
    model = copy.deepcopy(pair.model)
    assert model.drafter not in _overlap._workers
    assert torch.equal(model.generate(**ragged(2), max_new_tokens=12, do_sample=False), wanted)
    own = _overlap._workers[model.drafter]
    assert own.process.pid != worker(pair).process.pid
    process, drafter = own.process, model.drafter
    _overlap.release(drafter)
    assert gone(process) and worker(pair).alive and drafter not in _overlap._workers


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
def test_a_process_that_dies_or_hangs_is_an_error_and_no_wait(monkeypatch):
    model = target()
    fast = hasten.apply(model, BESIDE, draft=noisy(model, 0.1))
    wanted = fast.generate(**ragged(2), max_new_tokens=12, do_sample=False)
    first = worker(fast).process
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(HastenError, match=r"has ended \(exit code -9\).*overlap=false"):
        fast.generate(**ragged(2), max_new_tokens=12, do_sample=False)
    assert gone(first)
    assert torch.equal(fast.generate(**ragged(2), max_new_tokens=12, do_sample=False), wanted)
    second = worker(fast).process
    os.kill(second.pid, signal.SIGSTOP)
    monkeypatch.setattr(_overlap, "PATIENCE", 0.3)
    with pytest.raises(HastenError, match="has not answered for"):
        fast.generate(**ragged(2), max_new_tokens=12, do_sample=False)
    assert gone(second)
    fast.undo()


SCRIPT = """
    import sys, os, signal
    sys.path[:0] = {path!r}
    import torch, hasten
    from conformance.decode import noisy, target
    from hasten.decode import _overlap
    model = target()
    fast = hasten.apply(model, "decode/pearl", draft=noisy(model, 0.1))
    print(_overlap._workers[model.drafter].process.pid, flush=True)
    {end}
"""


@beside
@pytest.mark.parametrize(
    "end",
    [
        "raise RuntimeError('an end')",
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("os.fork() or (os.setsid(), os.execvp('sleep', ['sleep', '60']))", marks=pytest.mark.slow),
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
