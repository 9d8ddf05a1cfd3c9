"""SquareHead: the loss against transformers' own hidden states, zeros that stay, gradual pruning, what goes wrong."""

import copy
import itertools

import pytest
import torch
from torch import nn

import hasten
from conformance.optim import adamw, digits_loss, language_loss, lines, llama, pictures, vit
from hasten.core.errors import PlanError, UsageError
from hasten.prune.squarehead import SquareHead, divergence, squarehead
from hosts.tiny import DECODERS, padded_batch


def cases():
    def case(layers, batch, tokens, width, padding=0, dtype=torch.float32, **more):
        make = torch.Generator().manual_seed(layers * tokens * width)
        teacher = torch.randn(layers, batch, tokens, width, generator=make) * 3
        student = teacher + torch.randn(teacher.shape, generator=make)
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[-1, :padding] = False
        return {"args": (student.to(dtype), teacher.to(dtype), mask if padding else None), **more}

    yield case(1, 1, 1, 5, grad=True)
    yield case(3, 2, 7, 9, padding=3, grad=True)
    yield case(4, 3, 5, 8, padding=5)
    yield case(2, 2, 6, 16, dtype=torch.bfloat16)
    yield case(2, 2, 6, 16, padding=2, dtype=torch.float16)


def test_golden_value():
    teacher = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])  # mean squares 12.5 and 2
    student = torch.tensor([[[[3.0, 9.0]]], [[[1.0, 1.0]]]])  # errors 12.5 and 1
    torch.testing.assert_close(squarehead(student, teacher), torch.tensor(1.5))
    torch.testing.assert_close(squarehead(10 * student, 10 * teacher), torch.tensor(1.5))
    assert squarehead(teacher, teacher) == 0


def test_divergence_is_the_mean_over_tokens():
    make = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 3, 7, generator=make), torch.randn(2, 3, 7, generator=make)
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(divergence(z, t, 2.0), 4 * each.mean())
    mask = torch.tensor([[True, True, False], [False, True, True]])
    torch.testing.assert_close(divergence(z, t, 2.0, mask), 4 * each[mask].mean())


def pruned_pair(sparsity=0.75, seed=0):
    dense = llama(seed)
    model = copy.deepcopy(dense)
    hasten.apply(model, f"prune/magnitude(sparsity={sparsity}, layout=dense)").bake()
    return model, dense


def zeros(model):
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() == 2 and (p == 0).any()}


def matching(model, steps=6, plan="prune/squarehead", loader=None, **options):
    return hasten.training(model, adamw(model), lines() if loader is None else loader, plan, steps=steps, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_official_formula(name):
    """Hidden states as transformers returns them; the last one, after the last norm there, is taken before it here."""
    dense, model = DECODERS[name](), DECODERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    batch = padded_batch()
    plan = SquareHead(task=0.5, hidden=2.0, logit=0.25, temperature=3.0)
    run = hasten.training(model, adamw(model), [batch], plan, steps=1, teacher=dense)
    real, last = batch["attention_mask"].bool(), []
    for one in (model, dense):
        one.eval()
        keep = (
            hasten.apply(one, "")
            .host.blocks[-1]
            .register_forward_hook(lambda _, given, out: last.append(out[0] if isinstance(out, tuple) else out))
        )
        states = one(**batch, output_hidden_states=True)
        keep.remove()
        last[-1] = torch.stack([*states.hidden_states[1:-1], last[-1]]).detach()[:, real], states.logits.detach()
    (s, z), (t, y) = last
    own = torch.nn.functional.cross_entropy(z.flatten(0, 1), batch["input_ids"].flatten())
    features = sum((a - b).square().mean() / b.square().mean() for a, b in zip(s, t, strict=True))
    wanted = 0.5 * own + 2 * features + 0.25 * divergence(z, y, 3.0, real)
    model.eval()
    for given in run:
        logits = run.model(**given).logits
        run.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["input_ids"].flatten()))
    assert run.loss() == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    "make", [adamw, lambda model: torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=0.1)]
)
def test_zeros_stay_and_are_what_magnitude_finds_again(make):
    model, dense = pruned_pair()
    before = zeros(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = hasten.training(model, make(model), lines(), "prune/squarehead", steps=6, teacher=dense, clip=1.0)

    def check(run):
        after = zeros(run.model)
        assert all(torch.equal(after[name], one) for name, one in before.items())

    run.on("step", check)
    run.slice(language_loss)
    run.finish()
    assert len(before) == 4 * 7
    for name, p in model.named_parameters():
        assert not torch.equal(p, weights[name])
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = hasten.apply(model, "prune/magnitude(sparsity=0.75, layout=dense)")
    assert handle.report["prune/magnitude"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    for name, p in model.named_parameters():
        assert torch.equal(p, trained[name]), name


def test_zeroed_gradients_do_not_count_when_clipping():
    model, dense = pruned_pair()
    run = matching(model, steps=1, teacher=dense, clip=1e9)
    gone = zeros(model)
    norms = []
    run.on(
        "gradients",
        lambda run: norms.extend(p.grad[gone[n]].norm() for n, p in run.model.named_parameters() if n in gone),
    )
    run.slice(language_loss)
    assert len(norms) == 28 and not any(norms) and float(run.gradient_norm) > 0


def test_it_recovers_the_hidden_states():
    """After as many steps the states are nearer to the dense model's than with the loop's loss alone."""
    batches = list(itertools.islice(lines(), 4))
    found = {}
    for plan in ("prune/squarehead", "prune/squarehead(hidden=0)"):
        model, dense = pruned_pair(0.6)
        run = matching(model, steps=30, plan=plan, teacher=dense, clip=1.0)
        run.slice(language_loss)
        with torch.no_grad():
            states = [
                [torch.stack(one(input_ids=batch, output_hidden_states=True).hidden_states[1:]) for batch in batches]
                for one in (model, dense)
            ]
        found[plan] = float(sum(squarehead(s, t) for s, t in zip(*states, strict=True)))
    assert found["prune/squarehead"] < 0.5 * found["prune/squarehead(hidden=0)"]


def test_vision_transformer_and_bf16():
    dense = vit()
    model = copy.deepcopy(dense)
    hasten.apply(model, "prune/magnitude(sparsity=0.5, layout=dense)").bake()
    before = zeros(model)
    plan = "prune/squarehead(logit=1)"
    run = hasten.training(model, adamw(model), pictures(), plan, steps=3, teacher=dense, precision="bf16")
    run.slice(digits_loss)
    assert all(torch.equal(zeros(model)[name], one) for name, one in before.items())
    assert run.loss() < 20


def test_gradual_pruning_follows_the_cubic():
    plan = SquareHead(sparsity=0.8, begin=0.2, end=0.6, prunings=2)
    assert [plan.target(step, 10) for step in (0, 1, 3)] == [0, 0, 0]
    assert plan.target(4, 10) == plan.target(5, 10) == pytest.approx(0.8 * (1 - 0.5**3))
    assert plan.target(6, 10) == plan.target(9, 10) == pytest.approx(0.8)
    assert SquareHead(sparsity=0.8, end=1.0).target(9, 10) == pytest.approx(0.8)
    assert SquareHead(sparsity=0.5, pattern="2:4").target(0, 10) == 0.5
    dense = llama()
    model, seen = copy.deepcopy(dense), []
    run = matching(model, steps=10, plan=plan, teacher=dense)

    def look(run):
        pruned = zeros(run.model)
        seen.append(float(torch.cat([one.flatten() for one in pruned.values()]).float().mean()) if pruned else 0.0)

    run.on("step", look)
    run.slice(language_loss)
    assert seen == pytest.approx([0] * 4 + [0.7] * 2 + [0.8] * 4, abs=0.01)


def test_n_of_m_comes_whole():
    dense = llama()
    model = copy.deepcopy(dense)
    matching(model, steps=2, plan="prune/squarehead(sparsity=0.5, pattern='2:4')", teacher=dense).slice(language_loss)
    groups = model.model.layers[0].mlp.up_proj.weight.view(-1, 6, 4)
    assert bool(((groups != 0).sum(2) == 2).all())


def test_pruning_and_training_in_one_plan():
    dense = llama()
    model = copy.deepcopy(dense)
    run = matching(model, plan="prune/magnitude(sparsity=0.5, layout=dense) + prune/squarehead", teacher=dense)
    run.slice(language_loss)
    assert len(zeros(model)) == 28


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    plan = "prune/squarehead(sparsity=0.7, end=0.8, prunings=4)"

    def fresh(**more):
        dense = llama()
        return matching(copy.deepcopy(dense), steps=8, plan=plan, teacher=dense, clip=1.0, **more)

    whole = fresh()
    whole.slice(language_loss)
    half = fresh()
    half.slice(language_loss, steps=5)
    half.save(tmp_path / "half")
    rest = fresh(resume=tmp_path / "half")
    rest.slice(language_loss)
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_batches_and_an_evaluation_in_between():
    model, dense = pruned_pair()
    run = matching(model, steps=2, teacher=dense, accumulate=2)
    for batch in run:
        with run.evaluation() as evaluated:
            evaluated(input_ids=batch)
        run.backward(language_loss(run.model, batch))
    assert run.step == 2 and all(torch.equal(zeros(model)[n], one) for n, one in zeros(pruned_pair()[0]).items())


def test_finish_takes_the_hooks_off():
    model, dense = pruned_pair()
    hooks = lambda m: sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in m.modules())  # noqa: E731
    before = hooks(model), hooks(dense)
    dense.train()
    run = matching(model, steps=1, teacher=dense)
    run.slice(language_loss)
    assert hooks(model) > before[0]
    run.finish()
    assert (hooks(model), hooks(dense)) == before and dense.training


def test_what_can_not_be_says_why():
    model, dense = pruned_pair()
    with pytest.raises(PlanError, match="teacher"):
        matching(model)
    with pytest.raises(PlanError, match="acts on training"):
        hasten.apply(model, "prune/squarehead", teacher=dense)
    with pytest.raises(UsageError, match="shares weights"):
        matching(model, teacher=model)
    with pytest.raises(UsageError, match="4 blocks and its teacher 2"):
        matching(model, teacher=llama(depth=2))
    with pytest.raises(PlanError, match="no loss left"):
        SquareHead(task=0, hidden=0)
    with pytest.raises(PlanError, match="begin must be before end"):
        SquareHead(begin=0.7)
    with pytest.raises(UsageError, match="steps=N"):
        matching(model, steps=None, plan="prune/squarehead(sparsity=0.9)", teacher=dense)
    run = matching(model, teacher=dense)
    with pytest.raises(UsageError, match="without a forward of the run's model"):
        for _ in run:
            run.backward(nn.Parameter(torch.ones(())).sum())
