"""Writes docs/methods from cards, docstrings and evidence, and the table of results in README.md.

    python scripts/make_docs.py            # write
    python scripts/make_docs.py --check    # exit 1 when a page is not what it would write

Run it whenever a card, a docstring or the evidence has changed.
"""

import ast
import pathlib
import sys
from typing import Any

from hasten.bench import evidence
from hasten.cli.catalogue import spell_evidence
from hasten.core import names
from hasten.core.families import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by scripts/make_docs.py -->", "<!-- end of results -->"


def docstring(method: str) -> str:
    return (ast.get_docstring(ast.parse(names.method_files()[method].read_text())) or "").strip()


def paper(card: Any) -> str:
    kind = "https://doi.org/" if card.paper.startswith("10.") else "https://arxiv.org/abs/"
    return f"[{card.title}]({kind}{card.paper})"


def speed(line: dict[str, Any]) -> str:
    if line["simulated"]:
        return "simulated"
    if line["low"] is None or line["measured"] is None:
        return "-"
    high = "" if line["high"] is None else f" to {line['high']:.2f}"
    return f"{line['measured']:.2f}x ({line['low']:.2f}{high})"


def page(method: str) -> str:
    card, cls = names.card(method), names.load(method)
    body, _, rest = docstring(method).partition("\n\n")
    lines = [
        f"# {method}",
        "",
        body,
        "",
        f"Paper: {paper(card)}. Claim: {card.claim}",
        "",
        f"**Use it when** {lower(card.when)}",
        "",
        f"**Not when** {lower(card.when_not)}",
        "",
        "## Measured",
        "",
    ]
    found = evidence.latest(method)
    if found:
        lines += [
            "| workload | plan | claimed | measured (95%) | quality | memory held | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for line in found:
            claimed = f"{line['claimed']:.2f}x" if line["claimed"] else "no figure"
            held = (
                f"{line['held_bytes'] / line['held_base']:.0%}"
                if line.get("held_bytes") and line.get("held_base")
                else "-"
            )
            lines.append(
                f"| `{line['workload']}` | `{line['plan']}` | {claimed} | {speed(line)} "
                f"| {line['quality_verdict'] or '-'} | {held} | {line['verdict']} |"
            )
        lines += ["", *(f"- {spell_evidence(line)}. {line['why']}." for line in found)]
    else:
        lines.append(f"Not yet: run `hasten evidence {method}`.")
    lines += ["", "## Options", "", "| option | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default}` | {meaning} |" for name, _, default, meaning in cls.documented()] or [
        "| none | | |"
    ]
    identity = card.identity if isinstance(card.identity, str) else f"`{cls(**card.identity)}`"
    lines += [
        "",
        f"Seams: {', '.join(f'`{seam}`' for seam in card.seams)}. Needs: {', '.join(card.needs) or 'nothing'}. "
        f"Works on: {', '.join(card.hosts) or 'any model in training'}. Identity: {identity}.",
        "",
        "## How it works",
        "",
        "```text",
        rest.strip() or body,
        "```",
        "",
        f"Run it: `hasten compare '{card.experiment[0]}' '{card.experiment[1]}'`",
        "",
    ]
    return "\n".join(lines)


def lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def index() -> str:
    lines = ["# Methods", ""]
    for family, question in FAMILIES.items():
        mine = [method for method in names.method_files() if method.startswith(family + "/")]
        if mine:
            lines += [f"## {family}: {question}", ""]
            lines += [f"- [{method}]({method}.md): {names.card(method).title}" for method in mine]
            lines.append("")
    return "\n".join(lines)


def results() -> str:
    rows = [
        "| plan | workload | claimed in the paper's setting | measured here (95%) | quality | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for method in names.method_files():
        for line in evidence.latest(method)[-1:]:
            claimed = f"{line['claimed']:.2f}x" if line["claimed"] else "no figure"
            rows.append(
                f"| [`{line['plan']}`](docs/methods/{method}.md) | `{line['workload']}` | {claimed} | {speed(line)} "
                f"| {line['quality_verdict'] or '-'} | {line['verdict']} |"
            )
    machines = sorted(
        {
            f"{line['machine']['cpu']}, {line['machine']['usable_cores']:.0f} cores"
            for method in names.method_files()
            for line in evidence.latest(method)
        }
    )
    note = "A row is the newest line of `evidence/` for a method; its page has them all."
    return "\n".join([*rows, "", f"Measured on {'; '.join(machines)}. {note}" if machines else ""])


def pages() -> dict[pathlib.Path, str]:
    home = ROOT / "docs" / "methods"
    made = {home / f"{method}.md": page(method) for method in names.method_files()}
    made[home / "index.md"] = index()
    readme = (ROOT / "README.md").read_text()
    start, stop = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    made[ROOT / "README.md"] = f"{readme[:start]}\n{results()}\n{readme[stop:]}"
    return made


def main() -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date: run 'make docs'")
        return 1 if stale else 0
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
