"""`hasten tune`: what each arm's search found, as a table or one JSON object."""

import json
import pathlib
import time

from rich.console import Console
from rich.table import Table

from hasten.bench.compare import parse_seconds
from hasten.bench.result import escape, spell_seconds, wide_console
from hasten.bench.tuning import Tuned, tune
from hasten.cli.compare import LiveProgress


def command(
    workload: str, plans: list[str], trials: int, budget: str, seed: int, out: pathlib.Path | None, as_json: bool
) -> int:
    console = Console(stderr=True)
    began = time.monotonic()
    progress = LiveProgress(None, console, parse_seconds(budget))
    try:
        found = tune(workload, plans, trials=trials, budget=budget, seed=seed, out=out, progress=progress)
    except KeyboardInterrupt:
        console.print("interrupted: finished trials are kept; the same line again continues", highlight=False)
        return 130
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=1))
        return 0
    shown = wide_console()
    shown.print(table(found))
    for one in found:
        shown.print(f"{one.workload} {one.best}", highlight=False, soft_wrap=True, markup=False)
    shown.print(f"{spell_seconds(time.monotonic() - began)} in all", highlight=False)
    return 0


def table(found: list[Tuned]) -> Table:
    """One row an arm: CPU time to the target as given and as found, and what finding it took."""
    shown = Table(title="settings found, each arm with as many trials", header_style="bold")
    for name in ("arm", "settings", "as given", "as found", "trials", "cost"):
        shown.add_column(name, overflow="fold")
    for one in found:
        values = ", ".join(f"{name}={value:.3g}" for name, value in one.values.items()) or "as given"
        best = spell_seconds(one.score) if one.reached else "target missed"
        cells = [str(one.plan), values, spell_seconds(one.given), best, str(one.trials), spell_seconds(one.cpu)]
        shown.add_row(*map(escape, cells))
    return shown
