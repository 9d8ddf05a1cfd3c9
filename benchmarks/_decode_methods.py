"""More of decoding beside plain generation, beside the same method without its point, and on real tokens."""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from hasten.api import apply
from hasten.bench.figures import Figure, Reading, figure, served
from hasten.core.errors import UsageError
from hasten.workloads.find import workload as find

PLAIN = "plain generation on stdlib-lm"


def stories() -> tuple[str, str]:
    """The pair that examples/stories_pair.py made, where HASTEN_STORIES names its folder."""
    folder = pathlib.Path(os.environ.get("HASTEN_STORIES", ""))
    if not os.environ.get("HASTEN_STORIES") or not (folder / "target").is_dir():
        raise UsageError("set HASTEN_STORIES to the folder that examples/stories_pair.py wrote")
    return str(folder), f"model='{folder}/target', draft_model='{folder}/draft', prompts='{folder}/prompts.jsonl'"


def on_stories(concurrency: int, seconds: float) -> Reading:
    _, pair = stories()
    name = f"speed-bench({pair}, prompt=96, concurrency={concurrency})"
    return served(name, "decode/speculative", seconds=seconds)


def diverse(concurrency: int, seconds: float) -> Reading:
    """speed-bench on the bundled pair; at one prompt at a time also acceptance by category."""
    name = f"speed-bench(concurrency={concurrency})"
    found = served(name, "decode/speculative", seconds=seconds)
    if concurrency > 1:
        return found
    work: Any = find(name)
    arm = apply(work.trained(), "decode/speculative", draft=work.draft())
    return found.but(by_category=work.by_category(arm))


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 30 if quick else 200
    speed = functools.partial(served, seconds=seconds)
    yield figure(
        "pearl_overlap",
        lambda: speed("stdlib-lm(task=generate)", "decode/pearl", base="decode/pearl(overlap=false)"),
        against="the same pair and rounds, drafting and verifying in turn",
    )
    yield figure("pearl", lambda: speed("stdlib-lm(task=generate)", "decode/pearl"), against=PLAIN)
    for concurrency in (1, 4, 16):
        yield figure(
            f"speed_bench_{concurrency}",
            functools.partial(diverse, concurrency, seconds),
            against=f"plain generation on speed-bench, {concurrency} at a time",
        )
    for concurrency in (1, 4):
        yield figure(
            f"stories_{concurrency}",
            functools.partial(on_stories, concurrency, seconds),
            against=f"plain generation of a 2.2M-weight story model, {concurrency} at a time; the draft has 0.26M",
        )
