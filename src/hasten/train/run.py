"""The state of one training run and its events.

    run = Run(model, optimizer, loader, "optim/...", steps=1000)
    for batch in run:
        run.backward(loss_fn(run.model, batch))

The loop stays the person's own. `run.backward` is one micro-step: loss hooks, the backward pass and, each `accumulate`
batches, gradient hooks, clipping, the optimizer step, the schedule, zero_grad and step hooks.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hasten.core.errors import HastenError, UsageError
from hasten.core.plans import Plan
from hasten.hosts.base import Host
from hasten.hosts.changes import Changes
from hasten.hosts.context import Context
from hasten.train import checkpoint, distributed, randomness
from hasten.train.attach import attach_plan, check_arguments, check_loss, find_host
from hasten.train.events import Hooks
from hasten.train.passes import Passes
from hasten.train.precision import Scaler, autocast, wrap_forward
from hasten.train.rates import Rates
from hasten.train.stream import END, Stream
from hasten.train.trainer import LossFunction, Slice, train_slice
from hasten.train.verbs import Verbs

MOST_SKIPPED = 50


class NotFiniteError(HastenError, ArithmeticError):
    """The loss became NaN or infinite."""


class Run(Verbs):
    """One training run.

    Args:
        model: trained in place; under DDP or FSDP what `distributed.prepare` returned.
        optimizer: any `torch.optim.Optimizer` over the model's parameters; not one that needs a closure.
        loader: a `DataLoader` or any iterable of batches. Passes repeat until `steps`; without steps each `for` is one
            pass.
        plan: methods, as `Plan.of` takes them.
        host: where the model keeps its parts; found by the model's structure when None.
        context: calibration data, a draft, a teacher for methods that change the model.
        teacher, proxy, downstream, losses: those of the context, for a run without one; what methods' cards may need:
            a model to learn from, a small one to train, batches of a later task, (model, batch) -> [batch] losses.
        steps: optimizer steps in all.
        accumulate: batches per optimizer step. The last group of a pass without `steps` may be smaller; its gradients
            are the mean over the batches it has.
        clip: largest total norm of the gradients.
        precision: fp32, bf16 or fp16 (autocast in the model's forward, whose half-precision outputs come out as fp32).
        seed: of the run's own random state (`randomness`), its generators, and what methods draw.
        schedule: None, an `LRScheduler` (the run steps it once per optimizer step), or (step, steps) -> factor.
        resume: a folder that `save` wrote; the other arguments must be fresh objects like those of the saved run.

    Attributes:
        step: finished optimizer steps.
        state: per method name, what the method keeps: JSON-able values and tensors, saved in checkpoints.
        changes: undone by `finish`; for what a method changes on the model while it trains.
        skipped: optimizer steps left out because fp16 gradients overflowed. They do not count as steps.
        gradient_norm: total norm of the last step's gradients before clipping, a 0-d tensor; None without clip.

    Raises:
        UsageError: arguments out of range, a plan that can't train this model; nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Iterable[Any],
        plan: Any = "baseline",
        *,
        host: Host | None = None,
        context: Context | None = None,
        teacher: nn.Module | None = None,
        proxy: nn.Module | None = None,
        downstream: Iterable[Any] | None = None,
        losses: Callable[[nn.Module, Any], torch.Tensor] | None = None,
        steps: int | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        precision: str = "fp32",
        seed: int = 0,
        schedule: LRScheduler | Callable[[int, int | None], float] | None = None,
        resume: str | pathlib.Path | None = None,
    ) -> None:
        check_arguments(model, optimizer, steps, accumulate, clip, precision)
        self.model, self.optimizer, self.loader, self.plan = model, optimizer, loader, Plan.of(plan)
        self.steps, self.accumulate, self.clip, self.precision, self.seed = steps, accumulate, clip, precision, seed
        self.host = host or find_host(distributed.unwrap(model))
        self.processes, self.rank = distributed.processes(), distributed.rank()
        self.step = self.skipped = 0
        self.state: dict[str, dict[str, Any]] = {method.name: {} for method in self.plan.methods}
        self.changes = Changes()
        self.gradient_norm: torch.Tensor | None = None
        self.rates = Rates(schedule)
        self.hooks = Hooks()
        self.stream = Stream(loader, self.device, lambda: self.hooks.fire("pass", self))
        self.passes = Passes()
        self.generators: dict[str, torch.Generator] = {}
        self.scaler = Scaler(precision, self.device)
        self.own_random = randomness.Own(seed + self.rank, self.device)
        self._in_hand = self._at_end = self._finished = False
        self._micro = 0
        self._sum: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._held: list[torch.Tensor] | None = None
        self._saved: tuple[int, pathlib.Path] | None = None
        self._sync = contextlib.ExitStack()
        if self.processes > 1 and accumulate > 1 and steps is None and self.stream.length() is None:
            raise UsageError("accumulating over several processes needs steps=N or a loader with a length")
        given = {"teacher": teacher, "proxy": proxy, "downstream": downstream, "losses": losses}
        self.context = context or Context(**given, seed=seed)  # type: ignore[arg-type]
        attach_plan(self, self.context)
        wrap_forward(model, precision, self.device, self.changes)
        if resume is not None:
            checkpoint.load(self, pathlib.Path(resume))
            self._saved = self.step, pathlib.Path(resume)

    # What people and methods read.

    @property
    def progress(self) -> float:
        """The finished part of the run, 0 to 1.

        Raises:
            UsageError: the run has no number of steps.
        """
        if self.steps is None:
            raise UsageError("this needs the number of training steps: pass steps=N")
        return self.step / self.steps

    @property
    def done(self) -> bool:
        """Whether all steps are made; without steps, whether the pass is at its end."""
        return self._at_end if self.steps is None else self.step >= self.steps

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def accumulated(self) -> int:
        """Batches whose gradients wait for the next optimizer step."""
        return self._micro

    def loss(self) -> float:
        """The last optimizer step's loss after the loss hooks, a mean over its batches and processes; NaN before it."""
        return math.nan if self._loss is None else float(self._loss)

    def parameters(self) -> list[torch.Tensor]:
        """The model's parameters, then those that only the optimizer holds."""
        if self._held is None:
            held = {id(p): p for p in self.model.parameters()}
            for group in self.optimizer.param_groups:
                held.update({id(p): p for p in group["params"]})
            self._held = list(held.values())
        return self._held

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The run's autocast region, for computation outside the model's forward."""
        return autocast(self.precision, self.device)

    @property
    def losses(self) -> Callable[[nn.Module, Any], torch.Tensor] | None:
        """(model, batch) -> [batch], the loss of each example; None where the person gave none."""
        return self.context.losses

    # The loop.

    def __iter__(self) -> Iterator[Any]:
        self._drop()  # of a loop that was left by an exception
        if self.steps is None:
            self._at_end = False
        while (batch := self._take()) is not END:
            try:
                yield batch
            except GeneratorExit:  # the loop was left with this batch in hand: it is dropped
                self._drop()
                raise

    def _take(self) -> Any:
        """The next batch through the batch hooks, or END."""
        if self._finished:
            raise UsageError("this run is finished: make a new one")
        if self._in_hand:
            raise UsageError("run.backward(loss) was not called for the last batch: call it once for each batch")
        if not self.passes.open:
            raw = END if self.done else self.stream.next(repeat=self.steps is not None)
            if raw is END:
                self._at_end = True
                if self._micro:
                    self._rescale(self.accumulate / self._micro)
                    self._finish_step()
                return END
            batch = self.hooks.fold("batch_shaped", self, self.hooks.fold("batch_chosen", self, raw))
            if self.passes.claimed:
                self.passes.begin(self, batch)
        if self.passes.open:
            batch = self.passes.take()
        last = self._micro + 1 == self.accumulate or (self.steps is None and self.stream.at_end())
        self._sync.enter_context(distributed.exchange(self.model, last))
        self._in_hand = True
        self.hooks.fire("forward", self, batch)
        return batch

    def _drop(self) -> None:
        self._in_hand = False
        self._sync.close()
        self.passes.close()

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of one batch's loss (a 0-d tensor), and the optimizer step when its group is complete.

        Raises:
            UsageError: called twice for a batch, or the loss is no scalar that depends on the model.
            NotFiniteError: the loss is NaN or infinite and no gradient scaler (fp16) guards the step. Raised before the
                step on a CPU; one step later on an accelerator, which is not kept waiting for the value.
        """
        if not self._in_hand:
            raise UsageError(
                "run.backward(loss) was called twice for a batch, or without one: call it once for each batch"
            )
        if self.passes.open:
            check_loss(loss, graph=False)
            over, found, seen = self.passes.send(loss)
            if not over:
                self._in_hand = False
                return
            if found is None:
                self._count(seen)
                return
            loss = found
        loss = self.hooks.fold("loss", self, loss)
        check_loss(loss)
        loss = loss.reshape(())
        self.scaler.scale(loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self._count(loss.detach().float())

    def _count(self, seen: torch.Tensor) -> None:
        """One batch is done, with its gradients where there are any."""
        self._sum = seen if self._sum is None else self._sum + seen
        self._drop()
        self.hooks.fire("backward", self)
        self._micro += 1
        if self._micro == self.accumulate:
            self._finish_step()

    def _finish_step(self) -> None:
        self.assert_finite()
        assert self._sum is not None
        self._loss = distributed.mean(self._sum / self._micro)
        self._sum, self._micro = None, 0
        if self._loss.device.type == "cpu":
            self.assert_finite()
        self.scaler.unscale(self.optimizer)
        self.hooks.fire("gradients", self)
        if self.clip is not None:
            self.gradient_norm = distributed.clip_gradients(self.parameters(), self.clip)
        back = self.rates.before_step(self)
        stepped = self.scaler.step(self.optimizer)
        self.step += stepped
        self.skipped += not stepped
        self.rates.after_step(self, back, stepped)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters():
            parameter.grad = None
        if stepped:
            self.hooks.fire("step", self)
        elif self.scaler.skipped >= MOST_SKIPPED:
            raise NotFiniteError(
                f"fp16 gradients overflowed {MOST_SKIPPED} times in a row after step {self.step}: use bf16"
            )

    def assert_finite(self) -> None:
        """Raises `NotFiniteError` when the last loss is NaN or infinite and no gradient scaler guards the step."""
        if self.scaler.active or self._loss is None or math.isfinite(value := float(self._loss)):
            return
        at = self.step + (self._loss.device.type == "cpu")
        self._loss = None
        kept = f"; the checkpoint of step {self._saved[0]} is in {self._saved[1]}" if self._saved else ""
        raise NotFiniteError(
            f"the loss is {value} at step {at}: lower the learning rate, or clip the gradients (clip=1.0){kept}"
        )

    def _rescale(self, factor: float) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def train_step(self, loss_fn: LossFunction) -> bool:
        """One optimizer step on the next batches; False where the run was at its end."""
        before = self.step
        try:
            while self.step == before and (batch := self._take()) is not END:
                self.backward(loss_fn(self.model, batch))
        except BaseException:
            self._drop()
            raise
        return self.step > before

    def slice(
        self, loss_fn: LossFunction, *, steps: int | None = None, seconds: float | None = None, **more: Any
    ) -> Slice:
        """Trains for some optimizer steps or seconds; see `hasten.train.trainer.train_slice`."""
        return train_slice(self, loss_fn, steps=steps, seconds=seconds, **more)

    # Randomness, evaluation, checkpoints, the end.

    def randomness(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the random states (Python, NumPy, torch) are this run's own, begun from `seed`."""
        return self.own_random.use()

    @property
    def in_hand(self) -> bool:
        """Whether a batch waits for its backward pass."""
        return self._in_hand or self.passes.open

    def progress_state(self) -> dict[str, Any]:
        return {"micro": self._micro, "sum": self._sum, "loss": self._loss, "at_end": self._at_end}

    def restore_progress(self, state: dict[str, Any]) -> None:
        self._micro, self._sum, self._loss, self._at_end = (state[k] for k in ("micro", "sum", "loss", "at_end"))

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """The model with its evaluation weights, in eval mode, without gradients; training then goes on undisturbed."""
        modes = [(module, module.training) for module in self.model.modules()]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(randomness.preserved(self.device))
            for hook in self.hooks.of("evaluate"):
                stack.enter_context(hook(self))
            self.model.eval()
            try:
                yield self.model
            finally:
                for module, mode in modes:
                    module.training = mode

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a checkpoint folder, whole or not at all; every process calls it. See `hasten.train.checkpoint`."""
        checkpoint.save(self, pathlib.Path(path))
        self._saved = self.step, pathlib.Path(path)

    @classmethod
    def load(cls, path: str | pathlib.Path, *args: Any, **kwargs: Any) -> "Run":
        """A run over fresh objects that goes on from a checkpoint: `Run(*args, **kwargs, resume=path)`."""
        return cls(*args, **kwargs, resume=path)

    def finish(self) -> None:
        """Ends the run: undoes what it changed on the model for training only; the trained weights stay."""
        self._sync.close()
        self.changes.undo()
        self._finished = True
