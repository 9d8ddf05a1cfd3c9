"""The report's plots: matplotlib's SVG whose ink follows the page's light or dark colours."""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from hasten.bench.result import Group, Row
from hasten.bench.trials import Trial
from hasten.core.errors import HastenError
from hasten.core.plans import Plan

# Sentinels that matplotlib draws with and the page replaces by its own colours.
INK, FAINT = "#010203", "#040506"
ARMS = ["#070801", "#070802", "#070803", "#070804", "#070805", "#070806", "#070807", "#070808"]
FEW_LINES = 3
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", **{one: f"var(--arm{n})" for n, one in enumerate(ARMS)}}


def colour(n: int) -> str:
    return ARMS[n % len(ARMS)]


def _figure(width: float = 5.2, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an inline SVG element that scales with the page and has a title for screen readers."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hasten", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"', r"<svg \1\2", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = text.replace("<svg ", '<svg role="img" ', 1)
    end = text.index(">") + 1
    text = f"{text[:end]}<title>{title}</title>{text[end:]}"
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, variable)
    return text


def labels(group: Group) -> dict[str, str]:
    """A short name for each plan: its methods without their options, with the table's number where two are alike."""
    found = {"baseline": "baseline"}
    for row in group.rows:
        try:
            short = " + ".join(method.name.rpartition("/")[2] for method in Plan.parse(row.plan).methods)
        except HastenError:
            short = row.plan
        found[row.plan] = str(row.facts.get("shown") or short)
    alike = list(found.values())
    numbered = {row.plan: n for n, row in enumerate(group.rows, 1)}
    return {
        plan: "\n".join(textwrap.wrap(f"{numbered[plan]}. {name}" if alike.count(name) > 1 else name, 46))
        for plan, name in found.items()
    }


def _legend(axes: Any) -> None:
    """The arms' names: inside where they are few, below the axes, for which the figure grows, where they are many."""
    handles, names = axes.get_legend_handles_labels()
    lines = sum(name.count("\n") + 1 for name in names)
    if lines <= FEW_LINES:
        found = axes.legend(frameon=False, fontsize=8, loc="best")
    else:
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.17 * lines)
        found = axes.figure.legend(handles, names, frameon=False, fontsize=8, loc="outside lower left")
    for label in found.get_texts():
        label.set_color(INK)


def speed_against_quality(group: Group, margin: float) -> str | None:
    """Each plan's speedup against its change of quality, with both intervals and the margin."""
    rows = [row for row in group.rows if row.speedup and row.quality_change is not None and not row.simulated]
    if not rows:
        return None
    names = labels(group)
    figure, axes = _figure()
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.axhline(0, color=FAINT, linewidth=1)
    limit = margin * 100 * (1 if group.metric["better"] == "lower" else -1)
    axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "margin", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9, color=INK
    )
    for n, row in enumerate(group.rows):
        if row not in rows or row.speedup is None:
            continue
        x, y = row.speedup, (row.quality_change or 0) * 100
        low, high = _finite(row.low, x), _finite(row.high, x)
        worst, best = _finite(row.quality_low, y / 100) * 100, _finite(row.quality_high, y / 100) * 100
        axes.errorbar(
            [x],
            [y],
            xerr=[[max(0, x - low)], [max(0, high - x)]],
            yerr=[[max(0, y - worst)], [max(0, best - y)]],
            fmt="o",
            color=colour(n + 1),
            capsize=3,
            label=names[row.plan],
        )
    axes.set_xlabel("speedup (1 is the baseline)")
    axes.set_ylabel(f"change of {group.metric['name']}, %")
    axes.margins(0.15)
    _legend(axes)
    return _svg(figure, "speed against quality")


def pairs(group: Group, trials: Sequence[Trial]) -> str | None:
    """Every measured pair in the order of measuring: baseline time over plan time."""
    base = {trial.id: trial for trial in trials if trial.plan == "baseline"}
    names = labels(group)
    figure, axes = _figure()
    axes.axhline(1, color=FAINT, linewidth=1)
    drawn = False
    for n, row in enumerate(group.rows):
        ratios = pair_ratios(row, base, trials)
        if not ratios:
            continue
        drawn = True
        axes.plot(
            range(1, len(ratios) + 1), ratios, "o", markersize=3, alpha=0.7, color=colour(n + 1), label=names[row.plan]
        )
        if row.low and row.high and math.isfinite(row.high):
            axes.axhspan(row.low, row.high, color=colour(n + 1), alpha=0.15, linewidth=0)
    if not drawn:
        return None
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("pair, in the order of measuring")
    axes.set_ylabel("baseline time / plan time")
    _legend(axes)
    return _svg(figure, "every measured pair")


def pair_ratios(row: Row, base: dict[str, Trial], trials: Sequence[Trial]) -> list[float]:
    """The ratios of a plan's pairs by the clock of its row."""
    ratios = []
    for trial in trials:
        of = base.get(trial.baseline or "")
        if trial.plan == row.plan and of is not None and trial.what in ("time", "run"):
            ours, theirs = getattr(trial, row.clock), getattr(of, row.clock)
            ratios += [b / p for b, p in zip(theirs, ours, strict=False) if p > 0]
    return ratios


def curves(group: Group, trials: Sequence[Trial]) -> str | None:
    """Quality against training time, one line for each arm and seed."""
    runs = [trial for trial in trials if trial.what == "run" and trial.facts.get("curve")]
    if not runs:
        return None
    arms = ["baseline", *(row.plan for row in group.rows)]
    names = labels(group)
    figure, axes = _figure(height=3.4)
    named: set[str] = set()
    for trial in runs:
        if trial.plan not in arms:
            continue
        n = arms.index(trial.plan)
        points = trial.facts["curve"]
        axes.plot(
            [p[1] for p in points],
            [p[3] for p in points],
            color=colour(n),
            linewidth=1.4,
            alpha=0.85,
            label=None if trial.plan in named else names[trial.plan],
        )
        named.add(trial.plan)
    target = group.baseline.get("target")
    if target is not None:
        axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "target", (1, target), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9, color=INK
        )
    axes.set_xlabel("training time, s (evaluation untimed, set-up charged)")
    axes.set_ylabel(group.metric["name"])
    if group.metric["better"] == "lower" and all(p[3] > 0 for t in runs for p in t.facts["curve"]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    _legend(axes)
    return _svg(figure, "quality against training time")


def _finite(value: float | None, other: float) -> float:
    return value if value is not None and math.isfinite(value) else other
