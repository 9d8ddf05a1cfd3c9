import copy

import pytest
import torch

from conformance.optim import digits_loss, finish, language_loss, lines, llama, pictures, run_of, vit
from hasten.core.errors import UsageError
from hasten.optim import _zeroth
from hasten.optim._zeroth import ZerothOptimizer
from hasten.optim.mezo import MeZO, naive_mezo


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, rest in (
        ((7, 5), torch.float32, (2.5, 2.4, 1e-3, 1e-2)),
        ((1,), torch.float32, (0.1, 0.3, 1e-2, 1.0)),
        ((3, 4, 5), torch.bfloat16, (2.0, 2.001, 1e-3, 1e-3, 0.1)),
        ((6, 3), torch.float16, (1.0, 1.0, 1e-3, 1e-3, 0.5)),
    ):
        weights, z = (torch.randn(shape, generator=generator) for _ in range(2))
        yield {"args": (weights.to(dtype), z, *rest), "tolerance": 1e-5}
    yield {"args": (torch.randn(4, 6, generator=generator).T, torch.randn(6, 4), 1.0, 1.5, 1e-3, 0.1)}


def directions(parameters, seed):
    """z of each parameter, as the optimizer draws it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for p in parameters:
        pieces = [torch.empty(piece.numel()) for piece in _zeroth._pieces(p)]
        drawn.append(torch.cat([z.normal_(generator=generator) for z in pieces]).view(p.shape))
    return drawn


def test_a_step_follows_the_equation_and_reads_no_gradient():
    run = run_of("optim/mezo(lr=0.01, weight_decay=0.1)", schedule=lambda step, steps: 0.5)
    model, names = run.model, [name for name, _ in run.model.named_parameters()]
    before = copy.deepcopy(model)
    draws = torch.Generator().set_state(run.generator("optim/mezo").get_state())
    seed = int(torch.randint(2**62, (), generator=draws))
    batch = next(iter(lines(0)))
    run.slice(language_loss, steps=1)
    found = dict(model.named_parameters())
    z = directions(before.parameters(), seed)

    def at(eps):
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for p, along in zip(moved.parameters(), z, strict=True):
                p.add_(along, alpha=eps)
            return float(language_loss(moved, batch))

    plus, minus = at(1e-3), at(-1e-3)
    assert run.loss() == pytest.approx((plus + minus) / 2, rel=1e-5)
    for name, p, along in zip(names, before.parameters(), z, strict=True):
        decay = 0.1 if p.dim() > 1 else 0.0
        wanted = naive_mezo(p.detach(), along, plus, minus, 1e-3, 0.01 * 0.5, decay)
        torch.testing.assert_close(found[name].detach(), wanted, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_the_estimate_is_the_gradients_share_along_z_and_right_on_average():
    # L(theta) = c theta: the difference quotient is exactly c z, and E[(c z) z] = c.
    c = torch.tensor([1.0, -2.0, 0.5])
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = ZerothOptimizer([{"params": [p]}], lr=1.0, eps=1e-2, weight_decay=0.0)
    total = torch.zeros(3)
    for seed in range(4000):
        losses = []
        for turn in (optimizer.perturb, lambda _: optimizer.reverse()):
            turn(seed)
            losses.append(float(c @ p.detach()))
        optimizer.found.append((seed, losses[0] - losses[1]))
        optimizer.step()
        total -= p.detach()
        p.detach().zero_()
    torch.testing.assert_close(total / 4000, c, atol=0.15, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (70000,), (300, 500)])
def test_weights_come_back_to_their_last_bits(shape):
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    optimizer = ZerothOptimizer([{"params": [p]}], lr=1.0, eps=1e-3, weight_decay=0.0)
    before = p.detach().clone()
    optimizer.perturb(7)
    moved = p.detach() - before
    assert 2e-4 < float(moved.abs().mean()) < 2e-3
    optimizer.reverse()
    torch.testing.assert_close(p.detach() - before, -moved, atol=1e-6, rtol=0)
    optimizer.settle()
    torch.testing.assert_close(p.detach(), before, atol=5e-7, rtol=2e-7)


def test_weights_that_do_not_lie_in_a_row_and_half_precision():
    whole = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T)
    half = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    optimizer = ZerothOptimizer([{"params": [whole, half]}], lr=0.1, eps=0.25, weight_decay=0.0)
    before, (z, along) = whole.detach().clone(), directions([whole, half], 3)
    optimizer.perturb(3)
    torch.testing.assert_close(whole.detach(), before + 0.25 * z)
    torch.testing.assert_close(half.detach().float(), 0.25 * along, rtol=1e-2, atol=1e-2)


def test_no_graph_is_kept_and_the_weights_train_again_afterwards():
    run = run_of("optim/mezo", steps=2)
    graphs = []

    def loss(model, batch):
        found = language_loss(model, batch)
        graphs.append(found.requires_grad)
        return found

    finish(run, loss)
    assert graphs == [False] * 4
    run.finish()
    assert all(p.requires_grad for p in run.model.parameters())


def test_both_passes_drop_the_same_units():
    model = vit()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    losses = []

    def loss(model, batch):
        found = digits_loss(model, batch)
        losses.append(float(found))
        return found

    finish(run_of("optim/mezo(eps=1e-7)", steps=3, model=model, loader=pictures()), loss)
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    assert all(abs(one - other) < 1e-4 for one, other in pairs) and len({round(one, 3) for one, _ in pairs}) == 3


@pytest.mark.parametrize(
    ("plan", "options"), [("optim/mezo(lr=3e-4)", {}), ("optim/mezo(lr=3e-4, samples=2)", {"accumulate": 2})]
)
def test_a_resumed_run_ends_bit_for_bit_the_same(plan, options, tmp_path):
    run = run_of(plan, steps=4, **options)
    losses = finish(run)
    half = run_of(plan, steps=4, **options)
    with half.randomness():
        batches = iter(half)
        while half.step < 2 or half.accumulated < half.accumulate - 1:
            half.backward(language_loss(half.model, next(batches)))
    half.save(tmp_path / "half")
    resumed = run_of(plan, seed=0, steps=4, model=llama(3), loader=lines(0), resume=tmp_path / "half", **options)
    assert finish(resumed) == losses[2:]
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_loss_falls_on_one_batch():
    batch = next(iter(lines()))
    losses = finish(run_of("optim/mezo(lr=3e-3)", steps=30, model=llama(depth=1), loader=[batch]))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.05


def test_a_loop_left_between_the_passes_leaves_the_weights():
    run = run_of("optim/mezo")
    before = copy.deepcopy(run.model)
    for batch in run:
        run.backward(language_loss(run.model, batch))
        break
    assert all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(run.model.parameters(), before.parameters(), strict=True)
    )


def test_what_it_cannot_do_is_said():
    with pytest.raises(UsageError, match="no gradients to scale"):
        run_of("optim/mezo", precision="fp16")
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match="after the two passes"):
        ZerothOptimizer([{"params": [p]}], lr=1.0, eps=1.0, weight_decay=0.0).step()


def test_a_loop_may_take_entries_out_of_its_batch():
    rows = [{"input_ids": row, "labels": row} for row in list(lines())[:2]]

    def loss(model, batch):
        labels = batch.pop("labels")
        return model(**batch, labels=labels).loss

    assert len(finish(run_of(MeZO(), steps=2, loader=rows), loss)) == 2
