import pytest
import torch

from conformance.optim import digits_loss, finish, language_loss, lines, llama, outcome, pictures, run_of, vit
from hasten.core.errors import PlanError, UsageError
from hasten.grow.multilevel import Multilevel
from hasten.hosts import recognise
from hasten.hosts.widths import Sizes, Widths

SMALL = {"initial": 0.25, "small": 0.375}


def cases():
    for shape, alpha in (((2, 4, 6), 0.5), ((4, 2, 2), 0.25), ((2, 6, 10), 1.0), ((6, 2, 4), 0.0)):
        make = torch.Generator().manual_seed(sum(shape))
        large = torch.randn(*shape, generator=make)
        small = torch.randn(*(n // 2 for n in shape), generator=make)
        yield {"args": (large, small, alpha), "tolerance": 1e-6}
        yield {"args": (large.bfloat16(), small.bfloat16(), alpha), "tolerance": 2e-2}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": SMALL}


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_stages_go_down_and_up_again():
    assert Multilevel().stages(100) == [(0, 0), (5, 1), (55, 0)]
    three = Multilevel(levels=3, initial=0.05, small=0.3)
    assert three.stages(200) == [(0, 0), (10, 1), (20, 2), (80, 1), (140, 0)]
    assert Multilevel(levels=3, initial=0.01, small=0.01).stages(4) == [(0, 0), (1, 1), (2, 2), (3, 1), (4, 0)]


def test_decoalescing_keeps_the_function_of_the_small_model_where_only_the_width_grows():
    model, ids = llama(), torch.arange(12)[None]
    run, method = run_of("", model=model), Multilevel(depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    widths = Widths(run.host)
    assert widths.sizes == Sizes(24, 2, 1, 40, 4)
    method.coalesce(run, widths, Sizes(12, 1, 1, 20, 4))
    assert widths.sizes == Sizes(12, 1, 1, 20, 4)
    wanted = logits(model, ids)
    large = {name: torch.zeros_like(p) for name, p in llama().named_parameters()}
    Multilevel(depth=1, alpha=1.0).widen(run, widths, Sizes(24, 2, 1, 40, 4), large)
    assert widths.sizes == Sizes(24, 2, 1, 40, 4)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)


def test_coalescing_takes_back_what_decoalescing_did_and_means_of_layers():
    model = llama()
    run, method = run_of("", model=model), Multilevel(alpha=1.0)
    large, half = Sizes(24, 2, 1, 40, 4), Sizes(12, 1, 1, 20, 2)
    widths, before = Widths(run.host), {name: p.detach().clone() for name, p in model.named_parameters()}
    method.coalesce(run, widths, half)
    assert len(model.model.layers) == 2 and model.config.num_hidden_layers == 2 and model.config.hidden_size == 12
    up = [before[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (2, 3)]
    mean = (up[0] + up[1]) / 2
    wanted = ((mean[:20] + mean[20:]) / 2)[:, :12] + ((mean[:20] + mean[20:]) / 2)[:, 12:]
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight.detach(), wanted)
    small = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.widen(run, widths, large, before)
    method.coalesce(run, widths, half)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), small[name], rtol=1e-6, atol=1e-7)


def test_the_run_goes_through_the_cycle_and_interpolates_with_the_saved_weights():
    run = run_of(Multilevel(**SMALL, alpha=0.0, rate=0.5), steps=8)
    seen = []
    run.hooks.of("step").insert(0, lambda run: seen.append((run.model.config.hidden_size, run.rates.used[0])))
    run.slice(language_loss, steps=1)
    before = {}
    run.hooks.of("step").insert(0, lambda run: before.update(state(run.model)) if run.step == 2 else None)
    run.slice(language_loss, steps=1)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters()} and not run.optimizer.state
    assert len(run.model.model.layers) == 2 and set(run.state["grow/multilevel"]["saved"]) == {"0"}
    run.slice(language_loss, steps=3)
    assert len(run.model.model.layers) == 4 and run.state["grow/multilevel"] == {"stage": 2, "saved": {}}
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters()), "alpha=0 gives them back"
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    finish(run)
    rates = [rate / 0.003 for _, rate in seen]
    assert [width for width, _ in seen] == [24, 24, 12, 12, 12, 24, 24, 24]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([1, 1, 0.5, 0.5, 0.5, 1, 1, 1]))


def test_groups_of_heads_whose_keys_come_down_to_one_head_come_back():
    from hosts.tiny import DECODERS

    model = DECODERS["llama"]()
    run = run_of("grow/multilevel(initial=0.25, small=0.375)", model=model, loader=[torch.arange(20)[None] % 61] * 8)
    run.slice(language_loss, steps=3)
    assert model.config.num_key_value_heads == 1 and model.model.layers[0].self_attn.num_key_value_groups == 2
    finish(run)
    assert model.config.num_key_value_heads == 2 and model.config.num_attention_heads == 4


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_loss_falls_through_the_cycle_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    plan = "grow/multilevel(initial=0.2, small=0.4, alpha=0.5, warmup=0.1) + optim/linear_decay"
    run = run_of(plan, steps=20)
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    for step in (3, 7, 15):  # before, in and after the small model's stage
        half = run_of(plan, steps=20)
        half.slice(language_loss, steps=step)
        half.save(tmp_path / str(step))
        resumed = run_of(plan, steps=20, model=llama(7), loader=lines(0), resume=tmp_path / str(step))
        assert resumed.model.config.hidden_size == (12 if step == 7 else 24)
        assert finish(resumed) == losses[step:]
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_vit_on_digits_through_three_levels():
    plan = "grow/multilevel(levels=3, width=1, initial=0.1, small=0.2)"
    run = run_of(plan, steps=20, model=vit(depth=4), loader=pictures(rows=16))
    depths = []
    run.on("step", lambda run: depths.append(len(run.host.layers)))
    finish(run, digits_loss)
    assert depths == [4, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2] + [4] * 9
    assert recognise(run.model).kind == "vit"


def test_sizes_that_do_not_divide_are_named_and_nothing_is_changed():
    model = llama()
    with pytest.raises(UsageError, match=r"2 heads.* can't be divided so; choose another fraction"):
        run_of(Multilevel(levels=3, initial=0.1, small=0.1), model=model)
    with pytest.raises(UsageError, match="4 layers"):
        run_of(Multilevel(width=1, depth=3), model=model)
    assert model.config.hidden_size == 24
    with pytest.raises(PlanError, match="leave no steps for the large model"):
        Multilevel(levels=3)
