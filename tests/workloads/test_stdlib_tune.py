import numpy as np
import torch

from hasten.bench.training import make_run
from hasten.core.plans import Plan
from hasten.workloads.find import workload


def test_the_text_is_the_library_written_otherwise():
    tune, plain = workload("stdlib-tune"), workload("stdlib-lm(task=train)")
    for held_out in (False, True):
        wide, narrow = (one.tokens(held_out).tobytes()[:100_000] for one in (tune, plain))
        assert b"    " not in wide and wide.count(b"\n") == wide.count(b"\r\n") > 1000
        back = wide.replace(b"\r\n", b"\n").replace(b"\t", b"    ")
        assert narrow.startswith(back[:50_000])


def test_the_model_begins_away_from_the_target_and_the_baseline_gets_there():
    tune = workload("stdlib-tune")
    run = make_run(tune, Plan(), seed=0)
    values = tune.evaluate(run.model)
    assert values.shape == (64,) and 4.6 < float(np.mean(values)) < 5.2
    run.slice(tune.loss, steps=8)
    with run.evaluation() as model:
        assert float(np.mean(tune.evaluate(model))) < tune.target
    assert [tune.schedule(step, 500) for step in range(3)] == [0.5, 1.0, 1.0]


def test_seeds_change_the_order_of_the_batches_only():
    tune = workload("stdlib-tune")
    one, other = (tune.build(seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (next(iter(tune.batches(seed))) for seed in (0, 1))
    assert first.shape == second.shape == (2, 128) and not torch.equal(first, second)
