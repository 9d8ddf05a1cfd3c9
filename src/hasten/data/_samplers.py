"""Samplers over a choice of examples and over batches by length: they shuffle by seed and pass, shard and resume."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from hasten.core.errors import UsageError


class Placed(Sampler[Any]):
    """Base: an order that follows from the seed and the pass, of which each process takes its part.

    All processes take equally many entries; those over are left out of a pass, others in each. A state names the
    place within the pass, and is refused by a sampler of another number of processes or of other data.

    Args:
        seed: of the order. rank, processes: whose part this is.

    Raises:
        UsageError: a rank that is none of the processes.
    """

    def __init__(self, seed: int = 0, rank: int = 0, processes: int = 1) -> None:
        if not 0 <= rank < processes:
            raise UsageError(f"rank must be from 0 to {processes - 1}, the number of processes less one, not {rank}")
        self.seed, self.rank, self.processes = seed, rank, processes
        self.epoch = self.taken = self._first = 0

    def entries(self, generator: torch.Generator) -> list[Any]:
        """All entries of a pass, for all processes, in order."""
        raise NotImplementedError

    def digest(self) -> str:
        """What a state must agree with."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """The pass that the next iteration is of."""
        if epoch != self.epoch:
            self._first = 0
        self.epoch = epoch

    def mine(self) -> list[Any]:
        """This process's entries of the present pass."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        entries = self.entries(generator)
        return entries[self.rank : len(entries) // self.processes * self.processes : self.processes]

    def __iter__(self) -> Iterator[Any]:
        self.taken, self._first = self._first, 0
        for entry in self.mine()[self.taken :]:
            self.taken += 1
            yield entry

    def __len__(self) -> int:
        return len(self.mine())

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self.taken, "processes": self.processes, "digest": self.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            UsageError: it is of another number of processes, or of other examples.
        """
        if state["processes"] != self.processes:
            raise UsageError(
                f"the sampler's state is of {state['processes']} processes, and here are {self.processes}: "
                "resume with the same number"
            )
        if state["digest"] != self.digest():
            raise UsageError("the sampler's state is of other examples or another choice: resume with the same data")
        self.epoch, self._first = state["epoch"], state["taken"]


class Chosen(Placed):
    """Shuffled indices of the examples that were chosen.

    Args:
        count: examples in the data set.
    """

    def __init__(self, count: int, seed: int = 0, rank: int = 0, processes: int = 1) -> None:
        super().__init__(seed, rank, processes)
        self.count, self.indices = count, torch.arange(count)

    def choose(self, indices: Tensor) -> None:
        """Sets the choice, [n] int64; an index may occur more than once.

        Raises:
            UsageError: no index, fewer than processes, or one that is none of the data set's.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64).cpu().flatten()
        if len(indices) < self.processes:
            raise UsageError(f"{len(indices)} examples were chosen for {self.processes} process(es): choose more")
        if int(indices.min()) < 0 or int(indices.max()) >= self.count:
            raise UsageError(f"an index is out of range: the data set has {self.count} examples")
        self.indices = indices

    def entries(self, generator: torch.Generator) -> list[int]:
        return self.indices[torch.randperm(len(self.indices), generator=generator)].tolist()

    def digest(self) -> str:
        return hashlib.sha256(self.indices.numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.indices) // self.processes


class Buckets(Placed):
    """Batches of indices that a method makes of the examples' lengths.

    Args:
        lengths: [N, d]. make: (lengths, generator) -> lists of indices.
    """

    def __init__(
        self,
        lengths: Tensor,
        make: Callable[[Tensor, torch.Generator], list[list[int]]],
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(seed, rank, processes)
        self.lengths, self.make = lengths, make
        self._kept: tuple[int, list[Any]] | None = None

    def entries(self, generator: torch.Generator) -> list[list[int]]:
        return self.make(self.lengths, generator)

    def mine(self) -> list[Any]:
        if self._kept is None or self._kept[0] != self.epoch:
            self._kept = self.epoch, super().mine()
        return self._kept[1]

    def digest(self) -> str:
        return hashlib.sha256(self.lengths.numpy().tobytes()).hexdigest()[:16]
