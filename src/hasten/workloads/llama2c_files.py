"""Files of llama2.c: checkpoints of version 0 (fp32) and version 2 (Q8_0), tokenizers.

Layouts as in llama2.c's export.py and run.c. All numbers are little-endian; every matrix is (out, in). Rotary positions
turn neighbouring entries of a head there and the two halves in transformers, so the rows of the query and key
projections are put in that order here.
"""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hasten.core.errors import UsageError

MAGIC = 0x616B3432  # of versions 1 and 2; version 0 has none
HEADER0, HEADER2 = 28, 256
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = 256

Piece = tuple[str, float]
"""The text of a token and its score: of two pairs that could be merged, the one with the higher score is."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a checkpoint's header says.

    Attributes:
        words: size of the vocabulary. context: positions. tied: whether the output matrix is the embedding.
        group: weights that share a scale (version 2), 0 for fp32 (version 0).
    """

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    context: int
    tied: bool
    group: int

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names as in a `LlamaForCausalLM`, `{i}` for the layer, and shapes of what each layer has, in the order of
        version 0; matrices have two sizes."""
        width, hidden = self.width, self.hidden
        return [
            ("input_layernorm", (width,)),
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (self.kv_width, width)),
            ("self_attn.v_proj", (self.kv_width, width)),
            ("self_attn.o_proj", (width, width)),
            ("post_attention_layernorm", (width,)),
            ("mlp.gate_proj", (hidden, width)),
            ("mlp.down_proj", (width, hidden)),
            ("mlp.up_proj", (hidden, width)),
        ]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor in the file's order; `cos` and `sin` are version 0's rotary tables."""
        ends = [("model.embed_tokens", (self.words, self.width)), ("model.norm", (self.width,))]
        layers = [[(f"model.layers.{i}.{name}", shape) for i in range(self.layers)] for name, shape in self.parts()]
        if self.group:
            yield from (one for stacked in layers if len(stacked[0][1]) == 1 for one in stacked)
            yield ends[1]
            yield ends[0]
            yield from (one for stacked in layers if len(stacked[0][1]) == 2 for one in stacked)
        else:
            yield ends[0]
            yield from (one for stacked in layers for one in stacked)
            yield ends[1]
            half = self.width // self.heads // 2
            yield from (("cos", (self.context, half)), ("sin", (self.context, half)))
        if not self.tied:
            yield "lm_head", (self.words, self.width)

    def size(self) -> int:
        """Bytes of the file."""
        if not self.group:
            return HEADER0 + sum(4 * math.prod(shape) for _, shape in self.tensors())
        counts = [(math.prod(shape), len(shape)) for _, shape in self.tensors()]
        return HEADER2 + sum(count + 4 * (count // self.group) if sizes == 2 else 4 * count for count, sizes in counts)


def read_shape(file: pathlib.Path) -> Shape:
    """The header of a checkpoint, checked against the file's size.

    Raises:
        UsageError: it is no llama2.c checkpoint of version 0 or 2, or it is cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(HEADER2)
    if size < HEADER0:
        raise UsageError(f"{file} has {size} bytes and no header: it is no llama2.c checkpoint, or it is cut off")
    group, tied, at = 0, True, 0
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 2 or len(head) < HEADER2:
            what = f"of version {version}" if version != 2 else "cut off"
            raise UsageError(f"{file} is {what}: export it with llama2.c's export.py --version 0 or --version 2")
        at, tied, group = 8, bool(head[36]), struct.unpack_from("<i", head, 37)[0]
    width, hidden, layers, heads, kv_heads, words, context = struct.unpack_from("<7i", head, at)
    if not at:
        tied, words = words > 0, abs(words)
    sound = min(width, hidden, layers, heads, kv_heads, words, context) > 0 and (group > 0 or not at)
    if not sound or width % (2 * heads) or heads % kv_heads or (group and (width % group or hidden % group)):
        raise UsageError(
            f"{file} is no llama2.c checkpoint: its header says width {width}, {layers} layers, {heads} heads, "
            f"{kv_heads} of keys, {words} tokens, {context} positions" + (f", groups of {group}" if at else "")
        )
    shape = Shape(width, hidden, layers, heads, kv_heads, words, context, tied, group)
    if size != shape.size():
        raise UsageError(
            f"{file} has {size} bytes, and its header stands for {shape.size()}: it is cut off or in another format"
        )
    return shape


def read_weights(file: pathlib.Path) -> tuple[Shape, dict[str, torch.Tensor]]:
    """The header and the state dict of a `LlamaForCausalLM`, fp32; 8-bit weights times their scales.

    Raises:
        UsageError: as `read_shape`.
    """
    shape = read_shape(file)
    raw = file.read_bytes()
    at, state = HEADER2 if shape.group else HEADER0, {}
    for name, sizes in shape.tensors():
        count = math.prod(sizes)
        if shape.group and len(sizes) == 2:
            codes = np.frombuffer(raw, np.int8, count, at).reshape(-1, shape.group)
            scales = np.frombuffer(raw, "<f4", len(codes), at + count)
            values, at = codes * scales[:, None], at + count + 4 * len(codes)
        else:
            values, at = np.frombuffer(raw, "<f4", count, at), at + 4 * count
        tensor = torch.from_numpy(values.astype(np.float32)).view(sizes)
        for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            if name.endswith(part):
                tensor = halves(tensor, heads)
        if name not in ("cos", "sin"):
            state[f"{name}.weight"] = tensor
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return shape, state


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection [heads * size, in] whose pairs (2i, 2i+1) become (i, i + size/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def llama(shape: Shape) -> torch.nn.Module:
    """A `LlamaForCausalLM` of this shape, randomly initialised."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config(shape))


def config(shape: Shape) -> Any:
    """Its `LlamaConfig`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.words,
        max_position_embeddings=shape.context, rms_norm_eps=1e-5, tie_word_embeddings=shape.tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def read_pieces(file: pathlib.Path) -> list[Piece]:
    """The tokens of a llama2.c tokenizer (.bin) in order of their ids.

    Raises:
        UsageError: it is no such file, or it is cut off.
    """
    raw, at, found = file.read_bytes(), 4, []
    try:
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            if length < 0 or at + 8 + length > len(raw):
                raise ValueError
            found.append((raw[at + 8 : at + 8 + length].decode(), score))
            at += 8 + length
    except (struct.error, ValueError):
        raise UsageError(f"{file} is no llama2.c tokenizer, or it is cut off (at byte {at} of {len(raw)})") from None
    if len(found) < len(SPECIAL):
        raise UsageError(f"{file} is no llama2.c tokenizer: it holds {len(found)} tokens")
    return [(word, 0.0) for word in SPECIAL] + found[3:]


def read_characters(file: pathlib.Path, with_bytes: bool) -> list[Piece]:
    """The tokens of a sentencepiece list of characters (.vocab: piece, tab, score).

    Args:
        with_bytes: put the 256 tokens of bytes after the three special ones, as where characters that have no token
            become bytes.

    Raises:
        UsageError: a line is no piece and score.
    """
    pieces = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        word, tab, score = line.partition("\t")
        try:
            pieces.append((word.replace("\u2581", " "), float(score)))
        except ValueError:
            raise UsageError(f"line {number} of {file} is no piece with a score after a tab") from None
    if tuple(word for word, _ in pieces[:3]) != SPECIAL:
        raise UsageError(f"{file} does not begin with the pieces {', '.join(SPECIAL)}")
    extra = [(f"<0x{byte:02X}>", 0.0) for byte in range(BYTES)] if with_bytes else []
    return pieces[:3] + extra + pieces[3:]


def tokenizer(pieces: list[Piece]) -> Any:
    """The same tokens as a transformers fast tokenizer: pairs merged by score; bytes, or <unk>, where a character has
    no token. A text begins with <s> and a space."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [word.replace(" ", "\u2581") for word, _ in pieces]
    vocabulary = {word: place for place, word in enumerate(words)}
    score = {word: one for word, (_, one) in zip(words, pieces, strict=True)}
    merges = [
        (-score[word], vocabulary[word], (word[:cut], word[cut:]))
        for word in words[3:]
        if not (word.startswith("<0x") and len(word) == 6)
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    model = tokenizers.models.BPE(
        vocabulary, [pair for *_, pair in sorted(merges)], unk_token=SPECIAL[0], byte_fallback="<0x00>" in vocabulary
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(content=" ", left=1),
        ]
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
