"""MCTF: the paper's arithmetic by hand, real vision transformers with fewer tokens, and what a person trips over."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hasten
from conformance.tokens import pixels, vit
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import recognise
from hasten.kernels import lowbit, lowbit_gemm
from hasten.tokens import base
from hasten.tokens.mctf import MCTF, match, mctf
from hosts.test_vit import PREFIX, build, every, inputs_of, logits
from hosts.tiny import llama


def tokens(batch, number, width, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, number, width, generator=g).to(dtype)
    size = torch.randint(1, 5, (batch, number, 1), generator=g).float()
    received = torch.rand(batch, number, generator=g) + 0.05
    return x, size, received


def cases():
    yield {"args": (*tokens(1, 9, 6, 0), 3), "grad": True}
    yield {"args": (*tokens(3, 18, 5, 1), 7), "kwargs": {"num_prefix": 2}, "grad": True}
    yield {"args": (*tokens(2, 17, 8, 2), 8), "grad": True}
    yield {"args": (*tokens(2, 14, 4, 3), 7), "kwargs": {"num_prefix": 0, "bidirection": False}}
    yield {"args": (*tokens(2, 16, 4, 4), 5), "kwargs": {"tau_sim": 0, "tau_size": 1, "num_prefix": 3}}
    yield {"args": (*tokens(2, 13, 4, 5), 1), "kwargs": {"tau_info": 0, "tau_size": 0, "pooling": "size"}}
    yield {"args": (*tokens(2, 4, 4, 6), 1), "kwargs": {"tau_sim": 2.5}}
    yield {"args": (*tokens(2, 15, 8, 7, torch.bfloat16), 6), "tolerance": 1e-2}
    yield {"args": (*tokens(2, 11, 8, 8), 0)}


def test_the_matching_by_hand():
    """Class token, then patches b0 a0 b1 a1: a1 equals b0 and joins it; then b1 goes into a0, all that is left."""
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [-1, 0.5], [2, 0]]])
    size, received = torch.tensor([1.0, 2, 1, 1, 1])[None, :, None], torch.tensor([[0.2, 0.1, 0.2, 0.3, 0.2]])
    merged, sizes, places = mctf(x, size, received, 2, tau_info=0, tau_size=0)
    assert places.tolist() == [[0, 2, 1, 1, 2]] and sizes.flatten().tolist() == [1, 2, 3]
    # weights a s: b0 0.2 and a1 0.2; a0 0.2 and b1 0.3
    torch.testing.assert_close(merged[0], torch.tensor([[9, 9], [-0.6, 0.7], [1.5, 0]]))


@pytest.mark.parametrize("r", [1, 5, 8])
def test_sizes_and_mass(r):
    x, size, received = tokens(3, 17, 8, 9)
    merged, sizes, _ = mctf(x, size, received, r, pooling="size")
    assert merged.shape == (3, 17 - r, 8)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    torch.testing.assert_close((merged * sizes).sum(1), (x * size).sum(1))
    assert torch.equal(merged[:, 0], x[:, 0])


def test_less_attended_and_smaller_tokens_go_first():
    x = torch.ones(1, 13, 4)
    even = torch.ones(1, 13)
    received = even.clone()
    received[0, [4, 7]] = 1e-3
    small = torch.full((1, 13, 1), 50.0)
    small[0, [4, 7]] = 1
    for given in ((received, torch.ones(1, 13, 1)), (even, small)):
        groups = match(x, given[1], given[0], 1, 1, 1, 20, 40, False, "informed")
        assert groups.source.tolist() == [[4]] and groups.kept[0, groups.target[0, 0]] == 7


def counts_of(model, host, inputs):
    """Tokens that enter each block."""
    seen = []
    hooks = [
        one.block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1])) for one in host.layers
    ]
    out = logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen, out


def fewer(counter_of):
    with FlopCounterMode(display=False) as counter:
        counter_of()
    return counter.get_total_flops()


@every
@pytest.mark.parametrize("ahead", [True, False])
def test_real_models_have_fewer_tokens_and_come_back(name, ahead):
    model, inputs = build(name), inputs_of(name)
    wanted, P = logits(model, inputs), PREFIX[name]
    plain = fewer(lambda: logits(model, inputs))
    first = 4 if name == "timm_distilled" else 16
    handle = hasten.apply(model, MCTF(r=0.25, ahead=ahead, floor=2, layers=[0, 1]))
    seen, out = counts_of(model, handle.host, inputs)
    second = first - first // 4
    third = second - second // 4
    assert seen == [P + first, P + second, P + third]
    facts = handle.report["tokens/mctf"]
    assert facts["tokens_of_attention"] == seen
    assert facts["tokens_of_mlp"] == ([P + second, P + third, P + third] if ahead else seen)
    assert out.shape == wanted.shape and not torch.equal(out, wanted)
    assert fewer(lambda: logits(model, inputs)) < plain
    assert torch.equal(logits(handle.undo(), inputs), wanted)


@every
def test_identical_patches_lose_nothing(name):
    """Where all patches are equal, fusing them changes no logit: sizes count in attention and in average pooling."""
    model, inputs = build(name), inputs_of(name)
    for part, value in model.named_parameters():
        if "pos" in part:
            value.data.zero_()
    inputs = {key: torch.ones_like(value) for key, value in inputs.items()}
    wanted = logits(model, inputs)
    for ahead in (True, False):
        handle = hasten.apply(model, MCTF(r=3, ahead=ahead, floor=2, layers=[0, 1]))
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-4, atol=1e-5)
        handle.undo()


@torch.no_grad()
def test_fused_attention_is_what_the_paper_forms():
    """The block against A' = M A S^T built from matrices, with sizes from a block before."""
    host = recognise(vit())
    method, parts = MCTF(r=4), host.split_block(1)
    x, size, _ = tokens(2, 17, 32, 3)
    bias = size.log().mT[:, None]
    out, groups = base._fuse_ahead(method, parts, x, size, bias, 1, 4)
    weights = parts.weigh(x, bias)
    S = torch.nn.functional.one_hot(groups.places).mT.float()  # [B, K, N]
    weight = S * (weights.mean((1, 2))[:, None] * size.mT)
    M = weight / weight.sum(-1, keepdim=True)
    fused = M[:, None] @ weights @ S.mT[:, None]
    torch.testing.assert_close(fused.sum(-1), torch.ones(fused.shape[:-1]))
    merged = M @ x
    same = parts.attend_by(merged, fused, lambda values: values, lambda mixed: mixed)
    torch.testing.assert_close(out, merged + same, rtol=1e-5, atol=1e-5)


def test_batches_are_cut_without_effect(monkeypatch):
    model = vit()
    hasten.apply(model, "tokens/mctf(r=4)")
    whole = logits(model, {"pixel_values": pixels(5)})
    monkeypatch.setattr(base, "CACHE", 2 * 4 * 17 * 17 * 4)
    torch.testing.assert_close(logits(model, {"pixel_values": pixels(5)}), whole)


def test_interleaved_forward_passes_do_not_mix():
    """A second batch runs in the middle of the first one's pass."""
    model = vit()
    handle = hasten.apply(model, "tokens/mctf(r=3)")
    wanted = logits(model, {"pixel_values": pixels(2)})
    inside = []

    def other(block, given):
        if not inside:
            inside.append(None)
            logits(model, {"pixel_values": pixels(4)})

    handle.host.layers[2].block.register_forward_pre_hook(other)
    assert torch.equal(logits(model, {"pixel_values": pixels(2)}), wanted) and inside


def test_positions_come_back():
    """A model read by position gets as many tokens as without fusing; tokens of one group are equal."""
    model = vit().vit
    before = model(pixel_values=pixels()).last_hidden_state
    hasten.apply(model, MCTF(r=8, floor=2, layers=[3]))
    after = model(pixel_values=pixels()).last_hidden_state
    assert after.shape == before.shape and len(after[0].unique(dim=0)) == 9


def test_tokens_run_out():
    handle = hasten.apply(vit(), "tokens/mctf(r=100, floor=4)")
    logits(handle.model, {"pixel_values": pixels()})
    assert handle.report["tokens/mctf"]["tokens_of_mlp"] == [9, 5, 4]


def test_half_precision():
    model = vit().bfloat16()
    plain = logits(model, {"pixel_values": pixels().bfloat16()})
    hasten.apply(model, "tokens/mctf(r=2)")
    found = logits(model, {"pixel_values": pixels().bfloat16()})
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and not torch.equal(found, plain)


@pytest.mark.parametrize("ahead", ["true", "false"])
def test_fine_tuning(ahead):
    model = vit()
    images, labels = pixels(6), torch.tensor([0, 1, 2, 3, 4, 5])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = hasten.training(model, optimizer, [(images, labels)] * 12, f"tokens/mctf(r=4, ahead={ahead})", steps=12)
    losses = []
    for batch, wanted in run:
        loss = torch.nn.functional.cross_entropy(run.model(pixel_values=batch).logits, wanted)
        run.backward(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_gets_a_gradient():
    model = vit()
    hasten.apply(model, "tokens/mctf(r=4)")
    model(pixel_values=pixels()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_copy_runs_on_its_own_weights():
    """Averaged weights and teachers are deep copies of the model."""
    model = vit()
    hasten.apply(model, "tokens/mctf(r=4)")
    wanted, copied = logits(model, {"pixel_values": pixels()}), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied, {"pixel_values": pixels()}), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = vit().train()
        hasten.apply(model, "tokens/mctf(r=4)")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(pixel_values=pixels().requires_grad_()).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_with_gptq(monkeypatch):
    for part in (lowbit, lowbit_gemm):
        monkeypatch.setattr(part, "kernel", lambda bits: None)  # none is built for this
    model = vit()
    plan = "quant/gptq(bits=8, group=32) + tokens/mctf(r=3)"
    handle = hasten.apply(model, plan, calibration=[pixels()])
    found = logits(model, {"pixel_values": pixels()})
    alone = vit()
    hasten.apply(alone, "tokens/mctf(r=3)")
    torch.testing.assert_close(found, logits(alone, {"pixel_values": pixels()}), rtol=0.2, atol=0.2)
    assert handle.report["tokens/mctf"]["tokens_of_mlp"] == [14, 11, 10]
    fresh = logits(vit(), {"pixel_values": pixels()})
    assert torch.equal(logits(handle.undo(), {"pixel_values": pixels()}), fresh)


def test_what_is_refused():
    model = llama()
    with pytest.raises(PlanError, match="vit"):
        hasten.apply(model, "tokens/mctf")
    with pytest.raises(UsageError, match="works on vision transformers"):
        base.install(MCTF(), recognise(model), None)
    with pytest.raises(UsageError, match="block 7; this model has the blocks 0 to 3"):
        hasten.apply(vit(), MCTF(layers=[1, 7]))
    with pytest.raises(PlanError, match="whole number"):
        MCTF(r=2.5)
    with pytest.raises(PlanError, match="twice"):
        MCTF(layers=[1, 1])


def test_lost_sizes_are_said():
    model = vit()
    handle = hasten.apply(model, "tokens/mctf(r=2)")
    handle.host.layers[1].block.register_forward_hook(lambda block, given, out: copy.copy(out) * 1)
    with pytest.raises(UsageError, match="remove hooks"):
        logits(model, {"pixel_values": pixels()})
