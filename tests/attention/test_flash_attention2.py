"""FlashAttention-2: nothing is left out, on every kind of host; short of rounding the model is what it was."""

import pytest
import torch

import hasten
from conformance.attention import SUBJECTS
from hasten.attention.flash_attention2 import flash_attention2, naive_flash_attention2

SMALL: dict = {}


def cases():
    def case(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32, tolerance=1e-5, **options):
        make = torch.Generator().manual_seed(0)
        shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
        args = tuple(torch.randn(batch, h, n, dim, generator=make).to(dtype) for h, n in shapes)
        return {"args": args, "kwargs": options, "tolerance": tolerance}

    yield case(1, 2, 2, 40, 40, 16)
    yield case(2, 4, 2, 37, 53, 8, block=16)
    yield case(2, 4, 1, 33, 33, 20, causal=False, block=8, scaling=0.3)
    yield case(1, 2, 1, 150, 150, 64, dtype=torch.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_gradients_are_those_of_dense_attention(case):
    args, options = case["args"], dict(case["kwargs"])
    if args[0].dtype != torch.float32:
        return
    causal, both = options.pop("causal", True), []
    queries, keys = args[0].shape[2], args[1].shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    for fast in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in args)
        if fast:
            out = flash_attention2(q, k, v, causal, **options)
        else:
            scale = options.get("scaling")
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        out.square().sum().backward()
        both.append((out.detach(), q.grad, k.grad, v.grad))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(naive_flash_attention2(*args, causal, **options), both[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SUBJECTS)
def test_a_model_is_what_it_was(kind):
    build, run = SUBJECTS[kind]
    wanted = run(hasten.apply(build(), ""))
    handle = hasten.apply(build(), "attention/flash_attention2")
    found = run(handle)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (wanted, found)), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(torch.nan_to_num(other), torch.nan_to_num(one), rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(one, other)
    assert handle.report["attention/flash_attention2"]["density"] == 1.0


@torch.no_grad()
def test_single_tokens_are_decoded_by_the_kernel_too():
    build, _ = SUBJECTS["decoder"]
    ids = torch.arange(1, 31)[None]
    wanted = build().generate(ids, max_new_tokens=8, do_sample=False)
    handle = hasten.apply(build(), "attention/flash_attention2")
    assert torch.equal(handle.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    facts = handle.report["attention/flash_attention2"]
    assert facts["sparse_calls"] == 3 * 8 and facts["dense_calls"] == 0 and facts["density"] == 1.0
