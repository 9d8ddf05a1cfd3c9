"""OWL: the shares of outliers, how sparsity follows from them, and that the base prunes to it."""

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import PlanError
from hasten.core.plans import Plan
from hasten.prune.owl import OWL, owl
from hosts.tiny import DECODERS, llama, padded_batch

BATCH = padded_batch()


def scores(seed, *blocks):
    """Scores of blocks given as (tail, shapes): the larger the tail, the more of them are far above the mean."""
    make = torch.Generator().manual_seed(seed)
    return [[torch.exp(tail * torch.randn(shape, generator=make)) for shape in shapes] for tail, shapes in blocks]


def cases():
    some = [(0.5, [(5, 7), (3, 11)]), (1.5, [(5, 7), (3, 11)]), (1.0, [(5, 7), (3, 11)])]
    yield {"args": (scores(0, *some),), "grad": False}
    yield {"args": (scores(1, *some),), "kwargs": {"sparsity": 0.5, "multiple": 3.0, "spread": 0.2}, "grad": False}
    yield {"args": (scores(2, (2.0, [(9, 31)]), (1.0, [(2, 5)])),), "kwargs": {"multiple": 2.0}, "grad": False}
    yield {"args": (scores(3, *some, *some),), "kwargs": {"sparsity": 0.98, "spread": 0.3}, "grad": False}
    yield {"args": (scores(4, (1.0, [(4, 4)])),), "grad": False}
    half = [[part.half() for part in block] for block in scores(5, *some)]
    yield {"args": (half,), "grad": False}


def test_golden_value_of_the_official_formula():
    """The densities as the authors' script computes them, for blocks of one size."""
    blocks = scores(7, *[(tail, [(40, 50)]) for tail in (0.8, 1.0, 1.2, 1.4, 0.9)])
    d = np.array([float((part > 5 * part.mean()).float().mean()) * 100 for (part,) in blocks])
    density = (d - d.min()) * (1 / (d.max() - d.min()) * 0.08 * 2)
    density = density - density.mean() + (1 - 0.7)
    assert owl(blocks) == pytest.approx((1 - density).tolist(), abs=1e-6)


def test_more_outliers_less_sparsity_and_the_mean_holds():
    blocks = scores(8, (0.8, [(30, 30)]), (1.0, [(60, 30)]), (1.3, [(30, 30)]))
    found = owl(blocks, sparsity=0.7, spread=0.1)
    assert found[0] > found[1] > found[2] and found[0] - found[2] == pytest.approx(0.2)
    assert (found[0] + 2 * found[1] + found[2]) / 4 == pytest.approx(0.7)
    assert owl(blocks, spread=0.0) == [0.7] * 3


def test_no_block_is_emptied():
    blocks = scores(9, *[(1.5, [(30, 30)])] * 9, (0.1, [(30, 30)]))
    found = owl(blocks, sparsity=0.95, spread=0.4)
    assert max(found) < 1 and sum(found) / 10 == pytest.approx(0.95)


def pruned(model, options="", batch=BATCH):
    handle = hasten.apply(model, f"prune/owl(layout=dense{options})", calibration=[batch])
    return handle, handle.report["prune/owl"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("base", ["wanda", "sparsegpt", "magnitude"])
def test_each_block_gets_its_own_sparsity(name, base):
    handle, report = pruned(DECODERS[name](), f", multiple=2, base=prune/{base}")
    assert report["sparsity"] == pytest.approx(0.7, abs=0.02) and report["left_dense"] == []
    shares = report["shares"]
    weights = handle.host.weights()
    assert set(shares) == set(weights)
    for path, weight in weights.items():
        assert float((weight.matrix == 0).float().mean()) == pytest.approx(shares[path], abs=0.04)
    order = []
    for layer in handle.host.layers:
        own = {share for path, share in shares.items() if path.startswith(layer.path + ".")}
        assert len(own) == 1
        order += own
    outliers = list(report["outliers_percent"].values())
    assert np.argsort(order).tolist() == np.argsort(-np.array(outliers), kind="stable").tolist()


def test_the_outliers_are_those_of_the_dense_model():
    """Norms of later blocks are taken before any block is pruned."""
    model, inputs = llama(), {}
    weights = hasten.apply(model, "").host.weights()
    hooks = [
        one.part.register_forward_pre_hook(lambda _, given, path=path: inputs.update({path: given[0]}))
        for path, one in weights.items()
    ]
    with torch.no_grad():
        model(**BATCH)
    for hook in hooks:
        hook.remove()
    real = BATCH["attention_mask"].bool()
    norms = {path: x[real].square().mean(0).sqrt() for path, x in inputs.items()}
    blocks = [
        torch.cat([(one.matrix.abs() * norms[path]).flatten() for path, one in weights.items() if f".{i}." in path])
        for i in range(4)
    ]
    wanted = [100 * float((block > 3 * block.mean()).float().mean()) for block in blocks]
    _, report = pruned(model, ", multiple=3")
    assert list(report["outliers_percent"].values()) == pytest.approx(wanted, abs=0.02)


def test_a_plain_module_is_judged_matrix_by_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    handle = hasten.apply(model, "prune/owl(layout=dense, multiple=2)", calibration=[torch.randn(40, 32)])
    assert set(handle.report["prune/owl"]["outliers_percent"]) == {"0", "2", "4"}
    assert len(set(handle.report["prune/owl"]["shares"].values())) == 3
    assert handle.report["prune/owl"]["sparsity"] == pytest.approx(0.7, abs=0.01)


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="prunes single matrices"):
        OWL(base="prune/llm_drop")
    with pytest.raises(PlanError, match="prunes single matrices"):
        OWL(base="prune/owl")
    with pytest.raises(PlanError, match="sparsity of base must be left out"):
        OWL(base="prune/wanda(sparsity=0.6)")
    with pytest.raises(PlanError, match="fixes the sparsity"):
        OWL(pattern="2:4")
    with pytest.raises(PlanError, match="pattern must be"):
        OWL(pattern="often")
    text = "prune/owl(sparsity=0.6, base=prune/sparsegpt(damp=0.1))"
    assert str(Plan.parse(text)) == text
