"""The workload protocol: a model, data, a quality metric with a direction, a target, seeds."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import Options, option


def warm_cosine(step: int, steps: int, warmup: float, floor: float = 0.1) -> float:
    """The factor on the learning rate: a linear rise over a fraction of the steps, then a cosine down to `floor`."""
    warm = max(1, int(steps * warmup))
    done = min(1.0, max(0.0, (step - warm) / max(1, steps - warm)))
    return min(1.0, (step + 1) / warm) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


@dataclasses.dataclass(frozen=True)
class Metric:
    """How good an arm is.

    Attributes:
        name, unit: for tables.
        better: `lower` or `higher`.
        aggregate: rows [examples, ...] to one number; resampled by example for intervals. The mean by default.
    """

    name: str
    better: str
    unit: str = ""
    aggregate: Callable[[np.ndarray], float] = _mean


@dataclasses.dataclass(frozen=True)
class Workload(Options):
    """Base of workloads; a field is an option (`stdlib-lm(task=generate, prompt=512)`).

    A workload for training overrides `build`, `batches`, `optimizer`, `losses` (or `loss`), `evaluate` and the four
    training figures;
    one for inference overrides `trained`, `requests`, `serve`, `quality`. All tensors live on `self.device()`.
    """

    @property
    def metric(self) -> Metric:
        raise NotImplementedError

    def tasks(self) -> tuple[str, ...]:
        """`train` and/or the names of inference tasks, the default inference task first."""
        raise NotImplementedError

    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # Training: time to the target.

    @property
    def target(self) -> float:
        """The quality at which the clock stops."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Optimizer steps of the tuned baseline's schedule; a run that takes over `limit` times as many is a miss."""
        raise NotImplementedError

    limit: ClassVar[float] = 2.0
    evaluate_every: ClassVar[int] = 10
    clip: ClassVar[float | None] = 1.0
    tunable: ClassVar[Mapping[str, tuple[float, float]]] = {}  # option: (lowest, highest), for `hasten tune`

    def build(self, seed: int) -> nn.Module:
        """A fresh model."""
        raise self._unsupported("training")

    def batches(self, seed: int) -> Iterable[Any]:
        """An endless or re-iterable loader of batches in an order that the seed fixes (a `DataLoader`)."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The tuned baseline optimizer."""
        raise NotImplementedError

    def schedule(self, step: int, steps: int) -> float:
        """The tuned baseline's factor on the learning rate at a step."""
        return 1.0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """What training minimises; the mean of `losses` unless a workload says otherwise."""
        return self.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of each example of a batch, [batch], for methods that choose among examples."""
        raise NotImplementedError

    def proxy(self, seed: int) -> nn.Module | None:
        """A fresh small model for methods that choose data by one, where there is one."""
        return None

    def downstream(self) -> list[Any] | None:
        """Batches of a task that comes after this one, where there is one."""
        return None

    def evaluate(self, model: nn.Module) -> np.ndarray:
        """Quality of each held-out example, [examples, ...]; untimed."""
        raise NotImplementedError

    # Inference: time per request.

    def trained(self) -> nn.Module:
        """The trained model, in eval mode; a new object at each call."""
        raise self._unsupported("inference")

    def requests(self, seed: int) -> list[Any]:
        """The requests that are timed, one by one, in turn."""
        raise NotImplementedError

    def serve(self, handle: Any, request: Any) -> Any:
        """The timed work on one request; `handle` is a `hasten.Handle`. Returns what `same` and `quality` look at."""
        raise NotImplementedError

    def quality(self, handle: Any) -> np.ndarray:
        """Quality of each held-out example through the arm's real path, [examples, ...]. Untimed, same ones always."""
        raise NotImplementedError

    def same(self, one: Any, other: Any) -> bool:
        """Whether two outputs of `serve` are identical: what a lossless method promises."""
        return bool(torch.equal(one, other))

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Model inputs from the training part, for methods that calibrate."""
        return []

    def draft(self) -> nn.Module | None:
        """A smaller model for drafting, where there is one."""
        return None

    def teacher(self) -> nn.Module | None:
        """A model that methods learn from, where there is one."""
        return None

    def lent(self, methods: Iterable[Any], seed: int) -> dict[str, Any]:
        """What a training run is handed beside model, optimizer and data, as far as the methods' cards ask for it."""
        needs = {need for method in methods for need in method.card.needs}
        has: dict[str, Callable[[], Any]] = {
            "teacher": self.teacher,
            "proxy": lambda: self.proxy(seed),
            "downstream": self.downstream,
            "losses": lambda: self.losses,
        }
        return {need: get() for need, get in has.items() if need in needs}

    def handed(self, methods: Iterable[Any]) -> dict[str, Any]:
        """What `hasten.apply` is handed beside the model, as far as the methods' cards ask for it."""
        needs = {need for method in methods for need in method.card.needs}
        has = {"calibration": self.calibration, "draft": self.draft, "teacher": self.teacher}
        return {need: get() for need, get in has.items() if need in needs}

    def _unsupported(self, what: str) -> UsageError:
        return UsageError(f"the workload {self.title()} has no {what} task; it has: {', '.join(self.tasks())}")


@dataclasses.dataclass(frozen=True)
class Supervised(Workload):
    """Base of workloads that are trained only: by AdamW, whose rate rises in a straight line and falls as a cosine.

    A subclass gives `build`, `batches`, `losses`, `evaluate` and the fields `steps` and `target`; its quality is a
    cross-entropy unless it says otherwise.
    """

    task: str = option("train", "what is done", choices=("train",))
    rows: int = option(32, "examples of a training batch", least=1, most=65536)
    lr: float = option(6e-3, "peak learning rate of the baseline's AdamW", above=0)
    warmup: float = option(0.1, "fraction of the schedule in which the rate rises, before a cosine", least=0, below=1)

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    decay: ClassVar[float] = 0.05
    tunable: ClassVar[Mapping[str, tuple[float, float]]] = {"lr": (5e-4, 3e-2), "warmup": (0.02, 0.5)}

    @property
    def metric(self) -> Metric:
        return Metric("cross-entropy", "lower", "nat")

    def tasks(self) -> tuple[str, ...]:
        return ("train",)

    def seeded(self, seed: int, make: Callable[[], nn.Module]) -> nn.Module:
        """What `make` makes with torch's random state begun from the seed, on the workload's device."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make().to(self.device())

    def shuffled(self, seed: int, data: torch.utils.data.Dataset, **options: Any) -> torch.utils.data.DataLoader:
        """Whole batches of the examples in an order that the seed fixes."""
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(
            data, batch_size=self.rows, shuffle=True, drop_last=True, generator=generator, **options
        )

    def columns(self, seed: int, *parts: torch.Tensor) -> torch.utils.data.DataLoader:
        """As `shuffled`, of tensors that hold the examples side by side, [examples, ...], put on the device first."""
        return self.shuffled(seed, torch.utils.data.TensorDataset(*(part.to(self.device()) for part in parts)))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.decay, fused=True)

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps, self.warmup)
