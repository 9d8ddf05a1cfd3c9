"""The table of a family's methods, and shares and ratios of losses with known answers."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

import hasten
from hasten.bench import method_table
from hasten.core import names
from hasten.core.errors import HastenError
from small_workload import Small

BENCHMARKS = pathlib.Path(hasten.__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plans_are_those_that_the_methods_take():
    found = method_table.plans("quant", {"bits": (4, 3, 2)})
    assert {"quant/gptq", "quant/gptq(bits=3)", "quant/gptq(bits=2)", "quant/marlin"} <= set(found)
    assert "quant/marlin(bits=3)" not in found
    listed = {name for name in names.method_files() if name.startswith("quant/")}
    assert {plan.partition("(")[0] for plan in found} == listed
    pruned = method_table.plans("prune", {"sparsity": (0.5, 0.7), "keep": (0.75,)})
    assert {"prune/wanda", "prune/wanda(sparsity=0.7)", "prune/slicegpt"} <= set(pruned)
    assert not any(plan.startswith("prune/squarehead") for plan in pruned)


def test_the_table_says_what_was_measured_and_what_failed(tmp_path, capsys):
    kept = tmp_path / "quant_table.json"
    kept.write_text(json.dumps({"rows": [{**vars(method_table.Row("quant/old", why="gone"))}]}))
    given = ["quant/round_to_nearest(bits=8)", "quant/round_to_nearest(bits=2)", "quant/round_to_nearest(ignore=['*'])"]
    rows = method_table.table("quant", given, quality=Small(), speed=Small(), out=tmp_path, seconds=1.0)
    eight, two, none = rows
    assert abs(eight.change) < 0.003 < two.change and two.low <= two.change <= two.high
    assert two.bytes < eight.bytes < eight.bytes_base
    assert eight.simulated or eight.speed_low <= eight.speed <= eight.speed_high
    assert "no linear layer to quantize" in none.why
    content = json.loads(kept.read_text())
    assert [row["plan"] for row in content["rows"]] == ["quant/old", *given] and content["rows"][1]["commit"]
    page = kept.with_suffix(".md").read_text()
    assert page.count("\n| `quant/") == 4 and f"{two.change:+.2%}" in page and "not measured" in page


def test_the_share_of_a_gap():
    rng = np.random.default_rng(0)
    dense = rng.random(200)
    gap = 0.1 + 0.05 * rng.random(200)
    closed = load("_quant_quality").closed
    found = closed(dense, dense + gap, dense + 0.3 * gap)
    assert found.value == pytest.approx(0.7) and found.low == pytest.approx(0.7) and found.high == pytest.approx(0.7)
    noisy = closed(dense, dense + gap, dense + gap * rng.random(200))
    assert noisy.low < 0.5 < noisy.high and noisy.high - noisy.low < 0.2
    assert closed(dense, dense + gap, dense + 2 * gap).value == pytest.approx(-1)
    with pytest.raises(HastenError, match="no gap to close"):
        closed(dense, dense + rng.standard_normal(200), dense)


def test_the_ratio_of_perplexities():
    rng = np.random.default_rng(0)
    loss = 1 + rng.random(100)
    ratio = load("_prune_quality").perplexities
    found = ratio(loss + 0.5, loss, factor=np.log(2))
    assert found.value == pytest.approx(2**0.5) and found.low == pytest.approx(found.high)
    noisy = ratio(loss + rng.standard_normal(100), loss)
    assert noisy.low < 1 < noisy.high
