"""Trains `long`, the model of stdlib-lm(model=long), and writes it to src/hasten/workloads/weights.

    python scripts/make_long_weights.py

Two copies of the trained `draft` on top of each other (G_stack, arXiv:2405.15319), trained on the standard library with
pairs of needle lines in it, at growing lengths (`STAGES`). A model of this size learns no retrieval from such text
(3.3 bits a digit after 1,000 steps); rows of needle lines and nothing else teach it to copy from a fixed distance; rows
whose lines stand at uneven distances teach it to read the key, which then carries over to text. `--seconds` gives
each stage its share of the time instead of its bytes. Checkpoints under `--work` are taken up again with `--resume`.
The bundled weights were made that way, in four sittings of one thread (an hour and a quarter): the bytes of each stage
are theirs, the rate falls a little differently.
"""

import argparse
import json
import math
import pathlib
import platform
import time

import numpy as np
import torch
from safetensors.torch import save_file

from hasten.workloads import models, needle, text, weights

# Bytes of a row; rows of a batch; how many are drill, and the bytes between their lines; pairs of needles in the other
# rows; share of the time.
STAGES = ((512, 16, 0, 0, 4, 0.09), (256, 32, 20, 0, 3, 0.18), (512, 16, 3, 0, 4, 0.09), (256, 32, 22, 24, 3, 0.15),
          (512, 16, 4, 60, 5, 0.07), (2048, 4, 0, 0, 14, 0.13), (8704, 1, 0, 0, 40, 0.29))  # fmt: skip
DRILL_KEYS = 6
BYTES = [7_880_704, 6_037_504, 2_523_136, 3_162_112, 1_122_304, 1_310_720, 905_216]
ANSWERS = 4.0  # weight of a repeated code's digits in the loss


def stacked(seed: int) -> torch.nn.Module:
    """The `long` model with the draft's layers twice, the residual stream as deep in training as it is."""
    model = models.stdlib_llama("long", seed=seed)
    state = weights.load_weights(models.stdlib_llama("draft"), "draft").state_dict()
    for name in list(state):
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            state[f"model.layers.{int(index) + 2}.{rest}"] = state[name]
    model.load_state_dict(state)
    return model


def loss_of(
    model: torch.nn.Module, rows: torch.Tensor, answers: torch.Tensor, drills: int
) -> tuple[torch.Tensor, list[float]]:
    """The weighted loss, and the mean in bits of the plain bytes, of the answers' digits in text, and in drill rows."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    found = answers[:, 1:].flatten()
    scale = torch.where(found, ANSWERS, 1.0)
    with torch.no_grad():
        table, asked = losses.view(len(rows), -1), answers[:, 1:]
        texts = len(rows) - drills
        means = losses[~found].mean(), table[:texts][asked[:texts]].mean(), table[texts:][asked[texts:]].mean()
    return (losses * scale).sum() / scale.sum(), [mean.item() / math.log(2) for mean in means]


@torch.inference_mode()
def judge(model: torch.nn.Module, lengths: tuple[int, ...], rows: int, bytes_each: int = 32768) -> dict:
    """Bits per byte on held-out text by length, and the right share of digits by distance, as the model says them."""
    model.eval()
    stream, found = text.stream(True), {"bits_per_byte": {}, "needle": {}}
    rng = np.random.default_rng(1)
    for length in lengths:
        starts = rng.integers(0, len(stream) - length, max(2, bytes_each // length))
        losses = [
            model(input_ids=part, labels=part, use_cache=False).loss.item()
            for part in torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64)).split(4)
        ]
        found["bits_per_byte"][length] = float(np.mean(losses)) / math.log(2)
        depths = [0.02, 0.25, 0.5, 0.75, 0.95]
        right = np.zeros((len(depths), 2))
        for _ in range(rows):
            hay, needles = needle.haystack(stream, length, depths, rng)
            for place, one in enumerate(needles):
                row = torch.from_numpy(np.concatenate([hay, np.frombuffer(one.line, np.uint8)]).astype(np.int64))[None]
                logits = model(input_ids=row, use_cache=False, logits_to_keep=needle.DIGITS + 2).logits[0, :-2]
                digits = logits.argmax(-1) == row[0, -needle.DIGITS - 1 : -1]
                right[place] += digits.float().mean().item(), digits.all().item()
        for depth, (digits, whole) in zip(depths, right / rows, strict=True):
            found["needle"][f"{length}@{depth}"] = [round(digits, 3), round(whole, 3)]
    model.train()
    return found


def train(args: argparse.Namespace) -> tuple[torch.nn.Module, list[int]]:
    torch.manual_seed(args.seed)
    model, stream = stacked(args.seed).train(), text.stream(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seen, spent, step = [0] * len(STAGES), 0.0, 0
    file = args.work / "long.pt"
    if args.resume and file.exists():
        kept = torch.load(file)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        seen, spent, step = kept["seen"], kept["spent"], kept["step"]
    started, saved = time.monotonic() - spent, time.monotonic()
    budget, marks = sum(args.bytes), np.cumsum([0, *(stage[-1] for stage in STAGES)])
    while True:
        spent = time.monotonic() - started
        if args.seconds:
            done = spent / args.seconds
            phase = int(np.searchsorted(marks, done, "right")) - 1
        else:
            phase = next((at for at, limit in enumerate(args.bytes) if seen[at] < limit), len(STAGES))
            done = sum(seen) / budget if phase < len(STAGES) else 1.0
        if done >= 1:
            break
        length, count, drills, gap, pairs, _ = STAGES[phase]
        rng = np.random.default_rng([args.seed, step])
        made = [needle.training_row(stream, length, pairs, rng) for _ in range(count - drills)]
        made += [needle.drill_row(stream, length, DRILL_KEYS, gap, rng) for _ in range(drills)]
        rows, answers = zip(*made, strict=True)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50, (1 - done) / 0.5 + 0.01)
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss, bits = loss_of(model, batch, torch.from_numpy(np.stack(answers)), drills)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen[phase] += batch.numel()
        step += 1
        if step % 25 == 0:
            means = "  ".join(f"{one:.3f}" for one in bits)
            print(f"{spent:6.0f} s  step {step}  stage {phase}, {length} bytes  {means} bit", flush=True)
        if time.monotonic() - saved > 300:
            args.work.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "seen": seen, "spent": spent, "step": step}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
            before = time.monotonic()
            print(
                f"{spent:6.0f} s  step {step}  seen {seen}  {json.dumps(judge(model, (512, min(length, 8192)), 3))}",
                flush=True,
            )
            saved = time.monotonic()
            started += saved - before  # judging is not training
    return model, seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bytes", type=int, nargs=len(STAGES), default=BYTES, help="of each stage")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/long"))
    parser.add_argument("--out", type=pathlib.Path, default=weights.HOME)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, seen = train(args)
    state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / "long.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    found = judge(model, (512, 2048, 8192), 6, 131072)
    sizes = " ".join(map(str, seen))
    record = {
        "command": f"python scripts/make_long_weights.py --seed {args.seed} --lr {args.lr} --bytes {sizes}",
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bytes_seen": sum(seen),
        **found,
    }
    (args.out / "long.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
