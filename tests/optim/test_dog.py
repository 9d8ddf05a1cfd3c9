import math

import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.optim.base import RuleOptimizer
from hasten.optim.dog import DoG

DOUBLE = torch.float64


def cases():
    generator = torch.Generator().manual_seed(0)
    for shapes, dtype, layerwise in (
        (((7, 5), (3,)), torch.float32, False),
        (((2, 1, 3), ()), torch.float32, True),
        (((6, 4), (4,)), torch.bfloat16, True),
        (((33,),), DOUBLE, False),
    ):
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        state = DoG(layerwise=layerwise).init(weights)
        arguments = (gradients, weights, state, 0.5, [0.1 * n for n in range(len(shapes))], layerwise)
        yield {"args": arguments, "kwargs": {}, "tolerance": 1e-6}
        moved = [w + 0.1 * torch.randn(w.shape, generator=generator).to(w) for w in weights]
        yield {"args": (gradients, moved, *arguments[2:]), "kwargs": {"eps": 1e-3}, "tolerance": 1e-5}


def steps(method, gradients, weights):
    """The weights after each of some steps; gradients: a list of lists."""
    state, seen = method.init(weights), []
    for given in gradients:
        changes, state = method.update(given, weights, state, 1.0, [0.0] * len(weights))
        weights = [w + c for w, c in zip(weights, changes, strict=True)]
        seen.append(weights)
    return seen


def test_golden_values():
    # x0 = (3, 4) in two parameters, so r_eps = 0.1 (1 + 5) = 0.6. Gradients (1, 0), then (0, 2).
    weights = [torch.tensor([3.0], dtype=DOUBLE), torch.tensor([4.0], dtype=DOUBLE)]
    one, two, none = (torch.tensor([value], dtype=DOUBLE) for value in (1.0, 2.0, 0.0))
    first, second = steps(DoG(reps_rel=0.1, eps=1e-20, layerwise=False), [[one, none], [none, two]], weights)
    torch.testing.assert_close(torch.cat(first), torch.tensor([3 - 0.6, 4.0], dtype=DOUBLE))
    torch.testing.assert_close(torch.cat(second), torch.tensor([2.4, 4 - 0.6 / math.sqrt(5) * 2], dtype=DOUBLE))
    # Layer by layer: r_eps = 0.4 and 0.5; the second one's sum of squares is 4 alone.
    first, second = steps(DoG(reps_rel=0.1, eps=1e-20, layerwise=True), [[one, none], [none, two]], weights)
    torch.testing.assert_close(torch.cat(second), torch.tensor([3 - 0.4, 4 - 0.5], dtype=DOUBLE))


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_steps_do_not_depend_on_the_losses_scale(layerwise):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, generator=generator, dtype=DOUBLE), torch.randn(4, generator=generator, dtype=DOUBLE)]
    gradients = [[torch.randn(w.shape, generator=generator, dtype=DOUBLE) for w in weights] for _ in range(6)]
    method = DoG(layerwise=layerwise, eps=1e-20)
    plain = steps(method, gradients, weights)[-1]
    scaled = steps(method, [[1e3 * g for g in both] for both in gradients], weights)[-1]
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("distance", [0.03, 50.0])
def test_it_reaches_a_minimum_whose_distance_nobody_told(distance):
    weight = torch.zeros(10, dtype=DOUBLE)
    method = DoG(reps_rel=1e-6, layerwise=False)
    state = method.init([weight])
    for t in range(500):
        (change,), state = method.update([weight - distance], [weight], state, 1 - t / 500, [0.0])
        weight = weight + change
    assert float((weight - distance).abs().max()) < 0.05 * distance
    assert float(state["distance"][0]) < 2 * distance * math.sqrt(10)


def test_decay_is_added_to_the_gradient_and_is_off_unless_given():
    weight = torch.tensor([2.0])
    method = DoG(weight_decay=0.5, reps_rel=0.1, layerwise=False)
    (change,), state = method.update([torch.tensor([3.0])], [weight], method.init([weight]), 1.0, [0.5])
    torch.testing.assert_close(state["squares"][0], torch.tensor(16.0))  # (3 + 0.5 * 2)^2
    torch.testing.assert_close(change, torch.tensor([-0.3]))
    assert [group["weight_decay"] for group in run_of("optim/dog").optimizer.param_groups] == [0.0]


def test_half_precision_weights_are_measured_in_fp32():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = RuleOptimizer(DoG(reps_rel=0.1), torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.85), atol=4e-3, rtol=0)
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}


def test_the_mean_has_the_papers_weights():
    # gamma = 1: the mean of x_1 .. x_t has the share 2 / (t + 1) of x_t: 1, 2/3, 1/2.
    generator = torch.Generator().manual_seed(0)
    method, weight = DoG(average=1.0, reps_rel=0.1), torch.zeros(3, dtype=DOUBLE)
    state, mean = method.init([weight]), torch.zeros(3, dtype=DOUBLE)
    for share in (1.0, 2 / 3, 1 / 2):
        (change,), state = method.update([torch.randn(3, generator=generator, dtype=DOUBLE)], [weight], state, 1.0, [0])
        weight = weight + change
        mean = (1 - share) * mean + share * weight
        torch.testing.assert_close(state["mean"][0], mean)


def test_evaluation_and_the_end_see_the_mean_and_training_goes_on_undisturbed():
    plan = "optim/dog(reps_rel=0.01)"
    plain, watched = run_of(plan), run_of(plan)
    for step in range(4):
        plain.train_step(language_loss)
        watched.train_step(language_loss)
        before = watched.model.lm_head.weight.detach().clone()
        with watched.evaluation() as model:
            mean = model.lm_head.weight.detach().clone()
        assert torch.equal(watched.model.lm_head.weight, before) and torch.equal(mean, before) == (step == 0)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    watched.finish()
    assert torch.equal(watched.model.lm_head.weight, mean)
    bare = run_of("optim/dog(reps_rel=0.01, average=none)")
    bare.train_step(language_loss)
    before = bare.model.lm_head.weight.detach().clone()
    with bare.evaluation() as model:
        assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("plan", ["optim/dog(layerwise=false)", "optim/dog(layerwise=true)"])
def test_loss_falls_and_resume_is_exact(plan, tmp_path):
    run, half = run_of(plan, steps=12), run_of(plan, steps=12)
    losses = finish(run)
    assert losses[-1] < losses[0]
    half.slice(language_loss, steps=5)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=12, model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[5:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
