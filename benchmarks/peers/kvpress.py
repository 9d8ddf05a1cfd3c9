"""kvpress 0.5.5 in its own interpreter, run by `bench.peers.PeerWorker`: its presses on a model from a folder."""

import contextlib

import torch
from kvpress import AdaKVPress, PyramidKVPress, SnapKVPress
from transformers import DynamicCache, LlamaForCausalLM

KINDS = ("snapkv", "adakv", "pyramidkv")
state = {}


def load(path, threads):
    torch.set_num_threads(threads)
    state["model"] = LlamaForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    import kvpress
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__, "presses": len(kvpress.__all__)}


def press(kind, keep, window):
    """A press that keeps this share of the prompt's tokens; no press for `full`."""
    if kind == "full":
        return None
    inner = (PyramidKVPress if kind == "pyramidkv" else SnapKVPress)(compression_ratio=1 - keep, window_size=window)
    return AdaKVPress(inner) if kind == "adakv" else inner


def prefill(prompt, kind, keep, window):
    """The cache after the prompt, and the logits [vocabulary] that follow it."""
    cache, chosen = DynamicCache(), press(kind, keep, window)
    with contextlib.nullcontext() if chosen is None else chosen(state["model"]):
        rows = torch.tensor(prompt)[None]
        out = state["model"](input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[0, -1]


def step(token, place, cache):
    """One more token at its place in the text, which is not its place in the cache."""
    out = state["model"](
        input_ids=torch.tensor([[token]]),
        past_key_values=cache,
        use_cache=True,
        position_ids=torch.tensor([[place]]),
    )
    return out.logits[0, -1]


@torch.inference_mode()
def score(prompts, questions, answers, kind, keep, window):
    """Log-probability of every token of each answer; the question follows the prompt's compression."""
    found = []
    for prompt, question, answer in zip(prompts, questions, answers, strict=True):
        cache, logits = prefill(prompt, kind, keep, window)
        place, row = len(prompt), []
        for token in question:
            logits, place = step(token, place, cache), place + 1
        for token in answer:
            row.append(logits.float().log_softmax(-1)[token].item())
            logits, place = step(token, place, cache), place + 1
        found.append(row)
    return found


@torch.inference_mode()
def decode(prompt, new, kind, keep, window):
    """Prefill and greedy decoding, all of it timed by the caller."""
    cache, logits = prefill(prompt, kind, keep, window)
    out = [int(logits.argmax())]
    for place in range(len(prompt), len(prompt) + new - 1):
        out.append(int(step(out[-1], place, cache).argmax()))
    return out


@torch.inference_mode()
def held(prompt, kind, keep, window):
    """Bytes of the storages behind keys and values after the prompt."""
    cache, _ = prefill(prompt, kind, keep, window)
    parts = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in parts}.values())
