import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, run_of
from hasten.optim._zeroth import ZerothOptimizer, _pieces, thresholds


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, rest in (
        ((7, 5), torch.float32, (2.5, 2.4, 1e-3, 1e-2, 0.6)),
        ((1,), torch.float32, (0.1, 0.3, 1e-2, 1.0, 0.0)),
        ((40, 50), torch.float32, (0.1, 0.3, 0.2, 1e-2, 0.5)),  # eps z carries many weights across the threshold
        ((3, 4, 5), torch.bfloat16, (2.0, 2.001, 1e-3, 1e-3, 1.0)),
        ((6, 3), torch.float16, (1.0, 1.0, 1e-3, 1e-3, 9.0)),
    ):
        weights, z = (torch.randn(shape, generator=generator) for _ in range(2))
        yield {"args": (weights.to(dtype), z, *rest), "tolerance": 1e-5}


def made(shape, sparsity=0.75, eps=1e-3, lr=0.1, weight_decay=0.0, dtype=torch.float32):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    p = torch.nn.Parameter(weights)
    return p, ZerothOptimizer([{"params": [p]}], lr=lr, eps=eps, weight_decay=weight_decay, sparsity=sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_weights_above_the_threshold_never_change_and_the_others_all_move(eps, dtype):
    p, optimizer = made((300, 401), eps=eps, dtype=dtype)
    before = p.detach().clone()
    small = before.float().abs() <= optimizer.state[p]["threshold"]
    assert abs(float(small.float().mean()) - 0.25) < 0.02
    generator = torch.Generator().manual_seed(5)
    z = torch.cat([torch.empty(len(piece)).normal_(generator=generator) for piece in _pieces(p)]).view(p.shape)
    optimizer.perturb(5)
    if dtype == torch.float32:
        torch.testing.assert_close(p.detach(), before + eps * z * small)
    optimizer.reverse()
    if dtype == torch.float32:
        torch.testing.assert_close(p.detach(), before - eps * z * small, atol=1e-6, rtol=1e-5)
    optimizer.found.append((5, 0.01))
    optimizer.step()
    changed = p.detach() != before
    assert not bool((changed & ~small).any())
    if dtype == torch.float32:
        torch.testing.assert_close(p.detach(), before - 0.1 * 0.01 / (2 * eps) * z * small, atol=1e-6, rtol=1e-5)


def test_the_list_of_misjudged_places_is_short_and_goes_with_the_step():
    p, optimizer = made((300, 401))
    assert not optimizer._misjudged
    optimizer.perturb(5)
    places = sum(map(len, optimizer._misjudged.values()))
    assert 0 < places < 0.005 * p.numel()
    optimizer.reverse()
    optimizer.settle()
    assert not optimizer._misjudged


def test_only_small_weights_decay():
    p, optimizer = made((30, 40), lr=1.0, weight_decay=0.5)
    before = p.detach().clone()
    small = before.abs() <= optimizer.state[p]["threshold"]
    optimizer.perturb(1)
    optimizer.reverse()
    optimizer.found.append((1, 0.0))
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.where(small, before / 2, before), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("sparsity", "wanted"), [(0.75, 1.0), (0.5, 2.0), (0.01, 4.0), (0.99, 1.0)])
def test_thresholds(sparsity, wanted):
    assert float(thresholds(torch.tensor([[-3.0, 1.0], [4.0, -2.0]]), sparsity)) == wanted


def test_thresholds_stay_as_they_were_at_the_start_and_vectors_move_whole():
    run = run_of("optim/sparse_mezo(lr=0.01)", steps=3)
    kept = {p: float(state["threshold"]) for p, state in run.optimizer.state.items()}
    norm = run.model.model.norm.weight
    before = norm.detach().clone()
    finish(run)
    assert {p: float(state["threshold"]) for p, state in run.optimizer.state.items()} == kept
    assert norm not in kept and all(p.dim() > 1 for p in kept) and len(kept) == 1 + 4 * 7
    assert bool((norm.detach() != before).all())


def test_a_resumed_run_keeps_its_thresholds_and_ends_bit_for_bit_the_same(tmp_path):
    plan = "optim/sparse_mezo(lr=0.001, weight_decay=0.1)"
    run = run_of(plan, steps=6)
    losses = finish(run)
    half = run_of(plan, steps=6)
    half.slice(language_loss, steps=3)
    half.save(tmp_path / "half")
    resumed = run_of(plan, seed=0, steps=6, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[3:]
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
