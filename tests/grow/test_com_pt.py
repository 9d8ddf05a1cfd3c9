import pytest
import torch

from conformance.optim import digits_loss, finish, language_loss, lines, llama, outcome, pictures, run_of, vit
from hasten.core.errors import PlanError, UsageError
from hasten.grow.com_pt import ComPT, com_pt

SMALL = {"at": (0.5,), "alpha": 20.0}


def cases():
    for rows, width, small in ((3, 8, 4), (1, 5, 5), (7, 6, 1)):
        make = torch.Generator().manual_seed(rows)
        features, wanted = torch.randn(rows, width, generator=make), torch.randn(rows, small, generator=make)
        yield {"args": (features, wanted), "grad": True, "tolerance": 1e-5}
        yield {"args": (features.bfloat16(), wanted.bfloat16()), "tolerance": 1e-5}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": SMALL}


def named(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_distance_of_unit_vectors_is_what_their_angle_says():
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert float(com_pt(one, other)) == pytest.approx((2 - 2 * 2**-0.5) / 2)
    assert float(com_pt(torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 2.0]]))) == pytest.approx(0, abs=1e-7)


def test_the_small_model_is_the_leading_part_and_the_large_one_holds_it():
    model = llama()
    initial = named(model)
    run = run_of(ComPT(at=(0.5,), alpha=0.0), steps=4, model=model)
    assert model.config.hidden_size == 12 and model.config.num_attention_heads == 1 and len(model.model.layers) == 2
    query = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(named(model)[query], initial[query][:12, :12])
    before = {}
    run.hooks.of("step").insert(0, lambda run: before.update(named(model)) if run.step == 2 else None)
    run.slice(language_loss, steps=2)
    assert model.config.hidden_size == 24 and len(model.model.layers) == 4
    after = named(model)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        wanted = initial[name].clone()
        wanted[:12, :20] = before[f"model.layers.{layer // 2}.mlp.down_proj.weight"]
        assert torch.equal(after[name], wanted)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()} and not run.optimizer.state
    assert "teacher" in run.state["grow/com_pt"] and not run.state["grow/com_pt"]["teacher"]


def test_layers_keep_their_places_where_only_the_depth_grows_unless_they_are_stretched():
    for stretch, places in ((False, (0, 1, None, None)), (True, (0, 0, 1, 1))):
        model = llama()
        initial, before = named(model), {}
        run = run_of(ComPT(widths=(1.0,), alpha=0.0, stretch=stretch), steps=4, model=model)
        run.hooks.of("step").insert(0, lambda run, before=before, model=model: before.update(named(model)))
        run.slice(language_loss, steps=2)
        for layer, source in enumerate(places):
            name = "model.layers.{}.mlp.up_proj.weight"
            wanted = initial[name.format(layer)] if source is None else before[name.format(source)]
            assert torch.equal(named(model)[name.format(layer)], wanted)


def test_copies_without_noise_keep_the_function():
    model, ids = llama(), torch.arange(9)[None]
    run = run_of(ComPT(depths=(1.0,), expand="copy", noise=0.0, alpha=0.0), steps=4, model=model)
    outs = []

    def see(run):
        outs.append(model(input_ids=ids).logits.detach())

    run.hooks.of("step").insert(0, see)
    run.on("step", see)
    run.slice(language_loss, steps=2)
    assert model.config.hidden_size == 24
    torch.testing.assert_close(outs[-1], outs[-2], rtol=1e-4, atol=1e-5)


def test_the_frozen_predecessor_is_learnt_from_for_the_given_part():
    run = run_of(ComPT(depths=(1.0,), expand="copy", noise=0.0, alpha=100.0, distil=0.5), steps=8)
    run.slice(language_loss, steps=4)
    teacher = run.state["grow/com_pt"]["teacher"]
    assert teacher["model.norm.weight"].shape == (12,)
    plain = []
    run.hooks.of("loss").insert(0, lambda run, loss: plain.append(float(loss.detach())) or loss)
    extra = [after - before for after, before in zip(finish(run), plain, strict=True)]
    assert extra[0] == pytest.approx(0, abs=1e-4), "copies have the predecessor's features"
    assert extra[1] > 1e-3 and extra[2:] == [0.0, 0.0]


def test_three_models_and_a_resumed_run_that_is_the_same_bit_for_bit(tmp_path):
    plan = "grow/com_pt(widths=[0.5, 1.0], depths=[0.25, 0.5], at=[0.25, 0.5], alpha=20, warmup=0.1)"
    run = run_of(plan, steps=16)
    sizes = []
    run.on("step", lambda run: sizes.append((run.model.config.hidden_size, len(run.model.model.layers))))
    losses = finish(run)
    assert sizes == [(12, 1)] * 3 + [(24, 2)] * 4 + [(24, 4)] * 9
    for step in (2, 6, 11):
        half = run_of(plan, steps=16)
        half.slice(language_loss, steps=step)
        half.save(tmp_path / str(step))
        resumed = run_of(plan, steps=16, model=llama(0), loader=lines(0), resume=tmp_path / str(step))
        assert finish(resumed) == losses[step:]
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_vit_on_digits():
    run = run_of(ComPT(at=(0.4,), alpha=20.0), steps=10, model=vit(depth=2), loader=pictures(rows=16))
    assert run.model.config.hidden_size == 12
    losses = finish(run, digits_loss)
    assert run.model.config.hidden_size == 24 and all(loss < 10 for loss in losses)
    run.finish()
    assert not run.host.head._forward_pre_hooks


def test_chains_that_do_not_fit_are_named_and_nothing_is_changed():
    model = llama()
    with pytest.raises(UsageError, match="can't be divided so"):
        run_of(ComPT(widths=(0.3,)), model=model)
    with pytest.raises(UsageError, match="norms"):
        run_of("grow/com_pt + optim/linear_decay(norms='nowhere.json')", model=model)
    assert model.config.hidden_size == 24 and len(model.model.layers) == 4
    with pytest.raises(PlanError, match="wider or deeper"):
        ComPT(widths=(1.0,), depths=(1.0,))
    with pytest.raises(PlanError, match="equal length"):
        ComPT(widths=(0.5, 1.0))
