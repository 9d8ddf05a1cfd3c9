import copy
import math

import pytest
import torch

from conformance.optim import digits_loss, finish, language_loss, lines, llama, pictures, run_of, vit
from hasten.core.errors import UsageError
from hasten.hosts.recognise import recognise
from hasten.optim.base import MatrixOptimizer, stacks
from hasten.optim.sinkgd import SinkGD, naive_sinkgd, sinkgd


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, iterations in (
        ((7, 5), torch.float32, 5),
        ((3, 5, 12), torch.float32, 1),
        ((2, 9, 1), torch.float32, 5),
        ((1, 6), torch.float32, 2),
        ((2, 33, 17), torch.bfloat16, 5),
        ((4, 8), torch.float16, 3),
    ):
        gradient = torch.randn(shape, generator=generator).to(dtype)
        yield {"args": (gradient, iterations), "kwargs": {}, "grad": False, "tolerance": 2e-5}
    sparse = torch.randn(6, 4, generator=generator)
    sparse[2], sparse[:, 1] = 0, 0
    yield {"args": (sparse, 5), "kwargs": {}, "grad": False, "tolerance": 2e-5}
    yield {"args": (1e-18 * torch.randn(5, 6, generator=generator), 5), "kwargs": {}, "grad": False, "tolerance": 2e-5}


def test_rows_and_columns_reach_the_norms_of_the_paper():
    m, n = 24, 40
    x = sinkgd(torch.randn(m, n, generator=torch.Generator().manual_seed(1)), 30)
    torch.testing.assert_close(x.norm(dim=1), torch.full((m,), math.sqrt(n)), rtol=1e-4, atol=0)
    torch.testing.assert_close(x.norm(dim=0), torch.full((n,), math.sqrt(m)), rtol=1e-4, atol=0)


def test_golden_value():
    # Row norms 5 and 13, so the rows become sqrt(2) (3, 4) / 5 and sqrt(2) (5, 12) / 13; then each column to sqrt(2).
    x = sinkgd(torch.tensor([[3.0, 4.0], [5.0, 12.0]]), 1)
    rows = torch.tensor([[3 / 5, 4 / 5], [5 / 13, 12 / 13]], dtype=torch.float64)
    torch.testing.assert_close(x.double(), rows / rows.norm(dim=0) * math.sqrt(2), rtol=1e-6, atol=0)


def test_the_step_does_not_depend_on_the_gradients_scale():
    g = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sinkgd(g * 1e-12, 5), sinkgd(g, 5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sinkgd(g * 1e12, 5), sinkgd(g, 5), rtol=1e-5, atol=1e-6)


def build(method=None, optimizer=torch.optim.AdamW, **options):
    model = llama()
    matrices = [weight for _, weight in recognise(model).matrices()]
    rest = optimizer(model.parameters(), **{"lr": 1e-3, **options})
    return model, matrices, MatrixOptimizer(method or SinkGD(), matrices, rest)


def backward(model, seed=0):
    batch = next(iter(lines(seed)))
    model(input_ids=batch, labels=batch).loss.backward()


def test_matrices_follow_the_equation_and_the_rest_its_own_optimizer():
    model, matrices, optimizer = build(SinkGD(lr=0.01, weight_decay=0.1))
    plain = copy.deepcopy(model)
    before = [weight.detach().clone() for weight in matrices]
    backward(model)
    backward(plain)
    optimizer.step()
    torch.optim.AdamW(plain.parameters(), lr=1e-3).step()
    for weight, old in zip(matrices, before, strict=True):
        expected = old * (1 - 0.01 * 0.1) - 0.01 * naive_sinkgd(weight.grad, 5)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)
    own = {id(weight) for weight in matrices}
    others = [(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True) if id(p) not in own]
    assert others and all(torch.equal(p, q) for p, q in others)
    assert not any(weight in optimizer.state for weight in matrices)  # stateless


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_step_in_place_is_the_update(momentum, monkeypatch):
    """With a rate for each matrix; without the kernel the same steps are made in stacks."""
    trained = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr("hasten.kernels.sinkhorn.kernel", lambda: None)
        model, matrices, optimizer = build(SinkGD(lr=0.01, momentum=momentum, weight_decay=0.1))
        optimizer.split(matrices)
        for place, group in enumerate(optimizer.param_groups):
            group["lr"] *= 1 + place / 7
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*model.parameters(), *(optimizer.state[w].get("average", w) for w in matrices)])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_the_rest_can_have_a_rate_of_its_own():
    run = run_of("optim/sinkgd(lr=0.001, rest_lr=0.02)", steps=2, schedule=lambda step, steps: 0.5)
    finish(run)
    assert run.rates.used == [0.0005, 0.01]


def test_embedding_and_head_are_no_matrices():
    model, matrices, optimizer = build()
    own = {id(weight) for weight in matrices}
    assert id(model.model.embed_tokens.weight) not in own and id(model.lm_head.weight) not in own
    assert len(matrices) == 7 * 4


def test_state_dict_goes_round_with_momentum():
    model, _, optimizer = build(SinkGD(momentum=0.9))
    for seed in range(2):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    twin, _, other = build(SinkGD(momentum=0.9))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (twin, other)):
        backward(one, 5)
        its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_schedulers_hooks_and_closures_see_an_ordinary_optimizer():
    model, matrices, optimizer = build(optimizer=torch.optim.SGD, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *given: seen.append(1))

    def closure():
        seen.append(0)
        optimizer.zero_grad()
        batch = next(iter(lines()))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    scheduler.step()
    assert seen == [0, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0005, 0.0005]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [group["lr"] for group in optimizer.rest.param_groups] == [0.0005]


def test_a_group_added_later_goes_to_the_persons_part():
    model, _, optimizer = build()
    extra = torch.nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(3, 3)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3, 3), 1 - 0.5 * 0.01 - 0.5))  # AdamW's first step


def test_only_what_the_person_trains_is_taken_over():
    model = llama()
    matrices = [weight for _, weight in recognise(model).matrices()]
    rest = torch.optim.SGD(matrices[:3] + [model.lm_head.weight], lr=0.1)
    optimizer = MatrixOptimizer(SinkGD(), matrices, rest)
    assert len(optimizer.param_groups[0]["params"]) == 3
    assert len(rest.param_groups[0]["params"]) == 4  # the person's own object stays as it was
    with pytest.raises(UsageError, match="no matrix of a hidden layer"):
        MatrixOptimizer(SinkGD(), matrices, torch.optim.SGD([model.lm_head.weight], lr=0.1))


def test_equal_shapes_share_one_stack():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3, 2), (2, 3))]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    assert [len(stack) for stack in stacks(parameters)] == [2, 1]


@pytest.mark.parametrize("plan", ["optim/sinkgd(lr=0.01)", "optim/sinkgd(lr=0.01, momentum=0.9)"])
def test_loss_falls_and_a_resumed_run_ends_bit_for_bit_the_same(plan, tmp_path):
    run = run_of(plan, steps=16)
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    half = run_of(plan, steps=16)
    while half.step < 7:
        half.slice(language_loss, steps=1)
    half.save(tmp_path / "half")
    resumed = run_of(plan, seed=0, steps=16, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[7:]
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_vit_on_digits():
    run = run_of("optim/sinkgd(lr=0.003)", steps=45, model=vit(depth=2), loader=pictures(rows=32))
    losses = finish(run, digits_loss)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_half_precision_weights():
    weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    optimizer = MatrixOptimizer(SinkGD(lr=0.5, momentum=0.5), [weight], torch.optim.SGD([weight], lr=0.1))
    optimizer.step()
    assert weight.dtype == torch.bfloat16 and optimizer.state[weight]["average"].dtype == torch.float32
    torch.testing.assert_close(weight.detach().float(), -0.5 * naive_sinkgd(weight.grad, 5), rtol=2e-2, atol=2e-2)
    other = MatrixOptimizer(SinkGD(lr=0.5, momentum=0.5), [weight], torch.optim.SGD([weight], lr=0.1))
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[weight]["average"], optimizer.state[weight]["average"])
