"""Gives a decoder a cache of another kind: in `generate`, and from `host.new_cache()` for forwards of one's own."""

from collections.abc import Callable
from typing import Any

from hasten.core.errors import UsageError
from hasten.hosts.attention import _ATTEND, take_over
from hasten.hosts.base import Host

Factory = Callable[[int | None], Any]
"""Makes an empty transformers `Cache` from the number of columns of the prompt, None where it is not known."""


def check_caching(host: Host, name: str) -> None:
    """Raises UsageError where a cache that drops tokens makes no sense; changes nothing.

    Args:
        name: of the method that wants the cache, for messages.

    Raises:
        UsageError: no transformers decoder, one whose layers already see only a part of the text (sliding or chunked
            windows, recurrent states), or an encoder-decoder.
    """
    model = type(host.model).__name__
    if host.kind != "decoder":
        raise UsageError(f"{name} keeps a part of a decoder's cache, and {model} is a {host.kind}")
    config: Any = getattr(host.model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UsageError(f"{name} needs a transformers model: {model} has no transformers config")
    if config.is_encoder_decoder:
        raise UsageError(f"{name} works on decoders, and {model} is an encoder-decoder")
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ("full_attention",))
    partial = kinds - {"full_attention"}
    if partial or getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None):
        kind = ", ".join(sorted(partial)) or "sliding windows"
        raise UsageError(f"{name} needs layers that see the whole text; {model} has others ({kind}) with small caches")


def check_owners(host: Host, name: str) -> None:
    """Raises UsageError where the attention of a layer was taken over by a method that reads the whole cache itself.

    Raises:
        UsageError: one that attends to single queries too (`decodes`), which would take stored keys for all keys.
    """
    for layer in host.layers:
        owner = None if layer.attention is None else vars(layer.attention).get(_ATTEND)
        method: Any = getattr(getattr(owner, "run", None), "method", None)
        if getattr(method, "decodes", False):
            raise UsageError(f"{method.name} decodes with the whole cache, of which {name} keeps a part: leave one out")


def use_cache(host: Host, name: str, factory: Factory) -> None:
    """Makes `factory` the source of caches: `host.new_cache(prompt=None)`, and `generate` where none is passed.

    Args:
        name: of the method, for messages.
        factory: called once here, to learn the class of its caches, then with the prompt's columns by `generate`.

    Raises:
        UsageError: what `check_caching` refuses, or an attention that can't be observed; later, from `generate`, a
            cache of another kind or `cache_implementation`.
    """
    check_caching(host, name)
    own = type(factory(None))
    take_over(host)

    def new_cache(prompt: int | None = None) -> Any:
        return factory(prompt)

    def generate(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        settings = kwargs.get("generation_config") or host.model.generation_config
        kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        if kind not in (None, "dynamic"):
            raise UsageError(f"{name} has a cache of its own, not a {kind} one: leave cache_implementation out")
        given = kwargs.get("past_key_values")
        if given is not None and not isinstance(given, own):
            raise UsageError(
                f"{name} has a cache of its own: leave past_key_values out, or pass one from host.new_cache()"
            )
        if given is None and kwargs.get("use_cache", True):
            inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
            kwargs["past_key_values"] = new_cache(None if inputs is None else inputs.shape[1])
        return inner(*args, **kwargs)

    host.changes.set(host, "new_cache", new_cache)
    host.wrap_generate(generate)  # type: ignore[attr-defined]
