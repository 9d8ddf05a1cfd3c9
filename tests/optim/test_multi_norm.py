import math

import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.multi_norm import NORMS, MultiNorm, multi_norm, polar
from hasten.optim.sinkgd import sinkgd


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases():
    for shape, dtype, norms, iterations, newton in (
        ((7, 5), torch.float32, ("row", "column"), 5, 1),
        ((3, 5, 12), torch.float32, ("row", "spectral"), 1, 12),
        ((2, 2, 9, 4), torch.float32, ("spectral", "column", "rms"), 2, 5),
        ((1, 6), torch.float32, ("spectral",), 1, 3),
        ((2, 9, 1), torch.float32, ("sign", "row"), 3, 1),
        ((2, 33, 17), torch.bfloat16, ("rms", "spectral"), 1, 8),
        ((4, 8), torch.float16, ("column", "row", "rms"), 3, 1),
    ):
        gradient = random(*shape).to(dtype)
        yield {"args": (gradient, norms, iterations, newton), "tolerance": 3e-5}
    sparse = random(6, 4)
    sparse[2], sparse[:, 1] = 0, 0
    for norms in (("row", "column"), ("spectral", "row"), ("sign", "rms")):
        yield {"args": (sparse, norms, 2, 6), "tolerance": 3e-5}
    yield {"args": (torch.zeros(3, 4), NORMS, 2, 3), "tolerance": 1e-6}


def test_each_projection_has_its_norm_and_a_root_mean_square_of_one():
    g = random(24, 40)
    found = {name: multi_norm(g, (name,), 1, 40) for name in NORMS}
    torch.testing.assert_close(found["row"].norm(dim=1), torch.full((24,), math.sqrt(40)))
    torch.testing.assert_close(found["column"].norm(dim=0), torch.full((40,), math.sqrt(24)))
    torch.testing.assert_close(torch.linalg.svdvals(found["spectral"]), torch.full((24,), math.sqrt(40)))
    assert torch.equal(found["sign"], g.sign())
    torch.testing.assert_close(found["rms"] / found["rms"].norm(), g / g.norm())
    for x in found.values():
        torch.testing.assert_close(x.square().mean(), torch.tensor(1.0))


def test_projections_maximise_the_product_with_the_gradient():
    """The definition: of all matrices whose norm is 1, the projection has the largest inner product with G."""
    g = random(6, 9)
    dual = {
        "row": math.sqrt(9) * g.norm(dim=1).sum(),
        "column": math.sqrt(6) * g.norm(dim=0).sum(),
        "spectral": math.sqrt(9) * torch.linalg.svdvals(g).sum(),
        "sign": g.abs().sum(),
        "rms": math.sqrt(54) * g.norm(),
    }
    for name, wanted in dual.items():
        torch.testing.assert_close((g * multi_norm(g, (name,), 1, 40)).sum(), wanted)


def test_rounds_come_to_a_fixed_point():
    g, norms = random(20, 12), ("row", "spectral")  # a wide matrix is at one after a round
    found = [multi_norm(g, norms, rounds, 40) for rounds in (1, 100)]
    moved = [float((multi_norm(x, norms, 1, 40) - x).norm()) for x in found]
    assert moved[0] > 0.1 and moved[1] < 1e-3
    for name in norms:
        torch.testing.assert_close(multi_norm(found[1], (name,), 1, 40), found[1], rtol=1e-3, atol=1e-3)


def test_rows_and_columns_are_sinkgd():
    g = random(3, 11, 7)
    torch.testing.assert_close(multi_norm(g, ("row", "column"), 5, 1), sinkgd(g, 5), rtol=1e-5, atol=1e-5)


def test_the_step_does_not_depend_on_the_gradients_scale():
    g = random(2, 8, 6)
    for norms in (("row", "spectral"), ("column", "sign", "rms")):
        for scale in (1e-15, 1e12):
            torch.testing.assert_close(multi_norm(g * scale, norms, 2, 8), multi_norm(g, norms, 2, 8))


def test_polar_keeps_the_singular_vectors():
    g = random(30, 10)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(polar(g, 30), left @ right, rtol=1e-4, atol=1e-5)
    assert torch.equal(polar(g.mT.contiguous(), 8), polar(g, 8).mT)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"norms": []}, "at least one"), ({"norms": ["rows"]}, "did you mean 'row'|must be one of")],
)
def test_bad_norms(options, message):
    with pytest.raises(PlanError, match=message):
        MultiNorm(**options)


def test_loss_falls_and_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    plan = "optim/multi_norm(norms=[row, spectral], lr=0.01, iterations=1, newton=5, momentum=0.9)"
    run = run_of(plan, steps=16)
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    half = run_of(plan, steps=16)
    half.slice(language_loss, steps=7)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=16, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[7:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
