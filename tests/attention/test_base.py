"""The executor of sparse attention on real decoders: exact, padded, chunked, trained, saved, and its refusals."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import hasten.attention.base as base
from conformance.attention import decoder, tokens
from hasten.attention.base import SparseAttention
from hasten.core.errors import UsageError
from hasten.hosts import Context, recognise
from hasten.kernels.block_attention import naive_attention
from hasten.math.blocks import Blocks, seen, visible_blocks


@dataclasses.dataclass(frozen=True)
class Window(SparseAttention):
    """The nearest blocks, and the first."""

    blocks: int = 2
    gate: bool = False

    @property
    def name(self):
        return "attention/window"

    def select(self, call, kept):
        queries, keys = call.query.shape[2], call.key.shape[2]

        def make():
            table = visible_blocks(queries, keys, 4, 4)
            last = (torch.arange(0, queries, 4) + keys - queries) // 4
            near = (last[:, None] - torch.arange(table.shape[1])) < self.blocks
            near[:, 0] = True
            return Blocks.of((table & near)[None, None], 4, 4)

        return kept.once((queries, keys), make)

    def mix(self, call, blocks, kept):
        out = super().mix(call, blocks, kept)
        return out if kept.module is None else out * kept.module(torch.ones(1, 1))

    def modules(self, attention, layer, host):
        return nn.Linear(1, 1, bias=False) if self.gate else None


def applied(model, method):
    host, context = recognise(model), Context()
    base.install(method, host, context)
    return host, context


@torch.no_grad()
def test_every_block_is_dense_attention():
    model = decoder()
    ids, mask = tokens()
    wanted = model(ids, attention_mask=mask).logits
    host, context = applied(model, Window(blocks=100))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    assert context.report["attention/window"] == {"sparse_calls": 3, "dense_calls": 0, "density": 1.0}
    host.changes.undo()
    assert torch.equal(model(ids, attention_mask=mask).logits, wanted)


def naive_model(model, ids, method):
    """The same through SDPA with the dense mask that the blocks stand for."""
    n = ids.shape[1]
    table = visible_blocks(n, n, 4, 4)
    near = (torch.arange(table.shape[0])[:, None] - torch.arange(table.shape[1])) < method.blocks
    near[:, 0] = True
    mask = seen(Blocks.of((table & near)[None, None], 4, 4), n, n)
    return model(ids, attention_mask=mask.expand(len(ids), 1, n, n)).logits


@torch.no_grad()
def test_a_whole_model_equals_the_dense_mask_and_chunks_equal_the_whole():
    model, method, ids = decoder(), Window(), tokens()[0]
    wanted = naive_model(model, ids, method)
    host, context = applied(model, method)
    whole = model(ids).logits
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    cache, parts, start = host.new_cache(), [], 0
    for end in (12, 24, 46):
        parts.append(model(ids[:, start:end], past_key_values=cache).logits)
        start = end
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert 0 < context.report["attention/window"]["density"] < 0.7


@torch.no_grad()
def test_a_static_cache_is_read_only_as_far_as_it_is_filled():
    from transformers import StaticCache

    model, ids = decoder(), tokens()[0]
    host, _ = applied(model, Window())
    whole = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=64)
    first = model(ids[:, :20], past_key_values=cache).logits
    rest = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-5)
    host.changes.undo()


def test_gradients_are_those_of_the_dense_mask():
    ids, method, both = tokens()[0], Window(), []
    for sparse in (False, True):
        model = decoder()
        if sparse:
            applied(model, method)
        logits = model(ids, use_cache=False).logits if sparse else naive_model(model, ids, method)
        logits.square().mean().backward()
        both.append([p.grad for p in model.parameters()])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_weights_of_its_own_are_trained_copied_and_undone():
    import hasten

    model, ids = decoder().train(), tokens()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(model.state_dict())
    host, method = recognise(model), Window(gate=True)
    run = hasten.training(model, optimizer, [ids] * 3, "", steps=3)
    run.resize(lambda run: base.install(method, host, Context()) and None)
    added = [name for name in model.state_dict() if name not in before]
    assert added == [f"model.layers.{i}.self_attn.hasten_attention.weight" for i in range(3)]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    start = {name: model.state_dict()[name].clone() for name in added}
    for batch in run:
        run.backward(model(batch, labels=batch).loss)
    assert all(not torch.equal(model.state_dict()[name], start[name]) for name in added)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].self_attn.hasten_attention.weight.zero_()
        assert not torch.equal(copied(ids).logits, model(ids).logits)
    host.changes.undo()
    assert set(model.state_dict()) == before


@torch.no_grad()
def test_it_composes_with_a_cache_that_evicts():
    import hasten

    model = decoder()
    ids, mask = tokens()
    handle = hasten.apply(model, "kv/cake(keep=0.5, window=4)")
    base.install(Window(), handle.host, handle.context)
    cache = handle.host.new_cache()
    model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.layers[0].length < ids.shape[1]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 6
    alone = model.generate(ids[1:, 7:], max_new_tokens=6, do_sample=False)
    assert alone.shape[1] == ids.shape[1] - 7 + 6


def test_refusals_come_before_anything_is_changed():
    from transformers import MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 20}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**small, sliding_window=8))
    with pytest.raises(UsageError, match="whole text"):
        applied(model, Window())
    assert model.config._attn_implementation == "sdpa"
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(UsageError):
        applied(t5, Window())
    with pytest.raises(UsageError, match="taken over"):
        applied(nn.Linear(2, 2), Window())
    model = decoder()
    host, _ = applied(model, Window())
    with pytest.raises(UsageError, match="taken over already"):
        base.install(Window(), host, Context())


def test_masks_that_blocks_cannot_follow_are_refused():
    model, ids = decoder(), tokens()[0]
    applied(model, Window())
    custom = torch.ones(2, 1, 46, 46, dtype=torch.bool).tril()
    with pytest.raises(UsageError, match="mask of the caller's own"):
        model(ids, attention_mask=custom)
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    with pytest.raises(UsageError, match="holes"):
        model(ids, attention_mask=holes)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UsageError, match="dropout"):
        model(ids)


def test_the_naive_reference_is_the_same_attention():
    q, k, v = (torch.randn(1, h, 20, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 3))
    v = v[:, :2]
    blocks = Blocks.causal(20, 20, 4, 4)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(naive_attention(q, k, v, blocks), want, rtol=1e-5, atol=1e-5)
