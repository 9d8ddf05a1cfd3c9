"""What puts methods of every kind into a run: they step as the equation says, resume exactly and compose."""

import contextlib
import dataclasses

import pytest
import torch

from conformance.optim import adamw, finish, language_loss, lines, llama
from hasten.core.errors import UsageError
from hasten.hosts.recognise import recognise
from hasten.optim._optimizers import split_groups
from hasten.optim.base import MatrixOptimizer, RuleOptimizer, attach
from hasten.optim.sinkgd import SinkGD
from hasten.train.run import Run


@dataclasses.dataclass
class Momentum:
    """SGD with momentum as a rule; the common scalar counts steps and the learning rate is divided by it."""

    name: str = "optim/momentum"
    lr: float = 0.1
    weight_decay: float | None = None

    def init(self, weights):
        return {"average": [torch.zeros_like(w) for w in weights], "count": torch.zeros(())}

    def update(self, gradients, weights, state, lr, decay):
        average = [0.5 * a + g for a, g in zip(state["average"], gradients, strict=True)]
        count = state["count"] + 1
        changes = [-lr * (a / count + d * w) for a, w, d in zip(average, weights, decay, strict=True)]
        return changes, {"average": average, "count": count}


@dataclasses.dataclass
class Library:
    """Torch's own SGD as a made optimizer."""

    takes: str = "all"
    name: str = "optim/library"

    def make(self, groups):
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def run_with(*methods, seed=0, steps=8, resume=None, optimizer=adamw, schedule=None):
    """A run that methods of no family are attached to by hand, as a plan's would be."""
    model = llama(seed)
    run = Run(model, optimizer(model), lines(seed), steps=steps, clip=1.0, seed=seed, schedule=schedule)
    for method in methods:
        run.state[method.name] = {}
        attach(method, run)
    run.hooks.fire("attached", run)
    if resume is not None:
        from hasten.train import checkpoint

        checkpoint.load(run, resume)
    return run


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]


def test_a_rule_steps_by_its_equation():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    other = torch.nn.Parameter(torch.tensor([3.0]))
    old = torch.optim.AdamW([{"params": [parameter], "weight_decay": 0.5}, {"params": [other], "weight_decay": 0.0}])
    optimizer = RuleOptimizer(Momentum(), old)
    for _ in range(2):
        parameter.grad, other.grad = torch.tensor([1.0, 1.0]), torch.tensor([2.0])
        optimizer.step()
    first = torch.tensor([1.0, -2.0]) - 0.1 * (torch.ones(2) + 0.5 * torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(parameter.detach(), first - 0.1 * (1.5 / 2 + 0.5 * first))
    torch.testing.assert_close(other.detach(), torch.tensor([3.0 - 0.2 - 0.1 * 3.0 / 2]))
    assert optimizer.state["common"]["count"] == 2


def test_groups_of_a_rule_keep_how_their_rates_compare():
    pair = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    old = torch.optim.AdamW([{"params": [pair[0]], "lr": 1e-3}, {"params": [pair[1]], "lr": 3e-3}], weight_decay=0)
    run = Run(torch.nn.ParameterList(pair), old, [0], steps=1)
    run.replace_optimizer(lambda old, run: RuleOptimizer(Momentum(), old))
    run.slice(lambda model, batch: model[0].sum() + model[1].sum())
    torch.testing.assert_close(torch.stack([*pair]).detach().flatten(), torch.tensor([-0.1, -0.3]))


def test_a_rule_refuses_sharded_weights():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.device_mesh = object()
    with pytest.raises(UsageError, match="can't see sharded ones"):
        RuleOptimizer(Momentum(), torch.optim.SGD([parameter], lr=1))


@pytest.mark.parametrize(
    "methods",
    [(Momentum(),), (Library(),), (Library("matrices"),), (SinkGD(momentum=0.5),)],
    ids=lambda given: "+".join(type(one).__name__ for one in given),
)
def test_resume_is_exact(methods, tmp_path):
    run = run_with(*methods)
    run.slice(language_loss, steps=5)
    run.save(tmp_path)
    run.slice(language_loss)
    again = run_with(*methods, resume=tmp_path, seed=0)
    assert again.step == 5
    again.slice(language_loss)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))


def test_a_rules_state_keeps_its_number_type():
    def make():
        parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        parameter.grad = torch.full((3,), 0.1, dtype=torch.bfloat16)
        return parameter, RuleOptimizer(Momentum(), torch.optim.SGD([parameter], lr=1.0))

    parameter, optimizer = make()
    optimizer.step()
    optimizer.state[parameter]["average"] = torch.full((3,), 1 / 3)
    other, again = make()
    again.load_state_dict(optimizer.state_dict())
    assert again.state[other]["average"].dtype == torch.float32
    assert torch.equal(again.state[other]["average"], torch.full((3,), 1 / 3))


def test_a_library_takes_the_matrices_only():
    run = run_with(Library("matrices"))
    mine = {id(weight) for _, weight in recognise(run.model).matrices()}
    run.slice(language_loss, steps=1)
    kinds = {id(p): set(run.optimizer.state[p]) for p in run.model.parameters()}
    assert isinstance(run.optimizer, MatrixOptimizer)
    assert all(("momentum_buffer" in kinds[p]) == (p in mine) for p in kinds)


@pytest.mark.parametrize("old", ["plain", "parts"])
def test_groups_are_split_without_changing_a_step(old):
    def run(split):
        found = run_with(*([SinkGD()] if old == "parts" else []))
        matrices = [weight for _, weight in recognise(found.model).matrices()]
        if split:
            split_groups(found.optimizer, matrices)
            assert len(found.optimizer.param_groups) == 1 + len(matrices)
            assert sum(len(group["params"]) for group in found.optimizer.param_groups) == len(found.parameters())
        finish(found)
        return weights(found)

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("kind", ["function", "scheduler", "none"])
@pytest.mark.parametrize("matrices", [True, False])
def test_factors_of_groups_multiply_the_schedule(kind, matrices):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = None if kind == "none" else lambda step, steps: 0.5
    if kind == "scheduler":
        given = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    found = Run(model, optimizer, lines(), steps=2, schedule=given)
    if matrices:
        attach(SinkGD(lr=0.1), found)
    found.optimizer.param_groups[0]["lr_factor"] = 3.0
    found.slice(language_loss)
    wanted = 0.1 * (1.0 if kind == "none" else 0.5)
    assert found.rates.used == pytest.approx([3 * wanted, wanted][: len(found.rates.used)])


def test_an_optimizer_with_two_modes_is_switched_around_evaluations():
    class TwoModes(torch.optim.SGD):
        mode = "none"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    @dataclasses.dataclass
    class Free(Library):
        own_schedule: bool = True

        def make(self, groups):
            return TwoModes(groups, lr=0.05)

    run = run_with(Free(), schedule=lambda step, steps: 0.5)
    assert run.optimizer.mode == "train"
    run.slice(language_loss, steps=1)
    assert run.rates.used == [0.05]
    with contextlib.suppress(RuntimeError), run.evaluation():
        assert run.optimizer.mode == "eval"
        raise RuntimeError
    assert run.optimizer.mode == "train"
    run.finish()
    assert run.optimizer.mode == "eval"
