"""Evidence: one line a method, and methods of one workload that share the baseline's runs."""

import dataclasses
import json

import pytest

import small_workload
from hasten.bench import evidence
from hasten.bench.compare import compare
from hasten.cli.app import run as cli
from hasten.core import names

NAME = f"{small_workload.__file__}:Small"
METHODS = ["optim/adamw", "optim/linear_decay"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Both methods' experiments on the small workload, and evidence in a folder of the test's own."""
    cards = {name: dataclasses.replace(names.card(name), experiment=(NAME, name)) for name in METHODS}
    monkeypatch.setattr(names, "card", lambda name, old=names.card: cards.get(name) or old(name))
    monkeypatch.setattr(evidence, "folder", lambda: tmp_path / "evidence")
    monkeypatch.setenv("HASTEN_OUT", str(tmp_path / "out"))
    quick = lambda *given, **more: compare(*given, **{**more, "memory": False, "gated": False})  # noqa: E731
    monkeypatch.setattr(evidence, "compare", quick)
    return tmp_path


def test_methods_of_one_workload_share_its_baseline(small, capsys):
    assert cli(["evidence", *METHODS, "--together", "--budget", "60s", "--seeds", "2", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["method"] for line in lines] == METHODS and all(line["pairs"] == 2 for line in lines)
    assert lines[0]["quality_base"] == lines[1]["quality_base"] and lines[0]["facts"] != lines[1]["facts"]
    for line in lines:
        assert line["plan"] == line["method"] and evidence.lines_of(line["method"]) == [line]
    (trials,) = small.glob("out/evidence/*/trials.jsonl")
    kept = [json.loads(line) for line in trials.read_text().splitlines()]
    assert [one["plan"] for one in kept if one["what"] == "run"].count("baseline") == 2


def test_one_by_one_each_has_a_baseline_of_its_own(small):
    assert cli(["evidence", *METHODS, "--budget", "60s", "--seeds", "1"]) == 0
    assert [evidence.lines_of(name)[0]["pairs"] for name in METHODS] == [1, 1]
    assert len(list(small.glob("out/evidence/optim/*/trials.jsonl"))) == 2
