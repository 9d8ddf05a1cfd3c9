"""One table of all methods of a family: quality, bytes and speed of each beside the unchanged model.

`plans(family, {...})` lists the family's files, so a new method is in the table by existing. `table` writes
FAMILY_table.json and FAMILY_table.md anew after each row; rows of an earlier run stay until they are measured again,
each with its commit.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hasten.bench import machine, operations, stats
from hasten.bench.figures import race, say
from hasten.bench.serving import prepare
from hasten.core import names
from hasten.core.errors import HastenError, PlanError
from hasten.core.plans import Plan
from hasten.workloads.base import Workload
from hasten.workloads.find import workload as find


def plans(family: str, ladder: Mapping[str, Sequence[Any]]) -> list[str]:
    """Plans of one method each: at those values of the first option of the ladder that the method has and takes, or
    with its defaults where there are none. Methods that act on training are left out.

    Args:
        ladder: option to values, such as {"bits": (4, 3, 2)}.
    """
    found = []
    for name in names.method_files():
        if not name.startswith(f"{family}/"):
            continue
        method = names.load(name)
        if getattr(method, "training_only", False):
            continue
        known = {field.name for field in dataclasses.fields(method)}
        option = next((one for one in ladder if one in known), None)
        taken = []
        for value in ladder[option] if option else ():
            try:
                taken.append(str(method(**{str(option): value})))
            except PlanError:
                continue
        found += taken or [str(method())]
    return found


@dataclasses.dataclass
class Row:
    """A plan beside the unchanged model.

    Attributes:
        quality, quality_base: in the metric of the workload of quality. change, low, high: relative, with a paired 95%
            interval by example.
        bytes, bytes_base: that the model's weights hold. speed, speed_low, speed_high: times as fast, None where there
            is no real speed (`simulated` says why). setup_seconds: calibrating and packing.
        why: why nothing was measured.
    """

    plan: str
    quality: float | None = None
    quality_base: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    bytes: int | None = None
    bytes_base: int | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    simulated: str | None = None
    setup_seconds: float | None = None
    kernel: str = ""
    why: str = ""


def table(
    family: str,
    given: Sequence[str],
    *,
    quality: "str | Workload",
    speed: "str | Workload",
    out: pathlib.Path = pathlib.Path("out/bench"),
    seconds: float = 10.0,
) -> list[Row]:
    """Measures plans one by one and writes the table; a plan that fails is a row that says why.

    Args:
        given: plans, such as those of `plans(family, ...)`.
        quality, speed: workloads of one model: what is scored, and whose requests are timed. The methods are calibrated
            with the former.
        seconds: that timing a plan takes.
    """
    scored, timed = find(quality), find(speed)
    base = prepare(scored, Plan.of(""))
    before, bytes_base = np.asarray(scored.quality(base.handle), float), operations.held_bytes(base.handle.model)
    requests, turn, rows = timed.requests(0), 0, []

    def next_request() -> None:
        nonlocal turn
        turn = (turn + 1) % len(requests)

    for text in given:
        say(f"  {text} ...")
        row = Row(text, bytes_base=bytes_base, quality_base=float(scored.metric.aggregate(before)))
        try:
            arm = prepare(scored, Plan.of(text))
            test = stats.non_inferiority(before, np.asarray(scored.quality(arm.handle), float), scored.metric, 0.01)
            row.quality, row.change, row.low, row.high = test.plan, test.change, test.low, test.high
            row.bytes, row.setup_seconds = operations.held_bytes(arm.handle.model), round(arm.setup_seconds, 2)
            row.simulated = arm.handle.simulated
            row.kernel = "; ".join(str(facts["kernel"]) for facts in arm.handle.report.values() if "kernel" in facts)
            if not row.simulated:
                found = race(
                    lambda: timed.serve(base.handle, requests[turn]),
                    lambda arm=arm: timed.serve(arm.handle, requests[turn]),  # type: ignore[misc]
                    seconds=seconds,
                    after=next_request,
                )
                row.speed, row.speed_low, row.speed_high = found.value, found.low, found.high
        except HastenError as error:
            row.why = str(error)
        except Exception as error:
            row.why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append(row)
        say(f"    {' | '.join(cells(dataclasses.asdict(row)))}")
        write(family, rows, out, scored, timed)
    return rows


def write(family: str, rows: Sequence[Row], out: pathlib.Path, quality: Workload, speed: Workload) -> None:
    """Both files, with the rows of earlier runs whose plans are not among these."""
    path = out / f"{family}_table.json"
    try:
        kept = {one["plan"]: one for one in json.loads(path.read_text())["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    commit = machine.fingerprint()["commit"]
    new = [{key: _finite(value) for key, value in dataclasses.asdict(row).items()} for row in rows]
    whole = list((kept | {one["plan"]: {**one, "commit": commit} for one in new}).values())
    metric = f"{quality.metric.name}, {quality.metric.better} is better"
    content = {"quality": str(quality), "metric": metric, "speed": str(speed),
               "machine": machine.fingerprint(), "rows": whole}  # fmt: skip
    lines = [
        f"Quality on `{quality}` ({metric}), time on `{speed}`, beside the unchanged model; intervals are 95%.", "",
        "| plan | quality change | bytes | speed | set-up |", "|---|---|---|---|---|",
        *(f"| {' | '.join(cells(one))} |" for one in whole),
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for file, text in ((path, json.dumps(content, indent=1)), (path.with_suffix(".md"), "\n".join(lines))):
        part = file.with_name(file.name + ".part")
        part.write_text(text + "\n")
        os.replace(part, file)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells as text."""
    if row["why"]:
        return [f"`{row['plan']}`", f"not measured: {row['why']}", "-", "-", "-"]
    change = "lost" if row["change"] is None else f"{row['change']:+.2%} ({_ends(row, 'low', 'high', '+.2%')})"
    held = f"{row['bytes'] / row['bytes_base']:.1%}"
    if row["simulated"]:
        speed = f"simulated: {row['simulated']}"
    else:
        speed = f"{row['speed']:.2f}x ({_ends(row, 'speed_low', 'speed_high', '.2f')})"
    return [f"`{row['plan']}`", change, held, speed, f"{row['setup_seconds']:.1f} s"]


def _ends(row: Mapping[str, Any], low: str, high: str, form: str) -> str:
    return " to ".join("open" if _finite(row[end]) is None else format(row[end], form) for end in (low, high))


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
