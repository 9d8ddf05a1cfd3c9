"""The beginning of a run: checks, then the plan's methods. Families that change models install, others attach.

A method with an `attach(run)` of its own hooks the run itself; all others are attached by their family's base.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from hasten.core.errors import PlanError, UsageError
from hasten.core.options import Method
from hasten.hosts import recognise
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.train.precision import PRECISIONS


def attach_plan(run: Any, context: Context) -> None:
    """Checks every method of `run.plan`, then installs and attaches them in the plan's order.

    Raises:
        PlanError: a method can't take part in training, or lacks what it needs; nothing has been changed then.
    """
    have = context.have() | ({"steps"} if run.steps is not None else set())
    run.plan.check(have=have, host=run.host.kind)
    problems, bases = [], []
    for method in run.plan.methods:
        base = family(method)
        bases.append(base)
        if not any(hasattr(one, verb) for one, verb in ((base, "install"), (base, "attach"), (method, "attach"))):
            problems.append(
                f"{method.name} can't take part in training: its family neither changes a model nor hooks a run"
            )
        if run.processes > 1 and "weights.resize" in method.card.seams:
            problems.append(f"{method.name} makes new weights, which DDP and FSDP can't follow: train in one process")
    if problems:
        raise PlanError(problems, str(run.plan))
    mark = len(run.host.changes)
    try:
        for method, base in zip(run.plan.methods, bases, strict=True):
            if hasattr(base, "install") and not getattr(method, "training_only", False):
                run.resize(lambda _, method=method, base=base: _install(base, method, run, context))
            if hasattr(method, "attach"):
                method.attach(run)
            elif hasattr(base, "attach"):
                base.attach(method, run)
        run.hooks.fire("attached", run)
    except BaseException:
        run.finish()
        run.host.changes.undo(mark)
        raise


def family(method: Method) -> ModuleType:
    """The module that holds the family's protocol."""
    return importlib.import_module(f"hasten.{method.family}.base")


def _install(base: ModuleType, method: Method, run: Any, context: Context) -> None:
    base.install(method, run.host, context)


def find_host(model: nn.Module) -> Host:
    """The model's host; for a model that is not recognised (an encoder-decoder, say) the plain one, without layers."""
    try:
        return recognise(model)
    except UsageError:
        return Host(model)


def check_arguments(model: nn.Module, optimizer: Any, steps: Any, accumulate: Any, clip: Any, precision: Any) -> None:
    """Raises `UsageError` with all that is wrong with a run's arguments."""
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        problems.append(f"the optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    elif isinstance(optimizer, LBFGS):
        problems.append("LBFGS needs a closure, which a run does not have: use another optimizer")
    elif isinstance(model, nn.Module):
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            problems.append(
                "the optimizer holds none of the model's parameters: make it after prepare() and model.to()"
            )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        problems.append(f"steps must be a whole number of at least 1 or None, not {steps!r}")
    if not isinstance(accumulate, int) or accumulate < 1:
        problems.append(f"accumulate must be a whole number of at least 1, not {accumulate!r}")
    if clip is not None and not clip > 0:
        problems.append(f"clip must be above 0 or None, not {clip!r}")
    if precision not in PRECISIONS:
        problems.append(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if problems:
        raise UsageError("; ".join(problems))


def check_loss(loss: Any, graph: bool = True) -> None:
    """Raises `UsageError` where a loss is no tensor of one number or, with `graph`, depends on no weight."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or (graph and not loss.requires_grad):
        raise UsageError("run.backward takes a tensor of one number that depends on the weights: loss.mean()?")
