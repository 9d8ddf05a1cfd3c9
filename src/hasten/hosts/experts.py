"""Dense decoders of one architecture become one decoder of experts: in its feed-forward parts and in its attention.

Feed-forward: a router scores the experts of each token, p = softmax(W_r x), and the token goes through the `top` best
ones: y = sum_i p_i FFN_i(x). Tokens are sorted by expert, so that each expert runs once a layer, on its tokens only.

Attention: every token goes through every expert, y = sum_i g_i MHA_i(x), g = softmax(W_a x). The experts' heads lie
side by side in one attention of N times as many heads: sum_i g_i W_o,i h_i is one product of the stacked W_o with the
heads, each times its expert's g. So the model's own attention function, masks, rotary embedding and cache serve.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import output_tensor
from hasten.hosts.base import Host

QUERY, KEY, VALUE, OUTPUT = "q_proj", "k_proj", "v_proj", "o_proj"
Expert = Callable[[Tensor], Tensor]


def mix_top(x: Tensor, gates: Tensor, experts: Sequence[Expert], top: int) -> Tensor:
    """sum over each token's `top` largest gates of gate times expert.

    Args:
        x: [tokens, width]; gates: [tokens, N]; experts: N functions [some, width] -> [some, width].

    Returns:
        [tokens, width], in x's dtype.
    """
    weights, chosen = gates.topk(top, -1)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    tokens = order // top
    counts = flat.bincount(minlength=len(experts)).tolist()
    parts = [expert(part) for expert, part in zip(experts, x[tokens].split(counts), strict=True) if len(part)]
    mixed = torch.cat(parts) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, mixed.to(x.dtype))


def router_losses(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(load balance, z) of a router's logits [tokens, N], fp32 scalars.

    Load balance is N sum_i f_i P_i, of the share f_i of tokens that go to expert i and its mean gate P_i: 1 where all
    experts get equally many, N where one gets all. z is the mean of the squared logsumexp.
    """
    logits = logits.float()
    gates = logits.softmax(-1)
    chosen = gates.topk(top, -1).indices.flatten().bincount(minlength=logits.shape[-1])
    share = chosen / chosen.sum()
    return logits.shape[-1] * (share * gates.mean(0)).sum(), logits.logsumexp(-1).square().mean()


class ExpertFeedForward(nn.Module):
    """Stands where a feed-forward part was.

    Args:
        experts: modules from [..., width] to [..., width].
        router: [N, width], initial weights.
        top: experts of a token. normalise: whether their gates are divided by their sum.

    Attributes:
        sink: while it is a list, each forward with gradients in training appends its `router_losses`.
    """

    sink: list[tuple[Tensor, Tensor]] | None = None

    def __init__(self, experts: Sequence[nn.Module], router: Tensor, top: int, normalise: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Parameter(router)
        self.top, self.normalise = top, normalise

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states.flatten(0, -2)
        logits = nn.functional.linear(x.float(), self.router.float())
        gates = logits.softmax(-1)
        if self.normalise:
            gates = gates / gates.topk(self.top, -1).values.sum(-1, keepdim=True)
        if self.sink is not None and self.training and torch.is_grad_enabled():
            self.sink.append(router_losses(logits, self.top))
        return mix_top(x, gates, list(self.experts), self.top).view_as(hidden_states)


def stack_heads(weights: Sequence[Tensor] | Tensor, shared: int) -> Tensor:
    """Rows of N experts' projections side by side: N of [heads * e, ...] to [N * heads * e, ...].

    Args:
        shared: number of key and value heads that all experts share: each one's queries then stand together, of all
            experts one after another; 1 where every expert has keys and values of its own: expert after expert.
    """
    rows = torch.stack(tuple(weights)).unflatten(1, (shared, -1))
    return rows.transpose(0, 1).flatten(0, 2)


def gate_heads(heads: Tensor, gates: Tensor, shared: int) -> Tensor:
    """Each head's output times its expert's gate: heads [..., N * heads * e] in `stack_heads` order, gates [..., N]."""
    parts = heads.unflatten(-1, (shared, gates.shape[-1], -1))
    return (parts * gates[..., None, :, None].to(heads.dtype)).flatten(-3)


class GatedOutput(nn.Module):
    """The stacked output projection; the gates come from the attention around it.

    Args:
        weight: [width, N * heads * e]; bias: [N, width] or None.
    """

    gates: Tensor | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.shared = shared

    def forward(self, heads: Tensor) -> Tensor:
        assert self.gates is not None, "called outside its attention"
        out = nn.functional.linear(gate_heads(heads, self.gates, self.shared), self.weight)
        return out if self.bias is None else out + self.gates.to(out.dtype) @ self.bias


class ExpertAttention(nn.Module):
    """Stands where an attention was: `inner` is that attention with the experts' heads side by side.

    Args:
        router: [N, width], initial weights.
    """

    def __init__(self, inner: nn.Module, router: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.router = nn.Parameter(router)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Any = getattr(self.inner, OUTPUT)
        output.gates = nn.functional.linear(hidden_states.float(), self.router.float()).softmax(-1)
        try:
            return self.inner(hidden_states, *args, **kwargs)
        finally:
            output.gates = None


def upcycle(
    host: Host,
    hosts: Sequence[Host],
    router: Callable[[int, int], Tensor],
    *,
    top: int = 1,
    normalise: bool = False,
    attention: bool = True,
    share_kv: bool = False,
) -> dict[nn.Parameter, nn.Parameter | None]:
    """Makes the host's model a mixture of the dense models `hosts`, which may hold the host itself.

    Each expert starts as the part of one dense model. All else (norms, embeddings, shared keys and values, attention
    where `attention` is False) becomes the mean over the dense models. Undone with the host's other changes.

    Args:
        router: (experts, width) -> [experts, width], the first weights of a router.
        top, normalise: of `ExpertFeedForward`. share_kv: keys and values are one for all attention experts.

    Returns:
        {new parameter: the parameter of the model whose place it takes, or None for a router's}.

    Raises:
        UsageError: the models differ in their shapes, or have parts of a kind that is not known; nothing is changed.
    """
    check_alike(host, hosts)
    if attention:
        for layer in host.layers:
            _check_attention(layer.attention)
    depth, like = range(len(host.layers)), next(host.model.parameters())
    feeding = [[_copied(one.layers[i].mlp, one is host, like) for one in hosts] for i in depth]
    attending = [[_weights(one.layers[i].attention, like) for one in hosts] for i in depth if attention]
    left_out = {id(p) for layer in host.layers for p in layer.mlp.parameters()}  # type: ignore[union-attr]
    if attention:
        left_out |= {
            id(p)
            for layer in host.layers
            for name in (QUERY, OUTPUT) + ((KEY, VALUE) if not share_kv else ())
            for p in getattr(layer.attention, name).parameters()
        }
    _average(host, hosts, left_out)
    sources: dict[nn.Parameter, nn.Parameter | None] = {}
    for i, layer in enumerate(host.layers):
        assert layer.mlp is not None and layer.attention is not None
        own = dict(layer.mlp.named_parameters())
        width = _width(host, layer.attention)
        made = ExpertFeedForward(feeding[i], router(len(hosts), width).to(like), top, normalise)
        for expert in made.experts:
            sources.update({new: own[name] for name, new in expert.named_parameters()})
        sources[made.router] = None
        made.train(layer.mlp.training)
        if attention:
            inner = _widened(layer.attention, attending[i], share_kv)
            wide = ExpertAttention(inner, router(len(hosts), width).to(like))
            before = dict(layer.attention.named_parameters())
            sources.update({new: before[name] for name, new in inner.named_parameters()})
            sources[wide.router] = None
            wide.train(layer.attention.training)
            host.replace(f"{layer.path}.{layer.attention_path}", wide)
        host.replace(f"{layer.path}.{layer.mlp_path}", made)
    return sources


def check_alike(host: Host, hosts: Sequence[Host]) -> None:
    """Raises `UsageError` where dense models have other parts or shapes than the host's, or share its weights."""
    shapes = {name: p.shape for name, p in host.model.named_parameters()}
    name = type(host.model).__name__
    if any(layer.mlp is None or layer.attention is None for layer in host.layers):
        raise UsageError(f"a block of {name} lacks its attention or its feed-forward part: use a whole dense model")
    if any(isinstance(layer.mlp, ExpertFeedForward) for layer in host.layers):
        raise UsageError(f"{name} is a mixture of experts already")
    own = {id(p) for p in host.model.parameters()}
    for place, one in enumerate(hosts):
        if one is host:
            continue
        other = {key: p.shape for key, p in one.model.named_parameters()}
        if other != shapes:
            wrong = next(key for key in (*shapes, *other) if shapes.get(key) != other.get(key))
            found = [None if of.get(wrong) is None else tuple(of[wrong]) for of in (shapes, other)]
            raise UsageError(
                f"experts must have the model's architecture: {wrong} is {found[0]} in the model and {found[1]} in "
                f"dense model {place}"
            )
        if any(id(p) in own for p in one.model.parameters()):
            raise UsageError(f"dense model {place} shares weights with the model: pass a copy")


def run_parallel(host: Any) -> None:
    """Makes every block compute x + attention(norm(x)) + feed_forward(norm'(x)), both from the block's input.

    A block that does so already stays as it is. Undone with the host's other changes.

    Raises:
        UsageError: a block of another form (norms behind its sublayers, or a stream that is more than a sum).
    """
    anatomy = host.anatomy
    if anatomy.parallel:
        return
    plain = anatomy.additive and not anatomy.attention.after and not anatomy.mlp.after and len(anatomy.mlp.modules) == 1
    if not plain:
        raise UsageError(f"the blocks of {type(host.model).__name__} are no plain sum of sublayers: set parallel=false")
    for layer in host.layers:
        host.changes.set(layer.block, "forward", functools.partial(_parallel, layer.block, anatomy))


def _parallel(block: nn.Module, anatomy: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    def through(part: Any, *given: Any, **named: Any) -> Tensor:
        inputs = hidden_states
        for norm in reversed(part.before):
            inputs = block.get_submodule(norm)(inputs)
        return output_tensor(block.get_submodule(part.modules[0])(inputs, *given, **named))

    grown = hidden_states + through(anatomy.attention, *args, **kwargs) + through(anatomy.mlp)
    return (grown,) + (None,) * (anatomy.length - 1) if anatomy.length else grown


def _copied(part: nn.Module | None, own: bool, like: Tensor) -> nn.Module:
    assert part is not None
    return part if own else copy.deepcopy(part).to(like).requires_grad_(True)


def _check_attention(part: nn.Module | None) -> None:
    names = (QUERY, KEY, VALUE, OUTPUT)
    linears = all(type(getattr(part, name, None)) is nn.Linear for name in names)
    if not linears or not all(
        isinstance(getattr(part, one, None), int) for one in ("head_dim", "num_key_value_groups")
    ):
        raise UsageError(
            f"{type(part).__name__} is no attention of linear layers {', '.join(names)} with head_dim and "
            "num_key_value_groups: set attention=false to leave the attention dense"
        )


def _weights(part: nn.Module | None, like: Tensor) -> dict[str, Tensor]:
    return {name: p.detach().to(like, copy=True) for name, p in part.named_parameters()}  # type: ignore[union-attr]


@torch.no_grad()
def _average(host: Host, hosts: Sequence[Host], left_out: set[int]) -> None:
    """The mean over the dense models of all parameters that are in no expert."""
    others = [dict(one.model.named_parameters()) for one in hosts]
    for name, parameter in host.model.named_parameters():
        if id(parameter) not in left_out:
            before = parameter.detach().clone()
            mean = torch.stack([of[name].detach().to(parameter.device).float() for of in others]).mean(0)
            parameter.copy_(mean)
            host.changes.call(functools.partial(_put_back, parameter, before))


@torch.no_grad()
def _put_back(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _widened(part: nn.Module, experts: Sequence[dict[str, Tensor]], share_kv: bool) -> nn.Module:
    """A copy of an attention with the experts' heads side by side."""
    made: Any = copy.deepcopy(part)
    shared = made.k_proj.out_features // made.head_dim if share_kv else 1
    weights = [one[f"{OUTPUT}.weight"].T for one in experts]
    biases = [one[f"{OUTPUT}.bias"] for one in experts] if made.o_proj.bias is not None else None
    for name in (QUERY,) + (() if share_kv else (KEY, VALUE)):
        linear = getattr(made, name)
        stacked = stack_heads([one[f"{name}.weight"] for one in experts], shared)
        wide = nn.Linear(linear.in_features, len(stacked), linear.bias is not None, device="meta")
        wide.weight = nn.Parameter(stacked)
        if linear.bias is not None:
            wide.bias = nn.Parameter(stack_heads([one[f"{name}.bias"] for one in experts], shared))
        setattr(made, name, wide)
    if share_kv:
        made.num_key_value_groups *= len(experts)
    stacked = stack_heads(weights, shared).T.contiguous()
    setattr(made, OUTPUT, GatedOutput(stacked, torch.stack(biases) if biases else None, shared))
    return made


def _width(host: Host, attention: nn.Module) -> int:
    """Of the residual stream."""
    linear = getattr(attention, QUERY, None)
    if isinstance(linear, nn.Linear):
        return linear.in_features
    return int(host.embedding.weight.shape[1])  # type: ignore[attr-defined]
