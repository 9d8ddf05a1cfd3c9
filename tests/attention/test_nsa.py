"""Native Sparse Attention: its branches, the loop orders, training, decoding with every cache."""

import copy
import functools

import pytest
import torch
from torch.nn import functional as F

from conformance.attention import decoder, tokens
from hasten.api import apply, load_pretrained
from hasten.attention._nsa_parts import Branches, choose, coarse, compress, naive_compress, overlaps, window_blocks
from hasten.attention._routed import naive_routed, routed
from hasten.attention.nsa import NSA, naive_nsa, nsa
from hasten.bench.training import make_run
from hasten.core.errors import PlanError
from hasten.core.plans import Plan
from hasten.math.blocks import seen
from hasten.workloads.find import workload

SMALL = {"length": 4, "stride": 2, "block": 4, "count": 4, "window": 6}
ORDER = {"bfloat16": "tiles", "autocast": "keys", "checkpointing": "queries"}
SIZES = {"length": 4, "stride": 2, "block": 4, "count": 4, "initial": 1, "local": 2, "window": 5}


def tensors(batch, heads, hk, nq, nk, d=8, e=8, dtype=torch.float32, seed=0, length=4, stride=2):
    torch.manual_seed(seed)
    nc = max(0, (nk - length) // stride + 1)
    shapes = (heads, nq, d), (hk, nk, d), (hk, nk, e), (hk, nc, d), (hk, nc, e), (heads, nq, 3)
    *rest, gates = (torch.randn(batch, *shape, dtype=dtype) for shape in shapes)
    return *rest, gates.sigmoid()


def cases():
    yield {"args": tensors(2, 4, 2, 29, 29), "kwargs": SIZES, "grad": True}
    yield {"args": tensors(1, 4, 2, 29, 29), "kwargs": SIZES | {"order": "queries"}, "grad": True}
    yield {"args": tensors(1, 4, 2, 29, 29), "kwargs": SIZES | {"order": "keys"}, "grad": True}
    yield {"args": tensors(1, 2, 2, 9, 34, e=6), "kwargs": SIZES, "grad": True}  # a later chunk
    yield {"args": tensors(1, 3, 1, 1, 31), "kwargs": SIZES}  # a step of decoding
    yield {"args": tensors(1, 2, 1, 3, 3), "kwargs": SIZES}  # nothing to compress yet
    padding = {"begin": torch.tensor([0, 7]), "end": torch.tensor([33, 33])}
    yield {"args": tensors(2, 4, 2, 33, 33), "kwargs": SIZES | padding, "grad": True}
    yield {"args": tensors(2, 4, 2, 1, 33), "kwargs": SIZES | padding}
    yield {"args": tensors(1, 2, 1, 21, 21, dtype=torch.bfloat16), "kwargs": SIZES, "tolerance": 4e-2}


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("own", [False, True], ids=["lists per key head", "lists per query head"])
def test_all_loop_orders_are_the_equation(group, own):
    torch.manual_seed(group)
    heads, hk, nq, nk, block = 2 * group, 2, 11, 18, 5
    given = [torch.randn(2, h, n, 6) for h, n in ((heads, nq), (hk, nk), (hk, nk))]
    chosen = torch.rand(2, heads if own else hk, nq, 4) < 0.5
    more = chosen, block, 0.3, True, torch.tensor([0, 9]), torch.tensor([18, 17])
    results = []
    orders = [functools.partial(routed, order=order) for order in ("keys", "queries", "tiles")]
    for run in (naive_routed, *orders):
        leaves = [one.clone().requires_grad_() for one in given]
        out, lse = run(*leaves, *more)
        out.square().sum().backward()
        results.append([out.detach(), lse.detach(), *(one.grad for one in leaves)])
    assert (results[0][1] == -torch.inf).any(), "some query sees nothing"
    for other in results[1:]:
        for wanted, found in zip(results[0], other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_everything_chosen_is_dense_attention():
    q, k, v, *_ = tensors(2, 4, 2, 24, 24)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for order in ("keys", "queries", "tiles"):
        found, _ = routed(q, k, v, torch.ones(1, 1, 24, 6, dtype=torch.bool), 4, order=order)
        torch.testing.assert_close(found, wanted)


def test_compression_is_its_equation_and_starts_as_the_mean():
    x = torch.randn(2, 3, 19, 5)
    weights = torch.randn(4, 5), torch.randn(7, 20), torch.randn(5, 7)
    torch.testing.assert_close(compress(x, *weights, 2), naive_compress(x, *weights, 2))
    branches = Branches(heads=3, dim=5, value_dim=5, length=4, seed=0)
    torch.testing.assert_close(branches.keys(x, 2)[:, :, 3], x[:, :, 6:10].mean(2))
    assert branches.gates(torch.randn(2, 3, 19, 5)).sum(-1).allclose(torch.ones(2, 3, 19), atol=1e-3)


def test_equation_nine_where_the_sizes_agree_and_where_they_do_not():
    assert torch.equal(overlaps(3, 3, 4, 4, 4), torch.eye(3))
    # l = 32, d = 16, l' = 64: four strides a block; compression blocks count twice inside and once over the edge.
    table = overlaps(8, 2, 32, 16, 64)
    assert table[:, 0].tolist() == [2, 2, 2, 1, 0, 0, 0, 0] and table[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1]


def test_initial_and_local_blocks_are_always_there_and_groups_agree():
    q, k, v, ck, cv, _ = tensors(1, 4, 2, 40, 40)
    _, scores = coarse(q, ck, cv, 10, 4, 2, 4, 0.3, 0)
    table = choose(scores, 4, 4, 1, 2, 0).where(10)
    assert table.shape == (1, 2, 40, 10)
    for i in range(40):
        own = i // 4
        assert table[0, :, i, [0, own, max(0, own - 1)]].all() and not table[0, :, i, own + 1 :].any()
        assert (table[0, :, i].sum(-1) == min(4, own + 1)).all()


@pytest.mark.parametrize(("queries", "keys", "window"), [(150, 150, 64), (70, 201, 33), (5, 300, 130), (90, 90, 500)])
def test_window_is_exact(queries, keys, window):
    at = torch.arange(queries)[:, None] + keys - queries
    place = torch.arange(keys)
    found = seen(window_blocks(queries, keys, window), queries, keys)[0, 0]
    assert torch.equal(found, (place <= at) & (place > at - window))


def test_training_reaches_every_weight_of_its_own():
    handle = apply(decoder(), NSA(**SMALL))
    own = {name: p for name, p in handle.model.named_parameters() if "hasten_attention" in name}
    assert len(own) == 3 * 8
    ids = tokens()[0]
    losses = []
    for _ in range(8):
        logits = handle.model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        handle.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in handle.model.parameters():
                weight -= 0.5 * weight.grad
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "checkpointing"])
def test_training_in_half_precision_and_with_checkpointing(mode):
    model = decoder()
    handle = apply(model.bfloat16() if mode == "bfloat16" else model, NSA(**SMALL, order=ORDER[mode]))
    if mode == "checkpointing":
        model = handle.model  # renamed in transformers 5
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    handle.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        logits = handle.model(tokens()[0], use_cache=False).logits
    logits.float().square().mean().backward()
    grads = [p.grad for name, p in handle.model.named_parameters() if "self_attn" in name]
    assert len(grads) == 36 and all(grad is not None and grad.isfinite().all() for grad in grads)


@torch.no_grad()
def test_decoding_step_by_step_is_the_forward_pass():
    handle = apply(decoder(), NSA(**SMALL))
    shake(handle.model)
    ids, mask = tokens()
    wanted = handle.model(ids, attention_mask=mask, use_cache=False).logits
    cache, found = handle.host.new_cache(), []
    for start, end in [(0, 20), (20, 27), *((i, i + 1) for i in range(27, 46))]:
        part = handle.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(part.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_generate_with_static_and_reordered_caches():
    handle = apply(decoder(), NSA(**SMALL))
    shake(handle.model)
    ids = tokens()[0][:, :30]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "attention_mask": torch.ones_like(ids)}
    wanted = handle.model.generate(ids, do_sample=False, **settings)
    other = handle.model.generate(ids.flip(1), do_sample=False, cache_implementation="static", **settings)
    again = handle.model.generate(ids, do_sample=False, cache_implementation="static", **settings)
    assert torch.equal(again, wanted) and not torch.equal(other, wanted)
    beams = handle.model.generate(ids, num_beams=3, do_sample=False, **settings)
    slow = handle.model.generate(ids, num_beams=3, do_sample=False, use_cache=False, **settings)
    assert torch.equal(beams, slow)


@torch.no_grad()
def test_compressed_blocks_are_made_anew_when_weights_change():
    handle = apply(decoder(), NSA(**SMALL))
    ids = tokens()[0]
    cache = handle.host.new_cache()
    handle.model(ids[:, :40], past_key_values=cache)
    shake(handle.model)
    copied = copy.deepcopy(cache)
    found = handle.model(ids[:, 40:41], past_key_values=cache).logits
    for owner in handle.model.modules():
        run = owner.__dict__.get("_hasten_attend")
        if run is not None:
            run.run.kept.memo.clear()
    torch.testing.assert_close(found, handle.model(ids[:, 40:41], past_key_values=copied).logits)


def test_trained_by_another_optimizer_in_a_model_that_grows():
    work = workload("stdlib-lm(task=train, length=48, rows=2, steps=12)")
    small = ", ".join(f"{name}={value}" for name, value in SMALL.items())
    run = make_run(work, Plan.parse(f"grow/g_stack(factor=2, at=0.5) + attention/nsa({small}) + optim/sinkgd"), 0)
    own = {name: p for name, p in run.model.named_parameters() if "hasten_attention" in name}
    before = {name: p.detach().clone() for name, p in own.items()}
    assert len(own) == 2 * 8
    run.slice(work.loss, steps=4)
    assert all(not torch.equal(before[name], p) for name, p in own.items())
    run.slice(work.loss, steps=4)
    own = [p for name, p in run.model.named_parameters() if "hasten_attention" in name]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert len(own) == 4 * 8 and all(id(p) in held for p in own)


def test_saved_with_its_trained_weights(tmp_path):
    handle = apply(decoder(), NSA(**SMALL))
    shake(handle.model)
    ids = tokens()[0]
    with torch.no_grad():
        wanted = handle.model(ids).logits
        loaded = load_pretrained(handle.save(tmp_path / "saved"))
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=0, atol=0)


def test_long_text_costs_little_and_the_report_says_so():
    handle = apply(decoder(), NSA(**SMALL))
    with torch.no_grad():
        handle.model(torch.randint(1, 61, (1, 200)))
    facts = handle.report["attention/nsa"]
    assert facts["sparse_calls"] == 3 and facts["density"] < 0.2


def test_sizes_that_do_not_fit():
    with pytest.raises(PlanError, match="multiples of stride"):
        NSA(length=30)
    with pytest.raises(PlanError, match="at least 3"):
        NSA(count=2)


def shake(model):
    """Gives the method's own weights values as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "hasten_attention" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)


def test_pure_function_in_all_orders_on_one_input():
    given = tensors(1, 4, 1, 50, 50, seed=5)
    wanted = naive_nsa(*given, **SIZES)
    for order in ("keys", "queries", "tiles"):
        torch.testing.assert_close(nsa(*given, **SIZES, order=order), wanted, rtol=1e-4, atol=1e-5)
