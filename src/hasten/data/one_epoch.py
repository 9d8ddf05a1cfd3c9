"""One epoch: a larger corpus once instead of a small one many times, without dropout, and model size to match.

No example is seen twice, so that nothing is learnt by heart and dropout only slows training down (section 3 of the
paper). Where a data set names a larger one that it is a part of (its attribute `larger`), the run trains on that, in an
order that follows from the seed; a run that would need examples again does not begin.

For a model of P weights that processes T tokens, a step costs as P and there are as many as T, so at equal cost P T the
paper keeps its ratio, T / P about 5 (section 4), with r = T / P as it is planned:

    P' = P sqrt(r / 5),    T' = T sqrt(5 / r)

The run notes P' and T', with the steps that T' makes, among the plan's facts; the model is the person's to change.

Departures: P counts all trainable weights. `ratio` is an option: later work (2203.15556) finds 20 tokens a weight.
Where T' is more than one pass has, T' is the pass and P' is P T / T'. Weight decay stays the optimizer's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.data._batches import tensors
from hasten.data._examples import Examples
from hasten.data._samplers import Chosen

CARD = Card(
    title="One Epoch Is All You Need",
    paper="1906.06669",
    seams=("batch.select",),
    effects=("time", "steps", "quality"),
    lossless=False,
    claim="LM1B: as good as ten epochs with dropout on a tenth of the data in 1.9 to 3.3x less wall-clock time",
    claimed=1.9,
    identity="None: the order of the examples is the method's own, also where nothing else changes.",
    experiment=("text-lm(epochs=10, dropout=0.1, goal=3.45)", "data/one_epoch"),
    when="More data of the same kind can be had: pre-training on text, images or sound without labels.",
    when_not="All the data there is must be seen several times; fine-tuning on few examples.",
)


def naive_one_epoch(parameters: float, tokens: float, ratio: float, corpus: float = math.inf) -> tuple[float, float]:
    """The size and the tokens of equal cost, by halving the range that the size is in.

    Args:
        parameters: P. tokens: T. ratio: wanted T / P. corpus: tokens of one pass.

    Returns:
        P' and T'.
    """
    cost = parameters * tokens
    low, high = 1e-9, max(1.0, cost)
    for _ in range(400):
        middle = math.sqrt(low) * math.sqrt(high)
        if cost / middle / middle > ratio:
            low = middle
        else:
            high = middle
    size = low
    if cost / size > corpus:
        size = cost / corpus
    return size, cost / size


def one_epoch(parameters: float, tokens: float, ratio: float, corpus: float = math.inf) -> tuple[float, float]:
    """As `naive_one_epoch`, in closed form."""
    size = parameters * math.sqrt(tokens / parameters / ratio)
    size = max(size, parameters * (tokens / corpus))
    return size, parameters * (tokens / size)


@dataclass(frozen=True)
class Advice:
    """What fits a budget.

    Attributes:
        parameters: weights of the model. tokens: that it processes. steps: optimizer steps that they make.
        ratio: tokens a weight, as it was planned.
    """

    parameters: int
    tokens: int
    steps: int
    ratio: float


def advise(parameters: int, steps: int, batch_tokens: int, *, ratio: float = 5.0, corpus: float = math.inf) -> Advice:
    """The model's size and the number of steps that reach the lowest loss at the cost of a planned run.

    Args:
        parameters: weights of the planned model. steps: planned. batch_tokens: of one optimizer step.
        ratio: tokens a weight. corpus: tokens that one pass has.

    Raises:
        UsageError: a number that is not above 0.
    """
    if min(parameters, steps, batch_tokens, ratio, corpus) <= 0:
        raise UsageError("advise takes numbers above 0: weights, steps, tokens of a step, ratio, tokens of the corpus")
    size, tokens = one_epoch(parameters, steps * batch_tokens, ratio, corpus)
    return Advice(round(size), round(tokens), max(1, round(tokens / batch_tokens)), steps * batch_tokens / parameters)


class _Larger(Examples):
    """The examples of the larger data set, or of the loader's own where it names none."""

    @property
    def dataset(self) -> Any:
        larger = getattr(self.loader.dataset, "larger", None)
        return self.loader.dataset if larger is None else larger


@dataclass(frozen=True)
class OneEpoch(Method):
    """One pass over all the data there is, without dropout."""

    ratio: float = option(5.0, "tokens a weight that the advice aims at", above=0)
    dropout: bool = option(False, "leave the model's dropout on")

    def attach(self, run: Any) -> None:
        """Replaces the loader, switches dropout off until the run is finished and notes the advice.

        Raises:
            UsageError: the run's steps need more batches than one pass has.
        """
        from hasten.hosts.dropout import dropout_off

        if isinstance(run.loader, DataLoader) and not isinstance(run.loader.dataset, IterableDataset):
            examples = _Larger(self.name, run.loader, run.device)
            sampler = Chosen(len(examples), run.seed, run.rank, run.processes)
            loader = examples.loader_over(sampler)
        else:
            examples, loader = None, run.loader
        self._check(run, loader)
        if examples is not None:
            run.replace_loader(loader)
            self._advise(run, examples)
        run.on("pass", self._once)
        if not self.dropout:
            run.context.note(self.name, dropout_off=len(dropout_off(run.host.model, run.changes)))

    def _check(self, run: Any, loader: Any) -> None:
        needed = None if run.steps is None else run.steps * run.accumulate
        try:
            there = len(loader)
        except TypeError:
            return
        if needed is not None and needed > there:
            raise UsageError(
                f"{self.name} sees no example twice: {run.steps} steps need {needed} batches and one pass has {there}: "
                f"give more data, name a larger data set as the data set's attribute larger, or pass steps="
                f"{max(1, there // run.accumulate)}"
            )

    def _once(self, run: Any) -> None:
        if run.stream.epoch > 0:
            raise UsageError(
                f"{self.name} sees no example twice, and the data is at its end after {run.step} steps: "
                "give more data or fewer steps"
            )

    def _advise(self, run: Any, examples: Examples) -> None:
        tokens = next((part.numel() for part in tensors(_listed(examples[0])) if not part.is_floating_point()), 0)
        if run.steps is None or tokens < 2:
            return
        size = sum(parameter.numel() for parameter in run.host.model.parameters() if parameter.requires_grad)
        batch = examples.batch_size * tokens * run.accumulate * run.processes
        found = advise(size, run.steps, batch, ratio=self.ratio, corpus=len(examples) * tokens)
        run.context.note(
            self.name,
            parameters=size,
            tokens_a_weight=round(found.ratio, 3),
            advised_parameters=found.parameters,
            advised_tokens=found.tokens,
            advised_steps=found.steps,
        )


def _listed(example: Any) -> Any:
    """An example as a batch that `tensors` reads."""
    return example if isinstance(example, torch.Tensor | dict | list | tuple) else []


METHOD = OneEpoch
