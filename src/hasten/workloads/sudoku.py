"""sudoku: a tiny recursive model that fills in 4x4 Sudoku, trained from scratch.

The model is of the kind of the Tiny Recursive Model (arXiv 2510.04871): one network of two layers, used over and over.
It holds two states of each cell, the answer y and the thought z. A round is n updates of z from (puzzle + y + z) and
one of y from (y + z); a pass is T rounds of which only the last has gradients; a forward is several passes one after
another (deep supervision), each from the detached states of the one before and each with an answer of its own.

There are 288 filled 4x4 grids; a sixth of them is held out. A puzzle is a grid of which cells were emptied in random
order as long as the rest allows one solution only; twenty puzzles of each grid are trained on. Quality is the last
pass's cross-entropy over the empty cells of held-out puzzles, always at full depth.

The baseline was tuned on puzzles of at least 6 givens and a schedule of 80 steps: rates of 0.004, 0.006 and 0.01 came
to the target in 60, 50 and 60 steps. With 4 givens 0.006 takes about 90 of 120 steps.
"""

import dataclasses
import functools
import itertools

import numpy as np
import torch
from torch import nn

from hasten.core.options import option
from hasten.workloads.base import Supervised

SIDE, CELLS = 4, 16
EMPTY = 0


@functools.cache
def grids() -> torch.Tensor:
    """All filled grids, [288, 16] of 1 to 4: rows, columns and the four 2x2 boxes hold each digit once."""
    rows = list(itertools.permutations(range(1, SIDE + 1)))
    found = []
    for four in itertools.product(rows, repeat=SIDE):
        columns = all(len({row[c] for row in four}) == SIDE for c in range(SIDE))
        if columns and all(
            len({four[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == SIDE for r in (0, 2) for c in (0, 2)
        ):
            found.append([digit for row in four for digit in row])
    return torch.tensor(found)


def parts() -> tuple[torch.Tensor, torch.Tensor]:
    """Which grids are trained on and which are held out, as indices; the same always."""
    order = torch.randperm(len(grids()), generator=torch.Generator().manual_seed(4))
    return order[48:], order[:48]


def solutions(puzzles: torch.Tensor) -> torch.Tensor:
    """Which grids agree with each puzzle, bool [puzzles, 288]."""
    agree = nn.functional.one_hot(puzzles, SIDE + 1)[..., 1:].flatten(1).float() @ _one_hot().T
    return agree == (puzzles != EMPTY).sum(1, keepdim=True)


@functools.cache
def _one_hot() -> torch.Tensor:
    return nn.functional.one_hot(grids() - 1, SIDE).flatten(1).float()


def puzzles(which: torch.Tensor, generator: torch.Generator, least: int = 6) -> torch.Tensor:
    """Puzzles with exactly one solution, [len(which), 16]: cells of the given grids emptied in random order.

    Args:
        which: indices of grids.
        least: givens that stay at any rate; a cell is also kept where the puzzle would get a second solution.
    """
    made = grids()[which].clone()
    order = torch.rand(len(which), CELLS, generator=generator).argsort(1)
    rows = torch.arange(len(which))
    for cell in order.unbind(1):
        tried = made.clone()
        tried[rows, cell] = EMPTY
        good = (solutions(tried).sum(1) == 1) & ((tried != EMPTY).sum(1) >= least)
        made = torch.where(good[:, None], tried, made)
    return made


@functools.cache
def units() -> torch.Tensor:
    """Means over each cell's row, column and box, as matrices [3, 16, 16]."""
    row, column = torch.arange(CELLS) // SIDE, torch.arange(CELLS) % SIDE
    places = torch.stack([row, column, 2 * (row // 2) + column // 2])
    return (places[:, :, None] == places[:, None, :]).float() / SIDE


class Layer(nn.Module):
    """A cell sees itself and the means over its row, column and box: a gated part, added, then normed (RMS)."""

    means: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(4 * width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.register_buffer("means", units().flatten(0, 1), persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        seen = (self.means @ states).unflatten(1, (3, CELLS)).unbind(1)
        gate, value = self.up(torch.cat([states, *seen], -1)).chunk(2, -1)
        return nn.functional.rms_norm(states + self.down(nn.functional.silu(gate) * value), states.shape[-1:])


class Recursive(nn.Module):
    """The recursive model.

    Attributes:
        recursion: (n, T): updates of z in a round, and rounds in a pass. May be changed at any time.
        supervision_weights: the weight of each pass's loss; its length is the number of passes. May be changed.
    """

    def __init__(self, width: int, passes: int, recursion: tuple[int, int]) -> None:
        super().__init__()
        self.recursion = recursion
        self.supervision_weights = (1 / passes,) * passes
        self.digits = nn.Embedding(SIDE + 1, width)
        self.places = nn.Parameter(torch.randn(CELLS, width))
        self.start = nn.Parameter(torch.randn(2, width))
        self.net = nn.Sequential(Layer(width), Layer(width))
        self.head = nn.Linear(width, SIDE)

    def forward(self, puzzles: torch.Tensor) -> torch.Tensor:
        """Scores of each cell's digit after every pass, [passes, batch, 16, 4], from puzzles [batch, 16]."""
        given = self.digits(puzzles) + self.places
        y, z = (state.expand_as(given) for state in self.start)
        answers = []
        for _ in self.supervision_weights:
            with torch.no_grad():
                for _ in range(self.recursion[1] - 1):
                    y, z = self._round(given, y, z)
            y, z = self._round(given, y, z)
            answers.append(self.head(y))
            y, z = y.detach(), z.detach()
        return torch.stack(answers)

    def _round(self, given: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(self.recursion[0]):
            z = self.net(given + y + z)
        return self.net(y + z), z


@functools.cache
def examples(held_out: bool, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puzzles and their solutions of one part, both [puzzles, 16]: 20 of each grid, some of them alike."""
    which = parts()[held_out].repeat(4 if held_out else 20)
    return puzzles(which, torch.Generator().manual_seed(9 + held_out), least), grids()[which]


@dataclasses.dataclass(frozen=True)
class Sudoku(Supervised):
    width: int = option(32, "width of a cell's state", least=4)
    passes: int = option(2, "passes of a forward, each with a loss (deep supervision)", least=1, most=64)
    updates: int = option(6, "n: updates of the thought in a round", least=1, most=64)
    rounds: int = option(3, "T: rounds of a pass, of which the last has gradients", least=1, most=64)
    givens: int = option(4, "fewest givens of a puzzle; 4 are the least that determine a grid", least=4, most=15)
    rows: int = option(32, "puzzles of a training batch", least=1, most=4096)
    steps: int = option(120, "steps of the baseline's schedule", least=10)
    target: float = option(0.05, "cross-entropy in nats over empty cells at which training stops", above=0)

    tunable = {"lr": (1e-3, 3e-2), "warmup": (0.02, 0.4)}

    decay = 0.1

    @classmethod
    def title(cls) -> str:
        return "sudoku"

    def build(self, seed: int) -> nn.Module:
        return self.seeded(seed, lambda: Recursive(self.width, self.passes, (self.updates, self.rounds)))

    def batches(self, seed: int) -> torch.utils.data.DataLoader:
        """Batches of (puzzles, solutions), both [rows, 16]."""
        return self.columns(seed, *examples(False, self.givens))

    def losses(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Each puzzle's loss [rows]: over its empty cells the mean, over the passes the weighted sum."""
        weights = torch.tensor(model.supervision_weights, device=batch[0].device)
        return weights @ _cross_entropy(model(batch[0]), *batch)

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.losses(model, batch).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> np.ndarray:
        """Cross-entropy after the last pass of 192 held-out puzzles, [192]."""
        given, solved = (part.to(self.device()) for part in examples(True, self.givens))
        return _cross_entropy(model(given)[-1:], given, solved)[0].double().cpu().numpy()


def _cross_entropy(scores: torch.Tensor, given: torch.Tensor, solved: torch.Tensor) -> torch.Tensor:
    """[passes, rows]: mean over the empty cells, from scores [passes, rows, 16, 4]."""
    wanted = (solved - 1).expand(scores.shape[:-1])
    losses = nn.functional.cross_entropy(scores.float().flatten(0, 2), wanted.flatten(), reduction="none")
    empty = (given == EMPTY).float()
    return (losses.view_as(wanted) * empty).sum(-1) / empty.sum(-1)


WORKLOAD = Sudoku
