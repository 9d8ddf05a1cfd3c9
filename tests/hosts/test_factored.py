import pytest
import torch
from torch import nn

from conformance.optim import llama, vit
from hasten.core.errors import UsageError
from hasten.hosts.changes import Changes
from hasten.hosts.factored import FactoredLinear, balanced, factor, factorable, factored, merge, thin, truncated
from hasten.hosts.recognise import recognise


def layer(bias=True):
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(6, 3, generator=generator), torch.randn(3, 5, generator=generator)
    return FactoredLinear(b, a, torch.randn(6, generator=generator) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_the_product_forward_and_backward(bias):
    thin_one = layer(bias)
    dense = thin_one.dense()
    assert type(dense) is nn.Linear and (dense.bias is not None) == bias
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(thin_one(x), dense(x), atol=1e-5, rtol=1e-5)
    thin_one(x).square().sum().backward()
    dense.zero_grad()
    dense(x).square().sum().backward()
    torch.testing.assert_close(thin_one.b.grad, dense.weight.grad @ thin_one.a.detach().T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(thin_one.a.grad, thin_one.b.detach().T @ dense.weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(thin_one.weight, dense.weight)


def test_wrong_factors_are_refused():
    with pytest.raises(UsageError, match=r"factors are \[out, r\]"):
        FactoredLinear(torch.zeros(3, 2), torch.zeros(3, 2))


def test_the_truncation_is_the_best_of_its_rank():
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    b, a = truncated(weight, 4)
    s = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - b @ a).norm(), s[4:].norm())
    torch.testing.assert_close(b.T @ b, torch.diag(s[:4]), atol=1e-4, rtol=1e-4)


def test_balanced_factors_keep_the_product_and_share_its_scale():
    generator = torch.Generator().manual_seed(3)
    b, a = 100 * torch.randn(12, 4, generator=generator), 0.01 * torch.randn(4, 7, generator=generator)
    left, right = balanced(b, a)
    torch.testing.assert_close(left @ right, b @ a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left.T @ left, right @ right.T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(balanced(left, right)[0], left, atol=1e-4, rtol=1e-4)
    zero = balanced(torch.zeros(5, 2), torch.zeros(2, 4))
    assert all(torch.equal(one, torch.zeros_like(one)) for one in zero)


def test_only_layers_that_get_smaller_are_factored():
    assert thin(nn.Linear(40, 24), 0.25) == 6
    assert thin(nn.Linear(24, 24), 0.5) is None
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight  # shared
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    ranks = factorable(recognise(model), 0.25)
    gone = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    assert len(ranks) == 4 * 7 - 3 and not gone & set(ranks) and "lm_head" not in ranks


@pytest.mark.parametrize("make", [llama, vit])
def test_factoring_is_undone_bit_for_bit_or_merged(make):
    model = make()
    host, changes = recognise(model), Changes()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    sources = factor(host, factorable(host, 0.25), changes)
    held = dict(model.named_parameters())
    assert {id(p) for p in sources} <= {id(p) for p in held.values()} and len(factored(host)) * 2 == len(sources)
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in before.values())
    changes.undo()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], one) for name, one in before.items())
    factor(host, factorable(host, 0.25), changes)
    merge(host)
    assert list(model.state_dict()) == list(before) and not factored(host)
    assert all(type(part) is nn.Linear for part in model.modules() if isinstance(part, nn.Linear))
