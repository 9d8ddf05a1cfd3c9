"""report.html: one offline file with the table, the plots, the machine and the exact command."""

import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from hasten.bench import plots
from hasten.bench.result import (
    Comparison,
    Group,
    Row,
    caption,
    notes,
    spell_break_even,
    spell_memory,
    spell_plan,
    spell_quality,
    spell_ratio,
    spell_seconds,
)
from hasten.bench.trials import Trial
from hasten.core import names
from hasten.core.errors import HastenError
from hasten.core.plans import Plan

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --panel: #ffffff; --ink: #1d2127; --soft: #5c6570; --faint: #c9ccd1;
  --arm0: #7a828c; --arm1: #0b63c4; --arm2: #c2410c; --arm3: #15803d; --arm4: #7e22ce; --arm5: #a16207; --arm6: #be185d;
  --arm7: #0e7490; --good: #15803d; --bad: #b91c1c; --open: #a16207; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1c2026; --ink: #e8eaed; --soft: #a3abb5;
  --faint: #454c55; --arm0: #9aa3ae; --arm1: #6cb0ff; --arm2: #ff9a5c; --arm3: #6fd28d; --arm4: #c99bff;
  --arm5: #e6c15c; --arm6: #ff8cc0; --arm7: #67d3e6; --good: #6fd28d; --bad: #ff8b85; --open: #e6c15c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .75rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.number { white-space: nowrap; } td.plan { min-width: 11rem; overflow-wrap: break-word; }
.faster { color: var(--good); } .slower, .quality { color: var(--bad); } .undecided { color: var(--open); }
.verdict { font-weight: 600; white-space: nowrap; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
figure { margin: .5rem 0; padding: .75rem; background: var(--panel); border: 1px solid var(--faint);
  border-radius: 6px; }
figure svg { width: 100%; height: auto; display: block; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
pre { background: var(--panel); border: 1px solid var(--faint); border-radius: 6px; padding: .75rem; overflow-x: auto;
  font-size: .88rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write(path: pathlib.Path, comparison: Comparison, trials: Sequence[Trial]) -> None:
    """Writes the report whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(render(comparison, trials), encoding="utf-8")
    os.replace(part, path)


def render(comparison: Comparison, trials: Sequence[Trial]) -> str:
    """The page. `trials` may hold those of other comparisons; only this one's plans and workload are drawn."""
    names_shown = dict.fromkeys(group.workload.partition("(")[0] for group in comparison.groups)
    title = f"{', '.join(names_shown)}: what helped"
    sections = "".join(_section(comparison, group, trials) for group in comparison.groups)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{_text(title)}</h1>
<p>{_text(summary(comparison))}</p>
{sections}
{_claims(comparison)}
<h2>The command</h2><pre>{_text(comparison.command)}</pre>
<h2>The machine</h2>{_machine(comparison)}
<h2>How to read this</h2>
<p class="soft">Baseline and plans were run in turns, in random order, in one process; each figure compares pairs, and
the interval holds the true ratio 95 times in 100, however often it was looked at. An interval that holds 1 is no
measurable gain. Quality is compared example by example; it is held when even the worse end of its interval is within
the margin.</p>
</main></body></html>
"""


def _section(comparison: Comparison, group: Group, trials: Sequence[Trial]) -> str:
    mine = [trial for trial in trials if trial.workload == group.workload]
    plotted = [
        ("Quality against training time", plots.curves(group, mine)),
        ("Speed against quality", plots.speed_against_quality(group, comparison.margin)),
        ("Every measured pair", plots.pairs(group, mine)),
    ]
    figures = "".join(f"<section><h3>{name}</h3><figure>{svg}</figure></section>" for name, svg in plotted if svg)
    doing = "training, time to the target" if group.mode == "train" else "inference, time per request"
    return f"""<h2>{_text(group.workload)}: {doing}</h2>
<p class="soft">{_text(caption(group))}; margin {comparison.margin:.1%}.</p>
<div class="scroll">{_table(group)}</div>
{_reasons(group)}
<div class="two">{figures}</div>
"""


def summary(comparison: Comparison) -> str:
    """The outcome in one sentence."""
    faster = [row for row in comparison.plans if row.verdict == "faster"]
    count = f"{len(comparison.plans)} plan{'s' if len(comparison.plans) != 1 else ''}"
    if comparison.interrupted:
        return f"Interrupted: what was finished of {count} is shown."
    if not faster:
        return f"None of {count} was shown to be faster with quality held."
    best = max(faster, key=lambda row: row.speedup or 0)
    return f"{len(faster)} of {count} faster with quality held; the most is {best.plan}: {spell_ratio(best)}."


def _table(group: Group) -> str:
    memory = any(row.peak_bytes for row in group.rows)
    heads = [
        "plan",
        "verdict",
        "speedup (95%)",
        "pairs",
        "quality",
        *(["peak memory"] if memory else []),
        "set-up, paid back",
    ]
    rows = "".join(_row(group, row, n + 1, memory) for n, row in enumerate(group.rows))
    return (
        f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(group: Group, row: Row, n: int, memory: bool) -> str:
    held = row.quality_verdict if row.quality_verdict not in (None, "identical") else ""
    cells = [
        spell_ratio(row) + (f" {row.clock} clock" if row.clock != "wall" else ""),
        str(row.pairs),
        f"{spell_quality(row, group.metric)} {held}".strip(),
        *([spell_memory(row)] if memory else []),
        f"{spell_seconds(row.setup_seconds)}, {spell_break_even(row, group.mode)}",
    ]
    swatch = f'<span class="swatch" style="background: var(--arm{n % len(plots.ARMS)})"></span>'
    inner = "".join(f'<td class="number">{_text(cell)}</td>' for cell in cells)
    verdict = f'<td class="verdict {row.verdict.split()[0]}">{_text(row.verdict)}</td>'
    return f'<tr><td class="plan">{swatch}{_text(spell_plan(row))}</td>{verdict}{inner}</tr>'


def _reasons(group: Group) -> str:
    found = [f"<li>{_text(spell_plan(row))}: {_text(row.why)}.</li>" for row in group.rows if row.why]
    found += [f"<li>{_text(spell_plan(row))}: {_text(row.lossless)}.</li>" for row in group.rows if row.lossless]
    found += [f"<li>{_text(spell_plan(row))}: {_text(row.drafting)}.</li>" for row in group.rows if row.drafting]
    found += [f"<li>{_text(line)}.</li>" for line in notes(group)]
    red = [
        f"<li>{_text(spell_plan(row))}: its tests fail at this source.</li>" for row in group.rows if row.gate == "red"
    ]
    return f'<ul class="soft">{"".join(found + red)}</ul>' if found or red else ""


def _claims(comparison: Comparison) -> str:
    """What the papers claim, beside the page's own figures."""
    found: dict[str, Any] = {}
    for row in comparison.plans:
        try:
            found |= {method.name: method.card for method in Plan.parse(row.plan).methods}
        except HastenError:
            continue
    if not found:
        return ""
    order = list(names.method_files())
    rows = "".join(
        f'<tr><td class="plan">{_text(name)}</td><td>{_text(card.title)}</td><td>{_text(card.claim)}</td></tr>'
        for name, card in sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else 0)
    )
    return (
        '<h2>What the papers claim, in their settings</h2><div class="scroll"><table><thead><tr><th>method</th>'
        f"<th>paper</th><th>claim</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _machine(comparison: Comparison) -> str:
    machine = dict(comparison.machine)
    versions = machine.pop("versions", {})
    cores = f"{machine.get('usable_cores')} cores usable, {machine.get('threads')} threads"
    changed = " with uncommitted changes" if comparison.dirty else ""
    shown = {
        "processor": f"{machine.get('cpu')}, {cores}",
        "GPU": ", ".join(machine.get("gpus") or []) or "none",
        "memory": f"{machine.get('memory_gb')} GB",
        "system": f"{machine.get('os')}, Python {machine.get('python')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "source": f"{comparison.commit or 'an installed release'}{changed}",
        "load": str(machine.get("load")),
        "measured for": spell_seconds(comparison.seconds),
    }
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in shown.items()) + "</dl>"


def _text(value: Any) -> str:
    return html.escape(str(value))
