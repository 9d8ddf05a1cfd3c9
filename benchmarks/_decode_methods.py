"""More of decoding beside plain generation, beside the same method without its point, and on real tokens."""

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from hasten.api import apply
from hasten.bench.figures import Figure, Reading, figure, served
from hasten.core.errors import UsageError
from hasten.decode.awrs import METHOD as AWRS
from hasten.decode.base import speculation
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


def awrs_checks(seconds: float) -> Reading:
    """Tokens that rejection checks, as a share of those that masking checks in the same loop; and the times of both."""
    from hasten.workloads.constrained import RECORD

    work: Any = find("constrained-lm")
    found = {}
    for masking in (False, True):
        arm = apply(work.trained(), AWRS(schema=RECORD, masking=masking))
        checks = []
        for request in work.requests(0):
            work.serve(arm, request)
            checks.append(speculation(arm.host).counters.checks)  # type: ignore[union-attr]
        found[masking] = checks
    shares = [one / other for one, other in zip(found[False], found[True], strict=True)]
    speed = served(work, f"decode/awrs(schema='{RECORD}')", seconds=seconds)
    facts = {"speed_against_masking_by_processor": speed.value, "low_speed": speed.low, "high_speed": speed.high}
    return Reading(sum(found[False]) / sum(found[True]), min(shares), max(shares), facts)


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 15 if quick else 200
    speed = functools.partial(served, seconds=seconds)
    yield figure(
        "pearl_overlap",
        lambda: speed("stdlib-lm(task=generate)", "decode/pearl", base="decode/pearl(overlap=false)"),
        against="the same pair and rounds, drafting and verifying in turn",
    )
    medusa = "decode/medusa(nodes=12, tokens=128, temperature=0, lr=0.01)"
    yield figure("medusa", lambda: speed("stdlib-lm(task=generate, calibrate=96)", medusa), against=PLAIN)
    yield figure(
        "awrs_checks",
        lambda: awrs_checks(seconds),
        unit="share",
        against="token masking on JSON records, the same texts; the range is over requests",
        goal=0.1,
        better="lower",
    )
    infill = "stdlib-denoiser(task=infill, examples=192)"
    for name, order in (("diffusion_lm", "dimple(threshold=0.5)"), ("diffusion_lm_surer", "dimple(threshold=0.7)")):
        yield figure(
            name,
            functools.partial(speed, infill, f"decode/{order} + decode/dkv_cache", quality=True),
            against="the plain sampler, one byte a step, on stdlib-denoiser",
            goal=3.0,
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
