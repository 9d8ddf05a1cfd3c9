"""Wanda: which weights go, and that outputs suffer less than with magnitudes alone."""

import pytest
import torch

import hasten
from hasten.core.errors import PlanError
from hasten.prune.magnitude import magnitude
from hasten.prune.wanda import Wanda, wanda
from hosts.tiny import llama, padded_batch


def problem(rows, columns, seed=0, dtype=torch.float32):
    """A weight and the norms of inputs whose sizes differ a lot."""
    make = torch.Generator().manual_seed(seed)
    norms = torch.exp(torch.randn(columns, generator=make))
    return torch.randn(rows, columns, generator=make).to(dtype), norms


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (5, 33, {}),
            (4, 17, {"sparsity": 0.7}),
            (3, 22, {"pattern": "2:4"}),
            (3, 21, {"pattern": "5:8", "sparsity": 0.375}),
            (21, 10, {"pattern": "8x1", "sparsity": 0.6}),
            (9, 35, {"pattern": "4x16", "sparsity": 0.3}),
        ]
    ):
        yield {"args": problem(rows, columns, seed), "kwargs": options, "tolerance": 0, "grad": False}
    for dtype in (torch.bfloat16, torch.float16):
        yield {"args": problem(6, 40, 9, dtype), "kwargs": {}, "tolerance": 0, "grad": False}


def test_golden_value_of_the_papers_figure():
    """Figure 1: a third input of large norm saves the small weights that multiply it."""
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    norms = torch.tensor([1.0, 2, 8, 3])
    assert wanda(weight, norms).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]


def test_equal_norms_make_it_magnitude_by_row():
    weight, _ = problem(12, 40)
    assert torch.equal(wanda(weight, torch.full((40,), 3.0)), magnitude(weight, by_row=True))


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"sparsity": 0.7}, {"pattern": "8x1"}])
def test_output_error_is_below_that_of_magnitudes(options):
    weight, norms = problem(64, 128)
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(1)) * norms
    by_size = magnitude(weight, by_row=True, **options)
    found = wanda(weight, x.square().mean(0).sqrt(), **options)
    assert (found == 0).sum() == (by_size == 0).sum()
    assert (x @ (weight - found).t()).norm() < 0.7 * (x @ (weight - by_size).t()).norm()


def test_inputs_that_are_always_zero_go_first():
    weight, norms = problem(4, 10)
    norms[[2, 3, 7]] = 0
    assert not wanda(weight, norms, sparsity=0.3)[:, [2, 3, 7]].any()


def test_a_model_is_pruned_by_the_norms_of_its_inputs():
    """The rows of the first layers, whose inputs the method can't have changed yet, are those of the formula."""
    model, batch = llama(), padded_batch()
    path, inputs = "model.layers.0.self_attn.q_proj", []
    part = model.get_submodule(path)
    weight = part.weight.detach().clone()
    hook = part.register_forward_pre_hook(lambda _, given: inputs.append(given[0][batch["attention_mask"].bool()]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    hasten.apply(model, Wanda(layout="dense"), calibration=[batch])
    assert torch.equal(model.get_submodule(path).weight, wanda(weight, inputs[0].square().mean(0).sqrt()))


def test_calibration_is_asked_for():
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(llama(), "prune/wanda")
