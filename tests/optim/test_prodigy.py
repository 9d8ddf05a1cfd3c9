import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.base import RuleOptimizer
from hasten.optim.prodigy import Prodigy, prodigy

DOUBLE = torch.float64


def state_of(weights, generator, d=1e-6):
    """A state as after some steps: sums and averages that are neither zero nor equal."""
    state = Prodigy().init([w + 0.1 * torch.randn(w.shape, generator=generator).to(w.dtype) for w in weights])
    for name in ("average", "square", "sum"):
        state[name] = [torch.rand(w.shape, generator=generator).to(w.dtype) * d for w in state[name]]
    state["numerator"], state["d"], state["largest"] = (torch.tensor(one).to(state["d"]) for one in (d**2, d, d))
    return state


def cases():
    generator = torch.Generator().manual_seed(0)
    for shapes, dtype, options in (
        (((7, 5), (3,)), torch.float32, {}),
        (((2, 1, 3), ()), torch.float32, {"safe": False, "growth": 1.02}),
        (((6, 4), (4,)), torch.bfloat16, {"betas": (0.95, 0.99), "beta3": 0.9, "coefficient": 0.5}),
        (((33,),), DOUBLE, {"growth": 1.5}),
    ):
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        decay = [0.1 * n for n in range(len(shapes))]
        fresh = Prodigy().init(weights)
        yield {"args": (gradients, weights, fresh, 0.5, decay), "kwargs": options, "tolerance": 1e-6}
        later = state_of(weights, generator, d=0.3)
        yield {"args": (gradients, weights, later, 0.5, decay), "kwargs": options, "tolerance": 2e-5}


def step(method, gradient, weight, state, lr=1.0):
    changes, state = method.update([gradient], [weight], state, lr, [0.0])
    return weight + changes[0], state


def test_golden_values_of_two_steps():
    # One weight, gradient 1 always, d0 = 1e-2, beta1 = beta2 = 0.9, lr 1. Step 1: m = 0.1 d0, v = 0.1 d0^2, r = 0, so
    # d stays and x = -d0 0.1 / sqrt(0.1). Step 2: r = d0 (x0 - x), s = d0 (1 + b), b = sqrt(0.9).
    method = Prodigy(d0=1e-2, betas=(0.9, 0.9), eps=1e-30)
    one = torch.ones(1, dtype=DOUBLE)
    weight, state = step(method, one, torch.zeros(1, dtype=DOUBLE), method.init([torch.zeros(1, dtype=DOUBLE)]))
    moved = 1e-2 * 0.1 / 0.1**0.5
    torch.testing.assert_close(weight, torch.tensor([-moved], dtype=DOUBLE))
    assert float(state["d"]) == pytest.approx(1e-2)
    weight, state = step(method, one, weight, state)
    assert float(state["largest"]) == pytest.approx(max(1e-2, moved / (1 + 0.9**0.5)))
    torch.testing.assert_close(weight, torch.tensor([-moved - 1e-2 * 0.19 / 0.19**0.5], dtype=DOUBLE))


def quadratic(method, steps, scale=1.0, distance=5.0):
    """d, and the largest error, after steps on |x - distance| in ten weights."""
    weight = torch.zeros(10, dtype=DOUBLE)
    state = method.init([weight])
    for t in range(steps):
        gradient = scale * torch.sign(weight - distance) / 10
        weight, state = step(method, gradient, weight, state, lr=1 - t / steps)
    return float(state["d"]), float((weight - distance).abs().max())


@pytest.mark.parametrize("distance", [0.01, 5.0, 300.0])
def test_the_distance_is_found_from_far_below_and_never_exceeded(distance):
    d, error = quadratic(Prodigy(), 300, distance=distance)
    assert 0.05 * distance < d <= distance * 1.001  # a lower bound of the distance in the maximum norm
    assert error < 0.05 * distance


def test_the_estimate_does_not_depend_on_the_losses_scale():
    assert quadratic(Prodigy(), 50, scale=1e3)[0] == pytest.approx(quadratic(Prodigy(), 50)[0], rel=1e-3)


def test_growth_bounds_the_rise():
    weight = torch.zeros(10, dtype=DOUBLE)
    method = Prodigy(growth=1.1)
    state, seen = method.init([weight]), []
    for _ in range(40):
        weight, state = step(method, torch.sign(weight - 5), weight, state)
        seen.append(float(state["d"]))
    ratios = [after / before for before, after in zip(seen[2:], seen[3:], strict=False)]
    assert max(ratios) == pytest.approx(1.1) and min(ratios) >= 1


def test_safe_keeps_the_estimate_low_in_a_warm_up():
    def largest(safe):
        weight = torch.zeros(4, dtype=DOUBLE)
        method = Prodigy(safe=safe)
        state, generator = method.init([weight]), torch.Generator().manual_seed(0)
        for t in range(60):
            gradient = torch.sign(weight - 1) + torch.randn(4, generator=generator, dtype=DOUBLE)
            weight, state = step(method, gradient, weight, state, lr=min(1.0, (t + 1) / 50))
        return float(state["largest"])

    assert largest(safe=True) < 0.7 * largest(safe=False)


def test_zero_gradients_change_nothing():
    method, weight = Prodigy(), torch.ones(3)
    state = method.init([weight])
    for _ in range(3):
        weight, state = step(method, torch.zeros(3), weight, state)
    assert torch.equal(weight, torch.ones(3)) and float(state["d"]) == pytest.approx(1e-6)


def test_the_persons_decay_is_decoupled():
    weight, zero = torch.full((2,), 4.0), torch.zeros(2)
    state = Prodigy().init([weight])
    state["d"] = torch.tensor(0.5)
    (change,), _ = prodigy([zero], [weight], state, 0.5, [0.1])
    torch.testing.assert_close(change, torch.full((2,), -0.5 * 0.5 * 0.1 * 4))


def test_numbers_stay_tensors_and_half_weights_keep_fp32_state():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = RuleOptimizer(Prodigy(d0=0.1), torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight.detach(), torch.ones_like(weight))
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
    assert all(value.dim() == 0 for value in optimizer.state["common"].values())


def test_resume_is_exact(tmp_path):
    plan = "optim/prodigy(d0=0.001)"
    run, half = run_of(plan), run_of(plan)
    losses = finish(run)
    half.slice(language_loss, steps=4)
    half.save(tmp_path / "half")
    resumed = run_of(plan, model=llama(3), resume=tmp_path / "half")
    assert finish(resumed) == losses[4:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))
    assert torch.equal(run.optimizer.state["common"]["d"], resumed.optimizer.state["common"]["d"])


def test_betas_are_two():
    with pytest.raises(PlanError, match="two numbers"):
        Prodigy(betas=(0.9,))
