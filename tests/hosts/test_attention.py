"""Attention shown to caches: nothing is unmasked, nothing changes, undo restores it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.attention import NAME, hand_over, is_causal, make_mask, take_over


def llama(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 53, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


class Watcher:
    """Hands masks through and notes what it was shown."""

    def __init__(self):
        self.shown = []

    def mask(self, layer, query, given):
        return given

    def observe(self, layer, module, query, key, value, mask, scaling):
        self.shown.append((layer, module, tuple(query.shape), tuple(key.shape), mask, scaling))


@torch.no_grad()
def test_same_logits_causal_and_padded():
    model = llama()
    ids = torch.randint(1, 53, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    before, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    host = recognise(model)
    take_over(host)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)
    # the padded row is the row without its padding, and a later token does not change an earlier one
    alone = model(ids[1:, 4:]).logits
    assert torch.allclose(padded[1:, 4:], alone, atol=1e-5)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 52 + 1
    assert torch.allclose(model(changed).logits[:, :-1], before[:, :-1], atol=1e-6)
    host.changes.undo()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)


@torch.no_grad()
def test_a_cache_is_shown_queries_keys_and_mask():
    from transformers import DynamicCache

    class Watched(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            keys, values = super().update(keys, values, layer_idx)
            return hand_over(keys, watcher, layer_idx), values

    watcher, model = Watcher(), llama()
    take_over(recognise(model))
    ids = torch.randint(1, 53, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = Watched(config=model.config)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert [shown[0] for shown in watcher.shown] == [0, 1, 0, 1]
    assert watcher.shown[0][1] is model.model.layers[0].self_attn
    assert watcher.shown[1][2:4] == ((2, 4, 8, 8), (2, 2, 8, 8))
    assert watcher.shown[3][2:4] == ((2, 4, 1, 8), (2, 2, 9, 8))
    given = watcher.shown[3][4]
    assert is_causal(given) and given.shape == (2, 1, 1, 9) and given.sum(-1).flatten().tolist() == [7, 9]
    assert watcher.shown[0][5] == pytest.approx(8**-0.5)


def test_a_mask_of_another_pattern_is_not_called_causal():
    from transformers.masking_utils import sliding_window_causal_mask_function

    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 8, "q_offset": 4}
    assert is_causal(make_mask(**sizes))
    sliding = make_mask(mask_function=sliding_window_causal_mask_function(3), **sizes)
    assert not is_causal(sliding) and int(sliding[0, 0, -1].sum()) == 3
    assert make_mask(batch_size=1, q_length=1, kv_length=8, q_offset=7) is None


def test_refuses_what_it_cannot_see():
    eager = llama()
    eager.set_attn_implementation("eager")
    host = recognise(eager)
    with pytest.raises(UsageError, match="set_attn_implementation"):
        take_over(host)
    assert eager.config._attn_implementation == "eager" and len(host.changes) == 0

    class Plain(torch.nn.Module):
        pass

    host.model = Plain()
    with pytest.raises(UsageError, match="AttentionInterface"):
        take_over(host)


@torch.no_grad()
def test_gpt2_keeps_its_logits():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=53, n_positions=32)).eval()
    ids = torch.randint(0, 53, (2, 7))
    before = model(ids).logits
    host = recognise(model)
    take_over(host)
    assert torch.equal(model(ids).logits, before)
    host.changes.undo()
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_the_padding_is_read_once_a_forward_and_anew_in_the_next(monkeypatch):
    """All layers share a forward's mask; a later forward with other padding has its own range."""
    from hasten.hosts.attention import Call

    read, ranges = Call._read, []
    monkeypatch.setattr(Call, "_read", lambda self, mask: ranges.append(read(self, mask)) or ranges[-1])
    model = llama()
    host = recognise(model)
    for layer in range(2):
        host.attend_with(layer, lambda call: (call.range(), call.range(), call.dense())[2])
    ids = torch.randint(1, 53, (2, 11))
    for padding in (4, 6):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        model(ids, attention_mask=mask, use_cache=False)
        assert ranges.pop()[0].tolist() == [0, padding] and not ranges
