"""What the inputs of layers look like: statistics gathered block by block, in bounded memory.

The blocks are done one after another: a block's inputs come from the blocks before it, which the caller has changed
already, and only they and one block's statistics are held. Layers that read the very same tensor share a statistic.
Where a model has no chain of blocks, whole forwards are run for as many layers at a time as fit in memory.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hasten.core.errors import UsageError
from hasten.hosts.base import Host
from hasten.hosts.weights import Weight

GATHERED_BYTES = 256 * 2**20


class Statistic:
    """What is kept of the inputs x [tokens, columns], fp32 and finite, of one layer."""

    def __init__(self, columns: int, device: torch.device) -> None:
        raise NotImplementedError

    @staticmethod
    def numbers(columns: int) -> int:
        """How many floats are held."""
        raise NotImplementedError

    def add(self, x: Tensor) -> None:
        raise NotImplementedError

    def value(self, tokens: int) -> Any:
        """What a method gets, once all inputs were seen."""
        raise NotImplementedError

    def copy(self) -> "Statistic":
        raise NotImplementedError


class Hessian(Statistic):
    """fp32 [columns, columns], 2/tokens * sum of x x^T."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, device=device)

    @staticmethod
    def numbers(columns: int) -> int:
        return columns**2

    def add(self, x: Tensor) -> None:
        self.total.addmm_(x.t(), x)

    def value(self, tokens: int) -> Tensor:
        return self.total.mul_(2 / tokens)

    def copy(self) -> "Hessian":
        new = Hessian(0, self.total.device)
        new.total = self.total.clone()
        return new


class Norms(Statistic):
    """fp32 [columns], the root mean square of each input: ||x_j|| / sqrt(tokens)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, device=device, dtype=torch.float64)

    @staticmethod
    def numbers(columns: int) -> int:
        return 2 * columns

    def add(self, x: Tensor) -> None:
        self.total += x.square().sum(0, dtype=torch.float64)

    def value(self, tokens: int) -> Tensor:
        return (self.total / tokens).sqrt().float()

    def copy(self) -> "Norms":
        new = Norms(0, self.total.device)
        new.total = self.total.clone()
        return new


class Tokens(Statistic):
    """fp32 [at most LIMIT, columns]: the inputs themselves, evenly thinned out where there are more."""

    LIMIT = 2048

    def __init__(self, columns: int, device: torch.device) -> None:
        self.parts: list[Tensor] = []
        self.held, self.every = 0, 1

    @staticmethod
    def numbers(columns: int) -> int:
        return 2 * Tokens.LIMIT * columns

    def add(self, x: Tensor) -> None:
        part = x[:: self.every].clone()
        self.parts.append(part)
        self.held += len(part)
        if self.held > 2 * self.LIMIT:
            thinned = torch.cat(self.parts)[::2].clone()
            self.parts, self.held, self.every = [thinned], len(thinned), 2 * self.every

    def value(self, tokens: int) -> Tensor:
        rows = torch.cat(self.parts)
        return rows[:: -(-len(rows) // self.LIMIT)]

    def copy(self) -> "Tokens":
        new = Tokens(0, torch.device("cpu"))
        new.parts, new.held, new.every = list(self.parts), self.held, self.every
        return new


STATISTICS: dict[str, type[Statistic]] = {"hessian": Hessian, "norms": Norms, "tokens": Tokens}


class Inputs:
    """The statistics of some layers' inputs, gathered while this is entered.

    Padding and tokens with NaN or infinity are left out.
    """

    def __init__(self, weights: list[Weight], statistic: type[Statistic]) -> None:
        self.weights, self.statistic = weights, statistic
        self.paths = [weight.path for weight in weights]
        self.mask: Tensor | None = None  # [batch, tokens] of the batch that runs
        self.dropped = 0
        self._sums: dict[str, Statistic] = {}
        self._tokens: dict[str, int] = {}
        self._owner: dict[str, str] = {}
        self._unsound: set[str] = set()
        self._last: tuple[Tensor, str] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "Inputs":
        for weight in self.weights:
            self._hooks.append(weight.part.register_forward_pre_hook(self._see(weight), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._last = [], None

    def shared(self) -> Iterator[tuple[list[str], Any]]:
        """(paths of the layers that share their input, its statistic); layers that nothing called are left out.

        Raises:
            UsageError: a layer saw no finite token.
        """
        for owner in self.paths:
            if owner in self._unsound and not self._tokens.get(owner):
                raise UsageError(
                    f"all calibration inputs of {owner} hold NaN or infinity: check the calibration data and the dtype"
                )
            if self._tokens.get(owner):
                together = [path for path in self.paths if self._owner.get(path) == owner]
                yield together, self._sums.pop(owner).value(self._tokens[owner])
                _release()

    def tokens(self, path: str) -> int:
        """Real and finite tokens that a layer (or the one that it shares its input with) saw."""
        return self._tokens.get(self._owner.get(path, path), 0)

    def uncalled(self) -> list[str]:
        return [path for path in self.paths if path not in self._owner]

    def _see(self, weight: Weight) -> Callable[..., None]:
        path = weight.path

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is not None and self._last[0] is x and not isinstance(weight.part, nn.Conv2d):
                near = self._last[1]
                if self._owner.setdefault(path, near) == near:
                    return
            owner = self._owner.setdefault(path, path)
            if owner != path:  # shared until now: it goes on from what it has seen
                self._sums[path], self._tokens[path] = self._sums[owner].copy(), self._tokens[owner]
                self._owner[path] = path
            self._last = x, path
            self._add(path, weight.rows(x))

        return hook

    def _add(self, path: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None and self.mask.dim() == 2 and self.mask.numel() == len(rows):
            rows = rows[self.mask.flatten().to(rows.device).bool()]
        rows = rows.detach().float()
        sound = rows.isfinite().all(1)
        if not sound.all():
            self._unsound.add(path)
            self.dropped += int((~sound).sum())
            rows = rows[sound]
        if path not in self._sums:
            self._sums[path] = self.statistic(x.shape[-1], x.device)
        self._sums[path].add(rows)
        self._tokens[path] = self._tokens.get(path, 0) + len(rows)


def gather(
    host: Host, batches: list[dict[str, Any]], weights: dict[str, Weight], statistic: type[Statistic] = Hessian
) -> Iterator[Inputs]:
    """Statistics of some layers after others; a caller changes those layers before it asks for the next."""
    chain = [layer.path for layer in host.layers] if host.kind in ("decoder", "diffusion_lm", "vit") else []
    waiting = list(weights)
    entering: list[Any] = [None] * len(batches)
    with evaluating(host.model):
        for place, block in enumerate(chain):
            run = chain[: place + 1]
            inside = [path for path in waiting if path.startswith(block + ".")]
            waiting = [path for path in waiting if path not in set(inside)]
            if inside:
                with Inputs([weights[path] for path in inside], statistic) as inputs:
                    for batch, before in zip(batches, entering, strict=True):
                        _through(host, run, batch, before, inputs)
                yield inputs
            if any(path.startswith(one + ".") for one in chain[place + 1 :] for path in waiting):
                for index, batch in enumerate(batches):
                    entering[index] = _through(host, run, batch, entering[index], None)
        del entering
        while waiting:
            some = _fitting(waiting, weights, statistic)
            waiting = waiting[len(some) :]
            with Inputs([weights[path] for path in some], statistic) as inputs:
                for batch in batches:
                    inputs.mask = batch.get("attention_mask")
                    host.forward(batch)
            yield inputs


def _fitting(waiting: list[str], weights: dict[str, Weight], statistic: type[Statistic]) -> list[str]:
    """The first layers whose statistics fit `GATHERED_BYTES`, at least one."""
    total = 0
    for count, path in enumerate(waiting):
        total += 4 * statistic.numbers(weights[path].columns)
        if count and total > GATHERED_BYTES:
            return waiting[:count]
    return waiting


def _release() -> None:
    """Hands freed memory back to the system: what one layer's matrices leave behind does not fit the next ones."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


class StopError(Exception):
    """Ends a forward before or after the block of interest."""


def _through(host: Host, chain: list[str], batch: dict[str, Any], entering: Any, inputs: Inputs | None) -> Any:
    """Runs the last block of `chain` on one batch and returns its output.

    The model itself is called, so that it makes masks, positions and whatever else its blocks take; the blocks before
    the last return at once what the last of them gave (`entering`).
    """
    blocks = [host.model.get_submodule(path) for path in chain]
    out: list[Any] = []

    def leave(_module: nn.Module, _given: Any, output: Any) -> None:
        out.append(output)
        raise StopError

    if inputs is not None:
        inputs.mask = batch.get("attention_mask")
    with contextlib.ExitStack() as undo:
        for block in blocks[:-1]:
            undo.enter_context(returning(block, entering))
        undo.callback(blocks[-1].register_forward_hook(leave).remove)
        with contextlib.suppress(StopError):
            host.forward(uncached(host, batch))
    if not out:
        raise UsageError(f"the model's forward did not run {chain[-1]}: it can't be calibrated")
    return out[0]


def uncached(host: Host, batch: dict[str, Any]) -> dict[str, Any]:
    return {"use_cache": False} | batch if hasattr(host.model, "config") and host.kind == "decoder" else batch


@contextlib.contextmanager
def returning(block: nn.Module, value: Any) -> Iterator[None]:
    """The block's forward returns a copy of `value`."""
    before = vars(block).get("forward")
    block.forward = lambda *_, **__: tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
