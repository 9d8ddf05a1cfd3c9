"""Real torch optimizers made of this family's pure updates: matrices in stacks, rules with common scalars, parts."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from hasten.core.errors import UsageError

STACK = 2**18  # numbers in a stack: what is read again and again while it is updated stays in a core's cache
COMMON = "common"  # the entry of an optimizer's state that holds what all parameters share


class Parts(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, as one.

    `param_groups` holds their groups one after another and `state` is common to all, so learning-rate schedulers,
    gradient scalers, `state_dict` and distributed checkpoints see one ordinary optimizer. The last part takes new
    groups.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{**group, "params": [*group["params"]]} for group in groups], {})
        self.parts, self._counts = parts, [len(part.param_groups) for part in parts]
        self.param_groups = groups
        for part in parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        start = 0
        for part, count in zip(self.parts, self._counts, strict=True):
            part.state, part.param_groups = self.state, self.param_groups[start : start + count]
            start += count

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the last part."""
        if not self.parts:
            super().add_param_group(param_group)
            return
        self.parts[-1].add_param_group(param_group)
        self.param_groups.append(self.parts[-1].param_groups[-1])
        self._counts[-1] += 1

    def split(self, matrices: list[Tensor]) -> None:
        """As `split_groups`, in each part."""
        self._share()
        for part in self.parts:
            split_groups(part, matrices)
        self._counts = [len(part.param_groups) for part in self.parts]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _keep_types(self, state_dict, sum(self._counts[:-1]))
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every part; a closure is evaluated once."""
        loss = evaluated(closure)
        self._share()
        for part in self.parts:
            part.step()
        return loss


class StackOptimizer(torch.optim.Optimizer):
    """Steps matrices by an update method; those of one shape, type and device together, as far as a cache holds them.

    Args:
        method: the update (`hasten.optim.base.Update`).
        matrices: [m, n] each.
    """

    def __init__(self, method: Any, matrices: list[Tensor]) -> None:
        self.method = method
        super().__init__([{"params": matrices}], {"lr": method.lr, "weight_decay": method.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = evaluated(closure)
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        rates = {p: (float(group["lr"]), float(group["weight_decay"])) for p, group in found}
        if self._step_in_place(rates):
            return loss
        for stack in stacks(rates):
            self._step_stack(stack, [rates[p][0] for p in stack], [rates[p][1] for p in stack])
        return loss

    def _begin(self, weights: list[Tensor]) -> None:
        for p in weights:
            if p not in self.state and (fresh := self.method.init(p[None])):
                self.state[p] = {name: value[0] for name, value in fresh.items()}

    def _step_in_place(self, rates: dict[Tensor, tuple[float, float]]) -> bool:
        """Whether the method has a step in place (`step_`) and took these matrices."""
        if not rates or not hasattr(self.method, "step_"):
            return False
        weights = list(rates)
        self._begin(weights)
        state = {name: [self.state[p][name] for p in weights] for name in self.state.get(weights[0], ())}
        gradients, (lr, decay) = [cast(Tensor, p.grad) for p in weights], zip(*rates.values(), strict=True)
        return bool(self.method.step_(weights, gradients, state, [*lr], [*decay]))

    def _step_stack(self, weights: list[Tensor], lr: list[float], decay: list[float]) -> None:
        gradients = _stacked([p.grad for p in weights])  # type: ignore[misc]
        self._begin(weights)
        names = list(self.state[weights[0]]) if weights[0] in self.state else []
        state = {name: _stacked([self.state[p][name] for p in weights]) for name in names}
        step, state = self.method.update(gradients, state)
        for name, value in state.items():
            for p, own in zip(weights, value.unbind(), strict=True):
                self.state[p][name].copy_(own)
        if any(decay):
            torch._foreach_mul_(weights, [1 - rate * d for rate, d in zip(lr, decay, strict=True)])
        steps = list(step.to(weights[0].dtype).unbind())
        if len(set(lr)) == 1:
            torch._foreach_add_(weights, steps, alpha=-lr[0])
        else:
            torch._foreach_add_(weights, torch._foreach_mul(steps, [-rate for rate in lr]))


class RuleOptimizer(torch.optim.Optimizer):
    """Steps every parameter by a rule (`hasten.optim.base.Rule`), whose common scalars live in `state["common"]`.

    Args:
        method: the rule.
        old: the person's optimizer, whose groups are taken over; their weight decay too unless the rule has its own.

    Raises:
        UsageError: sharded parameters, of which a process sees a part only.
    """

    def __init__(self, method: Any, old: torch.optim.Optimizer) -> None:
        self.method = method
        sharded = [p for group in old.param_groups for p in group["params"] if hasattr(p, "device_mesh")]
        if sharded:
            raise UsageError(f"{method.name} sums over all weights and can't see sharded ones: use DDP or one process")
        groups = taken(old, method.weight_decay)
        super().__init__(groups, {"lr": method.lr, "weight_decay": method.weight_decay or 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = evaluated(closure)
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not found:
            return loss
        weights: list[Tensor] = [p for p, _ in found]
        self._begin(weights)
        state: dict[str, Any] = {name: [self.state[p][name] for p in weights] for name in self.state[weights[0]]}
        state |= self.state[COMMON]
        decay = [group["weight_decay"] for _, group in found]
        base = float(found[0][1]["lr"]) / found[0][1].get("lr_factor", 1.0)
        changes, state = self.method.update([cast(Tensor, p.grad) for p in weights], weights, state, base, decay)
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.state[COMMON][name] = value
                continue
            for p, own in zip(weights, value, strict=True):
                self.state[p][name] = own
        scales = [float(group["lr"]) / base if base else 1.0 for _, group in found]
        if any(scale != 1 for scale in scales):
            changes = torch._foreach_mul(changes, scales)
        torch._foreach_add_(weights, list(changes))
        return loss

    def _begin(self, weights: list[Tensor]) -> None:
        new = [p for p in weights if p not in self.state]
        if not new and COMMON in self.state:
            return
        for name, value in self.method.init(new).items():
            if isinstance(value, Tensor):
                self.state[COMMON].setdefault(name, value)
            else:
                for p, own in zip(new, value, strict=True):
                    self.state[p][name] = own
        self.state[COMMON]  # there, even where a rule has no common scalar

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _keep_types(self, state_dict, len(self.param_groups))
        common = state_dict["state"].get(COMMON, {})
        self.state[COMMON] = {name: value.detach().clone() for name, value in common.items()}


def _keep_types(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], groups: int) -> None:
    """Gives the states of the first groups their saved number types back, which torch casts to the weights'."""
    saved = [place for group in state_dict["param_groups"] for place in group["params"]]
    own = [p for group in optimizer.param_groups[:groups] for p in group["params"]]
    for place, p in zip(saved, own, strict=False):
        for name, value in state_dict["state"].get(place, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def stacks(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters of one shape, type and device together, at most `STACK` numbers; sharded ones each by itself."""
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        alone = id(p) if hasattr(p, "device_mesh") else None
        found[p.shape, p.dtype, p.device, p.grad.dtype, alone].append(p)  # type: ignore[union-attr]
    most = {
        same: max(1, STACK // same[0].numel()) if same[2].type == "cpu" else len(all_) for same, all_ in found.items()
    }
    return [all_[at : at + most[same]] for same, all_ in found.items() for at in range(0, len(all_), most[same])]


def without(optimizer: torch.optim.Optimizer, left_out: Iterable[Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the same class, with the groups and the state of all but some parameters."""
    gone = {id(p) for p in left_out}
    twin = copy.copy(optimizer)
    twin.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in twin.__dict__ and k != "step"})
    groups = [{**g, "params": [p for p in g["params"] if id(p) not in gone]} for g in optimizer.param_groups]
    twin.param_groups = [group for group in groups if group["params"]]
    twin.state = defaultdict(dict, {p: dict(kept) for p, kept in optimizer.state.items() if id(p) not in gone})
    return twin


def taken(old: torch.optim.Optimizer, weight_decay: float | None) -> list[dict[str, Any]]:
    """The groups of an optimizer that another replaces: their parameters, how their rates compare, their decay.

    Args:
        weight_decay: the new optimizer's own; None takes each group's over.
    """
    first = _base_rate(old.param_groups[0])
    groups = []
    for group in old.param_groups:
        ratio = _base_rate(group) / first if first else 1.0
        kept: dict[str, Any] = {"params": group["params"], **({"lr_factor": ratio} if ratio != 1 else {})}
        if weight_decay is None:
            kept["weight_decay"] = group.get("weight_decay", 0.0)
        groups.append(kept)
    return groups


def _base_rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def split_groups(optimizer: torch.optim.Optimizer, matrices: list[Tensor]) -> None:
    """Gives each of the matrices a parameter group of its own, with the options of the one that it was in."""
    if isinstance(optimizer, Parts):
        optimizer.split(matrices)
        return
    mine, groups = {id(p) for p in matrices}, []
    for group in optimizer.param_groups:
        alone = [p for p in group["params"] if id(p) in mine]
        if len(alone) == len(group["params"]) == 1:
            groups.append(group)
            continue
        rest = [p for p in group["params"] if id(p) not in mine]
        groups += [{**group, "params": rest}] if rest else []
        groups += [{**group, "params": [p]} for p in alone]
    optimizer.param_groups = groups
