"""Commands as a person types them: what they print, what they leave, how they fail."""

import json
import os
import subprocess
import sys

import pytest

import small_workload
from hasten.bench.trials import TrialFile
from hasten.cli.app import run
from hasten.core import names

NAME = f"{small_workload.__file__}:Small"
OPTIONS = ["--no-memory", "--no-gate", "--budget", "15s", "--precision", "20%"]


def test_list(capsys):
    assert run(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names.method_files())
    assert run(["list", "kv", "--json"]) == 0
    listed = [row["method"] for row in json.loads(capsys.readouterr().out)]
    assert listed == [name for name in names.method_files() if name.startswith("kv/")]
    assert run(["list", "quants"]) == 2
    assert "did you mean 'quant'" in capsys.readouterr().err


@pytest.mark.parametrize("method", list(names.method_files()))
def test_show(method, capsys):
    assert run(["show", method]) == 0
    out = capsys.readouterr().out
    assert names.card(method).claim[:40] in out and "use it when" in out
    assert run(["show", method, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == method


def test_compare_prints_one_object(tmp_path, capsys):
    code = run(["compare", NAME, "quant/gptq(bits=8)", "--json", "--out", str(tmp_path), *OPTIONS])
    captured = capsys.readouterr()
    assert code in (0, 3), captured.err
    printed = json.loads(captured.out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert printed["plans"][0]["plan"] == "quant/gptq(bits=8)" and TrialFile(tmp_path / "trials.jsonl").read()


def test_compare_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(["compare", NAME, "quant/gptq(bits=8)", "--out", str(tmp_path), *OPTIONS]) in (0, 3)
    captured = capsys.readouterr()
    assert "speedup (95%)" in captured.out and "left" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", NAME, "kv/cack"], "did you mean 'kv/cake'"),
        (["compare", "nothing", "kv/cake"], "there is no workload 'nothing'"),
        (["compare", NAME], "Missing argument"),
        (["compare", NAME, "kv/cake", "--seeds", "x"], "--seeds"),
        (["compare", NAME, "kv/cake", "--bugdet", "5m"], "No such option"),
        (["show", "cacke"], "did you mean 'cake'"),
        (["train", NAME, "optim/sinkgd", "--every", "0"], "--every"),
        (["train", NAME, "kv/cake"], "kv"),
        (["calibrate", "--comparisons", "1"], "at least 10"),
        (["evidence", "nosuch"], "there is no method"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_train_checkpoints_and_resumes(tmp_path, capsys):
    line = ["train", NAME, "optim/sinkgd", "--steps", "20", "--every", "5", "--out", str(tmp_path / "a")]
    assert run(line) == 0
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["step"] == 20 and (tmp_path / "a/model/model.safetensors").exists()
    points = [json.loads(text)["step"] for text in (tmp_path / "a/curve.jsonl").read_text().splitlines()]
    assert points == [5, 10, 15, 20]
    capsys.readouterr()
    assert run(line) == 0
    assert "resumed at step 20" in capsys.readouterr().err


def test_apply_saves_what_load_reads(tmp_path, capsys):
    import torch

    import hasten

    model = small_workload.Small().trained()
    assert run(["apply", NAME, "quant/gptq(bits=8)", "--out", str(tmp_path / "fast")]) == 0
    loaded = hasten.load_pretrained(tmp_path / "fast", model=model)
    assert str(loaded.plan) == "quant/gptq(bits=8)" and loaded.model(torch.ones(1, 16)).shape == (1, 3)
    assert run(["apply", NAME, "quant/gptq(bits=8)", "--out", str(tmp_path / "fast")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_env(capsys):
    assert run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == len(names.method_files()) and "cpu" in found and "versions" in found


def test_evidence_check(capsys):
    run(["evidence", "--check", "--json"])
    rows = json.loads(capsys.readouterr().out)
    wanted = (
        "method title paper gate effects simulated claimed measured low high quality_verdict verdict workload machine "
        "commit"
    )
    assert [row["method"] for row in rows] == list(names.method_files())
    assert all(set(wanted.split()) <= set(row) for row in rows)


@pytest.mark.slow
def test_train_under_torchrun(tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hasten"]
    line += ["train", NAME, "optim/sinkgd", "--steps", "10", "--out", str(tmp_path / "b")]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "b/result.json").read_text())["step"] == 10


def test_evidence_without_an_interval_is_spelled():
    from hasten.cli.catalogue import spell_evidence

    line = {"measured": None, "low": 0.0, "high": None, "clock": "wall", "verdict": "undecided", "plan": "a/b",
            "quality_verdict": "held", "workload": "w", "machine": {"cpu": "C"}}  # fmt: skip
    assert spell_evidence(line) == "undecided; quality held; a/b on w, C"
