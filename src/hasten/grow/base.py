"""How large the weights are at each time of training: the protocol of growth, and what makes a run follow it.

A method of this family has one pure verb:

    stages(depth, steps) -> [(step, indices), ...]     depth: layers of the person's model; steps: of the planned run

At each named step the model's blocks become the present blocks `indices`, repeated ones as copies; the first stage has
step 0 and makes the model small, the last gives it its full depth. Two attributes say how the optimizer goes on:
`carry` (copies take over the state of what they copy; otherwise all state starts anew) and `warmup` (fraction of the
run's steps in which the learning rate rises after each growth). All of it happens inside the run: it is on the clock.
Methods that change weights in other ways `attach` themselves, through `run.resize`, after `check_growable`.
"""

from typing import Any, Protocol

from hasten.core.errors import UsageError


class Growth(Protocol):
    """A method that grows a model by copying layers."""

    @property
    def name(self) -> str: ...
    @property
    def carry(self) -> bool: ...
    @property
    def warmup(self) -> float: ...
    def stages(self, depth: int, steps: int) -> list[tuple[int, list[int]]]: ...


def attach(method: Growth, run: Any) -> None:
    """Makes the model small at once and grows it in the run.

    Raises:
        UsageError: the run's length is not known, the depth does not fit the method, or the host can't copy layers.
    """
    check_growable(method.name, run)
    if not hasattr(run.host, "stack_layers"):
        raise UsageError(f"{method.name} copies layers, and {type(run.model).__name__} shows no list of equal layers")
    stages = method.stages(len(run.host.layers), run.steps)
    rise = round(method.warmup * run.steps)
    changes, at = run.host.changes, {"stage": -1}  # what the model is now; run.state says what it was when saved

    def enter(run: Any, stage: int) -> None:
        """Brings the model, stage by stage, to the given one."""
        while at["stage"] < stage:
            at["stage"] += 1
            indices = stages[at["stage"]][1]
            run.resize(lambda run, indices=indices: _rebuilt(run, indices))
            if at["stage"] > 0 and not method.carry:
                run.optimizer.state.clear()
        run.state.setdefault(method.name, {})["stage"] = stage

    def grow(run: Any, stage: int) -> None:
        """As `enter`, once the run has begun for good: frees the layers that were left out or copied."""
        changes.forget(begin, begin + left_out.pop() if left_out else begin)
        before = len(changes)
        enter(run, stage)
        changes.forget(before)

    def step(run: Any) -> None:
        due = sum(run.step >= start for start, _ in stages) - 1
        if due > at["stage"] or left_out:
            grow(run, due)

    def restore(run: Any, state: dict[str, Any]) -> None:
        saved = run.state.get(method.name, {}).get("stage", at["stage"])
        if saved < at["stage"]:
            raise UsageError("the checkpoint holds the smaller model, and this run has grown it: resume in a new run")
        grow(run, saved)

    def rising(run: Any) -> float:
        since = run.step - stages[at["stage"]][0]
        return min(1.0, (since + 1) / rise) if at["stage"] > 0 and rise else 1.0

    begin = len(changes)
    enter(run, 0)
    left_out = [len(changes) - begin]  # what undoes the first stage, until the first step is made
    run.on("step", step)
    run.on("restore", restore)
    if rise:
        run.multiply_lr(rising)


def check_growable(name: str, run: Any) -> None:
    """Whether a run's weights can change shape.

    Raises:
        UsageError: its length is not known, several processes train, or weights or the optimizer's state are sharded.
    """
    if not run.steps:
        raise UsageError(f"{name} needs the number of training steps: pass steps=N")
    if run.processes > 1:
        raise UsageError(f"{name} makes new weights, which DDP and FSDP can't follow: train in one process")
    held = [
        *run.parameters(),
        *(v for kept in run.optimizer.state.values() if isinstance(kept, dict) for v in kept.values()),
    ]
    if any(hasattr(one, "device_mesh") for one in held):
        raise UsageError(
            f"{name} makes new weights, and these or their optimizer's state are sharded: gather them first"
        )


def _rebuilt(run: Any, indices: list[int]) -> dict[Any, Any]:
    """Makes the model's blocks the present blocks `indices`; new parameter to the parameter whose place it takes."""
    before = dict(run.model.named_parameters())
    if len(set(indices)) == len(indices):
        run.host.keep_layers(indices)
        return {}
    names = run.host.stack_layers(indices)
    after = dict(run.model.named_parameters())
    return {after[new]: before[old] for new, old in names.items()}
