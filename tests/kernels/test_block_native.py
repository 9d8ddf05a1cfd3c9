"""The native kernel of block-sparse attention against PyTorch's path, which is held to the equation elsewhere."""

import math

import pytest
import torch
from torch.nn import functional as F

from hasten.kernels import _block_native, native
from hasten.kernels.block_attention import attention, naive_attention, torch_attention
from hasten.math.blocks import Blocks, seen, visible_blocks

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")

# batch, heads, kv heads, queries, keys, dim, dim of values; B', H' of the lists, block sizes, causal, more
CASES = {
    "tiles": ((1, 2, 2, 200, 200, 64, 64), 1, 2, 64, 64, True, ""),
    "small blocks are joined": ((1, 4, 2, 90, 90, 32, 48), 1, 2, 32, 16, True, ""),
    "blocks of odd size": ((2, 2, 1, 77, 101, 24, 33), 2, 1, 20, 40, True, "pad"),
    "many tiles of one block": ((1, 2, 1, 70, 300, 16, 16), 1, 1, 70, 300, False, ""),
    "few visits are gathered": ((1, 4, 2, 7, 400, 16, 24), 1, 4, 8, 64, True, "sparse pad"),
    "tiny blocks": ((1, 4, 4, 50, 60, 16, 16), 1, 1, 7, 5, True, "order mask"),
    "tokens": ((2, 6, 2, 40, 130, 40, 24), 2, 2, 4, 1, True, "pad"),
    "tokens of each query": ((1, 8, 2, 9, 150, 16, 24), 1, 2, 1, 1, True, "pad"),
    "masked tokens": ((1, 8, 2, 9, 150, 16, 16), 1, 8, 1, 1, True, "mask"),
    "all at once": ((2, 4, 2, 130, 150, 20, 36), 2, 4, 32, 48, False, "order mask pad"),
    "wide heads": ((1, 1, 1, 40, 64, 256, 200), 1, 1, 16, 32, True, ""),
    "one number": ((1, 1, 1, 20, 20, 1, 1), 1, 1, 16, 16, True, ""),
    "many heads on one": ((1, 12, 1, 30, 48, 8, 8), 1, 1, 16, 16, True, "mask"),
}  # fmt: skip


def build(name, seed=0):
    (batch, heads, kv_heads, queries, keys, dim, e), b, h, bq, bk, causal, more = CASES[name]
    make = torch.Generator().manual_seed(seed)

    def order(*shape):
        return torch.rand(*shape, generator=make).argsort(-1)

    q = torch.randn(batch, queries, heads, dim, generator=make).transpose(1, 2)  # rows of a head are not side by side
    k, v = (torch.randn(batch, kv_heads, keys + 5, n, generator=make)[:, :, 3 : keys + 3] for n in (dim, e))
    table = torch.rand(b, h, -(-queries // bq), -(-keys // bk), generator=make) < (0.2 if "sparse" in more else 0.6)
    if causal and "order" not in more:
        table &= visible_blocks(queries, keys, bq, bk)
    fields, options = {}, {"scaling": 0.4 / math.sqrt(dim), "causal": causal}
    if "order" in more:
        fields |= {"q_order": order(batch, heads, queries), "k_order": order(1, kv_heads, keys)}
    if "mask" in more:
        fields["masks"] = torch.rand(4, bq, bk, generator=make) < 0.7
        fields["mask_of"] = torch.randint(-1, 4, table.shape, generator=make)
    if "pad" in more:
        options |= {"begin": torch.arange(batch) * 11 + 3, "end": keys - torch.arange(batch) * 7 - 2}
    return (q, k, v), Blocks.of(table, bq, bk, **fields), options


def gradients(run, inputs, blocks, options, seed=3):
    """Output, log-sum-exp and the gradients of q, k and v for random gradients of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, log = run(*leaves, blocks, **options)
    make = torch.Generator().manual_seed(seed)
    upstream = torch.randn(out.shape, generator=make)
    of_log = torch.randn(log.shape, generator=make)
    loss = (out * upstream).sum() + torch.where(log > -torch.inf, log * of_log, 0).sum()
    return (out.detach(), log.detach(), *torch.autograd.grad(loss, leaves))


def in_torch(q, k, v, blocks, *, scaling, causal, begin=None, end=None):
    return torch_attention(q, k, v, blocks, scaling, causal, begin, end)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    inputs, blocks, options = build(name)
    found = gradients(lambda *a, **o: attention(*a, lse=True, **o), inputs, blocks, options)
    close(found, gradients(in_torch, inputs, blocks, options))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_lower_instruction_sets(isa):
    if isa == "AVX2" and not native.capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    for name in CASES:
        inputs, blocks, options = build(name)
        wanted = gradients(in_torch, inputs, blocks, options)
        scaling, causal, *padding = (options.get(key) for key in ("scaling", "causal", "begin", "end"))
        out, log = _block_native.forward(*inputs, blocks, scaling, causal, *padding, isa=isa)
        make = torch.Generator().manual_seed(3)
        upstream, of_log = torch.randn(out.shape, generator=make), torch.randn(log.shape, generator=make)
        grads = _block_native.backward(
            upstream, of_log, *inputs, out, log, blocks, scaling, causal, *padding, isa=isa
        )  # fmt: skip
        close((out, log, *grads), wanted)


@pytest.mark.parametrize("name", ["tiles", "many tiles of one block", "tokens", "blocks of odd size"])
@pytest.mark.parametrize("stop", [0.02, 0.2])
def test_stopping_early(name, stop):
    inputs, blocks, options = build(name)
    inputs = inputs[0] * 4, *inputs[1:]
    wanted = naive_attention(*inputs, blocks, stop=stop, lse=True, **options)
    close(attention(*inputs, blocks, stop=stop, lse=True, **options), wanted)
    if name == "tokens" and stop == 0.2:
        assert not torch.equal(wanted[0], naive_attention(*inputs, blocks, **options))


def test_threads_share_the_work_and_agree():
    inputs, blocks, options = build("all at once")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(lambda *a, **o: attention(*a, lse=True, **o), inputs, blocks, options))
            again = gradients(lambda *a, **o: attention(*a, lse=True, **o), inputs, blocks, options)
            assert all(map(torch.equal, found[-1], again)), "equal runs of equal threads are equal bit for bit"
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert torch.equal(one[0], found[0][0])
        close(one, found[0])


def test_expanded_lists_are_read_as_they_are():
    inputs, blocks, options = build("tiles")
    wide = Blocks(
        blocks.counts[:, :1].expand(1, 2, -1), blocks.indices[:, :1].expand(1, 2, -1, -1), 64, 64
    )  # fmt: skip
    narrow = Blocks(blocks.counts[:, :1], blocks.indices[:, :1], 64, 64)
    assert torch.equal(attention(*inputs, wide, **options), attention(*inputs, narrow, **options))


def test_large_scores_and_growing_maxima_stay_exact():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 256, 32, generator=make) for _ in range(3))
    k = k * torch.linspace(1, 30, 256)[:, None]  # each tile's largest score outgrows the one before
    blocks = Blocks.causal(256, 256, 64, 32)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(attention(q, k, v, blocks).double(), want, rtol=1e-4, atol=1e-4)
    out, log = attention(q * 0 + 1, k * 0 - 1000, v, blocks, scaling=1.0, lse=True)  # far below zero, all alike
    torch.testing.assert_close(log, torch.arange(1, 257).log()[None, None] - 32000, rtol=1e-6, atol=0.01)
    torch.testing.assert_close(out[0, 0, -1], v[0, 0].mean(0), rtol=1e-3, atol=1e-3)


def test_nan_in_padding_and_unlisted_blocks_is_not_read():
    for name in ("blocks of odd size", "tokens", "few visits are gathered"):
        (q, k, v), blocks, options = build(name)
        k, v = k.clone(), v.clone()
        mask = seen(blocks, q.shape[2], k.shape[2], False, options["begin"], options["end"])  # [b, h, Nq, Nk]
        unseen = ~mask.any(-2).expand(k.shape[0], -1, -1)
        unseen = unseen.unflatten(1, (-1, unseen.shape[1] // min(unseen.shape[1], k.shape[1]))).all(2)
        unseen = unseen.expand(*k.shape[:2], -1)
        assert bool(unseen.any())
        want = gradients(lambda *a, **o: attention(*a, lse=True, **o), (q, k, v), blocks, options)
        k[unseen], v[unseen] = torch.nan, torch.nan
        found = gradients(lambda *a, **o: attention(*a, lse=True, **o), (q, k, v), blocks, options)
        close(found, want)
        assert not bool(found[3][unseen].any()) and not bool(found[4][unseen].any())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_sums_in_fp32(dtype, tolerance):
    inputs, blocks, options = build("tiles")
    inputs = [x.to(dtype) for x in inputs]
    exact = gradients(in_torch, [x.float() for x in inputs], blocks, options)
    leaves = [x.requires_grad_() for x in inputs]
    out, log = attention(*leaves, blocks, lse=True, **options)
    assert out.dtype == dtype and log.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log, exact[1], rtol=1e-5, atol=1e-5)
    make = torch.Generator().manual_seed(3)
    upstream, of_log = torch.randn(out.shape, generator=make), torch.randn(log.shape, generator=make)
    (out.float() * upstream).sum().add((log * of_log)[log > -torch.inf].sum()).backward()
    for leaf, wanted in zip(leaves, exact[2:], strict=True):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.float(), wanted, rtol=5 * tolerance, atol=5 * tolerance)


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    inputs, blocks, options = build("tiles")
    want = attention(*inputs, blocks, **options)
    monkeypatch.setenv("HASTEN_NATIVE", "0")
    native.library.cache_clear()
    _block_native.library.cache_clear()
    try:
        assert not _block_native.available()
        torch.testing.assert_close(attention(*inputs, blocks, **options), want, rtol=1e-5, atol=1e-5)
    finally:
        native.library.cache_clear()
        _block_native.library.cache_clear()


def test_a_header_is_part_of_a_kernels_name():
    folder = native.pathlib.Path(native.__file__).parent
    text = native._text(folder / "block_attention.cpp")
    assert all((folder / name).read_text() in text for name in ("block_few.h", "block_rows.h", "vectors.h"))
