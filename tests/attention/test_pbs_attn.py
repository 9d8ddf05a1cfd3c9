"""PBS-Attn: orders and choices, that permuting loses nothing, and that it gathers scattered keys into few blocks."""

import pytest
import torch

import hasten.api
import hasten.attention.pbs_attn as module
from conformance.attention import decoder, tokens
from hasten.attention.pbs_attn import METHOD, naive_pbs_attn, pbs_attn
from hasten.core.errors import PlanError
from hasten.kernels.block_attention import attention
from hasten.math.blocks import Blocks, seen

SMALL = {"block": 4, "segment": 8, "threshold": 0.3}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cases():
    def case(batch, heads, hk, nq, nk, *args, dtype=torch.float32, **options):
        q, k = normal(batch, heads, nq, 8).to(dtype), 2 * normal(batch, hk, nk, 8, seed=1).to(dtype)
        return {"args": (q, k, *args), "kwargs": options, "tolerance": 0}

    yield case(1, 2, 2, 40, 40, 4, 8, 0.7)
    yield case(2, 4, 2, 37, 37, 4, 8, 0.5, True)
    yield case(2, 4, 2, 17, 37, 4, 12, 0.5, True)
    yield case(2, 4, 1, 43, 43, 5, 10, 0.6, True, begin=torch.tensor([0, 13]))
    yield case(2, 3, 1, 41, 43, 5, 10, 0.6, begin=torch.tensor([3, 13]), end=torch.tensor([43, 39]))
    yield case(2, 4, 2, 33, 43, 4, 8, 0.6, dtype=torch.bfloat16, scaling=0.2)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_naive_is_fast(case):
    naive, fast = (f(*case["args"], **case["kwargs"]) for f in (naive_pbs_attn, pbs_attn))
    assert all(torch.equal(one, other) for one, other in zip(naive, fast, strict=True))


@pytest.mark.parametrize("queries", [False, True])
def test_permuted_attention_is_attention_in_the_texts_order(queries):
    """With everything chosen nothing changes but the order of the sums (the paper's theorems of section 3.1)."""
    q, k, v = normal(2, 4, 53, 8), normal(2, 2, 53, 8, seed=1), normal(2, 2, 53, 8, seed=2)
    q_order, k_order, chosen = pbs_attn(q, k, 4, 12, 1.0, queries)
    blocks = Blocks.of(chosen, 4, 4, q_order=q_order, k_order=k_order)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, blocks), dense)
    segments = torch.arange(48) // 12
    assert (k_order[..., :48] // 12 == segments).all() and (k_order[..., 48:] == torch.arange(48, 53)).all()
    assert (q_order // 12 == torch.arange(53) // 12).all()


def scattered(length=768, every=19, dim=16):
    """Queries that all look for keys which stand far apart, and keys between them that nobody wants."""
    wanted = torch.nn.functional.normalize(normal(dim, seed=5), dim=0)
    q, k = normal(1, 1, length, dim) + 8 * wanted, normal(1, 1, length, dim, seed=1)
    k[:, :, ::every] += 6 * wanted
    return q, k


def test_scattered_keys_need_fewer_blocks(monkeypatch):
    """The paper's aim: of the same selection rule, the permuted keys need fewer blocks and lose less attention."""
    q, k = scattered()
    weights = (q @ k.mT / 4).masked_fill(torch.ones(768, 768).triu(1).bool(), -torch.inf).softmax(-1)

    def found():
        _, k_order, chosen = pbs_attn(q, k, 16, 128, 0.6)
        mask = seen(Blocks.of(chosen, 16, 16, k_order=k_order), 768, 768)
        return int(chosen.sum()), float((weights * mask).sum(-1).mean())

    blocks, mass = found()
    monkeypatch.setattr(module, "within_segments", lambda worth, segment, length: torch.arange(length)[None, None])
    text_blocks, text_mass = found()
    assert blocks < 0.8 * text_blocks and mass > text_mass + 0.03


def test_the_first_token_is_always_seen_and_no_later_segment():
    q, k = normal(2, 2, 64, 8), normal(2, 2, 64, 8, seed=1)
    begin = torch.tensor([0, 9])
    _, k_order, chosen = pbs_attn(q, k, 4, 16, 1e-6, begin=begin)
    mask = seen(Blocks.of(chosen, 4, 4, k_order=k_order), 64, 64, begin=begin)
    assert all(mask[b, :, int(begin[b]) :, int(begin[b])].all() for b in range(2))
    assert not mask.triu(1).any()
    own = torch.arange(64)[:, None] // 16 == torch.arange(64) // 16
    assert mask[0][:, own.tril()].all(), "a query sees its own segment"


@torch.no_grad()
def test_short_prompts_are_dense_and_the_report_has_the_density():
    handle = hasten.api.apply(decoder(), METHOD(**SMALL))
    ids, mask = tokens()
    handle.model(ids, attention_mask=mask)
    handle.model(ids[:, -6:])
    report = handle.report["attention/pbs_attn"]
    assert report["sparse_calls"] == 3 and report["dense_calls"] == 3
    assert 0.2 < report["density"] < 1


def test_gradients_flow_through_what_was_chosen():
    handle = hasten.api.apply(decoder(), METHOD(**SMALL))
    ids, _ = tokens()
    handle.model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.model.parameters())


@torch.no_grad()
def test_with_an_evicting_cache():
    handle = hasten.api.apply(decoder(), [METHOD(**SMALL), "kv/cake(keep=0.5, window=4, every=2)"])
    ids, mask = tokens()
    written = handle.model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert written.shape == (2, ids.shape[1] + 4)
    assert handle.report["attention/pbs_attn"]["sparse_calls"] == 3


def test_options():
    with pytest.raises(PlanError, match="multiple of block"):
        METHOD(block=96)
    with pytest.raises(PlanError, match="threshold"):
        METHOD(threshold=0.0)
    assert METHOD(threshold=1.0).idle
