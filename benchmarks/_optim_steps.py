"""Steps of optimizers beside PyTorch's fused AdamW, on the matrices, norms and embedding of a Llama of 10M weights."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hasten.bench.figures import Figure, Reading, figure, race
from hasten.core.errors import HastenError
from hasten.hosts.recognise import recognise
from hasten.kernels import sinkhorn
from hasten.optim.base import MatrixOptimizer
from hasten.optim.llr import LLR
from hasten.optim.muon import Muon
from hasten.optim.sinkgd import SinkGD
from hasten.optim.swan import Swan
from hasten.train.run import Run

GOAL = 1.3
AGAINST = "torch's fused AdamW on the same model of 10M weights"


def llama() -> nn.Module:
    """12 layers of width 256, with a gradient at every weight."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=2048, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


@functools.cache
def baseline() -> torch.optim.Optimizer:
    return stepped(adamw(llama()))


@functools.cache
def matrices_by(method: Any) -> torch.optim.Optimizer:
    model = llama()
    matrices = [weight for _, weight in recognise(model).matrices()]
    return stepped(MatrixOptimizer(method, matrices, adamw(model)))


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step()
    return optimizer


def step_cost(method: Any, seconds: float) -> Reading:
    """Time of a step over the baseline's."""
    if isinstance(method, SinkGD) and sinkhorn.kernel() is None:
        raise HastenError("the native kernel can't be built here: install a C++ compiler")
    found = race(baseline().step, matrices_by(method).step, seconds=seconds).inverse()
    return found.but(weights=sum(p.numel() for group in baseline().param_groups for p in group["params"]))


def layerwise_cost(seconds: float) -> Reading:
    """AdamW's step with a rate for each matrix, and the estimates' part of it over a whole run.

    Facts: `estimate`, the time of one in baseline steps; `first_part`, the cost while there is one each `every` steps.
    """
    method, model = LLR(), llama()
    gradients = [parameter.grad for parameter in model.parameters()]
    run = Run(model, adamw(model), [torch.zeros(1)], method, steps=1_000)
    run.slice(lambda model, batch: torch.stack([p.sum() for p in model.parameters()]).sum(), steps=1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    matrices = [weight for _, weight in run.host.matrices()]

    def step() -> None:
        run.hooks.fire("gradients", run)
        run.optimizer.step()

    found = race(baseline().step, step, seconds=seconds / 2).inverse()
    estimate = race(baseline().step, lambda: method.multipliers(matrices), seconds=seconds / 2).inverse()
    parts = [(one.value, one.low or one.value, one.high or one.value) for one in (found, estimate)]
    value, low, high = (one + method.until * more / method.every for one, more in zip(*parts, strict=True))
    first = found.value + estimate.value / method.every
    return Reading(value, low, high, {**found.facts, "estimate": estimate.value, "first_part": first})


def state_memory(method: Any) -> Reading:
    """Bytes of an optimizer's state over AdamW's."""
    found, base = (held(one) for one in (matrices_by(method), baseline()))
    return Reading(found / base, facts={"bytes": found, "bytes_base": base})


def held(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 20 if quick else 120
    costs: dict[str, tuple[Callable[..., Reading], float | None]] = {
        "sinkgd_step": (functools.partial(step_cost, SinkGD()), GOAL),
        "sinkgd_momentum_step": (functools.partial(step_cost, SinkGD(momentum=0.9)), None),
        "llr_step": (layerwise_cost, GOAL),
        "swan_step": (functools.partial(step_cost, Swan()), None),
        "muon_step": (functools.partial(step_cost, Muon()), None),
    }
    for name, (measure, goal) in costs.items():
        cost = functools.partial(measure, seconds=seconds)
        yield figure(name, cost, unit="x the time", against=AGAINST, goal=goal, better="lower")
    held_by = {"sinkgd": SinkGD(), "sinkgd_momentum": SinkGD(momentum=0.9), "swan": Swan(), "muon": Muon()}
    for name, method in held_by.items():
        memory = functools.partial(state_memory, method)
        yield figure(f"{name}_state_memory", memory, unit="x the bytes", against="AdamW's state", better="lower")
