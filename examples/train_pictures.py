"""A vision transformer for MNIST and its pictures, as files that the workload hf: reads; trained here in minutes.

    HASTEN_DATA=folder python examples/train_pictures.py pictures --minutes 4
    hasten compare "hf:pictures/vit(data=pictures/mnist.npz)" "quant/gptq(bits=4)" "tokens/mctf"

`HASTEN_DATA` names a folder with mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz. It writes pictures/vit, a
`ViTForImageClassification` (6 blocks of width 128, patches of 7x7 pixels), and pictures/mnist.npz: 54,000 images of the
training part, then 6,000 of the test part, so that the last tenth, which hf: holds out, has not been trained on.
"""

import argparse
import gzip
import math
import pathlib
import struct
import sys
import time

import numpy as np
import torch

import hasten
from hasten.workloads.data_folder import data_file

TRAIN, TEST = 54_000, 6_000
ROWS, RATE, WARM = 64, 1.5e-3, 0.08


def idx(name: str, count: int) -> np.ndarray:
    """The first entries of an IDX file of bytes."""
    raw = gzip.decompress(data_file(f"mnist/{name}").read_bytes())
    sizes = struct.unpack_from(f">{raw[3]}I", raw, 4) if len(raw) > 4 and raw[:3] == b"\0\0\x08" else (0,)
    found = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes))
    if sizes[0] < count or found.size != math.prod(sizes):
        raise hasten.UsageError(f"mnist/{name} is no IDX file of bytes with {count} entries, or it is cut off")
    return found.reshape(sizes)[:count]


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, image_size=28,
        patch_size=7, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def pixels(images: np.ndarray) -> torch.Tensor:
    """[n, 1, 28, 28] in -1..1, as hf: hands images over."""
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1


def train(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, seconds: float, seed: int) -> None:
    """AdamW; the rate rises, then falls along a cosine over the time that is given."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    draw, began, step = torch.Generator().manual_seed(seed), time.monotonic(), 0
    model.train()
    while (done := (time.monotonic() - began) / seconds) < 1:
        rate = min(1.0, (done + 1e-3) / WARM) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        chosen = torch.randint(0, len(images), (ROWS,), generator=draw).numpy()
        scores = model(pixel_values=pixels(images[chosen])).logits
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels[chosen]).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step}, {done:.0%} of the time: {loss.item():.3f} nats", flush=True)
        step += 1
    print(f"{step} steps of {ROWS} images")
    model.eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    right = 0
    for start in range(0, len(images), 500):
        scores = model(pixel_values=pixels(images[start : start + 500])).logits
        right += int((scores.argmax(-1).numpy() == labels[start : start + 500]).sum())
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes <= 0:
        raise hasten.UsageError("--minutes must be above 0")
    images = np.concatenate([idx("train-images-idx3-ubyte.gz", TRAIN), idx("t10k-images-idx3-ubyte.gz", TEST)])
    labels = np.concatenate([idx("train-labels-idx1-ubyte.gz", TRAIN), idx("t10k-labels-idx1-ubyte.gz", TEST)])
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out / "mnist.npz", images=images, labels=labels)
    torch.manual_seed(args.seed)
    model = vit()
    train(model, images[:TRAIN], labels[:TRAIN], args.minutes * 60, args.seed)
    print(f"{accuracy(model, images[TRAIN:], labels[TRAIN:]):.2%} of the held-out images are right")
    model.save_pretrained(args.out / "vit")


if __name__ == "__main__":
    try:
        main()
    except hasten.UsageError as problem:
        sys.exit(str(problem))
