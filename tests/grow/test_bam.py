import copy
import math

import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, outcome, run_of, vit
from hasten.core.errors import PlanError, UsageError
from hasten.grow.bam import BAM
from hasten.hosts.experts import ExpertAttention, ExpertFeedForward


def cases():
    generator = torch.Generator().manual_seed(0)
    for batch, length, width, count, heads, keys, size, shared, dtype in (
        (2, 5, 6, 3, 4, 2, 3, False, torch.float64),
        (1, 7, 4, 2, 4, 2, 2, True, torch.float64),
        (2, 1, 5, 1, 3, 3, 4, False, torch.float32),
        (1, 3, 4, 2, 2, 1, 4, True, torch.bfloat16),
    ):
        shapes = (
            (batch, length, width),
            (count, width),
            (count, heads * size, width),
            (1 if shared else count, keys * size, width),
            (1 if shared else count, keys * size, width),
            (count, width, heads * size),
        )
        given = tuple((0.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)
        exact = dtype != torch.bfloat16
        yield {"args": (*given, size), "grad": exact, "tolerance": 1e-5 if exact else 3e-2}


def bam_run(plan="grow/bam", seed=0, teacher=None, **more):
    teacher = [llama(seed + 10), llama(seed + 11)] if teacher is None else teacher
    return run_of(plan, seed, teacher=teacher, **more)


def subject(method_class):
    def train(method, seed):
        return outcome(bam_run(method, seed) if method else run_of(None, seed))

    return {"train": train, "options": {}}


def test_the_model_becomes_a_mixture_and_trains():
    run = bam_run(steps=20)
    blocks = run.model.model.layers
    assert all(isinstance(block.mlp, ExpertFeedForward) and len(block.mlp.experts) == 3 for block in blocks)
    assert all(isinstance(block.self_attn, ExpertAttention) for block in blocks)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters()}
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    run.finish()
    assert isinstance(blocks[0].mlp, ExpertFeedForward) and blocks[0].mlp.sink is None
    assert len(run.host.changes) == 0  # the dense parts are freed


def test_the_routers_losses_are_added_once_a_forward():
    plan = "grow/bam(balance={}, z={})"
    first = []
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        run = bam_run(plan.format(balance, z))
        run.slice(language_loss, steps=1)
        first.append(run.loss())
    layers = 4
    assert layers * 0.9 < first[1] - first[0] < layers * 3  # 1 where balanced, 3 where one expert gets all
    assert first[2] - first[0] == pytest.approx(layers * math.log(3) ** 2, rel=0.2)  # small scores

    twice = bam_run(plan.format(1.0, 0.0))
    twice.slice(lambda model, batch: (language_loss(model, batch) + language_loss(model, batch)) / 2, steps=1)
    assert twice.loss() == pytest.approx(first[1], abs=1e-5)


def test_options_choose_the_parts():
    for plan, heads in (("grow/bam(attention=false)", 0), ("grow/bam(share_kv=true)", 1), ("grow/bam", 3)):
        run = bam_run(plan)
        attention = run.model.model.layers[0].self_attn
        assert isinstance(attention, ExpertAttention) == (heads > 0)
        if heads:
            assert attention.inner.k_proj.out_features == heads * 12
        run.slice(language_loss, steps=1)
    two = bam_run("grow/bam(seed_expert=false, top=2, normalise=true, parallel=true)")
    assert len(two.model.model.layers[0].mlp.experts) == 2
    two.slice(language_loss, steps=1)


def test_resume_is_the_same_bit_for_bit(tmp_path):
    run = bam_run(steps=6)
    losses = finish(run)
    half = bam_run(steps=6)
    half.slice(language_loss, steps=3)
    half.save(tmp_path)
    resumed = run_of("grow/bam", 0, steps=6, teacher=[llama(4), llama(5)], loader=lines(0), resume=tmp_path)
    assert finish(resumed) == losses[3:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_dense_models_are_left_alone():
    teacher = [llama(1), llama(2)]
    before = [copy.deepcopy(one.state_dict()) for one in teacher]
    run = bam_run(teacher=teacher)
    finish(run)
    for one, state in zip(teacher, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_what_does_not_fit_is_named_and_nothing_is_changed():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    for plan, teacher, message in (
        ("grow/bam", [llama(depth=2)], "architecture"),
        ("grow/bam(top=4)", [llama(1)], "top=4"),
        ("grow/bam(seed_expert=false)", [llama(1)], "1 dense models give 1 experts"),
        ("grow/bam", [model], "shares weights"),
        ("grow/bam", ["draft.safetensors"], "teacher=MODEL or a list"),
    ):
        with pytest.raises(UsageError, match=message):
            run_of(plan, model=model, teacher=teacher)
    with pytest.raises(PlanError, match="teacher"):
        run_of("grow/bam", model=model)
    with pytest.raises(PlanError, match="decoder"):
        run_of("grow/bam", model=vit(), teacher=[vit()])
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(PlanError, match="attention=true"):
        BAM(share_kv=True, attention=False)
