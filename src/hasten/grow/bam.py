"""BAM: dense models, each trained on a domain of its own, become one mixture of experts that is trained on.

The feed-forward part of every dense model is an expert of which a token visits the best k; its attention is an expert
that every token visits. With routers W_r, W_a [N, D], p = softmax(W_r x), g = softmax(W_a x) and T the k largest p_i,

    FFN_MoE(x) = sum_{i in T} p_i FFN_i(x)        MHA_MoA(x) = sum_{i=1..N} g_i MHA_i(x)
    L = L_NLL + sum over layers (alpha L_LB + beta L_z),   L_LB = N sum_i f_i P_i,   L_z = mean (logsumexp_i W_r x)^2

with f_i the share of tokens that go to expert i and P_i its mean gate (paper, sections 4.1 and 4.2). All else is the
mean over the dense models; routers start at random. Shapes: x [B, T, D], W_q [N, H e, D], W_k and W_v [N, K e, D],
W_o [N, D, H e] of H heads and K key heads of width e. With `share_kv` keys and values are one, the dense models' mean.

The person's model is the seed and one of the dense models; the others are the run's `teacher`, one or a list. After
the run the model is the mixture.

Departures: the paper's seeds have parallel blocks (attention and feed-forward part read the same input). A model's
blocks stay as they are, which for most is one after the other; `parallel=true` changes them, and the model must learn
to live with it. alpha and beta have no values in the paper: 0.01 and 0.001 are those of its references [7] and [8].
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.grow.base import check_growable
from hasten.hosts import experts, recognise

CARD = Card(
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    paper="2408.08274",
    seams=("weights.resize", "loss"),
    effects=("steps", "quality", "memory"),
    lossless=False,
    claim="590M seeds, four experts: mean perplexity 9.70 where BTX has 10.72 (equal data), 10.00 at equal compute",
    claimed=None,
    identity="there are none: the model becomes another one, of more weights",
    needs=("teacher", "steps"),
    hosts=("decoder",),
    experiment=("two-domains", "grow/bam(seed_expert=false)"),
    tune={"balance": (0.001, 0.1), "z": (0.0001, 0.01)},
    when="Dense models of one seed are there, each good at a domain, and one model must be good at all of them.",
    when_not="The dense models would have to be trained first, or inference must stay as cheap as one of them.",
)


def naive_bam(
    x: Tensor, router: Tensor, queries: Tensor, keys: Tensor, values: Tensor, outputs: Tensor, size: int
) -> Tensor:
    """MHA_MoA with loops over sequences, tokens, experts and heads; causal, without rotary embedding.

    Args:
        x: [B, T, D]. router: [N, D].
        queries: [N, H e, D]; outputs: [N, D, H e].
        keys, values: [N, K e, D], or [1, K e, D] where all experts share them. H is a multiple of K.
        size: e.

    Returns:
        [B, T, D].
    """
    heads, groups = queries.shape[1] // size, queries.shape[1] // keys.shape[1]
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            gates = (router @ x[b, t]).softmax(0)
            for i in range(len(router)):
                key, value = (part[i if len(part) > 1 else 0] for part in (keys, values))
                found = []
                for h in range(heads):
                    q, own = slice(h * size, (h + 1) * size), slice(h // groups * size, (h // groups + 1) * size)
                    query = queries[i, q] @ x[b, t]
                    scores = torch.stack([query @ (key[own] @ x[b, s]) for s in range(t + 1)]) / size**0.5
                    seen = torch.stack([value[own] @ x[b, s] for s in range(t + 1)])
                    found.append(scores.softmax(0) @ seen)
                out[b, t] = out[b, t] + gates[i] * (outputs[i] @ torch.cat(found))
    return out


def bam(x: Tensor, router: Tensor, queries: Tensor, keys: Tensor, values: Tensor, outputs: Tensor, size: int) -> Tensor:
    """As `naive_bam`, as one attention of all experts' heads side by side."""
    shared = keys.shape[1] // size if len(keys) == 1 else 1
    q, k, v = (experts.stack_heads(one, n) for one, n in ((queries, shared), (keys, 1), (values, 1)))
    q, k, v = ((x @ one.T).unflatten(-1, (-1, size)).transpose(1, 2) for one in (q, k, v))
    heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gates = (x @ router.T).softmax(-1)
    gated = experts.gate_heads(heads.transpose(1, 2).flatten(2), gates, shared)
    return gated @ experts.stack_heads(outputs.mT, shared)


@dataclasses.dataclass(frozen=True)
class BAM(Method):
    """Upcycling dense decoders into a mixture of experts, when the run begins."""

    top: int = option(1, "k: feed-forward experts that a token visits", least=1)
    seed_expert: bool = option(True, "the run's own model is an expert too, and counts in the means")
    attention: bool = option(True, "attention becomes experts; otherwise it is the mean over the dense models (BTX)")
    share_kv: bool = option(False, "attention experts share keys and values, which keeps the cache as it was")
    normalise: bool = option(False, "the gates of a token's feed-forward experts are divided by their sum")
    parallel: bool = option(False, "blocks compute attention and feed-forward part from the same input")
    balance: float = option(0.01, "alpha: weight of the load-balancing loss", least=0)
    z: float = option(0.001, "beta: weight of the router's z-loss", least=0)
    scale: float = option(0.02, "standard deviation of the routers' first weights", least=0)

    def problems(self) -> list[str]:
        return ["share_kv shares the keys of attention experts: leave attention=true"] * (
            self.share_kv and not self.attention
        )

    def attach(self, run: Any) -> None:
        """Builds the mixture at once and adds the routers' losses to each batch's.

        Raises:
            UsageError: weights that can't change, no dense model that fits, fewer experts than `top`, or a model of
                parts that are not known.
        """
        check_growable(self.name, run)
        given = run.context.teacher
        dense = list(given) if isinstance(given, list | tuple | nn.ModuleList) else [given]
        if not all(isinstance(one, nn.Module) for one in dense):
            raise UsageError(f"{self.name} needs dense models of the same architecture: pass teacher=MODEL or a list")
        hosts = [run.host] * self.seed_expert + [recognise(one, "decoder") for one in dense]
        if len(hosts) < max(2, self.top):
            raise UsageError(
                f"{self.name}: {len(hosts)} dense models give {len(hosts)} experts, and top={self.top} of at least 2 "
                "are needed: pass more models as teacher="
            )
        experts.check_alike(run.host, hosts)
        changes = run.host.changes
        begin = len(changes)
        if self.parallel:
            experts.run_parallel(run.host)
        generator = run.generator(self.name)

        def router(count: int, width: int) -> Tensor:
            return self.scale * torch.randn(count, width, generator=generator)

        run.resize(
            lambda run: experts.upcycle(
                run.host,
                hosts,
                router,
                top=self.top,
                normalise=self.normalise,
                attention=self.attention,
                share_kv=self.share_kv,
            )
        )
        run.optimizer.state.clear()
        end = [len(changes)]
        sink: list[tuple[Tensor, Tensor]] = []
        for layer in run.host.layers:
            run.changes.set(layer.mlp, "sink", sink)

        def loss(run: Any, value: Tensor) -> Tensor:
            if sink:  # several forwards in a batch count as one: the mean
                forwards = len(sink) / len(run.host.layers)
                balance, z = (torch.stack(parts).sum() / forwards for parts in zip(*sink, strict=True))
                value = value + self.balance * balance + self.z * z
            sink.clear()
            return value

        def step(run: Any) -> None:
            if end:  # from now on there is no way back: the dense parts are freed
                changes.forget(begin, end.pop())

        run.on("forward", lambda run, batch: sink.clear())
        run.on("loss", loss)
        run.on("step", step)


METHOD = BAM
