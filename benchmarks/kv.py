"""A cache of a quarter of the tokens beside the whole one, at contexts of 4,096 to 32,768 tokens.

The model has random weights (seed 0), so its attention is flat and its choice of tokens means nothing: this measures
time and bytes only; quality is measured on trained weights (`hasten evidence kv/cake`, the family kvpress). The whole
cache is measured twice: transformers' `DynamicCache`, which copies itself at every token, and `kv/cake(keep=1)`, which
stores the same in memory that grows in chunks. A third reading isolates what is gained by reading less: a cache that
dropped one token in a thousand, whose attention runs through the kernel that the small one's runs through.

All but the last 64 tokens of a prompt are put into the caches as random keys and values; the model reads the rest.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hasten.api import Handle, apply
from hasten.bench.figures import Figure, Reading, figure, race
from hasten.hosts.ragged import Ragged

VOCABULARY, LAYERS, HEADS, DIM = 512, 4, 8, 64
EVERY, LAST = 32, 64  # tokens from one eviction to the next; tokens of a prompt that are really read
PLANS = {
    "dynamic": "",
    "whole": "kv/cake(keep=1)",
    "kernel": "kv/cake(keep=0.999, decode=false)",
    "quarter": f"kv/cake(keep=0.25, every={EVERY})",
    "heads": f"kv/cake(keep=0.25, every={EVERY}, heads=true)",
}
SHAPE = "a random Llama of 4 layers, width 512, 8 heads, fp32, one row, context {}"


def llama() -> torch.nn.Module:
    """Four layers of width 512, eight heads of 64; the cache of 16,384 tokens takes 268 MB in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCABULARY, max_position_embeddings=1 << 17, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Arm:
    """A plan on a model of its own, with a prompt in its cache; `whole` says whether the cache keeps all of it."""

    def __init__(self, plan: str, context: int) -> None:
        self.context, self.whole, self.looks_on = context, "0.25" not in plan, "keep=0." in plan
        self.handle: Handle = apply(llama(), plan)
        self.cache = self.handle.host.new_cache(**({"prompt": context} if self.looks_on else {}))
        self._fill(context - LAST)
        self.read(prompt(LAST))

    def _fill(self, tokens: int) -> None:
        """As if a part of the prompt had been read."""
        generator = torch.Generator().manual_seed(2)
        for layer in range(LAYERS):
            keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
            keys, values = self.cache.update(keys, values, layer)
            if self.looks_on:
                query = torch.randn(1, HEADS, LAST, DIM, generator=generator)
                self.cache.observe(layer, None, query, keys, values, None, DIM**-0.5)

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> None:
        self.handle.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, tokens: int) -> None:
        """Decodes so many tokens. A whole cache goes back to the prompt first; a shrunken one keeps its own size."""
        more = self.cache.get_seq_length() - self.context
        if self.whole and more:
            self.cache.crop(-more)
        token = torch.tensor([[7]])
        for _ in range(tokens):
            self.read(token)


def held(cache: Any) -> int:
    """Bytes of all storages that a cache's layers refer to: keys, values, places, remembered queries, unused room."""
    found: dict[int, int] = {}

    def look(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, list):
            for part in one:
                look(part)
        elif isinstance(one, CacheLayerMixin | Ragged):
            look(list(vars(one).values()))

    look(cache.layers)
    return sum(found.values())


@lru_cache(maxsize=len(PLANS))
def arm(name: str, context: int) -> Arm:
    return Arm(PLANS[name], context)


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))


def decode(base: str, plan: str, context: int, tokens: int, seconds: float) -> Reading:
    one, other = arm(base, context), arm(plan, context)
    found = race(lambda: one.decode(tokens), lambda: other.decode(tokens), seconds=seconds)
    return found.but(
        plan=PLANS[plan],
        tokens_per_second=tokens / found.facts["seconds"],
        tokens_per_second_base=tokens / found.facts["seconds_base"],
        bytes=held(other.cache),
        bytes_base=held(one.cache),
    )


def cache_bytes(plan: str, context: int, tokens: int) -> Reading:
    """The largest share of the dynamic cache's bytes, over some tokens after the prompt."""
    one, other, most = arm("dynamic", context), arm(plan, context), 0.0
    one.decode(1)  # the least that the whole cache may hold
    for _ in range(tokens):
        other.decode(1)
        most = max(most, held(other.cache))
    facts = {"plan": PLANS[plan], "bytes": int(most), "bytes_base": held(one.cache)}
    return Reading(most / held(one.cache), facts=facts)


@torch.inference_mode()
def prompt_bytes(plan: str, context: int) -> Reading:
    """The most that the cache holds between two layers of a prompt that is read in one forward."""
    handle, most = apply(llama(), plan), 0
    cache = handle.host.new_cache()
    observe = cache.observe

    def watched(*given: Any) -> None:
        nonlocal most
        most = max(most, held(cache))
        observe(*given)

    cache.observe = watched
    handle.model(input_ids=prompt(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    base = held(arm("dynamic", context).cache)
    return Reading(most / base, facts={"plan": plan, "bytes": most, "bytes_base": base})


def figures(quick: bool) -> Iterator[Figure]:
    seconds, tokens = (50, EVERY) if quick else (240, 2 * EVERY)
    bases = {
        "dynamic": "the dynamic cache, ",
        "whole": "the preallocated whole cache, ",
        "kernel": "the preallocated whole cache through the same kernel, ",
    }

    def size(name: str, measure: Callable[[], Reading], context: int, goal: float | None = None) -> Figure:
        against = bases["dynamic"] + SHAPE.format(context)
        return figure(name, measure, unit="share", against=against, goal=goal, better="lower")

    def speed(name: str, base: str, plan: str, context: int, goal: float | None = None) -> Figure:
        against = bases[base] + SHAPE.format(context) + ", tokens per second"
        return figure(name, partial(decode, base, plan, context, tokens, seconds), against=against, goal=goal)

    yield size("cache_bytes_quarter", partial(cache_bytes, "quarter", 16384, 2 * EVERY + 1), 16384, 0.3)
    yield speed("decode_16k_quarter", "dynamic", "quarter", 16384, 1.8)
    yield speed("decode_16k_quarter_over_preallocated", "whole", "quarter", 16384)
    yield speed("decode_16k_quarter_over_same_kernel", "kernel", "quarter", 16384)
    yield size("cache_bytes_heads", partial(cache_bytes, "heads", 16384, 2 * EVERY + 1), 16384, 0.3)
    yield speed("decode_16k_heads_over_preallocated", "whole", "heads", 16384)
    yield speed("decode_4k_quarter", "dynamic", "quarter", 4096)
    yield speed("decode_4k_quarter_over_preallocated", "whole", "quarter", 4096)
    yield size("prompt_peak_4k_quarter", partial(prompt_bytes, PLANS["quarter"], 4096), 4096)
    yield speed("decode_32k_quarter", "dynamic", "quarter", 32768)
    yield speed("decode_32k_quarter_over_preallocated", "whole", "quarter", 32768)
