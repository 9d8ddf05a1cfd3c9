import pytest
import torch

from conformance.optim import lines, llama
from hasten.core.errors import PlanError, UsageError
from hasten.grow.cgar import CGAR, recursion_at, supervision_weights
from hasten.train.run import Run
from hasten.workloads.find import workload

WORK = workload("sudoku(width=8, rows=4, passes=3)")


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, decay, dtype in (
        ((1,), 0.7, torch.float32),
        ((5, 3), 0.5, torch.float64),
        ((16, 2, 3), 1.0, torch.half),
    ):
        losses = torch.rand(shape, generator=generator).to(dtype)
        yield {"args": (losses, decay), "kwargs": {}, "grad": dtype != torch.half, "tolerance": 1e-6}


def run_of(plan, seed=0, steps=8, **options):
    model = WORK.build(seed)
    return Run(model, WORK.optimizer(model), WORK.batches(seed), plan or "", steps=steps, seed=seed, **options)


def finish(run):
    losses = []
    while not run.done:
        run.slice(WORK.loss, steps=1)
        losses.append(run.loss())
    return losses


def subject(method_class):
    def train(method, seed):
        run = run_of(method, seed)
        return [torch.tensor(finish(run)), *(p.detach() for p in run.model.parameters())]

    return {"train": train, "options": {}}


def test_stages_of_the_paper():
    assert [recursion_at((6, 3), at, 0.3, 0.6) for at in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)] == [
        (2, 1), (2, 1), (4, 2), (4, 2), (6, 3), (6, 3)
    ]  # fmt: skip
    assert recursion_at((1, 1), 0.0, 0.3, 0.6) == (1, 1)  # never more than the model's own


def test_weights_of_the_paper():
    weights = supervision_weights(16, 0.7)
    assert sum(weights) == pytest.approx(1) and weights[0] == pytest.approx(0.301, abs=1e-3)
    assert all(b / a == pytest.approx(0.7) for a, b in zip(weights, weights[1:], strict=False))


def test_the_forward_recurses_as_the_stage_says_and_in_full_when_evaluated():
    run = run_of("grow/cgar", steps=10)
    calls = []
    run.model.net.register_forward_hook(lambda *_: calls.append(run.step))
    finish(run)
    per_step = [calls.count(step) / 3 for step in range(10)]  # three passes in a forward
    assert per_step == [3] * 3 + [10] * 3 + [21] * 4  # T (n + 1)
    half = run_of("grow/cgar", steps=10)
    half.slice(WORK.loss, steps=1)
    with half.evaluation() as model:
        assert model.recursion == (6, 3)
    assert half.model.recursion == (2, 1) and half.model.supervision_weights[0] > 0.4
    half.finish()
    assert half.model.recursion == (6, 3) and half.model.supervision_weights == (1 / 3,) * 3


def test_the_loss_is_the_weighted_sum():
    run = run_of("grow/cgar(shallow=0.0, middle=0.0, decay=0.5)")
    batch = next(iter(run.loader))
    model = run.model
    own = []
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        run.model.supervision_weights = tuple(map(float, weights))
        own.append(WORK.losses(model, batch))
    run.model.supervision_weights = supervision_weights(3, 0.5)
    wanted = (4 * own[0] + 2 * own[1] + own[2]) / 7
    torch.testing.assert_close(WORK.losses(model, batch), wanted)


def test_resume_is_the_same_bit_for_bit(tmp_path):
    run = run_of("grow/cgar", steps=10)
    losses = finish(run)
    half = run_of("grow/cgar", steps=10)
    half.slice(WORK.loss, steps=4)
    half.save(tmp_path)
    resumed = run_of("grow/cgar", steps=10, resume=tmp_path)
    assert finish(resumed) == losses[4:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_model_without_recursion_is_named_and_nothing_is_changed():
    model = llama()
    with pytest.raises(UsageError, match="give LlamaForCausalLM an attribute recursion, a pair"):
        Run(model, torch.optim.SGD(model.parameters(), lr=0.1), lines(), "grow/cgar", steps=4)
    assert not hasattr(model, "recursion") and not hasattr(model, "supervision_weights")


def test_a_model_without_supervision_weights():
    class Plain(torch.nn.Linear):
        recursion = (6, 3)

    model = Plain(2, 2)
    with pytest.raises(UsageError, match="supervision_weights.*or set decay=1"):
        Run(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1, 2)], "grow/cgar", steps=4)
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1, 2)], "grow/cgar(decay=1.0)", steps=4)
    run.slice(lambda model, batch: model(batch).sum(), steps=1)
    assert model.recursion == (2, 1)


def test_bounds_in_the_wrong_order():
    with pytest.raises(PlanError, match="shallow must end first"):
        CGAR(shallow=0.7)
