"""tabular-mlp: the table is the formula's, the same everywhere; a short run learns it."""

import math

import numpy as np
import pytest
import torch

import hasten
from hasten.bench.training import make_run
from hasten.core.errors import PlanError
from hasten.core.plans import Plan
from hasten.workloads.tabular_mlp import COLUMNS, HELD_OUT, ROWS, table


def test_the_table_is_the_formulas_and_only_the_training_part_is_noisy():
    from sklearn.datasets import make_friedman1

    raw, _ = make_friedman1(ROWS + HELD_OUT, n_features=COLUMNS, noise=0.0, random_state=7)
    y = 10 * np.sin(math.pi * raw[:, 0] * raw[:, 1]) + 20 * (raw[:, 2] - 0.5) ** 2 + 10 * raw[:, 3] + 5 * raw[:, 4]
    x, noisy, held_x, held_y = table(1.0)
    assert x.shape == (ROWS, COLUMNS) and held_x.shape == (HELD_OUT, COLUMNS)
    torch.testing.assert_close(x.mean(0), torch.zeros(COLUMNS), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(COLUMNS), atol=1e-3, rtol=0)
    clean = torch.tensor((y - y[:ROWS].mean()) / y[:ROWS].std()).float()
    torch.testing.assert_close(held_y, clean[ROWS:], atol=1e-5, rtol=1e-4)
    assert float((noisy - clean[:ROWS]).std()) == pytest.approx(1 / y[:ROWS].std(), rel=0.05)
    torch.testing.assert_close(table(0.0)[1], clean[:ROWS], atol=1e-5, rtol=1e-4)


def test_a_short_run_learns_and_one_seed_is_one_run():
    workload = hasten.workload("tabular-mlp(width=64, depth=2, rows=64, steps=60)")
    losses = []
    for _ in range(2):
        run = make_run(workload, Plan(), seed=3)
        run.slice(workload.loss)
        with run.evaluation() as model:
            losses.append(workload.evaluate(model))
    assert np.array_equal(*losses) and losses[0].shape == (HELD_OUT,)
    assert losses[0].mean() < 0.2
    assert workload.evaluate(workload.build(4)).mean() > 0.9


def test_losses_are_those_of_the_examples():
    workload = hasten.workload("tabular-mlp")
    model, batch = workload.build(0), next(iter(workload.batches(0)))
    losses = workload.losses(model, batch)
    assert losses.shape == (workload.rows,)
    torch.testing.assert_close(
        workload.loss(model, batch), torch.nn.functional.mse_loss(model(batch[0])[:, 0], batch[1])
    )


def test_matrices_of_its_hidden_layers_are_found():
    workload = hasten.workload("tabular-mlp(depth=2)")
    run = make_run(workload, Plan.parse("optim/sinkgd"), seed=0)
    assert (256, 256) in {tuple(weight.shape) for _, weight in run.host.matrices()}


def test_options():
    with pytest.raises(PlanError, match="rows"):
        hasten.workload("tabular-mlp(rows=10000)")
