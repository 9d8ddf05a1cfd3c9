"""Commands and their options; each does its work in a module of its own."""

import os
import pathlib
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="hasten",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Makes PyTorch models train and run faster with published techniques, and proves it.",
)

Workload = Annotated[
    str,
    typer.Argument(help="stdlib-lm, digits-vit, digits-dit, hf:NAME_OR_PATH, or file.py:factory", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout and nothing else.")]


def run(arguments: list[str]) -> int:
    """Runs the command line and turns every error into a message and an exit code."""
    from hasten.core.errors import HastenError

    try:
        return int(app(args=arguments, prog_name="hasten", standalone_mode=False) or 0)
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        say("interrupted")
        return 130
    except HastenError as error:
        say(f"hasten: {error}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            say(f"hasten: {error.format_message()}\nSee 'hasten --help' or 'hasten COMMAND --help'.")
            return 2
        if os.environ.get("HASTEN_DEBUG"):
            raise
        text = " ".join(str(error).split())[:500]
        say(
            f"hasten: this should not have happened: {type(error).__name__}: {text}\n"
            "Set HASTEN_DEBUG=1 and run it again to see where."
        )
        return 1


def say(text: str) -> None:
    print(text.encode(errors="replace").decode(), file=sys.stderr)


@app.command()
def compare(
    workload: Workload,
    plans: Annotated[
        list[str],
        typer.Argument(
            help="Plans such as 'prune/llm_drop(keep=0.75) + quant/gptq', or YAML files.", show_default=False
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Training runs, or sets of requests.")] = 3,
    budget: Annotated[str, typer.Option(help="Time for everything: 90s, 5m, 1h.")] = "5m",
    margin: Annotated[str, typer.Option(help="How much worse quality may be.")] = "1%",
    precision: Annotated[str, typer.Option(help="Half-width of the interval at which timing stops.")] = "2%",
    out: Annotated[
        pathlib.Path | None, typer.Option(help="Folder for trials.jsonl, result.json and report.html.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each arm in its own process.")] = True,
    gate: Annotated[bool, typer.Option(help="First run the tests of the plans' methods, where they are there.")] = True,
    tuned: Annotated[
        int, typer.Option(help="Trials of tuning that the baseline and every training plan get first; 0 for none.")
    ] = 0,
    charge_tuning: Annotated[bool, typer.Option(help="Add what tuning took to every run of its arm.")] = False,
    leave_one_out: Annotated[
        bool, typer.Option(help="Measure each plan without each of its methods too: what each gives.")
    ] = False,
    json: Json = False,
) -> int:
    """Measure plans against the baseline: speedup with an interval, quality, memory, set-up, verdict.

    Ctrl-C keeps what is finished; the same line again continues. Exit codes: 0 done, 2 wrong usage, 3 budget spent
    before a verdict, 130 interrupted.
    """
    from hasten.cli.compare import command

    options = dict(seeds=seeds, budget=budget, margin=margin, precision=precision, out=out, memory=memory, gated=gate)
    tuning = dict(tuned=tuned, charge_tuning=charge_tuning, leave_one_out=leave_one_out)
    return command(workload, plans, {**options, **tuning}, json)


@app.command()
def tune(
    workload: Workload,
    plans: Annotated[list[str], typer.Argument(help="Training plans; the baseline is tuned with them.")],
    trials: Annotated[int, typer.Option(help="Training runs for each arm.")] = 12,
    budget: Annotated[str, typer.Option(help="Time for everything: 90s, 5m, 1h.")] = "10m",
    seed: Annotated[int, typer.Option(help="Of what is tried.")] = 0,
    out: Annotated[pathlib.Path | None, typer.Option(help="Folder for trials.jsonl and tuned.json.")] = None,
    json: Json = False,
) -> int:
    """Search the settings of the baseline and of training plans, with as many trials for each.

    Ctrl-C keeps what is finished; the same line again continues. hasten compare --tuned N does this and compares.
    """
    from hasten.cli.tuning import command

    return command(workload, plans, trials, budget, seed, out, json)


@app.command(name="list")
def list_methods(
    family: Annotated[str | None, typer.Argument(help="One family only, such as quant.", show_default=False)] = None,
    json: Json = False,
) -> int:
    """All methods, or those of one family."""
    from hasten.cli.catalogue import list_command

    return list_command(family, json)


@app.command()
def show(
    method: Annotated[str, typer.Argument(help="A method, such as kv/cake or cake.", show_default=False)],
    json: Json = False,
) -> int:
    """One method: its card and options, the claimed figure beside the measured ones, when to use it."""
    from hasten.cli.catalogue import show_command

    return show_command(method, json)


@app.command()
def apply(
    model: Annotated[
        str,
        typer.Argument(help="A model's folder or hub name, or stdlib-lm, digits-vit, digits-dit.", show_default=False),
    ],
    plan: Annotated[str, typer.Argument(help="A plan or a YAML file.", show_default=False)],
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the weights and the plan.")],
    text: Annotated[pathlib.Path | None, typer.Option(help="A text to calibrate on.")] = None,
    format: Annotated[
        str, typer.Option(help="hasten, or for other libraries compressed-tensors or gptq (quantized models).")
    ] = "hasten",
) -> int:
    """Apply a plan to a trained model and save the result; hasten.load_pretrained(OUT) loads it."""
    from hasten.cli.work import apply_command

    return apply_command(model, plan, out, text, format)


@app.command()
def train(
    workload: Workload,
    plan: Annotated[str, typer.Argument(help="A plan, a YAML file, or baseline.")] = "baseline",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the workload's own number by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the data order and the run.")] = 0,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="Folder for checkpoints; the same line again resumes.")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    tensorboard: Annotated[pathlib.Path | None, typer.Option(help="Folder for TensorBoard's curves.")] = None,
    spread: Annotated[str, typer.Option(help="Under torchrun: ddp or fsdp.")] = "ddp",
) -> int:
    """Train a workload with a plan; on several processes under torchrun -m hasten train."""
    from hasten.cli.work import train_command

    return train_command(workload, plan, steps, seed, out, every, accumulate, precision, tensorboard, spread)


@app.command()
def evidence(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all by default.", show_default=False)] = None,
    check: Annotated[bool, typer.Option("--check", help="Measure nothing: show which evidence stands.")] = False,
    budget: Annotated[str, typer.Option(help="Time for each method.")] = "3m",
    margin: Annotated[str, typer.Option(help="How much worse quality may be.")] = "1%",
    seeds: Annotated[int, typer.Option(help="Training runs, or sets of requests.")] = 3,
    together: Annotated[
        bool, typer.Option("--together", help="Methods of one workload share its baseline's runs, and their budgets.")
    ] = False,
    json: Json = False,
) -> int:
    """Run each method's smallest honest experiment and append what it gives to evidence/."""
    from hasten.cli.work import evidence_command

    return evidence_command(methods or [], check, budget, margin, seeds, together, json)


@app.command()
def calibrate(
    comparisons: Annotated[int, typer.Option(help="Comparisons of each kind.")] = 100,
    json: Json = False,
) -> int:
    """Test the measuring itself: false claims on identical arms, and a planted 10% slowdown."""
    from hasten.cli.work import calibrate_command

    return calibrate_command(comparisons, json)


@app.command()
def env(json: Json = False) -> int:
    """The machine, the versions and what is missing: what a report of a problem should hold."""
    from hasten.cli.work import env_command

    return env_command(json)
