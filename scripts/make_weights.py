"""Trains the small models that the demo, the tests and the inference evidence read from src/hasten/workloads/weights.

    python scripts/make_weights.py target      # the 4.9M-weight byte-level Llama of stdlib-lm
    python scripts/make_weights.py draft       # its 0.4M-weight draft
    python scripts/make_weights.py digits_vit  # the ViT of digits-vit: 16x16 pixels first, then 32x32

Each writes NAME.safetensors (bfloat16; the draft in 8 bits a row) and NAME.json, which records this command, the seed,
the versions and the quality.
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

from hasten.workloads import digits_vit, models, text
from hasten.workloads.digits import digits
from hasten.workloads.weights import save_rows

HOME = pathlib.Path(__file__).resolve().parents[1] / "src/hasten/workloads/weights"


def batch(data: np.ndarray, size: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    starts = generator.integers(0, len(data) - length, size)
    return torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))


def bits_per_byte(model: torch.nn.Module, length: int = 512, count: int = 64) -> float:
    rows = batch(text.stream(True), count, length, np.random.default_rng(1))
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(8)]
    model.train()
    return float(np.mean(losses)) / math.log(2)


def language_model(name: str, args: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)
    model = models.stdlib_llama(name, seed=args.seed)
    model.train()
    data = text.stream(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    started, seen = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / args.seconds if args.seconds else seen / args.tokens) < 1:
        length, rows = (512, 16) if done < 0.85 else (2048, 4)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, seen / 400_000, (1 - done) / 0.4 + 0.01)
        rows = batch(data, rows, length, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += rows.numel()
        if (seen // 8192) % 50 == 0:
            rate = seen / (time.perf_counter() - started)
            print(f"{name} {seen:>9} bytes  loss {loss.item() / math.log(2):.3f} bit  {rate:.0f} bytes/s", flush=True)
    model.bfloat16().float()
    return model, {"bytes_seen": seen, "bits_per_byte": bits_per_byte(model)}


def image_model(args: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """Trains on small images first and fine-tunes at full size with resampled position embeddings."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model, quality = None, {}
    for side, steps in ((digits_vit.TRAIN_SIDE, 1500), (digits_vit.SERVE_SIDE, 120)):
        larger = digits_vit.digits_vit(side, seed=args.seed)
        if model is not None:
            state, name = model.state_dict(), "vit.embeddings.position_embeddings"
            old, new = state[name], larger.state_dict()[name]
            grid = old[:, 1:].reshape(1, math.isqrt(old.shape[1] - 1), -1, old.shape[2]).permute(0, 3, 1, 2)
            to = math.isqrt(new.shape[1] - 1)
            grid = torch.nn.functional.interpolate(grid, size=(to, to), mode="bicubic").flatten(2).transpose(1, 2)
            larger.load_state_dict({**state, name: torch.cat([old[:, :1], grid], 1)})
        model = larger
        images, labels = digits(False, side)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr / 2, betas=(0.9, 0.95), weight_decay=0.05)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = args.lr / 2 * min(1.0, (step + 1) / 40, 1.02 - step / steps)
            rows = torch.randint(len(images), (64,), generator=generator)
            shift = torch.randint(-side // 8, side // 8 + 1, (2,), generator=generator).tolist()
            pixels = torch.roll(images[rows], shift, (2, 3))
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 19:
                print(f"digits_vit {side}x{side} step {step + 1}  loss {loss.item():.4f}", flush=True)
        model.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
        model.eval()
        images, labels = digits(True, side)
        with torch.no_grad():
            right = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in images.split(64)]) == labels
        quality[f"accuracy_{side}"] = right.float().mean().item()
        model.train()
    return model, quality


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["target", "draft", "digits_vit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop by time instead of by bytes seen")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, quality = image_model(args) if args.name == "digits_vit" else language_model(args.name, args)
    HOME.mkdir(parents=True, exist_ok=True)
    if args.name == "draft":
        save_rows(model, HOME / "draft.safetensors")
        quality["bits_per_byte"] = bits_per_byte(model)
    else:
        state = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, HOME / f"{args.name}.safetensors")
    record = {
        "command": f"python scripts/make_weights.py {args.name} --seed {args.seed} --lr {args.lr}"
        + (f" --tokens {quality['bytes_seen']}" if "bytes_seen" in quality else "")
        + (" --bf16" if args.bf16 else ""),
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **quality,
    }
    (HOME / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


if __name__ == "__main__":
    main()
