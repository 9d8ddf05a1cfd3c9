"""`hasten apply`, `train`, `evidence`, `calibrate` and `env`."""

import dataclasses
import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from hasten.bench.result import wide_console
from hasten.core.errors import UsageError
from hasten.core.plans import Plan


def apply_command(model: str, plan: str, out: pathlib.Path, text: pathlib.Path | None, format: str) -> int:
    from hasten.api import apply
    from hasten.quant._exchange import FORMATS
    from hasten.workloads.find import BUNDLED, workload

    if format not in ("hasten", *FORMATS):
        raise UsageError(f"--format is hasten, {' or '.join(FORMATS)}, not {format!r}")
    parsed = Plan.of(plan)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: give a new folder")
    name = model.partition("(")[0]
    if name in BUNDLED or name.startswith("hf:") or ".py" in name:
        found = workload(model, **({"text": str(text)} if text else {}))
    else:
        found = workload(f"hf:{model}", **({"text": str(text)} if text else {}))
    handle = apply(found.trained(), parsed, **found.handed(parsed.methods))
    if format == "hasten":
        handle.save(out)
    else:
        handle.export(out, format)
    console = Console(stderr=True)
    for method, facts in handle.report.items():
        console.print(f"{method}: " + ", ".join(f"{k} {v}" for k, v in facts.items()), highlight=False, soft_wrap=True)
    console.print(f"saved; load it with hasten.load_pretrained({str(out)!r})", highlight=False, soft_wrap=True)
    return 0


def train_command(
    name: str,
    plan: str,
    steps: int | None,
    seed: int,
    out: pathlib.Path | None,
    every: int,
    accumulate: int,
    precision: str,
    tensorboard: pathlib.Path | None,
    spread: str,
) -> int:
    from hasten.cli.training import Job

    if every < 1:
        raise UsageError(f"--every must be at least 1, not {every}")
    if spread not in ("ddp", "fsdp"):
        raise UsageError(f"--spread must be ddp or fsdp, not {spread!r}")
    return Job(name, Plan.of(plan), steps, seed, out, every, accumulate, precision, tensorboard, spread).run()


def evidence_command(
    methods: list[str], check: bool, budget: str, margin: str, seeds: int, together: bool, as_json: bool
) -> int:
    from hasten.bench import evidence
    from hasten.bench.compare import parse_seconds
    from hasten.cli.compare import LiveProgress
    from hasten.core import names

    wanted = [names.resolve(method) for method in methods]
    if check:
        found = evidence.check(wanted)
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            wide_console().print(evidence_table(found))
        return 0 if all(line["stands"] for line in found) else 1
    console, lines = Console(stderr=True), []
    groups: dict[str, list[str]] = {}
    for method in wanted or list(names.method_files()):
        groups.setdefault(names.card(method).experiment[0] if together else method, []).append(method)
    for group in groups.values():
        console.print(f"[bold]{', '.join(group)}[/bold]")
        seconds = parse_seconds(budget) * len(group)
        progress = LiveProgress(None, console, seconds)
        collect = (
            evidence.collect_together if len(group) > 1 else lambda one, **more: [evidence.collect(one[0], **more)]
        )
        lines += collect(group, budget=seconds, margin=margin, progress=progress, seeds=seeds)
    if as_json:
        print(json.dumps(lines, indent=1))
    else:
        wide_console().print(
            evidence_table([{**line, "stands": line["gate"] == "green", "problem": None} for line in lines])
        )
    return 0


def evidence_table(lines: list[dict[str, Any]]) -> Table:
    shown = Table(title="claimed against measured")
    for column in ("method", "claimed", "measured (95%)", "quality", "verdict", "workload", "stands"):
        shown.add_column(column, overflow="fold")
    for line in lines:
        measured = (
            "-"
            if line["low"] is None
            else f"{line['measured']:.2f}x ({line['low']:.2f} to {line['high']:.2f})"
            if line["high"] is not None
            else f"at least {line['low']:.2f}x"
        )
        claimed = f"{line['claimed']:.2f}x" if line["claimed"] else "no figure"
        problem = "yes" if line["stands"] else line["problem"] or "no"
        shown.add_row(
            line["method"],
            claimed,
            "simulated" if line["simulated"] else measured,
            str(line["quality_verdict"] or "-"),
            str(line["verdict"] or "-"),
            line["workload"],
            problem,
        )
    return shown


def calibrate_command(comparisons: int, as_json: bool) -> int:
    from hasten.bench.calibrate import calibrate

    if comparisons < 10:
        raise UsageError(f"--comparisons must be at least 10 to say anything, not {comparisons}")
    found = calibrate(comparisons)
    content = dataclasses.asdict(found)
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        for key, value in content.items():
            print(f"{key}: {value}")
    return 0 if found.passed else 1


def env_command(as_json: bool) -> int:
    import importlib.util

    import torch  # noqa: F401  # so that its threads are what is shown

    import hasten
    from hasten.bench import machine
    from hasten.core import names

    found: dict[str, Any] = {
        "hasten": hasten.__version__,
        "methods": len(names.method_files()),
        **machine.fingerprint(),
    }
    extras = {"diffusers": "diffusion", "timm": "vision", "tensorboard": "track", "pytest": "dev", "triton": None}
    found["missing"] = {
        package: f'pip install "hasten[{extra}]"' if extra else f"pip install {package}"
        for package, extra in extras.items()
        if importlib.util.find_spec(package) is None
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" if key != "missing" else f"{k} ({v})" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(one) for one in value)
        print(f"{key:>12}  {'-' if value in (None, '') else value}")
    return 0
