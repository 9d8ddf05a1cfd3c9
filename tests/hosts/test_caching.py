"""A cache of another kind in a decoder: where it is used, where it is refused, and that undoing takes it away."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.caching import use_cache
from hosts import tiny


class Counting(DynamicCache):
    """Remembers how it was made."""

    def __init__(self, prompt=None):
        super().__init__()
        self.prompt = prompt


def test_generate_and_new_cache_take_the_factorys_caches():
    model = tiny.llama()
    host, batch, made = recognise(model), tiny.padded_batch(9), []
    wanted = tiny.write(model, batch)
    use_cache(host, "kv/some", lambda prompt: made.append(prompt) or Counting(prompt))
    assert made == [None]
    assert torch.equal(tiny.write(model, batch), wanted) and made == [None, 9]
    assert host.new_cache().prompt is None and host.new_cache(prompt=4).prompt == 4
    mine = host.new_cache(prompt=9)
    tiny.write(model, batch, past_key_values=mine)
    assert mine.get_seq_length() == 9 + 7 and len(made) == 5
    tiny.write(model, batch, use_cache=False)
    assert len(made) == 5
    host.changes.undo()
    assert type(host.new_cache()) is DynamicCache and model.config._attn_implementation == "sdpa"


def test_what_is_refused():
    model = tiny.llama()
    host, batch = recognise(model), tiny.padded_batch(9)
    use_cache(host, "kv/some", Counting)
    with pytest.raises(UsageError, match="past_key_values"):
        tiny.write(model, batch, past_key_values=DynamicCache())
    with pytest.raises(UsageError, match="cache_implementation"):
        tiny.write(model, batch, cache_implementation="static")
    with pytest.raises(UsageError, match="cache_implementation"):
        settings = transformers.GenerationConfig(max_new_tokens=2, cache_implementation="static", pad_token_id=0)
        model.generate(**batch, generation_config=settings)
    for build in (tiny.mistral, tiny.gemma3):
        other = recognise(build())
        with pytest.raises(UsageError, match="sliding"):
            use_cache(other, "kv/some", Counting)
        assert not len(other.changes)
