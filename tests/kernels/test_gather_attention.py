"""Attention over listed tokens: every path equals the equation, whatever the storage, the lists and the dtype."""

import pytest
import torch
from torch.nn import functional as F

from hasten.kernels import gather_attention as module
from hasten.kernels import native
from hasten.kernels.gather_attention import gather_attention, naive_gather_attention, native_gather, torch_gather

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
# batch, heads, kv heads, queries, tokens, dim, dim of values, dtype
SHAPES = {
    "one": (1, 4, 1, 1, 50, 64, 64, torch.float32),
    "odd": (2, 6, 2, 3, 37, 24, 40, torch.float32),
    "many": (1, 8, 2, 5, 150, 16, 16, torch.float32),
    "wide": (1, 2, 1, 1, 20, 200, 136, torch.float32),
    "bf16": (2, 4, 4, 2, 90, 16, 24, torch.bfloat16),
    "fp16": (1, 12, 1, 1, 33, 32, 20, torch.float16),
}


def made(name, seed=0):
    batch, heads, kv_heads, n, tokens, dim, e, dtype = SHAPES[name]
    make = torch.Generator().manual_seed(seed)
    long = torch.randn(batch, kv_heads, tokens + 9, dim + e, generator=make).to(dtype)  # a view has strides of its own
    q = torch.randn(batch, heads, n, dim, generator=make).to(dtype)
    return q, long[:, :, 4 : tokens + 4, :dim], long[:, :, 4 : tokens + 4, dim:]


def lists(name, hs, seed=1):
    batch, _, _, _, tokens, *_ = SHAPES[name]
    make = torch.Generator().manual_seed(seed)
    rows = torch.rand(batch, hs, tokens, generator=make).argsort(-1)[..., : tokens * 2 // 3].int()
    return rows, torch.randint(0, rows.shape[-1] + 1, (batch, hs), generator=make, dtype=torch.int32)


def calls(name):
    """Arguments and options of each kind of storage and list."""
    batch, heads, kv_heads, _, tokens, dim, e, dtype = SHAPES[name]
    q, k, v = made(name)
    yield "all", (q, k, v), {}
    for hs in {1, kv_heads, heads}:
        rows, counts = lists(name, hs)
        yield f"rows of {hs}", (q, k, v, rows), {"scaling": 0.3}
        yield f"counted rows of {hs}", (q, k, v, rows, counts), {}
    flat = torch.randn(batch * kv_heads * tokens, dim + e, generator=torch.Generator().manual_seed(2)).to(dtype)
    starts = torch.randperm(batch * kv_heads, generator=torch.Generator().manual_seed(3)).view(batch, kv_heads) * tokens
    lengths = torch.randint(0, tokens + 1, (batch, kv_heads), generator=torch.Generator().manual_seed(4))
    yield "flat", (q, flat[:, :dim], flat[:, dim:]), {"starts": starts, "lengths": lengths}
    rows, counts = lists(name, kv_heads)
    yield "flat rows", (q, flat[:, :dim], flat[:, dim:], rows, counts), {"starts": starts}


def parts(args, options):
    """The positional form of the paths."""
    q, k, v, rows, counts = (*args, None, None)[:5]
    return (
        q,
        k,
        v,
        rows,
        counts,
        options.get("starts"),
        options.get("lengths"),
        options.get("scaling", q.shape[-1] ** -0.5),
    )


def same(found, wanted, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3 if dtype == torch.float16 else 1e-2
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_path_equals_the_equation(name):
    for _, args, options in calls(name):
        wanted = naive_gather_attention(*args, lse=True, **options)
        same(torch_gather(*parts(args, options)), wanted, args[0].dtype)
        same(gather_attention(*args, lse=True, **options), wanted, args[0].dtype)
        assert torch.equal(gather_attention(*args, **options), gather_attention(*args, lse=True, **options)[0])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_lower_instruction_sets(isa):
    if isa == "AVX2" and not native.capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    for name in SHAPES:
        for _, args, options in calls(name):
            wanted = naive_gather_attention(*args, lse=True, **options)
            same(native_gather(*parts(args, options), isa=isa), wanted, args[0].dtype)


@needs_compiler
@pytest.mark.parametrize("heads, n", [(2, 1), (6, 2)])
def test_long_lists_are_split_and_put_together_whatever_the_threads(heads, n):
    make = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, heads, n, 16, generator=make), torch.randn(1, 1, 3000, 16, generator=make)
    k[..., 2500, :] *= 30  # one part holds nearly all of the softmax
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gather_attention(q, k, k, lse=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    mask = torch.ones(n, 3000, dtype=torch.bool).tril(3000 - n)
    want = F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found[0][0], want, rtol=1e-5, atol=1e-5)


def test_nothing_listed_is_nothing_seen():
    q, k, v = made("odd")
    rows, counts = lists("odd", 2)
    counts.zero_()
    counts[0, 1] = 2  # of three queries the first sees none of its two tokens
    out, log = gather_attention(q, k, v, rows, counts, lse=True)
    assert not bool(out[1].any()) and bool((log[1] == -torch.inf).all())
    assert bool((log[0, 3:, 0] == -torch.inf).all()) and bool(log[0, 3:, 1:].isfinite().all())


def test_what_no_list_names_is_not_read():
    q, k, v = (x.clone() for x in made("many"))
    rows, _ = lists("many", 2)
    named = torch.zeros(1, 2, 150, dtype=torch.bool).scatter_(-1, rows.long(), True)
    want = gather_attention(q, k, v, rows)
    for x in (k, v):
        x[~named] = torch.nan
    assert torch.equal(gather_attention(q, k, v, rows), want)


def test_gradients_take_the_torch_path():
    q, k, v = (x.clone().requires_grad_() for x in made("odd"))
    rows, _ = lists("odd", 2)
    assert module.path(q, k, v) == "torch"
    weight = torch.randn(2, 6, 3, 40, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad((gather_attention(q, k, v, rows) * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((naive_gather_attention(q, k, v, rows) * weight).sum(), (q, k, v))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if native.compiler() is not None:
        with torch.no_grad():
            assert module.path(q, k, v) == "native"
