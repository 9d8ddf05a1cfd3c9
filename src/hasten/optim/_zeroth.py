"""Zeroth-order steps: two passes with weights moved along a random direction, and back, without storing the direction.

A direction z ~ N(0, I) is a seed. Each sweep over the weights draws it anew, in pieces of `PIECE` numbers that stay in
a core's cache, and moves the weights in place from theta + start z to theta + end z. A step is three sweeps: to eps, to
-eps, and from there to -lr g, which puts the weights back and updates them at once.

Moving forth and back rounds: a weight of 32 bits drifts by its last bit or two a step, up or down. Weights of 16 bits
drift by more than most updates: keep them in 32 bits (precision="bf16" computes the passes in 16).

With a threshold only the entries with |theta| <= threshold move. The set is found anew at each step and never stored:
while the weights are moved it is read off the moved ones, |theta + start z m - start z| <= threshold, and the few
entries that this misjudges, those within eps |z| above the threshold, are kept as a list of places.
"""

import copy
import math
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.train import randomness

PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}  # numbers drawn at once
HALF = (torch.float16, torch.bfloat16)

Rate = Callable[[dict[str, Any]], float]


def move(weights: Tensor, z: Tensor, start: float, end: float, moves: Tensor | None = None, decay: float = 0.0) -> None:
    """Moves weights from theta + start z to (1 - decay) theta + end z, in place.

    Args:
        weights, z: of one shape; moves: bool, which entries take part; None: all.
    """
    if moves is not None:
        z = z * moves
    if not decay:
        weights.add_(z, alpha=end - start)
    elif moves is None:
        weights.add_(z, alpha=-start).mul_(1 - decay).add_(z, alpha=end)
    else:
        weights.add_(z, alpha=-start)
        weights.addcmul_(weights, moves.to(weights.dtype), value=-decay).add_(z, alpha=end)


def judged(weights: Tensor, z: Tensor, at: float, threshold: Tensor | float) -> Tensor:
    """Which entries take part, judged by weights that stand at theta + at z where they do; exact for at = 0."""
    return (torch.sub(weights, z, alpha=at).abs_() if at else weights.abs()) <= threshold


def thresholds(weights: Tensor, sparsity: float) -> Tensor:
    """The magnitude up to which the smallest 1 - sparsity of a tensor's entries lie; a 0-d tensor in fp32."""
    count = max(1, round((1 - sparsity) * weights.numel()))
    return weights.detach().abs().flatten().float().kthvalue(count).values


class ZerothOptimizer(torch.optim.Optimizer):
    """Steps along the directions of pairs of passes; weights change in place, `p.grad` is neither read nor needed.

    Args:
        groups: parameter groups, of which `params` is taken.
        weight_decay: of tensors with two dimensions and more.
        sparsity: fraction of each such tensor's entries, those of largest magnitude now, that stay; 0: all move.

    Attributes:
        pending: seed and sign of the direction along which the weights are moved, else None.
        found: seed and difference of the two losses of each direction since the last step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, eps: float, weight_decay: float, sparsity: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": list(group["params"])} for group in groups], defaults)
        self.pending: tuple[int, float] | None = None
        self.found: list[tuple[int, float]] = []
        self._misjudged: dict[tuple[int, int], Tensor] = {}
        self._room: dict[torch.device, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if sparsity and p.dim() > 1:
                    self.state[p]["threshold"] = thresholds(p, sparsity)

    def perturb(self, seed: int) -> None:
        """Moves the weights to theta + eps z."""
        self.settle()
        self._sweep(seed, _nowhere, lambda group: group["eps"])
        self.pending = seed, 1.0

    def reverse(self) -> None:
        """Moves the weights from theta + eps z to theta - eps z."""
        assert self.pending is not None
        seed, sign = self.pending
        self._sweep(seed, lambda group: sign * group["eps"], lambda group: -sign * group["eps"])
        self.pending = seed, -sign

    def settle(self) -> None:
        """Puts moved weights back to theta."""
        if self.pending is not None:
            (seed, sign), self.pending = self.pending, None
            self._sweep(seed, lambda group: sign * group["eps"], _nowhere)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """theta <- theta - lr (g z + weight_decay theta), g z being the mean over the directions since the last step.

        Raises:
            UsageError: a closure, or no direction was tried since the last step.
        """
        if closure is not None or not self.found:
            raise UsageError("a zeroth-order optimizer steps after the two passes that a run makes of a batch")
        found, self.found = self.found, []
        if self.pending is not None and self.pending[0] != found[-1][0]:
            self.settle()
        for left in reversed(range(len(found))):
            seed, difference = found[left]
            sign, self.pending = (self.pending[1] if self.pending else 0.0), None
            share = difference / len(found)
            self._sweep(
                seed,
                lambda group, sign=sign: sign * group["eps"],  # type: ignore[misc]
                lambda group, share=share: -group["lr"] * share / (2 * group["eps"]),  # type: ignore[misc]
                _nowhere if left else lambda group: group["lr"] * group["weight_decay"],
                closing=True,
            )

    @torch.no_grad()
    def _sweep(self, seed: int, start: Rate, end: Rate, decay: Rate | None = None, closing: bool = False) -> None:
        """Moves all weights along one direction; `closing`: where they end is the new theta."""
        generators: dict[torch.device, torch.Generator] = {}
        before, self._misjudged = self._misjudged, {}
        for group in self.param_groups:
            a, b, less = start(group), end(group), decay(group) if decay else 0.0
            for p in group["params"]:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(seed)
                threshold = self.state[p].get("threshold") if p in self.state else None
                for place, piece in enumerate(_pieces(p)):
                    z, key = self._draw(piece, generators[p.device]), (id(p), place)
                    wide = piece.float() if piece.dtype in HALF else piece
                    moves = None
                    if threshold is not None:
                        moves = judged(wide, z, a, threshold)
                        if key in before:
                            moves.view(-1)[before[key]] ^= True
                    move(wide, z, a, b, moves, less if p.dim() > 1 else 0.0)
                    if wide is not piece:
                        piece.copy_(wide)
                    if moves is not None and b and not closing:
                        wrong = (judged(piece, z, b, threshold) != moves).flatten().nonzero().flatten()  # type: ignore[arg-type]
                        if len(wrong):
                            self._misjudged[key] = wrong

    def _draw(self, piece: Tensor, generator: torch.Generator) -> Tensor:
        """Normal numbers in the piece's shape, fp32."""
        room = self._room.get(piece.device)
        if room is None or len(room) < piece.numel():
            room = self._room[piece.device] = torch.empty(piece.numel(), device=piece.device)
        return room[: piece.numel()].normal_(generator=generator).view(piece.shape)


def _nowhere(group: dict[str, Any]) -> float:
    return 0.0


def _pieces(p: Tensor) -> tuple[Tensor, ...]:
    """A tensor's entries in pieces that share its memory; one piece where they do not lie in a row."""
    whole = p.detach()
    return whole.view(-1).split(PIECE.get(p.device.type, 1 << 16)) if whole.is_contiguous() else (whole,)


def attach(method: Any, run: Any, sparsity: float = 0.0) -> None:
    """Makes a run step by pairs of passes, `method.samples` pairs a batch, without gradients.

    Both passes of a pair draw the same random numbers (dropout).

    Args:
        method: with lr, eps, samples and weight_decay.

    Raises:
        UsageError: fp16 with its gradient scaler, or several processes.
    """
    if run.scaler.active:
        raise UsageError(f"{method.name} has no gradients to scale: use precision='bf16' or 'fp32'")
    draws = run.generator(method.name)

    def passes(run: Any, batch: Any) -> Generator[Any, Tensor, None]:
        for _ in range(method.samples):
            seed = int(torch.randint(2**62, (), generator=draws))
            state = randomness.capture(run.device)
            optimizer.perturb(seed)
            kept = False
            try:
                above = float((yield _own(batch)).detach())
                randomness.restore(state, run.device)
                optimizer.reverse()
                difference = above - float((yield _own(batch)).detach())
                kept = run.accumulate == 1 and math.isfinite(difference)
            finally:
                if not kept:
                    optimizer.settle()
            optimizer.found.append((seed, difference))

    @torch.no_grad()
    def freeze(run: Any) -> None:
        for p in run.model.parameters():
            if p.requires_grad:
                p.requires_grad_(False)
                frozen.append(p)

    def save(run: Any, state: dict[str, Any]) -> None:
        optimizer.settle()
        run.state[method.name]["found"] = [list(one) for one in optimizer.found]

    def restore(run: Any, state: dict[str, Any]) -> None:
        optimizer.found = [(seed, difference) for seed, difference in run.state[method.name].get("found", [])]

    run.in_passes(passes)
    groups = run.optimizer.param_groups
    optimizer = ZerothOptimizer(
        groups, lr=method.lr, eps=method.eps, weight_decay=method.weight_decay, sparsity=sparsity
    )
    run.replace_optimizer(lambda old, run: optimizer)
    frozen: list[Tensor] = []
    freeze(run)
    run.changes.call(lambda: [p.requires_grad_(True) for p in frozen] and None)
    run.changes.call(optimizer.settle)
    run.on("resize", freeze)
    run.on("checkpoint", save)
    run.on("restore", restore)


def _own(batch: Any) -> Any:
    """A batch that the loop may take entries out of."""
    return copy.copy(batch) if isinstance(batch, dict | list) else batch
