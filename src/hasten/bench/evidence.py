"""Evidence: each method's smallest honest experiment, claimed against measured, in evidence/FAMILY/METHOD.jsonl."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from hasten.bench import gate, machine
from hasten.bench.compare import compare
from hasten.bench.result import Comparison
from hasten.bench.session import Progress
from hasten.core import names


def folder() -> pathlib.Path:
    """The checkout's evidence folder; the user's cache where Hasten was installed without one."""
    root = machine.checkout()
    return root / "evidence" if root else gate.cache_folder() / "evidence"


def file_of(method: str) -> pathlib.Path:
    return folder() / f"{method}.jsonl"


def lines_of(method: str) -> list[dict[str, Any]]:
    """All lines of a method's evidence, oldest first; unreadable ones are passed over."""
    path = file_of(method)
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and content.get("method") == method:
            found.append(content)
    return found


def latest(method: str) -> list[dict[str, Any]]:
    """The newest line for each workload, plan and machine."""
    newest = {}
    for line in lines_of(method):
        newest[(line["workload"], line["plan"], line["machine"].get("id"))] = line
    return list(newest.values())


def source_of(method: str) -> str:
    """A digest of the method's file and its family's shared ones."""
    file = names.method_files()[method]
    digest = hashlib.sha256(file.read_bytes())
    for shared in sorted(file.parent.glob("*.py")):
        if shared.stem == "base" or shared.stem.startswith("_"):
            digest.update(shared.read_bytes())
    return digest.hexdigest()[:16]


def collect(
    method: str,
    *,
    budget: "float | str" = "3m",
    margin: "float | str" = 0.01,
    progress: Progress | None = None,
    seeds: int = 3,
) -> dict[str, Any]:
    """Runs the experiment that the method's card names and appends one line; interrupted runs leave none."""
    full = names.resolve(method)
    card = names.card(full)
    workload, plan = card.experiment
    out = pathlib.Path(os.environ.get("HASTEN_OUT", "out")) / "evidence" / full
    result = compare(workload, [plan], budget=budget, margin=margin, out=out, progress=progress, seeds=seeds)
    if result.interrupted:
        raise KeyboardInterrupt
    line = to_line(full, result)
    append(full, line)
    return line


def collect_together(
    methods: Sequence[str],
    *,
    budget: "float | str" = "3m",
    margin: "float | str" = 0.01,
    progress: Progress | None = None,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """As `collect`, for methods whose experiments have one workload: they share its baseline's runs, and the budget."""
    full = [names.resolve(method) for method in methods]
    experiments = [names.card(one).experiment for one in full]
    (workload,) = {workload for workload, _ in experiments}
    out = pathlib.Path(os.environ.get("HASTEN_OUT", "out")) / "evidence" / "together"
    plans = [plan for _, plan in experiments]
    result = compare(workload, plans, budget=budget, margin=margin, out=out, progress=progress, seeds=seeds)
    if result.interrupted:
        raise KeyboardInterrupt
    lines = [to_line(one, result, place) for place, one in enumerate(full)]
    for one, line in zip(full, lines, strict=True):
        append(one, line)
    return lines


def to_line(full: str, result: Comparison, place: int = 0) -> dict[str, Any]:
    """One line of evidence from a comparison's row."""
    card, row, group = names.card(full), result.plans[place], result.groups[0]
    plain = result.to_json()
    numbers = plain["plans"][place]
    shown = {key: result.machine.get(key) for key in ("id", "cpu", "cores", "usable_cores", "threads", "gpus", "os")}
    return {
        "method": full,
        "title": card.title,
        "paper": card.paper,
        "gate": row.gate,
        "effects": list(card.effects),
        "simulated": bool(row.simulated),
        "claim": card.claim,
        "claimed": card.claimed,
        "measured": None if row.simulated else numbers["speedup"],
        "low": None if row.simulated else numbers["low"],
        "high": None if row.simulated else numbers["high"],
        "clock": row.clock,
        "pairs": row.pairs,
        "quality": numbers["quality"],
        "quality_base": numbers["quality_base"],
        "quality_change": numbers["quality_change"],
        "quality_verdict": row.quality_verdict,
        "margin": result.margin,
        "peak_bytes": row.peak_bytes,
        "peak_base": row.peak_base,
        "held_bytes": row.held_bytes,
        "held_base": row.held_base,
        "operations": numbers["operations"],
        "operations_base": numbers["operations_base"],
        "setup_seconds": round(row.setup_seconds, 3),
        "break_even": numbers["break_even"],
        "misses": row.misses,
        "misses_base": row.misses_base,
        "lossless": row.lossless,
        "drafting": row.drafting,
        "facts": numbers["facts"],
        "verdict": row.verdict,
        "why": row.why,
        "metric": group.metric,
        "workload": result.workload,
        "plan": row.plan,
        "machine": shown,
        "versions": result.machine["versions"],
        "commit": result.commit,
        "dirty": result.dirty,
        "source": source_of(full),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(method: str, line: dict[str, Any]) -> None:
    path = file_of(method)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def check(methods: Iterable[str] = ()) -> list[dict[str, Any]]:
    """One object a method: its newest evidence line, whether it stands, and what is wrong where it does not.

    A line stands when it is there, its gate was green, its verdict is one, and the method's source has not changed
    since.
    """
    found = []
    for full in [names.resolve(name) for name in methods] or names.method_files():
        lines = lines_of(full)
        card = names.card(full)
        if not lines:
            bare = {
                "method": full,
                "title": card.title,
                "paper": card.paper,
                "gate": "not checked",
                "effects": list(card.effects),
                "simulated": False,
                "claimed": card.claimed,
                "measured": None,
                "low": None,
                "high": None,
                "quality_verdict": None,
                "verdict": None,
                "workload": card.experiment[0],
                "machine": None,
                "commit": None,
            }
            found.append({**bare, "stands": False, "problem": f"no evidence yet: run 'hasten evidence {full}'"})
            continue
        line = lines[-1]
        problem = None
        if line["gate"] != "green":
            problem = f"its tests were {line['gate']} when it was measured"
        elif line["verdict"] == "undecided":
            problem = "the budget was spent before a verdict: run it again with a larger --budget"
        elif line.get("source") != source_of(full):
            problem = "the method's source has changed since: run it again"
        found.append({**line, "stands": problem is None, "problem": problem})
    return found
