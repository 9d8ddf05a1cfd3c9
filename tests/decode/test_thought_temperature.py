"""TS: which rows think, what is scaled, and that a thought ends earlier for it."""

import pytest
import torch

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode.thought_temperature import TS, thought_temperature
from hasten.workloads import reasoning
from hosts.tiny import DECODERS

END, BEGIN = 7, 5


def cases():
    generator = torch.Generator().manual_seed(0)
    for rows, columns, start, begin, temperature, dtype in (
        (1, 1, 1, None, 0.5, torch.float32),
        (5, 9, 4, None, 0.8, torch.float32),
        (7, 13, 0, BEGIN, 2.0, torch.float32),
        (16, 11, 3, BEGIN, 0.3, torch.bfloat16),
        (3, 5, 9, None, 0.7, torch.float64),
        (2, 0, 0, BEGIN, 0.7, torch.float32),
        (2, 0, 0, None, 0.7, torch.float32),
    ):
        scores = torch.randn(rows, 11, generator=generator).to(dtype)
        ids = torch.randint(4, 9, (rows, columns), generator=generator)
        yield {"args": (scores, ids, temperature, END, begin, start), "tolerance": 1e-6}


def subject():
    """The end token is one that a random model likes enough to choose now and then."""
    return {"model": target, "options": {"temperature": 0.05, "end": 11}, "context": {}, "run": run}


def test_only_the_thinking_rows_and_the_end_token():
    scores = torch.tensor([[2.0] * 9] * 5)
    scores[4, END] = -2.0
    ids = torch.tensor([[0, BEGIN, 1, 1], [BEGIN, 1, END, 1], [END, BEGIN, END, BEGIN], [1, 1, 1, 1], [BEGIN, 1, 1, 1]])
    out = thought_temperature(scores, ids, 0.5, END, BEGIN)
    assert out[:, END].tolist() == [4.0, 2.0, 4.0, 2.0, -1.0]
    assert torch.equal(out[:, :END], scores[:, :END]) and torch.equal(out[:, END + 1 :], scores[:, END + 1 :])


def test_an_end_in_the_prompt_is_no_end():
    ids = torch.tensor([[END, 1, 1], [1, 1, END]])
    assert thought_temperature(torch.ones(2, 9), ids, 0.5, END, None, 2)[:, END].tolist() == [2.0, 1.0]


def test_a_score_of_minus_infinity_stays():
    scores = torch.full((1, 9), -torch.inf)
    assert thought_temperature(scores, torch.tensor([[BEGIN]]), 0.5, END, BEGIN)[0, END] == -torch.inf


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "neox_parallel"])
def test_by_hand(name):
    """Generation is what plain passes and the rule give, token by token."""
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(1))
    model = DECODERS[name]().double()
    wanted = ids
    for _ in range(8):
        scores = model(wanted).logits[:, -1].float()
        wanted = torch.cat([wanted, thought_temperature(scores, wanted, 0.02, 9, None, 6).argmax(-1)[:, None]], 1)
    fast = hasten.apply(model, TS(temperature=0.02, end=9))
    assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    fast.undo()
    assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)


def test_padding_changes_nothing():
    fast = hasten.apply(target(), TS(temperature=0.05, end=11))
    together = run(fast)
    batch = ragged()
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        alone = fast.generate(
            batch["input_ids"][row, real][None], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0, real.sum() :], together[row, 9:])


def test_the_callers_own_processors_stay():
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

    fast = hasten.apply(target(), TS(temperature=0.01, end=11))
    own = LogitsProcessorList([SuppressTokensLogitsProcessor([11])])
    assert (run(fast)[:, 9:] == 11).any()
    out = fast.generate(**ragged(), max_new_tokens=12, do_sample=False, eos_token_id=None, logits_processor=own)
    assert not (out[:, 9:] == 11).any() and len(own) == 1


def test_sampled_thoughts_end_earlier_the_lower_the_temperature():
    model = target(begin_of_thought_token_id=None, end_of_thought_token_id=11)
    ids, means = torch.full((256, 1), 4), []
    for temperature in (4.0, 1.0, 0.25):
        fast = hasten.apply(model, TS(temperature=temperature))
        torch.manual_seed(0)
        out = fast.generate(ids, max_new_tokens=24, do_sample=True, temperature=2.0, eos_token_id=None)[:, 1:]
        ended = (out == 11).int()
        means.append(torch.where(ended.any(1), ended.argmax(1), 24).float().mean().item())
        fast.undo()
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("plan", ["first", "last"])
def test_with_drafting(plan):
    model = target()
    wanted = run(hasten.apply(target(), TS(temperature=0.05, end=11)))
    methods = ["decode/thought_temperature(temperature=0.05, end=11)", "decode/speculative"]
    both = hasten.apply(model, methods if plan == "first" else methods[::-1], draft=noisy(target(), 0.1))
    assert torch.equal(run(both), wanted)


class Cut:
    """Budget forcing: the thought is ended by force after so many tokens."""

    def __init__(self, most, start):
        self.most, self.start = most, start

    def __call__(self, ids, scores):
        if ids.shape[1] - self.start < self.most:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, reasoning.END_THOUGHT] = 0
        thinks = ~(ids[:, self.start :] == reasoning.END_THOUGHT).any(1)
        return torch.where(thinks[:, None], forced, scores)


def test_better_than_a_hard_cut_of_as_many_tokens():
    """The paper's comparison: a thought that may end where it is done keeps the answer, one that is cut does not."""
    workload = hasten.workload("sums-lm(batch=32)")
    problems = reasoning._drawn(32, 1007, held_out=True)
    request = workload._prompts(problems)
    start = request["input_ids"].shape[1]

    def solved(plan, **options):
        handle = hasten.apply(workload.trained(), plan)
        out = handle.generate(**request, max_new_tokens=reasoning.NEW, do_sample=False, **options)[:, start:]
        right = [
            reasoning.answered(row) == str(problem.totals[-1])
            for row, problem in zip(out.tolist(), problems, strict=True)
        ]
        ended = (out == reasoning.END_THOUGHT).int()
        return sum(right) / 32, torch.where(ended.any(1), ended.argmax(1), reasoning.NEW).float().mean().item()

    (plain, whole), (scaled, short) = solved(""), solved("decode/thought_temperature")
    cut, budget = solved("", logits_processor=[Cut(round(short), start)])
    assert short < 0.7 * whole and scaled >= plain - 0.05
    assert budget <= short + 1 and cut < scaled - 0.3


def test_the_model_says_which_tokens():
    fast = hasten.apply(reasoning.sums_llama(), "decode/thought_temperature")
    assert fast._records == [{"end": reasoning.END_THOUGHT, "begin": reasoning.BEGIN_THOUGHT}]


def test_what_can_not_be_says_why():
    with pytest.raises(UsageError, match=r"convert_tokens_to_ids\('</think>'\)"):
        hasten.apply(target(), TS())
    with pytest.raises(UsageError, match="end=37 is no token of a vocabulary of 37"):
        hasten.apply(target(), TS(end=37))
    with pytest.raises(UsageError, match="can't both begin and end"):
        hasten.apply(target(), TS(end=3, begin=3))
    with pytest.raises(PlanError, match="above 0"):
        TS(temperature=0)
