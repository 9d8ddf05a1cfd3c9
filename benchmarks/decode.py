"""Drafting on stdlib-lm with its trained target and draft, beside plain generation and transformers' own drafting."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from hasten.api import apply
from hasten.bench.figures import Figure, Reading, figure, race, served
from hasten.bench.stats import lossless_test
from hasten.core.errors import HastenError
from hasten.decode.speculative import Speculative
from hasten.workloads import language
from hasten.workloads.find import workload as find

PLAIN = "plain generation on stdlib-lm"


def against_assisted(seconds: float) -> Reading:
    """Both draft as many tokens with the same draft before each check; both give the target's own greedy tokens."""
    work: Any = find("stdlib-lm(task=generate)")
    method = Speculative()
    ours = apply(work.trained(), method, draft=work.draft())
    theirs, draft = work.trained(), work.draft()
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = method.candidates, "constant"
    settings.assistant_confidence_threshold = 0.0  # else it drafts fewer when the draft is unsure
    requests, turn = work.requests(0), 0

    def assisted() -> torch.Tensor:
        prompt, options = requests[turn], {"max_new_tokens": work.new, "min_new_tokens": work.new, "do_sample": False}
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, **options)
        return out[:, prompt.shape[1] :]

    def next_request() -> None:
        nonlocal turn
        turn = (turn + 1) % len(requests)

    def drafted() -> torch.Tensor:
        return language.generate(ours, requests[turn], work.new)

    same = []
    for _ in range(4):
        same.append(work.same(assisted(), drafted()))
        next_request()
    test = lossless_test(same)
    if test.verdict == "lost":
        raise HastenError(f"only {test.identical} of {test.outputs} outputs are the same as the peer's")
    found = race(assisted, drafted, seconds=seconds, after=next_request)
    return found.but(identical=f"{test.identical} of {test.outputs}", candidates=method.candidates)


def figures(quick: bool) -> Iterator[Figure]:
    speed = functools.partial(served, seconds=20 if quick else 300)
    yield figure(
        "draft_target_batch1", lambda: speed("stdlib-lm(task=generate)", "decode/speculative"), against=PLAIN, goal=1.6
    )
    yield figure(
        "draft_target_batch4",
        lambda: speed("stdlib-lm(task=generate, batch=4)", "decode/speculative"),
        against=PLAIN + ", batch 4",
        goal=1.2,
    )
    yield figure(
        "against_assisted",
        lambda: against_assisted(20 if quick else 300),
        against="transformers' assisted generation, same draft and number of drafted tokens",
        goal=1.2,
    )
    yield figure(
        "quantized_target",
        lambda: speed("stdlib-lm(task=generate)", "quant/gptq(bits=4) + decode/speculative", quality=True),
        against=PLAIN,
    )
    yield figure(
        "shrunken_cache",
        lambda: speed("stdlib-lm(task=generate)", "kv/cake(keep=0.5) + decode/speculative", quality=True),
        against=PLAIN,
    )
