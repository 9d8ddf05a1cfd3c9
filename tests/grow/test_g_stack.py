import gc
import weakref

import pytest
import torch

from conformance.optim import digits_loss, finish, language_loss, lines, llama, pictures, run_of, vit
from hasten.core.errors import PlanError, UsageError
from hasten.grow.g_stack import GStack, growth_fraction, growth_tokens

HALF = GStack(factor=2, at=0.5, warmup=0.0)


def cases():
    for depth, factor, shape in ((3, 2, (4, 5)), (1, 4, (3,)), (6, 1, ()), (2, 3, (2, 3, 1))):
        layers = torch.randn(depth, *shape, generator=torch.Generator().manual_seed(depth))
        yield {"args": (layers, factor), "kwargs": {}, "grad": True, "tolerance": 0.0}


def test_stages_are_shallow_first_and_then_abab():
    assert GStack(factor=3, at=0.25).stages(6, 100) == [(0, [0, 1]), (25, [0, 1, 0, 1, 0, 1])]
    assert GStack(factor=1).stages(6, 100) == [(0, [0, 1, 2, 3, 4, 5])]


@pytest.mark.parametrize(
    ("parameters", "tokens", "paper"), [(7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)]
)
def test_growth_timing_of_the_papers_table(parameters, tokens, paper):
    assert growth_tokens(parameters, 6 * parameters * tokens) == pytest.approx(paper, rel=0.01)


def test_the_papers_timing_holds_for_large_models_only():
    assert growth_fraction(int(7e9), int(2e12), int(4e6)) == pytest.approx(11.11 / 2000, rel=0.01)
    assert growth_fraction(int(1e6), int(1e8), 4096) is None  # more tokens than the run has
    assert growth_fraction(int(7e9), int(2e12), int(2e10)) is None  # less than a step


def test_without_a_time_the_papers_is_taken_where_it_holds(monkeypatch):
    asked = []

    def fraction(parameters, tokens, step):
        asked.append((parameters, tokens, step))
        return 0.25

    model = llama()
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("hasten.grow.g_stack.growth_fraction", fraction)
    run = run_of("grow/g_stack(factor=2)", steps=8, model=model)
    run.slice(language_loss, steps=1)
    assert len(run.model.model.layers) == 2
    run.slice(language_loss, steps=1)
    assert len(run.model.model.layers) == 4
    assert asked == [(weights, 8 * 8 * 32, 8 * 32)]  # 8 steps of 8 rows of 32 bytes
    run_of("grow/g_stack(factor=2, tokens=1000)", steps=8)
    assert asked[1][1:] == (8000, 1000)


def test_where_the_papers_timing_does_not_hold_the_report_says_so():
    run = run_of("grow/g_stack(factor=2)", steps=20)
    facts = run.context.report["grow/g_stack"]
    assert facts["at"] == 0.1 and "does not hold for its size" in facts["why"]
    run.slice(language_loss, steps=2)
    assert len(run.model.model.layers) == 4
    pixels = run_of("grow/g_stack(factor=2)", steps=20, model=vit(), loader=pictures())
    assert "does not say how many tokens" in pixels.context.report["grow/g_stack"]["why"]


def test_each_deep_layer_is_a_copy_and_the_rest_is_kept():
    run = run_of(HALF, steps=6)
    assert len(run.model.model.layers) == 2 and run.model.config.num_hidden_layers == 2
    shallow = {}

    def keep(run):
        if run.step == 3 and not shallow:
            shallow.update({name: p.detach().clone() for name, p in run.model.named_parameters()})

    run.hooks.of("step").insert(0, keep)
    run.slice(language_loss, steps=3)
    deep = dict(run.model.named_parameters())
    assert len(run.model.model.layers) == 4 and run.model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in run.model.model.layers] == [0, 1, 2, 3]
    for name, p in deep.items():
        source = name
        for place, origin in ((2, 0), (3, 1)):
            source = source.replace(f"layers.{place}.", f"layers.{origin}.")
        assert torch.equal(p, shallow[source])
    assert len({id(p) for p in deep.values()}) == len(deep)  # copies, no sharing between layers
    assert len(finish(run)) == 3


def test_the_optimizer_begins_anew_unless_state_is_carried():
    for carry in (False, True):
        run = run_of(GStack(factor=2, at=0.5, carry=carry), steps=6)
        run.slice(language_loss, steps=3)
        layers, state = run.model.model.layers, run.optimizer.state
        trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in run.model.parameters()}
        if carry:
            pair = [state[layers[place].mlp.up_proj.weight]["exp_avg"] for place in (0, 2)]
            assert torch.equal(*pair) and pair[0].data_ptr() != pair[1].data_ptr() and bool(pair[0].any())
        else:
            assert not state


def test_the_rate_rises_again_after_growth():
    run = run_of(GStack(factor=2, at=0.25, warmup=0.25), steps=16)
    rates = []
    run.on("step", lambda run: rates.append(run.rates.used[0]))
    finish(run)
    expected = [1.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 9
    torch.testing.assert_close(torch.tensor(rates), 0.003 * torch.tensor(expected))


def test_layers_that_are_left_out_are_freed():
    model = llama()
    left_out = weakref.ref(model.model.layers[3])
    run = run_of(HALF, steps=6, model=model)
    assert left_out() is not None  # until the first step the plan could still fail and be undone
    run.slice(language_loss, steps=1)
    gc.collect()
    assert left_out() is None


def test_loss_falls_through_growth_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    plan = "grow/g_stack(factor=2, at=0.5) + optim/sinkgd(lr=0.01, momentum=0.9) + optim/linear_decay"
    run = run_of(plan, steps=16)
    losses = finish(run)
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    for step in (5, 12):  # before and after the model grows
        half = run_of(plan, steps=16)
        half.slice(language_loss, steps=step)
        half.save(tmp_path / str(step))
        resumed = run_of(plan, steps=16, model=llama(7), loader=lines(0), resume=tmp_path / str(step))
        assert len(resumed.model.model.layers) == (2 if step < 8 else 4)
        assert finish(resumed) == losses[step:]
        pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_vit_on_digits():
    plan = "grow/g_stack(factor=2, at=0.3) + optim/sinkgd(lr=0.003)"
    run = run_of(plan, steps=45, model=vit(depth=2), loader=pictures(rows=32))
    assert len(run.host.layers) == 1
    losses = finish(run, digits_loss)
    assert len(run.host.layers) == 2
    assert sum(losses[-5:]) < 0.92 * sum(losses[:5])


def test_a_depth_that_the_factor_does_not_divide_is_named_and_nothing_is_changed():
    model = llama(depth=4)
    with pytest.raises(UsageError, match=r"4 layers can't be 3 copies .* divides 4 \(2, 4\)"):
        run_of(GStack(factor=3), model=model)
    assert len(model.model.layers) == 4


def test_bad_input_is_named():
    with pytest.raises(PlanError, match="leave out tokens"):
        GStack(at=0.5, tokens=100)
    with pytest.raises(PlanError, match="steps=N"):
        run_of("grow/g_stack(factor=2)", steps=None)
    model = llama()

    class Sharded(torch.optim.AdamW):
        """Its state is sharded, as that of FSDP is: a stand-in for a DTensor."""

    optimizer = Sharded(model.parameters())
    state = torch.zeros(3)
    state.device_mesh = "two processes"
    optimizer.state[next(model.parameters())] = {"exp_avg": state}
    with pytest.raises(UsageError, match="sharded: gather them first"):
        run_of(GStack(factor=2), model=model, optimizer=lambda model: optimizer)
    assert len(model.model.layers) == 4


def test_a_later_method_that_fails_leaves_the_full_model():
    model = llama()
    with pytest.raises(UsageError, match="norms"):
        run_of("grow/g_stack(factor=2) + optim/linear_decay(norms='nowhere.json')", model=model)
    assert len(model.model.layers) == 4 and model.config.num_hidden_layers == 4


def test_a_model_without_layers_is_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with pytest.raises(PlanError, match="decoder and vit"):
        run_of(HALF, model=model)
