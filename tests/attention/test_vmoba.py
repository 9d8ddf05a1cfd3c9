"""VMoBA: the partitions, the choice by threshold, and video, picture and class-token hosts."""

import pytest
import torch
from torch.nn import functional as F

from conformance.attention import check_training_of_a_denoiser, classify, denoise, dit, vit
from hasten.api import apply
from hasten.attention._routed import tiles
from hasten.attention.vmoba import VMoBA, choose, divisor, largest, layout, naive_vmoba, vmoba
from hasten.core.errors import PlanError, UsageError

SMALL = {"frames": 2, "tile": (3, 2), "box": (2, 3, 3), "threshold": 0.3}


def tensors(batch, heads, n, d=8, e=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, heads, n, width, dtype=dtype) for width in (d, d, e))


def cases():
    yield {"args": (*tensors(2, 2, 24), (4, 6), (2, 3)), "grad": True}
    yield {"args": (*tensors(1, 3, 36, e=6), (3, 3, 4), (1, 3, 2), 0.4), "grad": True}
    yield {"args": (*tensors(2, 2, 38), (6, 6), (2, 6), 0.2, 2, 0.5), "grad": True}  # class tokens
    yield {"args": (*tensors(1, 2, 16), (4, 4), (2, 2), 1.0)}
    yield {"args": (*tensors(1, 2, 24, dtype=torch.bfloat16), (4, 6), (4, 2)), "tolerance": 2e-2}


def test_layouts_of_the_three_kinds():
    grid = (4, 2, 6)
    numbers = torch.arange(48).view(grid)
    places, order, block = layout(grid, (2, 2, 6))
    assert block == 24 and torch.equal(order, torch.arange(48))
    places, order, block = layout(grid, (4, 1, 3))
    assert block == 12 and torch.equal(order.view(4, 12)[1].sort().values, numbers[:, 0, 3:].flatten())
    places, order, block = layout(grid, (2, 2, 2), prefix=3)
    assert block == 8 and torch.equal(order[-3:], torch.arange(3)) and (places[:3] == 6).all()
    assert torch.equal(order[8:16].sort().values - 3, numbers[:2, :, 2:4].flatten())
    assert torch.equal(places[order], torch.arange(51) // 8)
    assert [divisor(12, 5), divisor(7, 4), divisor(6, 9)] == [4, 1, 6]


def test_layers_take_turns():
    method = VMoBA()
    video, picture = (8, 12, 16), (12, 16)
    assert [method.sides(i, video) for i in range(4)] == [(2, 12, 16), (8, 3, 4), (4, 6, 4), (2, 12, 16)]
    assert [method.sides(i, picture) for i in range(3)] == [(2, 16), (3, 4), (6, 4)]


def test_the_chosen_hold_the_threshold_and_no_more():
    torch.manual_seed(1)
    like, own = torch.rand(2, 3, 20, 5), F.one_hot(torch.arange(20) // 4, 5).bool()
    sizes = []
    for threshold in (0.15, 0.25, 0.6, 1.0):
        chosen = largest(like, own, threshold)
        assert (chosen | ~own).all()
        held, total = (like * chosen).sum((2, 3)), like.sum((2, 3))
        assert (held >= threshold * total - 1e-3).all()
        others = like.masked_fill(~chosen | own, torch.inf).amin((2, 3))
        fewer = held - others.where(others < torch.inf, 0.0)
        assert ((fewer < threshold * total) | (others == torch.inf)).all()
        sizes.append(int(chosen.sum()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] and sizes[-1] == like.numel()
    assert largest(like, own, 1e-6).sum() == 2 * 3 * 20, "the own blocks are enough"


def test_concentrated_heads_get_fewer_blocks():
    torch.manual_seed(2)
    q, k, v = tensors(1, 2, 64)
    k[:, 0] *= 0.1
    k[:, 0, :8] += q[:, 0].mean(1, keepdim=True) * 4  # head 0: all alike, one block stands out
    q[:, 0] = q[:, 0].mean(1, keepdim=True) + 0.1 * q[:, 0]
    _, chosen = vmoba(q, k, v, (8, 8), (1, 8), threshold=0.3)
    assert chosen[0, 0].sum() < chosen[0, 1].sum()


def test_neighbours_choose_alike_so_their_tiles_stay_sparse():
    rows = torch.linspace(-1, 1, 32)
    field = torch.stack([rows[:, None].expand(32, 32), rows.expand(32, 32)], -1).reshape(1, 1, 1024, 2) * 3
    keys = field + 0.05 * torch.randn(1, 1, 1024, 2, generator=torch.Generator().manual_seed(0))
    _, order, block = layout((32, 32), (8, 8))
    chosen = choose(field[:, :, order], keys[:, :, order], block, 0.25, 0)
    single = float(chosen.float().mean())
    together = tiles(chosen, block).density(1024, 1024, causal=False)
    assert 0.05 < single < 0.3 and single < together < 0.5


def test_threshold_one_is_full_attention():
    q, k, v = tensors(2, 2, 24)
    torch.testing.assert_close(vmoba(q, k, v, (4, 6), (2, 2), 1.0)[0], F.scaled_dot_product_attention(q, k, v))


def test_agreement_when_heads_share_keys():
    q, k, v = tensors(1, 4, 24)[0], *tensors(1, 2, 24, seed=1)[1:]
    wanted = naive_vmoba(q, *(one.repeat_interleave(2, 1) for one in (k, v)), (4, 6), (2, 3))[0]
    torch.testing.assert_close(vmoba(q, k, v, (4, 6), (2, 3))[0], wanted)


def test_pictures_with_class_tokens():
    model = vit()
    wanted = classify(apply(model, ""))
    handle = apply(model, VMoBA(**SMALL))
    found = classify(handle)
    assert not torch.equal(found, wanted) and (found - wanted).abs().max() < 1
    assert handle.report["attention/vmoba"]["dense_calls"] == 0


def test_denoisers_train_with_it():
    handle = apply(dit(), VMoBA(**SMALL))
    sample = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(3))
    given = {"timestep": torch.tensor([5, 9]), "class_labels": torch.tensor([1, 3])}
    out = handle.model(sample, **given).sample
    out.square().mean().backward()
    grads = [p.grad for layer in handle.host.layers for p in layer.attention.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert handle.report["attention/vmoba"]["dense_calls"] == 0
    with torch.no_grad():
        torch.testing.assert_close(denoise(handle), handle.model(sample, **given).sample)


def test_refusals():
    from conformance.attention import decoder

    with pytest.raises(PlanError, match="two sides"):
        VMoBA(tile=(3,))
    with pytest.raises(PlanError, match="three sides"):
        VMoBA(box=(3, 2))
    with pytest.raises((UsageError, PlanError)):
        apply(decoder(), VMoBA())


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "checkpointing"])
def test_training_in_half_precision_and_with_checkpointing(mode):
    check_training_of_a_denoiser(VMoBA(**SMALL), mode)
