import math

import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, run_of
from hasten.core.errors import PlanError
from hasten.optim.rewarming import Rewarming, rewarming


def cases():
    for steps, warmup, peak, floor, start in (
        (100, 0.01, 1.0, 0.1, 0.0),
        (37, 0.2, 2.0, 0.0, 0.1),
        (1, 0.0, 0.5, 0.1, 0.0),
        (5, 0.9, 1.0, 1.0, 1.0),
    ):
        yield {"args": (steps, warmup, peak, floor, start), "kwargs": {}, "grad": False, "tolerance": 1e-12}


def test_golden_values():
    # W = 2 of T = 6: half, full, then (1 + cos(pi k / 4)) / 2 for k = 1..4, above a floor of a tenth of the peak 2.
    wanted = [1.0, 2.0, *(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4))) for k in (1, 2, 3, 4))]
    found = rewarming(6, 1 / 3, 2.0, 0.1, 0.0)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert float(found[-1]) == pytest.approx(0.2)


def test_without_warm_up_it_is_a_cosine_from_the_peak():
    factors = Rewarming(warmup=0).schedule(1000)
    assert factors[0] == pytest.approx(1.0, abs=1e-5) and factors[-1] == pytest.approx(0.1)
    assert bool((factors.diff() < 0).all())


def test_it_replaces_the_constant_rate_and_a_resumed_run_goes_on_with_it(tmp_path):
    def run(**more):
        return run_of("optim/rewarming(warmup=0.25)", steps=8, schedule=lambda step, steps: 0.1, **more)

    whole, rates = run(), []
    whole.on("step", lambda run: rates.append(run.rates.used[0]))
    losses = finish(whole)
    torch.testing.assert_close(torch.tensor(rates), (0.003 * rewarming(8, 0.25, 1.0, 0.1, 0.0)).float())
    half = run()
    half.slice(language_loss, steps=3)
    half.save(tmp_path / "half")
    resumed = run(model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_needs_the_number_of_steps_and_a_plan_holds_one_schedule():
    with pytest.raises(PlanError, match="steps=N"):
        run_of("optim/rewarming", steps=None)
    with pytest.raises(PlanError, match="lr"):
        run_of("optim/rewarming + optim/linear_decay")
