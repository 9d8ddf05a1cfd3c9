"""Trains the model of sums-lm and writes it to src/hasten/workloads/weights.

    python scripts/make_reasoning_weights.py --steps 3000

A quarter of the thoughts are in the concise style, the rest in the wordy one; the loss is on what follows the prompt.
Rows of similar lengths share a batch. Writes reasoning.safetensors (8-bit rows with a scale each) and reasoning.json,
which records this command.
"""

import argparse
import json
import pathlib
import platform
import time

import numpy as np
import torch

import hasten
from hasten.workloads import reasoning, weights
from hasten.workloads.base import warm_cosine

CONCISE = 0.25
TOKENS = 128
POOL = 8  # batches whose rows are sorted by length together


def pool(stream, rows: int, rng: np.random.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`POOL` batches: right-padded token ids [rows, length], and which of them are learnt."""
    made = []
    for _ in range(POOL * rows):
        problem = next(stream)
        thought = reasoning.think(problem, rng, wordy=rng.random() > CONCISE)
        made.append((reasoning.prompt(problem), reasoning.solution(problem, thought)))
    made.sort(key=lambda one: len(one[0]) + len(one[1]))
    batches = []
    for at in rng.permutation(POOL) * rows:
        some = made[at : at + rows]
        batch = reasoning.padded([start + rest for start, rest in some], left=False)
        learnt = batch["attention_mask"].bool()
        for row, (start, _) in enumerate(some):
            learnt[row, : len(start)] = False
        batches.append((batch["input_ids"], learnt))
    return batches


def judge(model: torch.nn.Module, examples: int) -> dict[str, float]:
    """Accuracy on held-out problems, and the mean number of tokens that a solution takes."""
    workload = hasten.workload("sums-lm", examples=examples)
    handle = hasten.apply(model.eval(), "")
    accuracy = workload.quality(handle).mean().item()
    outs = [workload.serve(handle, request) for request in workload.requests(0)]
    model.train()
    return {
        "accuracy": round(accuracy, 4),
        "tokens": float(np.mean([(out != reasoning.PAD).sum(1).float().mean().item() for out in outs])),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=weights.HOME)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    stream = reasoning.problems(rng, held_out=False)
    model = reasoning.sums_llama(seed=args.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    args.out.mkdir(parents=True, exist_ok=True)
    started, batches = time.perf_counter(), []
    for step in range(args.steps):
        if not batches:
            batches = pool(stream, args.rows, rng)
        ids, learnt = batches.pop()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_cosine(step, args.steps, 0.05, floor=0.01)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        wanted = ids[:, 1:].masked_fill(~learnt[:, 1:], -100)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        loss = losses / (args.rows * TOKENS)  # a mean over the batch would weigh the tokens of short rows more
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            found = judge(model, 32) if (step + 1) % 500 == 0 else ""
            seconds, nats = time.perf_counter() - started, losses.item() / learnt.sum().item()
            torch.save(model.state_dict(), args.out / "reasoning.tmp")
            print(f"{step + 1} {seconds:.0f} s  {nats:.4f} {found}", flush=True)
    (args.out / "reasoning.tmp").unlink(missing_ok=True)
    weights.save_rows(model, args.out / "reasoning.safetensors")
    given = f"--steps {args.steps} --rows {args.rows} --lr {args.lr} --seed {args.seed}"
    record = {
        "command": f"python scripts/make_reasoning_weights.py {given}",
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **judge(model, 384),
    }
    (args.out / "reasoning.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
