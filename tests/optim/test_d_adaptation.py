import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.d_adaptation import DAdaptation, d_adaptation

DOUBLE = torch.float64


def cases():
    generator = torch.Generator().manual_seed(0)
    for shapes, dtype, options in (
        (((7, 5), (3,)), torch.float32, {}),
        (((2, 1, 3), ()), torch.float32, {"growth": 1.02, "betas": (0.5, 0.9)}),
        (((6, 4), (4,)), torch.float16, {"coefficient": 0.5, "eps": 1e-4}),
        (((33,),), DOUBLE, {"betas": (0.9, 0.99)}),
    ):
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        decay = [0.1 * n for n in range(len(shapes))]
        state = DAdaptation().init(weights)
        yield {"args": (gradients, weights, state, 0.5, decay), "kwargs": options, "tolerance": 1e-6}
        for name, size in (("average", 0.1), ("square", 1.0), ("sum", 0.02)):
            state = {**state, name: [size * torch.rand(w.shape, generator=generator).to(w) for w in state[name]]}
        state |= {"numerator": state["d"] * 100, "d": state["d"] * 1e5}
        yield {"args": (gradients, weights, state, 0.5, decay), "kwargs": options, "tolerance": 2e-5}


def step(method, gradient, weight, state, lr=1.0):
    changes, state = method.update([gradient], [weight], state, lr, [0.0])
    return weight + changes[0], state


def test_golden_values_of_two_steps():
    # One weight, gradient 1 always, beta2 = 0.81, so b = 0.9. Step 1: m = 0.1 d, v = 0.19, s = 0.1 d, r = 0.
    # Step 2: r = 0.1 d s / sqrt(v) of step 1, s = 0.19 d, so the estimate is r / (0.1 s) = d / sqrt(0.19) / 1.9.
    method = DAdaptation(d0=1e-2, betas=(0.9, 0.81), eps=1e-30)
    weight, one = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    weight, state = step(method, one, weight, method.init([weight]))
    first = -1e-2 * 0.1 / 0.19**0.5
    torch.testing.assert_close(weight, torch.tensor([first], dtype=DOUBLE))
    (change,), state = d_adaptation([one], [weight], state, 1.0, [0.0], (0.9, 0.81), 1e-30, coefficient=100.0)
    assert float(state["d"]) == pytest.approx(100 * 1e-2 / 0.19**0.5 / 1.9)
    torch.testing.assert_close(change, torch.tensor([-1e-2 * 0.19 / (0.81 * 0.19 + 0.19) ** 0.5], dtype=DOUBLE))


@pytest.mark.parametrize("distance", [0.01, 5.0])
def test_the_distance_is_found_from_far_below(distance):
    method, weight = DAdaptation(betas=(0.9, 0.99)), torch.zeros(10, dtype=DOUBLE)
    state, steps, seen = method.init([weight]), 400, []
    for t in range(steps):
        weight, state = step(method, torch.sign(weight - distance) / 10, weight, state, lr=1 - t / steps)
        seen.append(float(state["d"]))
    assert 0.05 * distance < seen[-1] < 3 * distance  # averages that forget make it no strict bound
    assert seen == sorted(seen)
    assert float((weight - distance).abs().max()) < 0.05 * distance


def test_growth_bounds_the_rise():
    method, weight = DAdaptation(growth=1.1), torch.zeros(10, dtype=DOUBLE)
    state, seen = method.init([weight]), []
    for _ in range(60):
        weight, state = step(method, torch.sign(weight - 5), weight, state)
        seen.append(float(state["d"]))
    ratios = [after / before for before, after in zip(seen, seen[1:], strict=False)]
    assert max(ratios) == pytest.approx(1.1) and min(ratios) >= 1


def test_zero_gradients_change_nothing():
    method, weight = DAdaptation(), torch.ones(3)
    state = method.init([weight])
    for _ in range(3):
        weight, state = step(method, torch.zeros(3), weight, state)
    assert torch.equal(weight, torch.ones(3)) and float(state["d"]) == pytest.approx(1e-6)


def test_resume_is_exact(tmp_path):
    plan = "optim/d_adaptation(d0=0.001)"
    run, half = run_of(plan), run_of(plan)
    losses = finish(run)
    half.slice(language_loss, steps=4)
    half.save(tmp_path / "half")
    resumed = run_of(plan, model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[4:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_betas_are_two():
    with pytest.raises(PlanError, match="two numbers"):
        DAdaptation(betas=(0.9,))
