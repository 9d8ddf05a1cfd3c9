import json

import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, run_of
from hasten.core.errors import PlanError, UsageError
from hasten.optim.linear_decay import LinearDecay, linear_decay, linear_decay_scheduler


def cases():
    generator = torch.Generator().manual_seed(0)
    for recorded, steps, power, smooth in (
        (50, 50, 1, 0.1),
        (37, 80, 2, 0.2),
        (9, 4, 1, 1.0),
        (2, 7, 1, 0.5),
        (64, 30, 2, 0.0),
    ):
        norms = torch.rand(recorded, generator=generator) + 0.1
        yield {"args": (norms, steps, power, smooth), "kwargs": {}, "grad": False, "tolerance": 1e-9}


def test_equal_norms_give_the_straight_line():
    factors = linear_decay(torch.full((10,), 3.0), 10, 1, 0.1)
    torch.testing.assert_close(factors, torch.arange(9, -1, -1, dtype=torch.float64) / 9)


def test_golden_value_of_algorithm_1():
    # w = 1/G^2 = 1, 1/4, 1, 4; eta = w * (sum of the later w) = 5.25, 1.25, 4, 0.
    factors = linear_decay(torch.tensor([1.0, 2.0, 1.0, 0.5]), 4, 2, 0.0)
    torch.testing.assert_close(factors, torch.tensor([5.25, 1.25, 4.0, 0.0], dtype=torch.float64) / 5.25)


def test_large_norms_at_the_start_give_a_warm_up():
    factors = linear_decay(torch.linspace(10, 1, 100).clamp_min(2.0), 100, 2, 0.1)
    assert factors[0] < 0.5 and 20 < int(factors.argmax()) < 95 and factors[-1] == 0


def test_agrees_with_scipys_median_filter_and_the_authors_padding():
    import numpy as np
    from scipy.ndimage import median_filter

    norms = torch.rand(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    width = 2 * (int(0.2 * 40) // 2) + 1
    smooth = median_filter(np.pad(norms.numpy(), (0, 2 * width), mode="reflect"), size=width, mode="nearest")[
        : -2 * width
    ]
    weights = smooth**-1.0
    eta = weights * (weights.sum() - np.cumsum(weights))
    torch.testing.assert_close(
        linear_decay(norms, 40, 1, 0.2), torch.from_numpy(eta / eta.max()), atol=1e-12, rtol=1e-9
    )


def test_warm_up_horizon_and_floor():
    factors = LinearDecay(warmup=0.2, horizon=0.5, floor=0.1).schedule(20)
    assert len(factors) == 20
    torch.testing.assert_close(factors[:3], torch.tensor([0.55, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(factors[10:], torch.full((10,), 0.1, dtype=torch.float64))
    assert bool((factors[2:10].diff() < 0).all())


@pytest.mark.parametrize("refined", [False, True])
def test_past_the_horizon_the_rate_is_the_floor(refined, tmp_path):
    norms = tmp_path / "norms.json"
    norms.write_text(json.dumps({"l1": [3.0, 2.0, 1.0, 1.5], "l2": [1, 1, 1, 1]}))
    method = LinearDecay(horizon=0.5, floor=0.0, warmup=0.0, norms=str(norms) if refined else None)
    run = run_of(method, steps=8)
    weights = []
    run.on("step", lambda run: weights.append([p.detach().clone() for p in run.model.parameters()]))
    losses = finish(run)
    assert len(losses) == 8 and run.rates.used == [0.0]
    assert all(torch.equal(p, q) for p, q in zip(weights[4], weights[7], strict=True))  # nothing is learned any more
    assert not all(torch.equal(p, q) for p, q in zip(weights[1], weights[4], strict=True))
    scheduler = linear_decay_scheduler(torch.optim.SGD(run.model.parameters(), lr=1.0), 8, horizon=0.5, floor=0.25)
    assert [scheduler.lr_lambdas[0](step) for step in (4, 7, 8, 1000)] == [0.25] * 4


def test_it_replaces_the_persons_schedule_for_every_group():
    run = run_of("optim/linear_decay(warmup=0) + optim/sinkgd(lr=0.5)", steps=4, schedule=lambda step, steps: 100.0)
    rates = []
    run.on("step", lambda run: rates.append(list(run.rates.used)))
    finish(run)
    expected = [[0.5 * left / 4, 0.003 * left / 4] for left in (4, 3, 2, 1)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_a_run_records_norms_and_the_next_is_refined_by_them(tmp_path):
    path = tmp_path / "norms.json"
    run = run_of(LinearDecay(record=str(path)), steps=8)
    seen = []
    run.on("gradients", lambda run: seen.append(sum(float(p.grad.abs().sum()) for p in run.model.parameters())))
    finish(run)
    recorded = json.loads(path.read_text())
    torch.testing.assert_close(torch.tensor(recorded["l1"]), torch.tensor(seen), rtol=1e-4, atol=0)
    refined = LinearDecay(norms=str(path))
    torch.testing.assert_close(refined.schedule(8), linear_decay(torch.tensor(recorded["l1"]), 8, 1, 0.1))
    by_l2 = LinearDecay(norms=str(path), norm="l2").schedule(8)
    torch.testing.assert_close(by_l2, linear_decay(torch.tensor(recorded["l2"]), 8, 2, 0.1))
    assert len(finish(run_of(refined, steps=8))) == 8


def test_norms_recorded_before_a_checkpoint_are_kept(tmp_path):
    path = tmp_path / "norms.json"
    plan = LinearDecay(record=str(path))
    finish(run_of(plan, steps=6))
    whole = json.loads(path.read_text())
    half = run_of(plan, steps=6)
    half.slice(language_loss, steps=3)
    half.save(tmp_path / "half")
    finish(run_of(plan, steps=6, model=llama(1), loader=lines(), resume=tmp_path / "half"))
    assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize("content", ["[]", "[1, 0]", '{"l2": [1, 2]}', "no json", "[1, NaN]"])
def test_bad_norms_are_an_error_that_says_what_to_do(tmp_path, content):
    path = tmp_path / "norms.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="norms"):
        run_of(LinearDecay(norms=str(path)))


def test_needs_the_number_of_steps():
    with pytest.raises(PlanError, match="steps=N"):
        run_of("optim/linear_decay", steps=None)


def test_pytorch_scheduler():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 2.0}])
    scheduler = linear_decay_scheduler(optimizer, 4, warmup=0.0)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]  # past its end the rate is the floor, 0
    with pytest.raises(PlanError, match="no option"):
        linear_decay_scheduler(optimizer, 4, warm=1)
