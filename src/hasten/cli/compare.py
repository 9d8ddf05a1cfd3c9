"""`hasten compare`: live progress on stderr, the table or one JSON object on stdout."""

import json
import pathlib
import shlex
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hasten.bench.compare import REPORT, RESULT, TRIALS, compare, parse_seconds
from hasten.bench.result import (
    Comparison,
    Row,
    escape,
    notes,
    spell_plan,
    spell_quality,
    spell_ratio,
    spell_seconds,
    table,
    wide_console,
)


class LiveProgress:
    """The rows so far, what is being done, and the time left."""

    def __init__(self, live: Live | None, console: Console, seconds: float) -> None:
        self.live, self.console, self.seconds = live, console, seconds
        self.began = time.monotonic()
        self._rows: list[Row] = []
        self._stage = "starting"
        self._spinner = Spinner("dots")

    def stage(self, text: str) -> None:
        changed, self._stage = text != self._stage, text
        if self.live:
            self.live.update(self._render())
        elif changed and not text.startswith("training, seed"):
            self.console.print(f"{self._left()}  {text}", highlight=False)

    def rows(self, rows: list[Row]) -> None:
        self._rows = rows
        if self.live:
            self.live.update(self._render())

    def _left(self) -> str:
        return f"{spell_seconds(max(0.0, self.seconds - (time.monotonic() - self.began)))} left"

    def _render(self) -> Group:
        shown = Table(box=None, pad_edge=False)
        for name in ("plan", "pairs", "speedup so far", "quality"):
            shown.add_column(name, overflow="fold")
        for row in self._rows:
            shown.add_row(escape(spell_plan(row)), str(row.pairs), spell_ratio(row), spell_quality(row, {}))
        self._spinner.update(text=Text(f"{self._stage}, at most {self._left()}"))
        return Group(shown, self._spinner) if self._rows else Group(self._spinner)


def command(
    workload: str,
    plans: list[str],
    options: dict[str, Any],
    as_json: bool,
) -> int:
    """Compares with the options of `hasten.bench.compare.compare`."""
    console = Console(stderr=True)
    seconds = parse_seconds(options["budget"])
    line = shlex.join(["hasten", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else None
    live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
    progress = LiveProgress(live, console, seconds)
    if live:
        with live:
            result = compare(workload, plans, **options, progress=progress, command=line)
    else:
        result = compare(workload, plans, **options, progress=progress, command=line)
    publish(result, as_json)
    if result.interrupted:
        console.print("interrupted: what is finished is kept; the same line again continues", highlight=False)
    return result.exit_code


def publish(result: Comparison, as_json: bool = False) -> None:
    """Writes result.json beside the trials and prints it, or the table with what needs a reason."""
    content = json.dumps(result.to_json(), indent=1)
    folder = pathlib.Path(result.out or ".")
    (folder / RESULT).write_text(content + "\n")
    if as_json:
        print(content)
        return
    shown = wide_console()
    shown.print(table(result))
    for row in result.plans:
        if row.why and row.verdict != "faster":
            shown.print(f"{spell_plan(row)}: {row.verdict}: {row.why}", highlight=False, soft_wrap=True, markup=False)
    for line in [line for group in result.groups for line in notes(group)]:
        shown.print(line, highlight=False, soft_wrap=True, markup=False)
    end = f"{folder}/{REPORT} shows the curves; {folder}/{TRIALS} holds every measurement"
    shown.print(end, highlight=False, soft_wrap=True)
