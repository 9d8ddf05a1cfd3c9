"""What each token of a vocabulary adds to a text, in bytes."""

import json
from typing import Any

from hasten.core.errors import UsageError

Words = list[bytes | None]


def words_of(model: Any, tokenizer: str) -> Words | None:
    """The bytes of every token of a model, None for one that adds none; None at all where a token is a byte.

    Args:
        tokenizer: a folder or a name that transformers knows; empty for the model's own.

    Raises:
        UsageError: there is no tokenizer, or its tokens can't be told in bytes.
    """
    size = model.config.get_text_config().vocab_size
    if size <= 256 and not tokenizer:
        return None
    from transformers import AutoTokenizer

    name = tokenizer or model.config.name_or_path
    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"the tokens of {type(model).__name__} are needed as bytes, and no tokenizer was found at {name!r}: give "
            f"tokenizer='FOLDER', where tokenizer.save_pretrained wrote it ({type(error).__name__})"
        ) from None
    return tokens_as_bytes(found, size)


def tokens_as_bytes(tokenizer: Any, size: int) -> Words:
    """The same from a tokenizer: byte-level, with spaces marked by an underline (sentencepiece), or of plain text.

    Special tokens add nothing; the first word after a prompt has its space, as in the middle of a text.

    Raises:
        UsageError: a tokenizer without a description by `tokenizers`, or of another kind (word pieces).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} does not say how its tokens become text: give a fast tokenizer")
    kinds = _kinds(json.loads(backend.to_str()).get("decoder"))
    if kinds & {"WordPiece", "BPEDecoder", "CTC"}:
        raise UsageError(f"{type(tokenizer).__name__} has {', '.join(kinds)} tokens, whose bytes depend on others")
    letters = {letter: byte for byte, letter in enumerate(_letters())}
    words: Words = [None] * size
    added = tokenizer.added_tokens_decoder
    for text, token in tokenizer.get_vocab().items():
        if token >= size or (token in added and added[token].special):
            continue
        if token in added:
            word = text.encode()
        elif "ByteLevel" in kinds:
            word = bytes(letters[letter] for letter in text) if set(text) <= set(letters) else text.encode()
        elif "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x"):
            word = bytes([int(text[3:5], 16)])
        else:
            word = text.replace("\u2581", " ").encode() if kinds & {"Metaspace", "Replace"} else text.encode()
        words[token] = word or None
    return words


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder's parts."""
    if isinstance(decoder, list):
        return set().union(*(_kinds(one) for one in decoder))
    return {decoder["type"]} | _kinds(decoder.get("decoders", [])) if decoder else set()


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's): its own where it can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + unseen.index(byte)) for byte in range(256)]
