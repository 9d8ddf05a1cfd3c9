"""What a comparison found: one row a plan, the table, and the object that `--json` prints."""

import dataclasses
import math
from typing import Any

VERDICTS = ("faster", "no measurable gain", "slower", "quality lost", "undecided")


@dataclasses.dataclass
class Row:
    """One plan beside the baseline of its workload. Ratios are above 1 when the plan is better; None is not measured.

    Attributes:
        speedup, low, high: baseline time over plan time with its 95% interval, by the clock named.
        at_least: the baseline missed the target on some seed, so the speedup is a lower bound.
        quality: the plan's; `quality_base` the baseline's; `quality_change` relative to the baseline's, in the metric's
            own direction; `quality_low`, `quality_high` its interval.
        quality_verdict: held, lost, not shown, or identical (a lossless method's outputs were compared and agree).
        peak_bytes: peak memory above the state before the model was built; `peak_base` the baseline's.
        setup_seconds: calibration, compilation and tuning; `break_even`: uses after which it is paid back.
        verdict: one of VERDICTS; `why` says what it rests on when that is not plain.
    """

    plan: str
    workload: str = ""
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    clock: str = "wall"
    at_least: bool = False
    pairs: int = 0
    quality: float | None = None
    quality_base: float | None = None
    quality_change: float | None = None
    quality_low: float | None = None
    quality_high: float | None = None
    quality_verdict: str | None = None
    lossless: str | None = None
    drafting: str | None = None
    peak_bytes: int | None = None
    peak_base: int | None = None
    held_bytes: int | None = None
    held_base: int | None = None
    operations: float | None = None
    operations_base: float | None = None
    setup_seconds: float = 0.0
    break_even: float | None = None
    misses: int = 0
    misses_base: int = 0
    simulated: str | None = None
    gate: str = "not checked"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    verdict: str = "undecided"
    why: str = ""


@dataclasses.dataclass
class Group:
    """The plans that were measured against one baseline.

    Attributes:
        workload: with its options. mode: train or serve.
        metric: name, better and unit. baseline: its own figures.
        rows: one a plan.
    """

    workload: str
    mode: str
    metric: dict[str, str]
    rows: list[Row]
    baseline: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Comparison:
    """The outcome of `hasten compare`: training plans and inference plans each beside a baseline of their own."""

    groups: list[Group]
    machine: dict[str, Any]
    margin: float
    command: str
    seconds: float
    interrupted: bool = False
    commit: str | None = None
    dirty: bool | None = None
    out: str | None = None

    @property
    def plans(self) -> list[Row]:
        return [row for group in self.groups for row in group.rows]

    @property
    def workload(self) -> str:
        return ", ".join(group.workload for group in self.groups)

    @property
    def finished(self) -> bool:
        return not self.interrupted and all(row.verdict != "undecided" for row in self.plans)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; infinite values become None."""
        content = dataclasses.asdict(self)
        baselines = [{k: v for k, v in group.items() if k != "rows"} for group in content.pop("groups")]
        plans = [dataclasses.asdict(row) for row in self.plans]
        return _plain(
            {"workload": self.workload, "plans": plans, "baselines": baselines, "finished": self.finished, **content}
        )

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return 130
        return 0 if self.finished else 3


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def spell_plan(row: Row) -> str:
    """The plan's text, or for one that another was made into, how."""
    return str(row.facts.get("shown", row.plan))


def spell_ratio(row: Row) -> str:
    """`1.84x (1.71 to 1.97)`; a miss of the baseline makes it a lower bound."""
    if row.simulated:
        return "simulated"
    if row.speedup is None or row.low is None or row.high is None:
        return "-"
    sign = "\u2265 " if row.at_least else ""
    return f"{sign}{row.speedup:.2f}x ({row.low:.2f} to {row.high:.2f})"


def spell_bytes(count: int | float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def spell_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def spell_quality(row: Row, metric: dict[str, str]) -> str:
    if row.quality_verdict == "identical":
        return "identical"
    if row.quality is None:
        return "-"
    change = f" ({row.quality_change:+.1%})" if row.quality_change is not None else ""
    return f"{row.quality:.4g} {metric.get('unit', '')}".rstrip() + change


def spell_break_even(row: Row, mode: str) -> str:
    """After how much use the set-up is paid back; in training it is charged to the run itself."""
    if mode == "train":
        return "charged"
    if row.setup_seconds < 0.05:
        return "at once"
    if row.break_even is None or not math.isfinite(row.break_even):
        return "never"
    return f"{row.break_even:.0f} requests"


def table(comparison: Comparison) -> Any:
    """The comparison as a rich table, one section a workload."""
    from rich.table import Table

    memory = any(row.peak_bytes for row in comparison.plans)
    captions = "\n".join(map(caption, comparison.groups))
    shown = Table(title="plans against the baseline", caption=captions, header_style="bold", caption_justify="left")
    shown.add_column("plan", overflow="fold", min_width=24, ratio=1)
    names = ["speedup (95%)", "quality", *(["peak memory"] if memory else []), "set-up, paid back", "verdict"]
    for name in names:
        shown.add_column(name, justify="left" if name == "verdict" else "right", overflow="fold")
    colours = {"faster": "green", "slower": "red", "quality lost": "red", "undecided": "yellow"}
    for group in comparison.groups:
        if len(comparison.groups) > 1:
            shown.add_section()
            shown.add_row(f"[bold]{escape(group.workload)}[/bold]")
        for row in group.rows:
            colour = colours.get(row.verdict, "default")
            held = row.quality_verdict if row.quality_verdict not in (None, "identical") else ""
            cells = [
                escape(spell_plan(row)),
                spell_ratio(row),
                f"{spell_quality(row, group.metric)} {held}".strip(),
                *([spell_memory(row)] if memory else []),
                f"{spell_seconds(row.setup_seconds)}, {spell_break_even(row, group.mode)}",
                f"[{colour}]{row.verdict}[/{colour}]",
            ]
            shown.add_row(*cells)
    return shown


def wide_console(stderr: bool = False) -> Any:
    """A console for tables: as wide as the terminal, and wide enough where the output goes to a file."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


def escape(text: str) -> str:
    """Square brackets of a plan are no markup."""
    return text.replace("[", "\\[")


def spell_memory(row: Row) -> str:
    share = f" ({row.peak_bytes / row.peak_base:.0%})" if row.peak_bytes and row.peak_base else ""
    return spell_bytes(row.peak_bytes) + share


def notes(group: Group) -> list[str]:
    """The settings that tuning found, and what each method of a plan gives."""
    lines = []
    for name, facts in [("baseline", group.baseline), *((spell_plan(row), row.facts) for row in group.rows)]:
        if "tuned" in facts and "shown" not in facts:
            values = ", ".join(f"{knob}={value:.3g}" for knob, value in facts["tuned"].items()) or "as they were given"
            lines.append(
                f"{name}: tuned in {facts['tuning_trials']} trials ({spell_seconds(facts['tuning_cpu'])} of CPU time): "
                + values
            )
    for row in group.rows:
        gives = [f"{method} gives {spell_gain(found)}" for method, found in row.facts.get("gives", {}).items()]
        lines += [f"{row.plan}: {', '.join(gives)}"] if gives else []
    return lines


def spell_gain(found: dict[str, float | None]) -> str:
    """`1.42x (1.31 to 1.55)`."""
    high = found["high"]
    end = f"{high:.2f}" if high is not None and math.isfinite(high) else "no bound"
    return f"{found['gain']:.2f}x ({found['low']:.2f} to {end})"


def caption(group: Group) -> str:
    """What the columns of one workload mean."""
    base, metric = group.baseline, group.metric
    words = [f"{group.workload}: quality is {metric['name']}, {metric['better']} is better"]
    if base.get("quality") is not None:
        words.append(f"baseline {base['quality']:.4g}")
    if base.get("seconds") is not None:
        words.append(f"{base['seconds']:.3g} s a {'run' if group.mode == 'train' else 'request'}")
    return ", ".join([*words, f"clock {' and '.join(sorted({row.clock for row in group.rows}))}"])
