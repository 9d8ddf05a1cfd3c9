"""`hasten list` and `hasten show`."""

import dataclasses
import json
from typing import Any

from hasten.core import names
from hasten.core.errors import UsageError, nearest
from hasten.core.families import FAMILIES


def list_command(family: str | None, as_json: bool) -> int:
    present = sorted({full.split("/")[0] for full in names.method_files()}, key=list(FAMILIES).index)
    if family is not None and family not in present:
        raise UsageError(f"there is no family {family!r}{nearest(family, present)} there are: {', '.join(present)}")
    found = {full: names.card(full) for full in names.method_files() if family in (None, full.split("/")[0])}
    if as_json:
        print(json.dumps([{"method": full, **dataclasses.asdict(card)} for full, card in found.items()], indent=1))
        return 0
    width = max(len(full) for full in found)
    last = ""
    for full, card in found.items():
        group = full.split("/")[0]
        if group != last:
            print(f"\n{group}: {FAMILIES[group]}" if last else f"{group}: {FAMILIES[group]}")
            last = group
        marks = ", ".join(card.effects) + (", lossless" if card.lossless else "")
        print(f"  {full:<{width}}  {card.title}  [{marks}]")
    print("\n'hasten show METHOD' tells when to use one; 'hasten compare WORKLOAD METHOD' measures it here.")
    return 0


def show_command(method: str, as_json: bool) -> int:
    from hasten.bench.evidence import latest

    full = names.resolve(method)
    card, cls = names.card(full), names.load(full)
    options = [dict(zip(("name", "type", "default", "meaning"), row, strict=True)) for row in cls.documented()]
    lines = latest(full)
    if as_json:
        plain = json.dumps(
            {"method": full, **dataclasses.asdict(card), "options": options, "evidence": lines}, indent=1, default=str
        )
        print(plain)
        return 0
    from rich.console import Console

    show = Console(highlight=False, soft_wrap=True)
    where = card.paper if card.paper.startswith("10.") else f"arXiv {card.paper}"
    show.print(f"[bold]{full}[/bold]  {card.title} ({where})\n", markup=True)
    for title, text in (
        ("use it when", card.when),
        ("not when", card.when_not),
        ("seams", ", ".join(card.seams)),
        ("effects", ", ".join(card.effects) + (", lossless" if card.lossless else "")),
        ("needs", ", ".join(card.needs) or "nothing"),
        ("works on", ", ".join(card.hosts) or "any model in training"),
        ("identity", card.identity if isinstance(card.identity, str) else str(cls(**card.identity))),
        ("claimed", card.claim),
    ):
        show.print(f"{title:>12}  {text}", markup=False)
    for line in lines:
        show.print(f"{'measured':>12}  {spell_evidence(line)}", markup=False)
    if not lines:
        show.print(f"{'measured':>12}  not yet: run 'hasten evidence {full}'", markup=False)
    show.print("\noptions", markup=False)
    for row in options:
        show.print(f"  {row['name']} = {row['default']}  {row['meaning']}", markup=False)
    show.print(f"\nhasten compare {card.experiment[0]!r} {card.experiment[1]!r}", markup=False)
    return 0


def spell_evidence(line: dict[str, Any]) -> str:
    """One evidence line as a sentence."""
    if any(line.get(end) is None for end in ("measured", "low", "high")):  # the budget ended before an interval did
        speed = line.get("verdict", "-")
    else:
        speed = f"{line['measured']:.2f}x ({line['low']:.2f} to {line['high']:.2f}, {line['clock']}): {line['verdict']}"
    cpu = line["machine"].get("cpu", "?") if isinstance(line["machine"], dict) else line["machine"]
    return f"{speed}; quality {line['quality_verdict'] or '-'}; {line['plan']} on {line['workload']}, {cpu}"
