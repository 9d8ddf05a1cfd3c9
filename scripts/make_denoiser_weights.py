"""Trains the masked-diffusion language model of stdlib-denoiser.

    python scripts/make_denoiser_weights.py --steps 6000

Half of the steps are masked diffusion (arXiv 2502.09992): bytes are hidden, all over a window or in one span of it, and
predicted with attention in both directions. The other half are block diffusion (arXiv 2503.09573): a hidden copy of the
window stands beside a clean one; a hidden block sees itself and the clean blocks before it, a clean block itself and
those before it. Blocks have 1 (autoregressive), 4, 8, 16 or 32 bytes.

Writes denoiser.safetensors (8-bit rows with a scale each) and denoiser.json, which records this command.
"""

import argparse
import json
import math
import pathlib
import platform
import time

import numpy as np
import torch

from hasten.workloads import text
from hasten.workloads.stdlib_denoiser import MASK, stdlib_denoiser

HOME = pathlib.Path(__file__).resolve().parents[1] / "src/hasten/workloads/weights"
BLOCKS = (1, 1, 4, 8, 16, 16, 32)


def windows(data: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    starts = rng.integers(0, len(data) - length, rows)
    return torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))


def hide_anywhere(ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each row hides a share of its bytes, stratified over rows."""
    rows, length = ids.shape
    share = (np.arange(rows) + rng.random(rows)) / rows
    return torch.from_numpy(rng.random((rows, length)) < np.maximum(share, 1 / length)[:, None])


def hide_span(ids: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each row hides a share of one span of 16 to 96 bytes; in half of the batches the span ends the row."""
    rows, length = ids.shape
    hidden = np.zeros((rows, length), bool)
    size = int(rng.integers(16, 97))
    at_end = rng.random() < 0.5
    for row in range(rows):
        start = length - size if at_end else int(rng.integers(0, length - size + 1))
        hidden[row, start : start + size] = rng.random(size) < max(1 / size, (row + rng.random()) / rows)
    return torch.from_numpy(hidden)


def loss_of(model: torch.nn.Module, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Masked diffusion: cross-entropy of the hidden bytes, attention in both directions."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    logits = model(input_ids=ids.masked_fill(hidden, MASK), attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[hidden][:, :MASK], ids[hidden])


def block_loss(model: torch.nn.Module, ids: torch.Tensor, block: int, rng: np.random.Generator) -> torch.Tensor:
    """Block diffusion over all blocks at once."""
    rows, length = ids.shape
    share = np.repeat(rng.random((rows, length // block)), block, 1)
    hidden = torch.from_numpy(rng.random((rows, length)) < share) if block > 1 else torch.ones_like(ids).bool()
    place = torch.arange(length) // block
    own, before = place[:, None] == place[None], place[None] < place[:, None]
    none = torch.zeros_like(own)
    mask = torch.cat([torch.cat([own, before], 1), torch.cat([none, own | before], 1)])[None, None]
    both = torch.cat([ids.masked_fill(hidden, MASK), ids], 1)
    positions = torch.arange(length).repeat(2)[None]
    out = model.model(input_ids=both, attention_mask=mask, position_ids=positions, use_cache=False)
    logits = model.lm_head(out.last_hidden_state[:, :length][hidden])[:, :MASK]
    return torch.nn.functional.cross_entropy(logits, ids[hidden])


@torch.no_grad()
def quality(model: torch.nn.Module) -> dict[str, float]:
    rng = np.random.default_rng(1)
    model.eval()
    ids = windows(text.stream(True), 64, 256, rng)
    found = {"masked": loss_of(model, ids, hide_anywhere(ids, rng)).item()}
    found["span"] = loss_of(model, ids, hide_span(ids, rng)).item()
    for block in (1, 8, 16):
        found[f"block {block}"] = block_loss(model, ids[:, :192], block, rng).item()
    model.train()
    return {name: round(value / math.log(2), 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="go on from OUT/denoiser.tmp, which so many steps made")
    parser.add_argument("--out", default=str(HOME))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, args.first])
    model, data = stdlib_denoiser(seed=args.seed).train(), text.stream(False)
    if args.first:
        model.load_state_dict(torch.load(pathlib.Path(args.out) / "denoiser.tmp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    started = time.perf_counter()
    for step in range(args.first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step - args.first + 1) / 300, (1 - step / args.steps) / 0.5 + 0.005)
        with torch.autocast("cpu", torch.bfloat16):
            if step % 2:
                ids = windows(data, args.rows, 192, rng)
                loss = block_loss(model, ids, int(rng.choice(BLOCKS)), rng)
            else:
                ids = windows(data, args.rows, 256, rng)
                loss = loss_of(model, ids, (hide_anywhere if rng.random() < 0.5 else hide_span)(ids, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == args.steps - 1:
            print(f"{step} {time.perf_counter() - started:.0f} s {quality(model)}", flush=True)
            torch.save(model.state_dict(), pathlib.Path(args.out) / "denoiser.tmp")
    from hasten.workloads.weights import save_rows

    save_rows(model, pathlib.Path(args.out) / "denoiser.safetensors")
    given = f"--steps {args.steps} --first {args.first} --rows {args.rows} --lr {args.lr} --seed {args.seed}"
    record = {
        "command": f"python scripts/make_denoiser_weights.py {given}",
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bits_per_byte": quality(model),
    }
    (pathlib.Path(args.out) / "denoiser.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
