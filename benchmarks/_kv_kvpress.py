"""`kv/cake` beside kvpress on the same weights, prompts and budget. `figures` is joined to the family kv.

kvpress 0.5.5 has no CAKE; its counterparts are SnapKV (an even budget), AdaKV over SnapKV (a budget by head, by hidden
keys) and PyramidKV (a budget by layer). Each is given the observation window of 32 queries that CAKE has and its own
default of 64, and is taken at the better one. Both sides decode without further evictions, one token a call.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from hasten.api import Handle, apply
from hasten.bench import machine
from hasten.bench.figures import Figure, PeerWorker, Reading, figure, peer_python, race
from hasten.workloads import language, needle
from hasten.workloads.find import workload

REQUIREMENTS = ("kvpress==0.5.5", "torch==2.13.0")
KINDS, WINDOWS = ("snapkv", "adakv", "pyramidkv"), (32, 64)
PROMPT, NEW, KEEPS = 1536, 64, (0.1, 0.25)
Tokens = list[list[int]]


@functools.cache
def peer(model: str) -> PeerWorker:
    """A worker that holds the bundled model of this name."""
    worker = PeerWorker(peer_python("kvpress", REQUIREMENTS), pathlib.Path(__file__).parent / "peers/kvpress.py")
    with tempfile.TemporaryDirectory() as folder:
        workload(f"stdlib-lm(model={model})").trained().save_pretrained(folder)
        worker.call("load", path=folder, threads=machine.threads())
    return worker


@functools.cache
def ours(model: str, keep: float | None) -> Handle:
    plan = "" if keep is None else f"kv/cake(keep={keep}, decode=False)"
    return apply(workload(f"stdlib-lm(model={model})").trained(), plan)


def step(handle: Handle, cache: Any, tokens: list[int]) -> torch.Tensor:
    """The logits [vocabulary] that follow some more tokens."""
    rows = torch.tensor(tokens)[None]
    return handle.model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


@torch.inference_mode()
def score(handle: Handle, prompts: Tokens, questions: Tokens, answers: Tokens) -> np.ndarray:
    """Log-probability of every token of each answer, [examples, tokens], as the worker's `score`."""
    found = []
    for prompt, question, answer in zip(prompts, questions, answers, strict=True):
        cache, row = handle.host.new_cache(), []
        logits = step(handle, cache, prompt)
        for token in question:
            logits = step(handle, cache, [token])
        for token in answer:
            row.append(logits.float().log_softmax(-1)[token].item())
            logits = step(handle, cache, [token])
        found.append(row)
    return np.array(found)


def continuations(count: int) -> tuple[Tokens, Tokens, Tokens]:
    rows = language.spread_windows(workload("stdlib-lm").tokens(True), count, PROMPT + NEW, seed=29)
    return rows[:, :PROMPT].tolist(), [[] for _ in rows], rows[:, PROMPT:].tolist()


def codes(count: int, prompt: int) -> tuple[Tokens, Tokens, Tokens]:
    """Needles with the question at the prompt's end; asked after the compression, every method here is at chance."""
    stream = workload("stdlib-lm(model=long)").tokens(True)
    asked = needle.questions(stream, count, prompt, depths=4, seed=29)
    return [one.prompt.tolist() for one in asked], [[] for _ in asked], [one.answer.tolist() for one in asked]


def beside(
    model: str, keep: float, data: tuple[Tokens, Tokens, Tokens], judge: Callable[[np.ndarray], np.ndarray], better: int
) -> Reading:
    """Our quality over that of the peer's best press, by example, with a bootstrap interval of the ratio of means.

    Args:
        judge: log-probabilities [examples, tokens] to a quality [examples].
        better: 1 where more is better, -1 where less is.
    """
    worker = peer(model)

    def theirs(kind: str, window: int) -> np.ndarray:
        parts = dict(zip(("prompts", "questions", "answers"), data, strict=True))
        return judge(np.array(worker.call("score", **parts, kind=kind, keep=keep, window=window)))

    full, full_peer = judge(score(ours(model, None), *data)), theirs("full", 0)
    assert np.allclose(full, full_peer, atol=2e-3), "the two sides do not run the same model"
    mine = judge(score(ours(model, keep), *data))
    found = {(kind, window): theirs(kind, window) for kind in KINDS for window in WINDOWS}
    best = max(found, key=lambda name: better * found[name].mean())
    picks = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    ratios = mine[picks].mean(1) / found[best][picks].mean(1)
    facts = {f"{kind}_window{window}": float(values.mean()) for (kind, window), values in found.items()}
    return Reading(
        float(mine.mean() / found[best].mean()),
        *(float(end) for end in np.percentile(ratios, [2.5, 97.5])),
        {"keep": keep, "best_peer": " window ".join(map(str, best)), "cake": float(mine.mean()),
         "full_cache": float(full.mean()), "examples": len(mine), **facts},
    )  # fmt: skip


def bits(logs: np.ndarray) -> np.ndarray:
    return -logs.mean(1) * language.NATS_TO_BITS


def recall(logs: np.ndarray) -> np.ndarray:
    return np.exp(logs).mean(1)


def decode(kind: str, keep: float, prompt: int, new: int, seconds: float) -> Reading:
    tokens = continuations(1)[0][0][:prompt]
    handle = ours("target", keep)

    @torch.inference_mode()
    def run() -> list[int]:
        cache = handle.host.new_cache()
        out = [int(step(handle, cache, tokens).argmax())]
        while len(out) < new:
            out.append(int(step(handle, cache, out[-1:]).argmax()))
        return out

    arm = peer("target").arm("decode", prompt=tokens, new=new, kind=kind, keep=keep, window=32)
    return race(arm, run, seconds=seconds).but(keep=keep, prompt=prompt, new=new)


def cache_bytes(keep: float) -> Reading:
    """Bytes behind the cache after the prompt, ours over SnapKV's; AdaKV hides keys and frees nothing."""
    prompt = continuations(1)[0][0]
    cache = ours("target", keep).host.new_cache()
    with torch.inference_mode():
        step(ours("target", keep), cache, prompt)
    parts = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
    mine = sum({storage.data_ptr(): storage.nbytes() for storage in parts}.values())
    found = {
        kind: peer("target").call("held", prompt=prompt, kind=kind, keep=keep, window=32) for kind in ("full", *KINDS)
    }
    return Reading(
        mine / found["snapkv"], facts={"keep": keep, "bytes": mine, **{f"bytes_{k}": v for k, v in found.items()}}
    )


def figures(quick: bool) -> Iterator[Figure]:
    count, best = 32 if quick else 96, "the best of kvpress's SnapKV, AdaKV and PyramidKV"
    for keep in KEEPS[1:] if quick else KEEPS:
        name = "" if keep == 0.25 else "_" + f"{keep:g}".replace("0.", "")
        yield figure(
            f"kvpress_quality{name}", lambda keep=keep: beside("target", keep, continuations(count), bits, -1),
            unit="bits over bits", against=best, goal=1.0, better="lower",
        )  # fmt: skip
        yield figure(
            f"kvpress_recall{name}", lambda keep=keep: beside("long", keep, codes(2 * count, 1024), recall, 1),
            unit="recall over recall", against=best, goal=1.0,
        )  # fmt: skip
    seconds = 40 if quick else 180
    for kind in KINDS[:2]:
        name = "kvpress_time" if kind == "snapkv" else f"kvpress_time_{kind}"
        yield figure(
            name, lambda kind=kind: decode(kind, 0.25, PROMPT, NEW, seconds),
            against=f"kvpress's {kind}, prompt of {PROMPT}, {NEW} tokens", goal=1.0,
        )  # fmt: skip
    yield figure(
        "kvpress_bytes", lambda: cache_bytes(0.25), unit="share", against="kvpress's SnapKV", goal=1.0, better="lower"
    )
