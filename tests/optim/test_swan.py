import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.multi_norm import multi_norm
from hasten.optim.swan import Swan, swan


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases():
    for shape, dtype, steps, beta, center in (
        ((7, 5), torch.float32, 6, 0.5, True),
        ((3, 5, 12), torch.float32, 4, 0.8, True),
        ((2, 2, 9, 4), torch.float32, 8, 0.5, False),
        ((1, 6), torch.float32, 10, 0.8, True),
        ((2, 9, 1), torch.float32, 3, 0.7, False),
        ((2, 33, 17), torch.bfloat16, 5, 0.5, True),
        ((4, 8), torch.float16, 1, 0.8, True),
    ):
        yield {"args": (random(*shape).to(dtype), steps, beta, center), "tolerance": 1e-4}
    sparse = random(6, 4)
    sparse[2], sparse[:, 1] = 0, 0
    yield {"args": (sparse, 6, 0.5, False), "tolerance": 1e-4}
    yield {"args": (torch.zeros(3, 4), 10, 0.8, True), "tolerance": 1e-6}
    yield {"args": (torch.ones(3, 4), 10, 0.8, True), "tolerance": 1e-6}  # rows without deviation


@pytest.mark.parametrize("shape", [(20, 32), (32, 20)])
def test_half_beta_whitens(shape):
    g = random(*shape)
    centred = g - g.mean(1, keepdim=True)
    rows = centred / centred.square().mean(1, keepdim=True).sqrt()
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    left = left[:, values > 1e-3 * values[0]]  # the columns of a tall one, centred, have one direction less
    wanted = left @ right[: left.shape[1]]
    wanted *= (20 * 32) ** 0.5 / wanted.norm()
    torch.testing.assert_close(swan(g, 22, 0.5, True), wanted, rtol=1e-3, atol=1e-3)


def test_the_default_keeps_singular_values_in_a_band():
    values = torch.linalg.svdvals(swan(random(32, 64), 10, 0.8, True))
    plain = torch.linalg.svdvals(random(32, 64))
    assert values.max() / values.min() < 3 < plain.max() / plain.min()


def test_it_is_multi_normalization_by_rows_and_the_spectral_norm():
    """Paper 2502.06742, section 3: without centring, one round of the two projections."""
    g = random(2, 12, 20)
    torch.testing.assert_close(swan(g, 40, 0.5, False), multi_norm(g, ("row", "spectral"), 1, 40), rtol=1e-3, atol=1e-3)


def test_root_mean_square_and_scale():
    g = random(3, 8, 6)
    x = swan(g, 10, 0.8, True)
    torch.testing.assert_close(x.square().mean((-2, -1)), torch.ones(3))
    for scale in (2.0**-50, 2.0**40):
        torch.testing.assert_close(swan(g * scale, 10, 0.8, True), x)


def test_a_step_size_that_diverges_is_refused():
    with pytest.raises(PlanError, match="at most 0.85"):
        Swan(beta=1.0)


def test_loss_falls_and_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    plan = "optim/swan(lr=0.01, steps=5, momentum=0.9)"
    run = run_of(plan, steps=16)
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    half = run_of(plan, steps=16)
    half.slice(language_loss, steps=7)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=16, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[7:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
