"""Nothing is silently unmasked: the attention and its masks are registered together, and hidden tokens stay hidden."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import hasten
from hasten.core.errors import UsageError
from hasten.hosts.attention import NAME
from kv.test_cache import applied, build, tokens

KINDS = {
    "all": {"keep": 1.0},
    "even": {},
    "heads": {"heads": True},
    "budget": {"budget": 60},  # more than there is: nothing is evicted
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_function_and_mask_are_registered_together():
    applied(build())
    assert NAME in AttentionInterface().valid_keys() and NAME in AttentionMaskInterface().valid_keys()


@every_kind
@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(kind):
    model, ids = build(), tokens(2, 46)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    handle, outs = applied(model, **KINDS[kind]), []
    for filling in (0, 7):
        given, cache, parts, start = ids.masked_fill(mask == 0, filling), handle.host.new_cache(), [], 0
        for end in (38, 39, 43, 44, 45, 46):
            step = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache}
            parts.append(model(given[:, start:end], **step).logits)
            start = end
        outs.append(torch.cat(parts, 1))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1, 13:], outs[1][1, 13:])


@every_kind
@torch.no_grad()
def test_tokens_hidden_later_are_hidden(kind):
    """Rows at different places leave holes behind the prompt: a mask of two dimensions hides them."""
    model, ids = build(), tokens(2, 46)
    handle, changed = applied(model, **{"decode": False} | KINDS[kind]), ids.clone()
    changed[0, 41:43] = 9
    mask = torch.ones_like(ids)
    mask[0, 41:43] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    outs = []
    for given in (ids, changed):
        cache = handle.host.new_cache()
        model(given[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        parts, start = [], 40
        for end in (43, 44, 46):
            step = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache}
            parts.append(model(given[:, start:end], **step).logits)
            start = end
        outs.append(torch.cat(parts, 1))
    real = mask[:, 40:].bool()
    assert torch.allclose(outs[0][real], outs[1][real], atol=1e-6)
    visible = model(ids[:, 40:], past_key_values=_after(handle, ids)).logits
    assert not torch.allclose(outs[0][0, -1], visible[0, -1], atol=1e-3)  # hiding them matters


def _after(handle, ids):
    cache = handle.host.new_cache()
    handle.model(ids[:, :40], past_key_values=cache)
    return cache


@every_kind
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_followed(kind, dtype):
    """Two branches of a tree of drafts do not see each other."""
    model, ids = build(), tokens(1, 44)
    handle = applied(model, **{"decode": False} | KINDS[kind])
    tree = torch.ones(1, 1, 4, 44, dtype=torch.bool).tril(40)
    tree[..., 2:, 41] = False
    tree[..., 3, 40:42] = False
    tree[..., 2, 40:42] = False
    places = torch.tensor([[40, 41, 40, 41]])
    given = tree if dtype == torch.bool else torch.zeros(1, 1, 4, 44).masked_fill_(~tree, torch.finfo(dtype).min)
    got = model(ids[:, 40:], attention_mask=given, position_ids=places, past_key_values=_after(handle, ids)).logits
    for branch in (slice(0, 2), slice(2, 4)):
        want = model(ids[:, 40:][:, branch], past_key_values=_after(handle, ids)).logits
        assert torch.allclose(got[:, branch], want, atol=1e-5)


@torch.no_grad()
def test_a_prompt_whose_last_token_does_not_see_all_is_refused():
    model, ids = build(), tokens(1, 40)
    window = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril() & ~torch.ones(40, 40, dtype=torch.bool).tril(-9)
    window[..., 0] = True
    for heads in (False, True):
        handle = applied(model, heads=heads)
        with pytest.raises(UsageError, match="hides"):
            model(ids, attention_mask=window, past_key_values=handle.host.new_cache())
        handle.undo()
    hasten.apply(model, "kv/cake(keep=1)")
    want = build()(ids, attention_mask=window, past_key_values=DynamicCache()).logits
    assert torch.equal(model(ids, attention_mask=window, past_key_values=DynamicCache()).logits, want)
