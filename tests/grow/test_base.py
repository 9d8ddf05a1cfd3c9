"""What growth needs of a run, before anything is changed."""

import pytest
import torch

from conformance.optim import finish, llama, run_of
from hasten.core.errors import UsageError
from hasten.grow.base import check_growable


def test_a_plain_run_can_grow():
    run = run_of(None)
    finish(run)
    check_growable("grow/x", run)


@pytest.mark.parametrize("where", ["weight", "state"])
def test_sharded_weights_and_states_are_refused(where):
    run = run_of(None)
    run.slice(lambda model, batch: model(input_ids=batch, labels=batch).loss, steps=1)
    parameter = next(run.model.parameters())
    held = parameter if where == "weight" else run.optimizer.state[parameter]["exp_avg"]
    held.device_mesh = object()
    with pytest.raises(UsageError, match="sharded: gather them first"):
        check_growable("grow/x", run)


def test_several_processes_and_open_ends_are_refused():
    run = run_of(None)
    run.processes = 2
    with pytest.raises(UsageError, match="train in one process"):
        check_growable("grow/x", run)
    with pytest.raises(UsageError, match="steps=N"):
        check_growable("grow/x", run_of(None, steps=None, model=llama()))
    assert isinstance(next(run.model.parameters()), torch.nn.Parameter)
