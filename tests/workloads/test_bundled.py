"""Bundled workloads: their weights do what their records say, and one seed gives one run."""

import importlib

import pytest
import torch

import hasten
from hasten.workloads import text, weights
from hasten.workloads.find import BUNDLED


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in weights.HOME.glob("*.safetensors") if file.stem != "digits_features")
)
def test_records_name_the_command(name):
    record = weights.record(name)
    assert record["command"].startswith("python scripts/make_") and "seed" in record["command"]


def test_a_workload_prints_as_it_is_called():
    for name, module in BUNDLED.items():
        assert importlib.import_module(module).WORKLOAD.title() == name


def test_weights_are_small():
    assert sum(file.stat().st_size for file in weights.HOME.iterdir()) < 20e6


def test_the_target_predicts_its_text():
    workload = hasten.workload("stdlib-lm(examples=8, prompt=128)")
    handle = hasten.apply(workload.trained(), "")
    assert workload.quality(handle).mean() < 2.2
    out = workload.serve(handle, workload.requests(0)[0])
    assert out.shape == (1, 64)


def test_the_vit_tells_digits_apart():
    workload = hasten.workload("digits-vit")
    assert workload.quality(hasten.apply(workload.trained(), "")).mean() > 0.9


@pytest.mark.parametrize(
    "name", ["stdlib-lm(task=train, rows=2)", "digits-vit(task=train, rows=4)", "digits-dit(task=train)"]
)
def test_one_seed_is_one_run(name):
    workload = hasten.workload(name)

    def first():
        batch = next(iter(workload.batches(3)))
        return workload.loss(workload.build(3), batch)

    assert torch.equal(first(), first())


def test_held_out_text_is_held_out():
    files = [path for path, _ in text.source_files()]
    part = sum(map(text.is_held_out, files)) / len(files)
    assert 0.04 < part < 0.14 and len(text.stream(True)) > 200_000
