"""Digits drawn by a small diffusers transformer (or U-Net) with classifier-free guidance: `digits-dit`."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from hasten.core.options import option
from hasten.workloads import weights
from hasten.workloads.base import Metric, Workload
from hasten.workloads.digits import CLASSES, SIDE, digits

WEIGHTS = weights.HOME
FEATURES = 16


def digits_dit(layers: int = 10, *, side: int = SIDE, seed: int = 0) -> nn.Module:
    """A `DiTTransformer2DModel` for digits: tokens of 2x2 pixels (16 of them), width 80; class 10 is the null class.

    As in the DiT paper each block starts as the identity: the last linear of its adaptive norm starts at zero.
    Labels are dropped in the data and never inside the model, whose blocks would each drop others.
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=20,
            in_channels=1,
            out_channels=1,
            num_layers=layers,
            sample_size=side,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def digits_unet(*, seed: int = 0) -> nn.Module:
    """A `UNet2DModel` for digits (8x8 and 4x4), predicting the noise; class 10 is the null class."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=SIDE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(40, 80),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=20,
            norm_num_groups=8,
            num_class_embeds=CLASSES + 1,
        )


def digits_classifier(*, seed: int = 0) -> nn.Sequential:
    """A convolutional classifier; the input of its last layer are the features of the Frechet distance, [batch, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.Tanh(),
            nn.Linear(FEATURES, CLASSES),
        )


def flow_scheduler() -> Any:
    """The sampler of the transformer: Euler steps of rectified flow, from noise level 1 to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)


def ddim_scheduler() -> Any:
    """The sampler of the U-Net: deterministic DDIM on the cosine schedule.

    Without clipping, which would part the estimate of the image from that of the noise and spoil guided samples.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)


@torch.no_grad()
def draw(
    model: nn.Module, scheduler: Any, noise: torch.Tensor, labels: torch.Tensor, *, steps: int, guidance: float
) -> torch.Tensor:
    """Samples with classifier-free guidance, as a person writes it with diffusers.

    Args:
        noise: [batch, 1, 8, 8]; labels: [batch], 0 to 9.
        guidance: weight of the conditional prediction; 1 asks for no guidance and halves the batch.

    Returns:
        images [batch, 1, 8, 8] in [-1, 1].
    """
    scheduler.set_timesteps(steps, device=noise.device)
    guided = guidance != 1
    classes = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guided else labels
    images = noise
    for time in scheduler.timesteps:
        inputs = torch.cat([images, images]) if guided else images
        output = model(inputs, timestep=time.expand(len(inputs)), class_labels=classes).sample
        if guided:
            with_class, without = output.chunk(2)  # [batch, 1, 8, 8] each
            output = without + guidance * (with_class - without)
        images = scheduler.step(output, time, images).prev_sample
    return images.clamp(-1, 1)


BUILDERS = {"digits_dit": digits_dit, "digits_unet": digits_unet, "digits_classifier": digits_classifier}


def load(name: str) -> nn.Module:
    """A bundled model in eval mode: `digits_dit`, `digits_unet` or `digits_classifier`."""
    return weights.load_weights(BUILDERS[name](), name)


@functools.cache
def real_features() -> tuple[np.ndarray, np.ndarray]:
    """Mean [16] and covariance [16, 16] of the classifier's features over the digits for training."""
    from safetensors.numpy import load_file

    stored = load_file(WEIGHTS / "digits_features.safetensors")
    return stored["mean"], stored["covariance"]


def frechet(features: np.ndarray) -> float:
    """Frechet distance between features [count, 16] and those of real digits.

    |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2)), of Gaussians with these means and covariances (Heusel et al. 2017,
    equation 6). With few samples it is too large by about a constant, the same for all arms with the same noise.
    """
    mean, covariance = real_features()
    own = np.cov(features, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ own @ root).clip(0)).sum()
    return float(((features.mean(0) - mean) ** 2).sum() + np.trace(own) + np.trace(covariance) - 2 * cross)


def _frechet_of_rows(rows: np.ndarray) -> float:
    return frechet(rows[:, :FEATURES])


def psnr(rows: np.ndarray) -> float:
    """How near the rows' samples are to the full sampler's from the same noise, in decibel of the range 2; the mean."""
    return float(np.mean(10 * np.log10(4 / np.maximum(rows[:, FEATURES], 1e-12))))


@dataclasses.dataclass(frozen=True)
class DigitsDiT(Workload):
    """Class-conditional digits by diffusion with classifier-free guidance: `digits-dit`.

    A row of quality is the classifier's features of one sample, and its mean squared distance to what the full sampler
    draws from the same noise (`psnr(rows)` sums those up). A row of the training task is one held-out loss.
    """

    task: str = option(
        "sample", "sample draws digits; train is the time to a held-out loss", choices=("sample", "train")
    )
    model: str = option("dit", "dit: transformer and rectified flow; unet: U-Net and DDIM", choices=("dit", "unet"))
    sampling_steps: int = option(50, "steps of the sampler", least=2)
    guidance: float = option(2.0, "weight of the conditional prediction; 1 is no guidance", least=1)
    batch: int = option(32, "digits in a request", least=1)
    examples: int = option(128, "digits that are drawn to judge quality", least=32)
    side: int = option(8, "pixels per side of a digit that is trained on, an even number (task=train)", least=8)
    layers: int = option(10, "layers of the transformer that is trained", least=1)
    rows: int = option(64, "digits of a training batch", least=1)
    steps: int = option(300, "steps of the baseline's schedule in training", least=10)
    target: float = option(0.565, "held-out loss at which training stops", above=0)

    limit = 2.0
    evaluate_every = 20

    @classmethod
    def title(cls) -> str:
        return "digits-dit"

    @property
    def metric(self) -> Metric:
        if self.task == "train":
            return Metric("held-out loss", "lower")
        return Metric("Frechet distance", "lower", aggregate=_frechet_of_rows)

    def tasks(self) -> tuple[str, ...]:
        return ("sample", "train")

    def problems(self) -> list[str]:
        found = []
        if self.task == "train" and self.model != "dit":
            found.append("task=train trains the transformer: leave model=dit")
        if self.side % 2 or (self.task != "train" and self.side != SIDE):
            found.append("side is an even number for task=train; the trained models draw digits of 8x8")
        return found

    # Sampling.

    def trained(self) -> nn.Module:
        return load(f"digits_{self.model}").to(self.device())

    def scheduler(self) -> Any:
        return flow_scheduler() if self.model == "dit" else ddim_scheduler()

    def noise(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise [count, 1, 8, 8] and labels [count], on the workload's device."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
        return noise.to(self.device()), (torch.arange(count) % CLASSES).to(self.device())

    def requests(self, seed: int) -> list[Any]:
        noise, labels = self.noise(8 * self.batch, 1000 + seed)
        return list(zip(noise.split(self.batch), labels.split(self.batch), strict=True))

    def serve(self, handle: Any, request: Any) -> torch.Tensor:
        noise, labels = request
        return draw(handle.model, self.scheduler(), noise, labels, steps=self.sampling_steps, guidance=self.guidance)

    def quality(self, handle: Any) -> np.ndarray:
        """[examples, 17]: 16 features and a squared distance."""
        noise, labels = self.noise(self.examples, 0)
        parts = zip(noise.split(self.batch), labels.split(self.batch), strict=True)
        drawn = torch.cat([self.serve(handle, part) for part in parts])
        away = (drawn - _full_samples(self)).square().mean((1, 2, 3), dtype=torch.float64)  # [examples]
        with torch.no_grad():
            features = load("digits_classifier").to(drawn)[:-1](drawn).double()
        return torch.cat([features, away[:, None]], dim=1).cpu().numpy()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Noised digits of the training part at levels all along the way, a quarter of them without class."""
        batch = dict(next(iter(self.batches(0))))
        noised, times = self._noised(batch)
        name = "hidden_states" if self.model == "dit" else "sample"
        return [{name: noised, "timestep": times, "class_labels": batch["labels"]}]

    # Training.

    def build(self, seed: int) -> nn.Module:
        return digits_dit(self.layers, side=self.side, seed=seed).to(self.device())

    def batches(self, seed: int) -> DataLoader:
        """Batches of `rows`: `images`, `labels` (some of them the null class), `noise` and `level` in (0, 1)."""
        images, labels = digits(held_out=False, side=self.side)
        rng = torch.Generator().manual_seed(seed)
        collate = functools.partial(_with_noise, rng=rng, device=self.device())
        data = list(zip(images, labels, strict=True))
        return DataLoader(data, self.rows, shuffle=True, drop_last=True, collate_fn=collate, generator=rng)  # type: ignore[arg-type]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01)

    def schedule(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / min(50, steps / 4), 0.02 + 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self._losses(model, batch).mean()

    def evaluate(self, model: nn.Module) -> np.ndarray:
        """The loss of each held-out digit at four fixed levels of noise, [1436]; of large digits of a part of them."""
        images, labels = digits(held_out=True, side=self.side)
        count = max(16, len(images) * SIDE**2 // self.side**2)
        images, labels = images[:count], labels[:count]
        pairs = list(zip(images.repeat(4, 1, 1, 1), labels.repeat(4), strict=True))
        rng = torch.Generator().manual_seed(0)
        batch = _with_noise(pairs, rng=rng, device=self.device())
        at_once = len(pairs) if self.side == SIDE else 32
        with torch.no_grad():
            parts = zip(*(value.split(at_once) for value in batch.values()), strict=True)
            losses = [self._losses(model, dict(zip(batch, part, strict=True))) for part in parts]
        return torch.cat(losses).double().cpu().numpy()

    def _noised(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, noise, level = batch["images"], batch["noise"], batch["level"]
        if self.model == "dit":
            return torch.lerp(images, noise, level[:, None, None, None]), 1000 * level
        times = (1000 * level).long()
        return self.scheduler().add_noise(images, noise, times), times

    def _losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The squared error of the velocity, [batch]."""
        noised, times = self._noised(batch)
        output = model(noised, timestep=times, class_labels=batch["labels"]).sample
        return (output - (batch["noise"] - batch["images"])).square().mean((1, 2, 3))


@functools.cache
def _full_samples(workload: DigitsDiT) -> torch.Tensor:
    """What the unchanged sampler draws for `quality`, [examples, 1, 8, 8]."""
    noise, labels = workload.noise(workload.examples, 0)
    model, options = workload.trained(), {"steps": workload.sampling_steps, "guidance": workload.guidance}
    parts = zip(noise.split(workload.batch), labels.split(workload.batch), strict=True)
    return torch.cat([draw(model, workload.scheduler(), *part, **options) for part in parts])


def _with_noise(pairs: list[Any], *, rng: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
    images, labels = torch.stack([one for one, _ in pairs]), torch.stack([other for _, other in pairs])
    count = len(images)
    made = {
        "images": images,
        "labels": torch.where(torch.rand(count, generator=rng) < 0.15, CLASSES, labels),
        "noise": torch.randn(images.shape, generator=rng),
        "level": (torch.arange(count) + torch.rand(count, generator=rng)) / count,  # spread evenly over (0, 1)
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


WORKLOAD = DigitsDiT
