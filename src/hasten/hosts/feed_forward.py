"""Feed-forward layers by what they compute: which linear layer is the gate, and what the activation does.

Nothing goes by names: a form is taken only where it gives the module's own output on random inputs.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LEAST = 1e-3  # relative error up to which a form is the module's
_PROBES = 5


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """down(act(gate(x)) * up(x)), or down(act(gate(x))) where `up` is None. All are names of the module's children."""

    gate: str
    down: str
    activation: str
    up: str | None = None

    def __call__(self, part: nn.Module, x: Tensor) -> Tensor:
        hidden = getattr(part, self.activation)(getattr(part, self.gate)(x))
        if self.up is not None:
            hidden = hidden * getattr(part, self.up)(x)
        return getattr(part, self.down)(hidden)  # type: ignore[no-any-return]


@torch.no_grad()
def find(part: nn.Module) -> FeedForward | None:
    """The form of a module, or None where it has none of these: other children, other wiring, or dropout."""
    children = dict(part.named_children())
    linears = {name: child for name, child in children.items() if type(child) is nn.Linear}
    rest = [name for name in children if name not in linears and not _idle(children[name])]
    if len(linears) not in (2, 3) or len(rest) != 1 or any(True for _ in children[rest[0]].parameters()):
        return None
    training = part.training
    part.eval()
    try:
        for form in _forms(linears, rest[0]):
            given = _probe(linears[form.gate])
            wanted = part(given)
            if isinstance(wanted, Tensor) and _same(form(part, given), wanted):
                return form
    except Exception:  # a module of another wiring refuses this input, or returns something else
        return None
    finally:
        part.train(training)
    return None


@torch.no_grad()
def relu_shift(activation: nn.Module, like: Tensor) -> float | None:
    """The s for which an activation is relu(z - s), s >= 0; None where it is another function."""
    z = torch.linspace(-8, 8, 257, device=like.device, dtype=torch.float32)
    found = activation(z)
    if not isinstance(found, Tensor) or found.shape != z.shape:
        return None
    shift = round(8 - float(found[-1]), 5)
    return shift if shift >= 0 and torch.allclose(found, torch.relu(z - shift), atol=1e-5) else None


def _idle(child: nn.Module) -> bool:
    """Whether a child does nothing to its input, in training neither."""
    return isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)


def _probe(linear: nn.Linear) -> Tensor:
    make = torch.Generator().manual_seed(0)
    return torch.randn(1, _PROBES, linear.in_features, generator=make).to(linear.weight)


def _forms(linears: dict[str, nn.Linear], activation: str) -> Iterator[FeedForward]:
    for names in itertools.permutations(linears):
        gate, down, up = names[0], names[-1], names[1] if len(names) == 3 else None
        first, last = linears[gate], linears[down]
        fits = last.in_features == first.out_features
        if up is not None:
            fits = fits and linears[up].weight.shape == first.weight.shape
        if fits:
            yield FeedForward(gate, down, activation, up)


def _same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    size, least = wanted.double().norm(), max(LEAST, 4 * torch.finfo(wanted.dtype).eps)
    return bool((found.double() - wanted.double()).norm() <= least * size) and bool(size > 0)
