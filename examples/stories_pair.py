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
import pathlib
import sys

import torch

import hasten
from hasten.workloads import llama2c_files
from hasten.workloads.data_folder import data_file
from hasten.workloads.llama2c import SEPARATOR, TEXT


def train(ids: torch.Tensor, words: int, steps: int, seed: int) -> torch.nn.Module:
    """A model of 2.2M weights (8 layers of width 160), AdamW with a cosine, rows of 256 tokens."""
    torch.manual_seed(seed)
    shape = llama2c_files.Shape(160, 432, 8, 8, 4, words, 512, tied=True, group=0)
    model = llama2c_files.llama(shape).train()
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
    workload = hasten.workload("llama2c(model=stories260k)")
    draft, words = workload.trained().cpu(), workload.tokenizer()
    text = gzip.decompress(data_file(TEXT).read_bytes()).decode()
    stories = [one.strip() for one in text.split(SEPARATOR)]
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = len(stories) * 9 // 10
    with (args.out / "prompts.jsonl").open("w") as file:
        for story in stories[held_out:]:
            prompt = ".".join(story.split(".")[:3]) + "."
            file.write(json.dumps({"category": "stories", "turns": [prompt]}) + "\n")
    tokens = words(stories)["input_ids"]
    ids = torch.tensor([token for story in tokens for token in story])
    cut = sum(map(len, tokens[:held_out]))
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
