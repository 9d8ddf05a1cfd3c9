"""LCSC: the weights that are used are a linear combination of checkpoints that training left behind, found by search.

With checkpoints theta_1 .. theta_K along the run (K vectors of P weights, the last one the newest),

    theta = theta_K + sum_{i<K} alpha_i (theta_i - theta_K) = sum_i alpha_i theta_i,   sum_i alpha_i = 1,

where coefficients may be negative. They are found by an evolutionary search that begins with moving averages of
several rates: two good combinations are crossed and mutated, and the child takes the place of the worst. Training
itself goes on from its own weights; evaluations, and the model after the run, have the combination.

The search lasts as long as its forwards on batches that are taken out of the stream when the run begins (with several
passes over the data they come again in later ones); all of it is in the run and on the clock. K vectors are held in
memory.

Departures: what is minimised is the loss on those batches, where the paper takes FID and the like. The paper searches
once, after training; here again and again, from the last population, so that the target can be seen as it is
reached, and between two searches the coefficients go with the window of checkpoints. The authors have not published
their search; the chances of its operators are ours, and its size is scaled down (the paper: hundreds of checkpoints,
2000 births).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.grow import _search
from hasten.train import distributed, randomness

CARD = Card(
    title="Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better",
    paper="2404.02241",
    seams=("weights.average",),
    effects=("steps", "quality", "memory"),
    lossless=False,
    claim="consistency models reach the full run's FID with 23x (CIFAR-10) and 15x (ImageNet-64) less training",
    claimed=23.0,
    identity="there are none: the weights that are evaluated are never those that are trained",
    needs=("steps", "losses"),
    experiment=("stdlib-lm(task=train, length=64, rows=8, target=3.3)", "grow/lcsc"),
    tune={"mutation": (0.01, 0.3), "start": (0.05, 0.6)},
    when="Diffusion and consistency models, and other runs whose weights jitter around a better mean.",
    when_not="Runs whose rate decays anyway: their last weights hardly jitter. Memory for less than K weights.",
)

RATES = (0.3, 0.5, 0.7, 0.85, 0.95)
STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def naive_lcsc(checkpoints: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """theta, weight by weight, as differences to the newest checkpoint.

    Args:
        checkpoints: K of [P], oldest first, in any number format.
        coefficients: [K], alpha; their sum is 1.

    Returns:
        [P] fp32.
    """
    base = checkpoints[-1].float()
    out = base.clone()
    for p in range(len(base)):
        for i in range(len(checkpoints) - 1):
            out[p] = out[p] + coefficients[i] * (checkpoints[i][p].float() - base[p])
    return out


def lcsc(checkpoints: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """As `naive_lcsc`, a checkpoint at a time."""
    out = torch.zeros_like(checkpoints[0], dtype=torch.float32)
    for one, share in zip(checkpoints, coefficients, strict=True):
        out = torch.add(out, one.float() * share)
    return out


@dataclasses.dataclass(frozen=True)
class LCSC(Method):
    """Evaluates and hands over the best linear combination of the run's last checkpoints."""

    checkpoints: int = option(10, "K: checkpoints in the combination", least=2, most=1000)
    every: float = option(0.02, "between two checkpoints, as a fraction of the run's steps", above=0, below=1)
    start: float = option(0.2, "when the first checkpoint is kept, as a fraction of the steps", least=0, below=1)
    search_every: float = option(0.1, "between two searches, as a fraction of the steps", above=0, most=1)
    population: int = option(6, "combinations that a search keeps", least=3)
    children: int = option(8, "combinations that a search tries beside", least=0)
    mutation: float = option(0.05, "standard deviation of a coefficient's mutation", least=0)
    batches: int = option(1, "batches taken out of the stream that combinations are judged on", least=1)
    store: str = option("fp32", "number format of the checkpoints in memory", choices=tuple(STORES))

    def attach(self, run: Any) -> None:
        """Takes the batches out of the stream and hooks checkpoints, searches and evaluations into the run.

        Raises:
            UsageError: no number of steps, no losses, sharded weights, or too few batches.
        """
        if run.steps is None or run.losses is None:
            raise UsageError(f"{self.name} needs steps=N and losses=, (model, batch) -> the loss of each example")
        if any(hasattr(p, "device_mesh") for p in run.model.parameters()):
            raise UsageError(f"{self.name} combines whole weights, and these are sharded: use DDP or one process")
        with run.randomness():
            held_out = run.more(self.batches)
        if len(held_out) < self.batches:
            raise UsageError(f"{self.name}: the loader has fewer than the {self.batches} batches to judge by")
        kept, searched = (max(1, round(part * run.steps)) for part in (self.every, self.search_every))
        first = round(self.start * run.steps)

        def step(run: Any) -> None:
            state = run.state[self.name]
            if run.step < first:
                return
            keeps, searches = (run.step - first) % kept == 0, (run.step - first) % searched == 0
            if keeps:
                state["kept"] = [*state.get("kept", []), _flat(run, STORES[self.store])][-self.checkpoints :]
            if searches and len(state.get("kept", [])) > 1:
                self.search(run, held_out)
            if (keeps or searches) and "population" in state and state.get("kept"):
                best = _search.aged(state["population"][:1], len(state["kept"]))[0]
                state["combined"] = lcsc(state["kept"], best.float())

        @contextlib.contextmanager
        def combined(run: Any) -> Iterator[None]:
            found = run.state[self.name].get("combined")
            if found is None:
                yield
                return
            own = _own(run)
            _put(run, found)
            try:
                yield
            finally:
                _put_back(run, own)

        def finish() -> None:
            if "combined" in run.state[self.name]:
                _put(run, run.state[self.name]["combined"])

        run.on("step", step)
        run.on("resize", lambda run: run.state[self.name].clear())  # checkpoints of another shape
        run.on("evaluate", combined)
        run.changes.call(finish)

    def search(self, run: Any, held_out: list[Any]) -> None:
        """Renews the population for the present checkpoints."""
        state = run.state[self.name]
        points, own = state["kept"], _own(run)
        modes = [(module, module.training) for module in run.model.modules()]

        def fitness(coefficients: Tensor) -> float:
            _put(run, lcsc(points, coefficients.float()))
            losses = torch.stack([run.losses(run.model, batch).float().mean() for batch in held_out])
            found = float(distributed.mean(losses.mean()))
            return found if found == found else float("inf")

        newest = torch.zeros(1, len(points), dtype=torch.float64)
        newest[0, -1] = 1
        start = [newest]
        if "population" in state:
            start.append(_search.aged(state["population"], len(points)))
        start.append(_search.averages(len(points), RATES))
        population = torch.cat(start).unique_consecutive(dim=0)[: self.population]
        run.model.eval()
        try:
            with torch.no_grad(), randomness.preserved(run.device):
                state["population"], _ = _search.evolve(
                    fitness, population, self.children, self.mutation, run.generator(self.name)
                )
        finally:
            _put_back(run, own)
            for module, mode in modes:
                module.training = mode


def _weights(run: Any) -> list[Tensor]:
    return [p for p in run.model.parameters() if p.requires_grad]


def _own(run: Any) -> list[Tensor]:
    return [p.detach().clone() for p in _weights(run)]


@torch.no_grad()
def _put_back(run: Any, own: list[Tensor]) -> None:
    for parameter, value in zip(_weights(run), own, strict=True):
        parameter.copy_(value)


def _flat(run: Any, dtype: torch.dtype) -> Tensor:
    """All trained weights, [P]."""
    return torch.cat([p.detach().flatten().to(dtype) for p in _weights(run)])


@torch.no_grad()
def _put(run: Any, flat: Tensor) -> None:
    parameters = _weights(run)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


METHOD = LCSC
