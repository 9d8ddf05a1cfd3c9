"""FlexAttention's path on a GPU: the values and gradients of the PyTorch path, and its share of the ideal."""

import pytest
import torch

from hasten.kernels import block_attention
from hasten.math.blocks import Blocks, visible_blocks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "causal", "padded"), [(4, True, False), (2, True, True), (1, False, True)])
def test_values_and_gradients(dtype, kv_heads, causal, padded):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 700, 64, device="cuda", dtype=dtype, generator=generator) for h in (4, kv_heads, kv_heads)
    )
    table = torch.rand(2, 4, 11, 11, device="cuda", generator=generator) < 0.4
    table = table & visible_blocks(700, 700, 64, 64, torch.device("cuda")) if causal else table
    blocks = Blocks.of(table, 64, 64)
    begin = torch.tensor([0, 130], device="cuda") if padded else None
    both = []
    for function in (block_attention.torch_attention, flex):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, log = function(*leaves, blocks, 0.125, causal, begin, None)
        (out.float().square().sum() + log.masked_fill(log == -torch.inf, 0).sum()).backward()
        both.append((out.detach().float(), *[leaf.grad.float() for leaf in leaves]))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-3
    for one, other in zip(*both, strict=True):
        assert float((one - other).norm()) <= tolerance * float(one.norm())


def flex(*given):
    from hasten.kernels import _block_flex

    return _block_flex.attention(*given)


def test_share_of_the_ideal_at_32k():
    q, k, v = (torch.randn(1, 4, 32768, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    visible = visible_blocks(32768, 32768, 128, 128, torch.device("cuda"))
    distance = torch.arange(256, device="cuda")[:, None] - torch.arange(256, device="cuda")
    blocks = Blocks.of((visible & ((distance < 8) | (distance % 24 == 0)))[None, None], 128, 128)
    density = blocks.density(32768, 32768, True)

    def dense():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def sparse():
        block_attention.attention(q, k, v, blocks)

    times = {}
    for run in (dense, sparse, dense, sparse):
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            run()
        end.record()
        torch.cuda.synchronize()
        times[run] = min(times.get(run, 1e9), begin.elapsed_time(end))
    assert times[dense] * density / times[sparse] > 0.3, (
        "the block mask is made anew in each call, which costs most here"
    )
