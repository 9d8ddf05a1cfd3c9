"""Ten thousand random plans, YAML files and argument lists: a person sees a message, never a traceback."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.bench import compare as comparing
from hasten.cli.app import run
from hasten.core import names
from hasten.core.errors import HastenError
from hasten.core.plans import Plan

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
NAMES = [
    *names.method_files(),
    *(full.split("/")[1] for full in names.method_files()),
    "kv/",
    "/cake",
    "kv.cake",
    "baseline",
]
OPTIONS = sorted({row[0] for full in names.method_files() for row in names.load(full).documented()}) + ["", "keep "]

values = st.one_of(
    st.integers(-(10**400), 10**400).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "none", "1e999", "-0", "nan", "[1, 2", "[]", "'a", "'it\\'s'", "kv/cake(keep=0.5)", "cake", "()"]
    ),
    st.text(max_size=8),
)
options = st.tuples(st.sampled_from(OPTIONS) | st.text(max_size=6), values).map("=".join)
method = st.tuples(st.sampled_from(NAMES), st.lists(options, max_size=3)).map(
    lambda parts: parts[0] + (f"({', '.join(parts[1])})" if parts[1] else "")
)
plans = st.lists(method, max_size=3).map(" + ".join) | st.text(max_size=40) | st.text("()[]=+,'\"/ a1.", max_size=60)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NAMES) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, *OPTIONS, "plan"]), inner, max_size=2)
    ),
    max_leaves=8,
)


def answers(function, *arguments):
    """The error a person would be shown, or None; anything else escapes and fails the test."""
    try:
        function(*arguments)
    except HastenError as error:
        text = str(error)
        assert text and "Traceback" not in text and len(text) < 20_000
        return text
    return None


@settings(max_examples=2000, **QUICK)
@given(plans)
def test_plan_text(text):
    if answers(Plan.parse, text) is None:
        plan = Plan.parse(text)
        assert Plan.parse(str(plan)) == plan and Plan.from_yaml(plan.to_yaml()) == plan


@settings(max_examples=1500, **QUICK)
@given(trees.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)) | st.text(max_size=40))
def test_yaml(text):
    answers(Plan.from_yaml, text)


words = (
    st.sampled_from(
        [
            "list",
            "show",
            "compare",
            "apply",
            "train",
            "evidence",
            "env",
            "calibrate",
            "--json",
            "--seeds",
            "--budget",
            "--margin",
            "--out",
            "--help",
            "5m",
            "0",
            "-1",
            "1%",
            "stdlib-lm",
            "digits-vit(task=train)",
            "hf:",
            "hf:nowhere",
            "x.py:f",
            "nope",
            "--check",
            "",
            "\x00",
            "--",
            "baseline",
            "quant",
            "kv/cake",
            "stdlib-lm(",
            "--precision",
            "--steps",
        ]
    )
    | plans
)


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """Commands check their arguments and then do nothing."""
    from hasten.bench import calibrate, evidence, gate, report, serving, training
    from hasten.cli import training as jobs
    from hasten.cli import work

    nothing = lambda *_, **__: None  # noqa: E731
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "compare_serving", nothing)
    monkeypatch.setattr(training, "compare_training", nothing)
    monkeypatch.setattr(report, "write", nothing)
    monkeypatch.setattr(gate, "gate", lambda *_, **__: gate.Gate("not checked", ""))
    monkeypatch.setattr(evidence, "collect", lambda method, **_: evidence.check([method])[0])
    monkeypatch.setattr(work, "calibrate_command", lambda *_: 0)
    monkeypatch.setattr(work, "apply_command", lambda model, plan, out, text: Plan.of(plan) and 0)
    monkeypatch.setattr(jobs.Job, "run", lambda self: 0)
    monkeypatch.setattr(calibrate, "calibrate", nothing)
    monkeypatch.setattr(
        comparing.machine if hasattr(comparing, "machine") else gate, "cache_folder", lambda: tmp_path, raising=False
    )


def test_argument_lists(unmeasured, capsys):
    @settings(max_examples=1200, **QUICK)
    @given(st.lists(words, max_size=5))
    def check(arguments):
        code = run(arguments)
        out, err = capsys.readouterr()
        assert code in (0, 1, 2, 3), (arguments, code, err)
        assert "Traceback" not in err and "this should not have happened" not in err, (arguments, err)
        if code == 2:
            assert err.strip() or out.strip()

    check()
