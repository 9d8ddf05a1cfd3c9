"""Double Sparsity: the calibrated channels, the label cache, and the tokens that they find."""

import pytest
import torch

from attention.test_reading import applied, build, logits, one_by_one, tokens
from hasten.attention.double_sparsity import DoubleSparsity, double_sparsity, naive_double_sparsity
from hasten.core.errors import PlanError

SMALL = {"keep": 0.4, "channels": 0.25, "full": 1}


def cases():
    for batch, heads, kv_heads, count, begin in ((1, 2, 2, 40, [0]), (3, 4, 2, 23, [0, 9, 20]), (2, 6, 1, 31, [4, 0])):
        generator = torch.Generator().manual_seed(count)
        query, keys = torch.randn(batch, heads, 16, generator=generator), torch.randn(batch, kv_heads, 16, count)
        channels = torch.stack([torch.randperm(16, generator=generator)[:5] for _ in range(kv_heads)])
        labels = keys.gather(2, channels[None, :, :, None].expand(batch, -1, -1, count))
        yield {"args": (query, labels, channels, torch.tensor(begin)), "kwargs": {"budget": 11}}


def test_without_padding_any_order():
    args = next(iter(cases()))["args"]
    wanted = naive_double_sparsity(*args, 11)
    assert torch.equal(double_sparsity(*args[:3], None, 11).sort(-1).values, wanted.sort(-1).values)


def test_with_all_channels_the_true_best_tokens_are_found():
    query, keys = torch.randn(2, 2, 8), torch.randn(2, 2, 8, 64)
    found = double_sparsity(query, keys, torch.arange(8).expand(2, 8), None, 5)
    wanted = torch.einsum("bhd,bhdn->bhn", query, keys).topk(5).indices
    assert torch.equal(found.sort(-1).values, wanted.sort(-1).values.int())


def test_calibration_finds_the_channels_that_carry_the_scores():
    model = build()
    with torch.no_grad():  # the rotation mixes channels i and i + 4: make one pair of key head 1 loud in layer 2
        weight = model.model.layers[2].self_attn.k_proj.weight.view(2, 8, 32)
        weight[1, [3, 7]] *= 30
    record = applied("attention/double_sparsity(channels=0.25)", model)._records[0]["channels"]
    assert len(record) == 3 and all(len(heads) == 2 and len(heads[0]) == 2 for heads in record)
    assert record[2][1] == [3, 7]


def test_labels_are_the_keys_channels_as_they_come_and_go():
    handle, ids = applied("attention/double_sparsity(keep=0.4, channels=0.25, full=1)"), tokens(2, 150)
    _, cache = logits(handle, ids, one_by_one(150, 60))
    cache.crop(-30)
    logits(handle, ids, [140], cache=cache)
    assert cache.layers[0].labels is None
    for layer in cache.layers[1:]:
        which = layer.channels[None, :, :, None].expand(2, -1, -1, 140)
        assert torch.equal(layer.labels[..., :140], layer.keys.transpose(2, 3).gather(2, which))
    assert cache.nbytes > sum(layer.nbytes for layer in cache.layers)


def test_options():
    with pytest.raises(PlanError, match="one of q, k, qk"):
        DoubleSparsity(by="v")
    assert DoubleSparsity(keep=1.0).idle and not DoubleSparsity(keep=1.0, budget=4).idle
