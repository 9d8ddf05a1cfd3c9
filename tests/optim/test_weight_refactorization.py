import copy

import pytest
import torch
from torch import nn

from conformance.optim import digits_loss, finish, language_loss, lines, llama, outcome, pictures, run_of, vit
from hasten.core.errors import UsageError
from hasten.hosts.factored import FactoredLinear, factored
from hasten.optim.weight_refactorization import refactor

BOTH = "optim/weight_refactorization(every=3) + optim/momentum_reset(every=3)"


def cases():
    generator = torch.Generator().manual_seed(0)
    for m, r, n, dtype, tolerance in (
        (7, 3, 5, torch.float32, 1e-4),
        (5, 5, 9, torch.float32, 1e-3),
        (33, 1, 4, torch.float32, 1e-4),
        (9, 4, 6, torch.bfloat16, 2e-2),
    ):
        b, a = (torch.randn(shape, generator=generator) for shape in ((m, r), (r, n)))
        yield {"args": (b.to(dtype), a.to(dtype)), "tolerance": tolerance}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": {"every": 3}}


def test_refactoring_leaves_the_model_and_evens_the_factors_scale():
    run = run_of("optim/weight_refactorization", steps=4)
    batch = next(iter(lines()))
    layers = list(factored(run.host).values())
    with torch.no_grad():
        for layer in layers:
            layer.b.mul_(20)
            layer.a.div_(20)
        before = run.model(input_ids=batch).logits
        refactor(layers)
        after = run.model(input_ids=batch).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    for layer in layers:
        torch.testing.assert_close(layer.b.T @ layer.b, layer.a @ layer.a.T, atol=1e-4, rtol=1e-3)


def test_it_happens_every_t_steps():
    gaps = []
    run = run_of("optim/weight_refactorization(every=3)", steps=7)
    layer = next(iter(factored(run.host).values()))
    for _ in range(7):
        run.slice(language_loss, steps=1)
        gaps.append(float((layer.b.T @ layer.b - layer.a @ layer.a.T).detach().abs().max()))
    assert [gap < 1e-5 for gap in gaps] == [step % 3 == 0 for step in range(1, 8)]


def test_weights_gradients_and_state_shrink_by_the_ratio_of_the_factors():
    def held(plan):
        run = run_of(plan, steps=2)
        run.slice(language_loss, steps=1)
        paths = factored(run.host) or run.host.linears()
        mine = [p for part in paths.values() for p in part.parameters()]
        assert all(p in run.optimizer.state for p in mine)
        return sum(p.nbytes + sum(one.nbytes for one in run.optimizer.state[p].values() if one.dim()) for p in mine)

    # A block of width 24 with 1 of 2 heads for keys and values and 40 columns within; r = 6, of keys and values 3.
    dense = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40
    thin = 2 * 6 * 48 + 2 * 3 * 36 + 3 * 6 * 64
    assert held("optim/weight_refactorization") / held(None) == pytest.approx(thin / dense)


def test_the_finished_model_is_plain_and_computes_the_same():
    run = run_of(BOTH, steps=4)
    finish(run)
    with run.evaluation() as model:
        before = model(input_ids=next(iter(lines()))).logits
    run.finish()
    assert list(run.model.state_dict()) == list(llama().state_dict())
    parts = list(run.model.modules())
    assert not any(isinstance(part, FactoredLinear) for part in parts)
    assert sum(type(part) is nn.Linear for part in parts) == 4 * 7 + 1
    assert all(p.requires_grad for p in run.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(input_ids=next(iter(lines()))).logits, before, atol=1e-4, rtol=1e-4)


def test_a_run_that_never_began_leaves_the_model_bit_for_bit():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    run_of(BOTH, model=model).finish()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], one) for name, one in before.items())


def test_dense_weights_are_freed_once_the_run_has_begun():
    import gc
    import weakref

    model = llama()
    old = weakref.ref(model.model.layers[0].mlp.up_proj)
    run = run_of("optim/weight_refactorization", model=model)
    assert old() is not None
    run.slice(language_loss, steps=1)
    gc.collect()
    assert old() is None


def test_loss_falls_on_both_hosts():
    losses = finish(run_of(BOTH, steps=12))
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    one = [next(iter(pictures(rows=8)))]
    plan = BOTH.replace("every=3", "every=8")
    losses = finish(run_of(plan, steps=20, model=vit(depth=1), loader=one), digits_loss)
    assert sum(losses[-4:]) < sum(losses[:4]) - 1


def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    run = run_of(BOTH, steps=8)
    losses = finish(run)
    half = run_of(BOTH, steps=8)
    half.slice(language_loss, steps=4)
    half.save(tmp_path / "half")
    resumed = run_of(BOTH, steps=8, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[4:]
    for one in (run, resumed):
        one.finish()
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_model_without_layers_that_would_shrink_is_refused():
    with pytest.raises(UsageError, match="gets smaller"):
        run_of("optim/weight_refactorization(rank=0.9)")


@pytest.mark.parametrize("other", ["optim/sinkgd(momentum=0.9)", "optim/llr(smallest=4)"])
@pytest.mark.parametrize("first", [True, False])
def test_factors_are_matrices_for_other_methods(other, first):
    mine = "optim/weight_refactorization(every=3)"
    run = run_of(" + ".join([mine, other] if first else [other, mine]), steps=5)
    factors = [p for layer in factored(run.host).values() for p in (layer.b, layer.a)]
    before = [p.detach().clone() for p in factors]
    losses = finish(run)
    assert losses[-1] < losses[0]
    held = [p for layer in factored(run.host).values() for p in (layer.b, layer.a)]
    assert {id(p) for p in held} <= {id(p) for _, p in run.host.matrices()}
    assert not any(torch.equal(p, old) for p, old in zip(held, before, strict=True))
    run.finish()
    assert not factored(run.host)
