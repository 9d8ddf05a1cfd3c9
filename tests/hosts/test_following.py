"""A cache that follows a pattern: what it computes, what it frees, and where it refuses."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.caching import use_cache
from hasten.hosts.following import FollowingCache
from hosts import tiny

LENGTH = 40


@dataclasses.dataclass
class Window:
    """Some first and last tokens; kv head 1 sees more of the last ones where `wider`. Asked every `every` columns."""

    first: int = 2
    last: int = 9
    wider: int = 0
    every: int = 1
    slack: int = 0

    def due(self, layer, seen):
        return seen % self.every == 0

    def reach(self, heads):
        return self.last + self.wider * torch.arange(heads)[None, :, None]

    def keep(self, layer, held, query):
        newest = held.seen - 1 - (0 if held.padding is None else held.padding[:, None, None])
        where = held.positions()
        return (where < self.first) | (newest - where < self.reach(held.shape[1]) + self.slack - 1)

    def sees(self, layer, positions, asked):
        apart = asked[:, None, :, None] - positions[:, :, None]
        return (positions[:, :, None] < self.first) | (apart < self.reach(positions.shape[1])[..., None])


class Only(Window):
    def layers(self):
        return [1, 3]


def dense_mask(policy, mask, heads, groups):
    """The pattern over the whole text, bool [batch, heads, T, T]; hidden columns at a row's beginning do not count."""
    batch, length = mask.shape
    shown = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    for b in range(batch):
        lead = int(mask[b].argmax())
        for h in range(heads):
            near = query - key < policy.last + policy.wider * (h // groups)
            shown[b, h] = (near | (key - lead < policy.first)) & (key <= query) & mask[b].bool()
            shown[b, h].fill_diagonal_(True)
    return shown


def batch(pads=(0, 13, 5), length=LENGTH):
    ids = torch.randint(1, 61, (len(pads), length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def following(policy, model=None):
    model = tiny.llama() if model is None else model
    host = recognise(model)
    use_cache(host, "attention/some", lambda prompt: FollowingCache(policy, len(host.cache_layers), prompt))
    return model, host


def feed(model, ids, mask, places, ends, cache):
    out, start = [], 0
    for end in ends:
        part = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=places[:, start:end], past_key_values=cache
        )
        out.append(part.logits)
        start = end
    return torch.cat(out, dim=1)


POLICIES = {
    "each step": Window(),
    "blocks": Window(every=8),
    "heads": Window(wider=6),
    "heads in blocks": Window(wider=6, every=8),
    "no first": Window(first=0, last=1, wider=3),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "ends", [(29, *range(30, 41)), (4, 9, 10, 27, 33, 34, 40), (8, 11, 14, 24, 33, 40), (LENGTH,)], ids=str
)
@pytest.mark.parametrize("name", POLICIES)
def test_it_equals_the_masked_attention_over_the_whole_text(name, ends):
    policy, (ids, mask, places) = POLICIES[name], batch()
    model = tiny.llama()
    want = model(ids, attention_mask=dense_mask(policy, mask, 4, 2), position_ids=places).logits
    model, host = following(policy, model)
    cache = host.new_cache()
    got = feed(model, ids, mask, places, ends, cache)
    real = mask.bool()
    assert torch.allclose(got[real], want[real], atol=2e-5), (got - want)[real].abs().max()
    held = cache.layers[0]
    assert (held.ragged is not None) == bool(policy.wider)
    if policy.every == 1:
        per_head = [policy.first + policy.last - 1 + policy.wider * h for h in range(2)]
        rows = held.real() if held.ragged is not None else held.real()[:, None].expand(-1, 2)
        assert rows.tolist() == [per_head] * 3


@torch.no_grad()
def test_without_sees_what_is_kept_is_seen():
    """A policy that is asked at every step needs no mask while decoding; padded rows equal rows alone."""

    class Blind(Window):
        sees = None

    ids, mask, places = batch()
    for policy in (Blind(), Blind(wider=6), Blind(wider=6, every=4)):
        model, host = following(policy)
        together = host.new_cache()
        got = feed(model, ids, mask, places, (30, *range(31, 41)), together)
        for row in range(3):
            pad, alone = int((mask[row] == 0).sum()), host.new_cache()
            one = [t[row : row + 1, pad:] for t in (ids, mask, places)]
            ends = [end - pad for end in (30, *range(31, 41))]
            if policy.every > 1 and pad % policy.every:
                continue  # it is asked at other places of the text
            want = feed(model, *one, ends, alone)
            assert torch.allclose(got[row, pad:], want[0], atol=2e-5)


@torch.no_grad()
def test_memory_is_freed_and_stays_small():
    ids, mask, places = batch((0,), 400)
    for policy, slots in ((Window(every=16), 2 + 9 + 16), (Window(wider=10, every=16), 2 + 9 + 5 + 16)):
        model, host = following(policy)
        cache = host.new_cache()
        feed(model, ids, mask, places, (200, *range(201, 401)), cache)
        stored = sum({s.data_ptr(): s.nbytes() for layer in cache.layers for s in stores(layer)}.values())
        assert stored == cache.nbytes
        full = 4 * 2 * 400 * 2 * 8 * 4  # layers, heads, tokens, keys and values, dim, bytes
        assert stored <= full * (slots + 2 * 64) / 400
        assert max(layer.length for layer in cache.layers) <= slots + 5


def stores(layer):
    held = layer.ragged
    pair = (layer._keys, layer._values) if held is None else (held.keys, held.values)
    return [one.untyped_storage() for one in pair]


@torch.no_grad()
@pytest.mark.parametrize("wider", [0, 6])
def test_tokens_are_taken_back_or_refused(wider):
    policy, (ids, mask, places) = Window(wider=wider, slack=4), batch()
    model, host = following(policy)
    cache, other = host.new_cache(), host.new_cache()
    feed(model, ids, mask, places, (30, 31, 35), cache)
    cache.crop(-4)
    feed(model, ids, mask, places, (30, 31), other)
    for at in range(31, 40):
        step = {"attention_mask": mask[:, : at + 1], "position_ids": places[:, at : at + 1]}
        got, want = (model(ids[:, at : at + 1], past_key_values=one, **step).logits for one in (cache, other))
        assert torch.allclose(got, want, atol=1e-5)
    assert cache.get_seq_length() == 40
    with pytest.raises(UsageError, match="can't be taken back"):
        cache.crop(-(policy.last + wider + 6))


@torch.no_grad()
@pytest.mark.parametrize("wider", [0, 6])
def test_rows_are_reordered_repeated_and_left_out(wider):
    ids, mask, places = batch()
    model, host = following(Window(wider=wider))
    order = torch.tensor([2, 0, 0, 1, 2])
    cache, moved = host.new_cache(), host.new_cache()
    for one in (cache, moved):
        feed(model, ids, mask, places, (30, 33), one)
    moved.reorder_cache(order)
    for at in range(33, 37):
        step = {"attention_mask": mask[:, : at + 1], "position_ids": places[:, at : at + 1]}
        want = model(ids[:, at : at + 1], past_key_values=cache, **step).logits
        if at == 35:
            moved.batch_select_indices(torch.tensor([0, 3]))
            order = order[[0, 3]]
        step = {name: one[order] for name, one in step.items()}
        got = model(ids[order, at : at + 1], past_key_values=moved, **step).logits
        assert torch.allclose(got, want[order], atol=1e-5)
    moved.batch_repeat_interleave(3)
    assert moved.batch_size == 6 and moved.layers[2].length == cache.layers[2].length
    moved.reset()
    assert moved.get_seq_length() == 0 and moved.nbytes == 0


def test_generate_with_beams_and_prompts_in_parts():
    model, host = following(Window(wider=3))
    given = tiny.padded_batch(25)
    greedy = tiny.write(model, given)
    assert torch.equal(tiny.write(model, given, prefill_chunk_size=7), greedy)
    assert tiny.write(model, given, num_beams=3).shape == (2, 33)


@torch.no_grad()
def test_layers_that_do_not_follow_keep_everything():
    ids, mask, places = batch((0,))
    model, host = following(Only())
    cache = host.new_cache()
    feed(model, ids, mask, places, (30, 40), cache)
    assert [layer.length for layer in cache.layers] == [40, 10, 40, 10]
    everything, plain = Window(last=100), DynamicCache()
    model, host = following(everything)
    got = feed(model, ids, mask, places, (30, 40), host.new_cache())
    assert torch.allclose(got, feed(tiny.llama(), ids, mask, places, (30, 40), plain), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("wider", [0, 6])
def test_holes_and_trees_stay_hidden(wider):
    """After the prompt some tokens are hidden again, by a mask of two dimensions and by one of four."""
    policy, (ids, mask, places) = Window(wider=wider), batch()
    mask[0, 33:35] = 0
    mask[1, 34] = 0
    model = tiny.llama()
    hidden = dense_mask(policy, mask, 4, 2)
    want = model(ids, attention_mask=hidden, position_ids=places).logits
    model, host = following(policy, model)
    cache = host.new_cache()
    got = feed(model, ids, mask, places, (30, 36, 37, 40), cache)
    real = mask.bool()
    assert torch.allclose(got[real], want[real], atol=2e-5)
    four, other = torch.ones(3, 1, 10, LENGTH, dtype=torch.bool).tril(30) & mask[:, None, None].bool(), host.new_cache()
    feed(model, ids, mask, places, (30,), other)
    step = model(ids[:, 30:], attention_mask=four, position_ids=places[:, 30:], past_key_values=other).logits
    assert torch.allclose(step[real[:, 30:]], want[:, 30:][real[:, 30:]], atol=2e-5)
