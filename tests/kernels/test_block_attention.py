"""Every path of block-sparse attention equals softmax under the dense mask, in values and gradients."""

import pytest
import torch

from hasten.kernels import _block_flex, block_attention
from hasten.kernels.block_attention import attention, naive_attention, torch_attention
from hasten.math.blocks import Blocks, pool, seen, spread, top_blocks, visible_blocks
from hasten.math.online_softmax import merge, naive_flash, naive_flash2


def tensors(batch, heads, kv_heads, queries, keys, dim, e=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw(batch, heads, queries, dim), draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, e or dim)


def chosen(b, h, queries, keys, bq, bk, causal, share=0.5, seed=1):
    table = torch.rand(b, h, -(-queries // bq), -(-keys // bk), generator=torch.Generator().manual_seed(seed)) < share
    return table & visible_blocks(queries, keys, bq, bk) if causal else table


def order(b, h, n, seed):
    return torch.rand(b, h, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)


# batch, heads, kv heads, queries, keys, dim, dim of values, dtype; B', H' of the lists, block sizes, causal, more
CASES = {
    "plain": ((1, 1, 1, 32, 32, 16), 1, 1, 8, 8, True, {}),
    "odd": ((2, 4, 2, 37, 37, 12), 2, 4, 8, 8, True, {}),
    "shared": ((2, 6, 2, 29, 29, 8), 1, 2, 7, 5, True, {}),
    "chunk": ((1, 4, 1, 11, 43, 8), 1, 4, 4, 8, True, {}),
    "both": ((2, 2, 2, 23, 31, 8, 20), 2, 1, 6, 9, False, {}),
    "padded": ((3, 2, 1, 33, 33, 8), 3, 2, 8, 8, True, {"pad": 1}),
    "ordered": ((2, 4, 2, 30, 30, 8), 2, 4, 8, 8, True, {"order": 1}),
    "masked": ((2, 4, 2, 26, 26, 8), 1, 2, 8, 6, True, {"mask": 1}),
    "all": (
        (2, 4, 2, 27, 39, 8), 2, 4, 8, 8, False,
        {"order": 1, "mask": 1, "pad": 1},
    ),
    "tokens": ((2, 4, 2, 35, 35, 8), 2, 4, 16, 1, True, {}),
    "tokens of groups": (
        (2, 4, 2, 1, 35, 8), 2, 2, 1, 1, True, {"pad": 1}
    ),
    "half": (
        (1, 2, 1, 40, 40, 64, None, torch.bfloat16),
        1, 2, 16, 16, True, {},
    ),
    "wide": ((1, 1, 1, 150, 200, 72), 1, 1, 64, 64, True, {}),
}  # fmt: skip


def build(name):
    shape, b, h, bq, bk, causal, more = CASES[name]
    q, k, v = tensors(*shape)
    batch, heads, kv_heads, queries, keys = shape[:5]
    fields, options = {}, {"causal": causal, "scaling": 0.37}
    table = chosen(b, h, queries, keys, bq, bk, causal and "order" not in more)
    if "order" in more:
        fields["q_order"], fields["k_order"] = order(batch, heads, queries, 3), order(1, kv_heads, keys, 4)
    if "mask" in more:
        fields["masks"] = torch.rand(3, bq, bk, generator=torch.Generator().manual_seed(5)) < 0.6
        fields["mask_of"] = torch.randint(-1, 3, table.shape, generator=torch.Generator().manual_seed(6))
    if "pad" in more:
        options["begin"] = torch.arange(batch) * 5
        options["end"] = keys - torch.arange(batch) % 2 * 4
    return (q, k, v), Blocks.of(table, bq, bk, **fields), options


def dense(q, k, v, blocks, *, scaling, causal=True, begin=None, end=None):
    """Softmax with -inf where the mask hides."""
    heads = q.shape[1]
    mask = spread(seen(blocks, q.shape[2], k.shape[2], causal, begin, end), heads)
    s = q.float() @ spread(k, heads).float().mT * scaling
    s = s.masked_fill(~mask, -torch.inf)
    log = s.logsumexp(-1)
    p = (s - log.masked_fill(log == -torch.inf, 0)[..., None]).exp()
    return (p @ spread(v, heads).float()).to(q.dtype), log


def in_torch(q, k, v, blocks, *, scaling, causal, begin=None, end=None):
    return torch_attention(q, k, v, blocks, scaling, causal, begin, end)


def in_flex(q, k, v, blocks, *, scaling, causal, begin=None, end=None):
    return _block_flex.attention(q, k, v, blocks, scaling, causal, begin, end, compile=False, tile=16)


RUNS = {
    "naive": lambda q, k, v, blocks, **o: naive_attention(q, k, v, blocks, lse=True, **o),
    "torch": in_torch,
    "flex": in_flex,
    "here": lambda q, k, v, blocks, **o: attention(q, k, v, blocks, lse=True, **o),
}


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_equals_dense_attention_under_the_mask(name, run):
    inputs, blocks, options = build(name)
    half, gradients = inputs[0].dtype != torch.float32, run is not RUNS["flex"]  # which has none on a CPU
    both = []
    for function in (dense, run):
        leaves = [x.clone().requires_grad_(gradients) for x in inputs]
        out, log = function(*leaves, blocks, **options)
        assert out.dtype == inputs[0].dtype and log.dtype == torch.float32
        if not gradients:
            both.append((out.float(), log))
            continue
        (out.float().square().sum() + log.masked_fill(log == -torch.inf, 0).sin().sum()).backward()
        both.append((out.detach().float(), log.detach(), *[leaf.grad.float() for leaf in leaves]))
    for one, other in zip(*both, strict=True):
        tolerance = 0.05 if half else 3e-4 if name == "wide" else 2e-5
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["plain", "odd", "padded", "ordered", "tokens", "tokens of groups"])
@pytest.mark.parametrize("stop", [0.05, 0.3])
def test_stopping_early(name, stop):
    inputs, blocks, options = build(name)
    wanted = naive_attention(*inputs, blocks, stop=stop, lse=True, **options)
    for found in (
        torch_attention(*inputs, blocks, options["scaling"], options["causal"], options.get("begin"),
                        options.get("end"), stop),
        attention(*inputs, blocks, stop=stop, lse=True, **options),
    ):  # fmt: skip
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
    if name == "tokens" and stop == 0.3:
        assert not torch.equal(wanted[0], naive_attention(*inputs, blocks, **options))


def test_a_query_that_sees_nothing_gets_zero():
    q, k, v = tensors(1, 2, 1, 9, 9, 8)
    table = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    table[..., 1, 0] = True
    out, log = attention(q, k, v, Blocks.of(table, 3, 3), lse=True)
    assert torch.equal(out[:, :, :3], torch.zeros(1, 2, 3, 8)) and bool((log[:, :, 6:] == -torch.inf).all())
    assert bool(out[:, :, 3:6].any())


def test_all_causal_blocks_are_dense_attention():
    q, k, v = tensors(2, 4, 2, 50, 50, 16)
    out = attention(q, k, v, Blocks.causal(50, 50, 16, 16))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_the_path_is_chosen_by_device():
    q = torch.zeros(1, 1, 4, 8)
    assert block_attention.path(q, Blocks.causal(4, 4, 2, 2)) in ("native", "torch")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "block_q", "block_k"), [(16, 16, 4, 4), (13, 29, 5, 3), (1, 7, 2, 2)])
def test_flash_attention_is_exact(causal, queries, keys, block_q, block_k):
    q, k, v = (x[0, 0] for x in tensors(1, 1, 1, queries, keys, 8))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    want = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=0.5)[0]
    for flash in (naive_flash, naive_flash2):
        out, log = flash(q, k, v, block_q, block_k, 0.5, causal)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        s = (q @ k.T * 0.5).masked_fill(torch.zeros(1, dtype=torch.bool) if mask is None else ~mask, -torch.inf)
        torch.testing.assert_close(log, s.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_parts_over_disjoint_keys_merge_exactly():
    (q, k, v), blocks, options = build("odd")
    table = blocks.where(5)
    half = torch.rand(table.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    parts = [attention(q, k, v, Blocks.of(part, 8, 8), lse=True, **options) for part in (table & half, table & ~half)]
    out, log = merge(*zip(*parts, strict=True))
    want = attention(q, k, v, blocks, lse=True, **options)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "block_q", "block_k"), [(10, 10, 4, 4), (7, 19, 3, 5), (9, 9, 1, 1)])
def test_visible_blocks_and_density(queries, keys, block_q, block_k):
    pairs = torch.zeros(-(-queries // block_q), -(-keys // block_k))
    for i in range(queries):
        for j in range(i + keys - queries + 1):
            pairs[i // block_q, j // block_k] += 1
    assert torch.equal(pairs > 0, visible_blocks(queries, keys, block_q, block_k))
    assert Blocks.causal(queries, keys, block_q, block_k).density(queries, keys, True) == pytest.approx(1)
    table = chosen(2, 3, queries, keys, block_q, block_k, True)
    want = float((table * pairs).sum((-1, -2)).mean() / pairs.sum())
    assert Blocks.of(table, block_q, block_k).density(queries, keys, True) == pytest.approx(want)


def test_top_blocks_obeys_its_limits():
    scores = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    allowed, always = visible_blocks(24, 24, 4, 4), torch.eye(6, dtype=torch.bool)
    table = top_blocks(scores, 2, allowed, always)
    assert bool((table.sum(-1) == torch.tensor([1, 2, 2, 2, 2, 2])).all())
    assert bool((table & always).sum() == 36) and not bool((table & ~allowed).any())
    number = torch.tensor([1, 1, 2, 2, 3, 3])
    assert bool((top_blocks(scores, number, allowed).sum(-1) == torch.tensor([1, 1, 2, 2, 3, 3])).all())
    assert torch.equal(pool(torch.arange(5.0)[:, None], 2)[:, 0], torch.tensor([0.5, 2.5, 4.0]))
