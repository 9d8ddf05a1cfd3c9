"""A target and a draft with real tokens: the published 260K-weight story model as draft, and a larger one trained here.

    HASTEN_DATA=folder python examples/stories_pair.py stories            # about 15 minutes on two cores
    hasten compare "speed-bench(model=stories/target, draft_model=stories/draft, prompts=stories/prompts.jsonl)" \
        decode/speculative decode/prompt_lookup

`HASTEN_DATA` names a folder with lm_stories260K/ (llama2.c's stories260K.bin and tok512.bin) and tinystories_sample/.
Both become ordinary transformers folders: a `LlamaForCausalLM` and a tokenizer. The prompts are the first sentences of
held-out stories.
"""

import argparse
import gzip
import json
import os
import pathlib
import struct
import sys
from typing import Any

import numpy as np
import torch

import hasten

SPECIAL = ("<unk>", "<s>", "</s>")


def pieces(file: pathlib.Path) -> list[tuple[str, float]]:
    """The tokens of a llama2.c tokenizer in order of their ids, with their scores."""
    raw, at, found = file.read_bytes(), 4, []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        found.append((raw[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return found


def tokenizer(file: pathlib.Path) -> Any:
    """The same tokens as a fast tokenizer: byte pairs by rank, bytes where a character has no token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [piece.replace(" ", "\u2581") for piece, _ in pieces(file)]
    words[:3] = SPECIAL
    vocabulary = {word: place for place, word in enumerate(words)}
    rank = {word: score for word, (_, score) in zip(words, pieces(file), strict=True)}
    merges = [
        (-rank[word], vocabulary[word], (word[:cut], word[cut:]))
        for word in words[259:]
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    model = tokenizers.models.BPE(
        vocabulary, [pair for *_, pair in sorted(merges)], unk_token=SPECIAL[0], byte_fallback=True
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


def published(file: pathlib.Path) -> torch.nn.Module:
    """A llama2.c checkpoint (version 0, tied output) as a `LlamaForCausalLM`.

    Its rotary positions turn neighbouring entries of a head, transformers' the two halves: rows of the query and key
    projections are put in that order.
    """
    raw = file.read_bytes()
    width, hidden, layers, heads, kv_heads, words, context = struct.unpack("<7i", raw[:28])
    numbers, at = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return numbers[at - size : at].view(*shape)

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        size = weight.shape[1] // count
        return weight.view(layers, count, size // 2, 2, width).transpose(2, 3).reshape(weight.shape)

    one = width // heads
    embedding, norm1 = take(words, width), take(layers, width)
    query, key = halves(take(layers, width, width), heads), halves(take(layers, kv_heads * one, width), kv_heads)
    value, out, norm2 = take(layers, kv_heads * one, width), take(layers, width, width), take(layers, width)
    gate, down, up = take(layers, hidden, width), take(layers, width, hidden), take(layers, hidden, width)
    last = take(width)
    model = llama(width, hidden, layers, heads, kv_heads, words, context)
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": last}
    parts = {
        "input_layernorm": norm1, "self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": value,
        "self_attn.o_proj": out, "post_attention_layernorm": norm2, "mlp.gate_proj": gate, "mlp.down_proj": down,
        "mlp.up_proj": up,
    }  # fmt: skip
    for name, stacked in parts.items():
        state |= {f"model.layers.{i}.{name}.weight": stacked[i] for i in range(layers)}
    model.load_state_dict(state)
    return model.eval()


def llama(width: int, hidden: int, layers: int, heads: int, kv: int, words: int, context: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=words, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(ids: torch.Tensor, words: int, steps: int, seed: int) -> torch.nn.Module:
    """A model of 2.2M weights (8 layers of width 160), AdamW with a cosine, rows of 256 tokens."""
    torch.manual_seed(seed)
    model = llama(160, 432, 8, 8, 4, words, 512).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    begins = beginnings(ids)
    for step in range(steps):
        chosen = begins[torch.randint(0, len(begins), (16,), generator=draw)]
        rows = torch.stack([ids[start : start + 256] for start in chosen.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats per token", flush=True)
    return model.eval()


def beginnings(ids: torch.Tensor) -> torch.Tensor:
    """Where a story begins that 256 tokens can be read from."""
    return (ids[:-256] == 1).nonzero()[:, 0]


@torch.no_grad()
def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> float:
    rows = torch.stack([ids[start : start + 256] for start in beginnings(ids)[:64].tolist()])
    return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    home = pathlib.Path(os.environ.get("HASTEN_DATA", ""))
    weights, sample = home / "lm_stories260K", home / "tinystories_sample/tinystories_sample.txt.gz"
    if not sample.is_file() or not (weights / "stories260K.bin").is_file():
        raise hasten.UsageError("set HASTEN_DATA to the folder that holds lm_stories260K/ and tinystories_sample/")
    stories = [one.strip() for one in gzip.decompress(sample.read_bytes()).decode().split("<|endoftext|>")]
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = len(stories) * 9 // 10
    with (args.out / "prompts.jsonl").open("w") as file:
        for story in stories[held_out:]:
            prompt = ".".join(story.split(".")[:3]) + "."
            file.write(json.dumps({"category": "stories", "turns": [prompt]}) + "\n")
    words = tokenizer(weights / "tok512.bin")
    tokens = words(stories)["input_ids"]
    ids = torch.tensor([token for story in tokens for token in story])
    cut = sum(map(len, tokens[:held_out]))
    draft = published(weights / "stories260K.bin")
    print(f"draft: {loss_of(draft, ids[cut:]):.3f} nats per token on the held-out tenth", flush=True)
    target = train(ids[:cut], len(words), args.steps, args.seed)
    print(f"target: {loss_of(target, ids[cut:]):.3f} nats per token on the held-out tenth", flush=True)
    for name, model in (("draft", draft), ("target", target)):
        model.save_pretrained(args.out / name)
        words.save_pretrained(args.out / name)


if __name__ == "__main__":
    try:
        main()
    except hasten.UsageError as problem:
        sys.exit(str(problem))
