"""SLA: sparse-linear attention, fine-tuned (arXiv 2509.24006, section 4).

Attention weights are a few large ones of high rank and many small ones of low rank. Blocks with the largest get exact
attention, those in the middle linear attention, which costs the same for any number of them, the smallest nothing.

    P_c = softmax(pool(Q) pool(K)' / sqrt d);  of each row the top k_h are critical, the bottom k_l negligible
    O^s = softmax attention over the critical blocks;  h_j = phi(K_j)' V_j,  z_j = sum of phi(K_j)
    O^l_i = phi(Q_i) sum_j h_j / phi(Q_i) sum_j z_j over the marginal blocks j of i;  O = O^s + proj(O^l)

q, k, v [B, H, N, d]; proj d x d, one a layer, zero at first (the authors' code), so that tuning starts from O^s. P_c
decides and gets no gradient, as in the paper.

Departures: a row has at least one critical block, where the authors' code rounds down to none; padded rows and
attention to another text stay dense. The code that the authors publish now has no third class and linear attention over
all keys; this is the paper's. Their features `hedgehog` are left out.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.head_sizes import head_sizes
from hasten.kernels import block_attention
from hasten.math.blocks import Blocks, pool, spread
from hasten.math.shapes import Bool, Float

CARD = Card(
    title="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    paper="2509.24006",
    seams=("attention.mask",),
    effects=("time", "quality"),
    lossless=False,
    claim="2.2x end-to-end video generation with Wan2.1-1.3B (95% of the attention left out), after 2,000 tuning steps",
    claimed=2.2,
    identity={"critical": 1.0},
    experiment=(
        "digits-dit(task=train, side=64, layers=2, rows=4, steps=80, target=0.52)",
        "attention/sla(block=32)",
    ),
    when="Denoisers of thousands of tokens that can be tuned for some steps.",
    when_not="Denoisers that must stay untrained; pictures of a few hundred tokens.",
    hosts=("denoiser", "vit"),
)

FEATURES = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}
_TINY = 1e-5  # added to the linear branch's sum, as the authors do


def naive_sla(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, critical: float = 0.05, negligible: float = 0.1,
    block: int = 64, features: str = "softmax", scaling: float | None = None,
) -> Tensor:  # fmt: skip
    """Row by row, block by block; see `sla`."""
    batch, heads, n, d = q.shape
    scaling, phi = d**-0.5 if scaling is None else scaling, FEATURES[features]
    cuts = [slice(at, min(at + block, n)) for at in range(0, n, block)]
    num_critical, num_negligible = shares(len(cuts), critical, negligible)
    out = []
    for b in range(batch):
        for h in range(heads):
            queries, keys, values = (x[b, h * x.shape[1] // heads].float() for x in (q, k, v))
            for rows in cuts:
                score = [float(queries[rows].mean(0).detach() @ keys[cut].mean(0).detach()) for cut in cuts]
                order = sorted(range(len(cuts)), key=lambda j: -score[j])
                exact = torch.cat([torch.arange(n)[cuts[j]] for j in order[:num_critical]])
                part = (queries[rows] @ keys[exact].T * scaling).softmax(-1) @ values[exact]
                summed, total = torch.zeros(d, v.shape[-1]), torch.zeros(d)
                for j in order[num_critical : len(cuts) - num_negligible]:
                    summed = summed + phi(keys[cuts[j]]).T @ values[cuts[j]]
                    total = total + phi(keys[cuts[j]]).sum(0)
                linear = phi(queries[rows]) @ summed / (phi(queries[rows]) @ total + _TINY)[:, None]
                marginal = len(cuts) > num_critical + num_negligible
                out.append(part + (linear @ weight.float().T + bias.float() if marginal else 0))
    return torch.cat(out).view(batch, heads, n, -1).to(q.dtype)


def sla(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n e"],
    weight: Float[Tensor, "e e"], bias: Float[Tensor, "e"], critical: float = 0.05, negligible: float = 0.1,
    block: int = 64, features: str = "softmax", scaling: float | None = None,
) -> Float[Tensor, "b h n e"]:  # fmt: skip
    """Exact attention over critical blocks plus projected linear attention over marginal ones.

    Args:
        weight, bias: of proj.
        critical, negligible: k_h and k_l, shares of a row's blocks.
        block: tokens of a query block and of a key block; the last may be shorter.
        features: phi: softmax or elu + 1 or relu of each vector.
    """
    chosen, marginal = classify(q, k, critical, negligible, block)
    blocks = Blocks.of(chosen, block, block)
    exact = block_attention.attention(q, k, v, blocks, scaling=scaling, causal=False)
    return exact + F.linear(linear(q, k, v, marginal, block, features), weight, bias) * bool(marginal.any())


def shares(num_blocks: int, critical: float, negligible: float) -> tuple[int, int]:
    """How many blocks of a row are critical and negligible."""
    first = max(1, int(critical * num_blocks))
    return first, min(int(negligible * num_blocks), num_blocks - first)


def classify(
    q: Tensor, k: Tensor, critical: float, negligible: float, block: int
) -> tuple[Bool[Tensor, "b h tq tk"], Bool[Tensor, "b h tq tk"]]:
    """Which key blocks are critical and which marginal to each query block."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scores = pool(q.float(), block) @ spread(pool(k.float(), block), q.shape[1]).transpose(-1, -2)
        tk = scores.shape[-1]
        first, last = shares(tk, critical, negligible)
        # The order of the scores is that of their softmax.
        order = scores.argsort(dim=-1, descending=True)
        place = torch.arange(tk, device=q.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        return rank < first, (rank >= first) & (rank < tk - last)


def linear(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], v: Float[Tensor, "b hk n e"],
    marginal: Bool[Tensor, "b h tq tk"], block: int, features: str,
) -> Float[Tensor, "b h n e"]:  # fmt: skip
    """Linear attention of each query block over its marginal blocks; 0 where it has none."""
    n, phi = q.shape[2], FEATURES[features]

    def cut(x: Tensor) -> Tensor:  # [B, H, N, d] to [B, H, T, block, d]
        return F.pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block))

    with torch.autocast(q.device.type, enabled=False):  # sums in float32
        keys = cut(phi(k.float()))
        values = cut(F.pad(v.float(), (0, 1), value=1.0))  # the last column sums up the weights
        parts = spread(keys.transpose(-1, -2) @ values, q.shape[1])  # [B, H, Tk, d, e + 1]
        summed = (marginal.float() @ parts.flatten(-2)).unflatten(-1, parts.shape[-2:])  # [B, H, Tq, d, e + 1]
        mixed = (cut(phi(q.float())) @ summed).flatten(2, 3)[:, :, :n]
        return (mixed[..., :-1] / (mixed[..., -1:] + _TINY)).to(q.dtype)


@dataclasses.dataclass(frozen=True)
class Sorted(Blocks):
    """The critical blocks, and which blocks are marginal."""

    marginal: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class SLA(SparseAttention):
    critical: float = option(0.05, "share of a row's key blocks with exact attention, at least one", above=0, most=1)
    negligible: float = option(0.1, "share of a row's key blocks that are skipped", least=0, below=1)
    block: int = option(64, "tokens of a block of queries or keys", least=1)
    features: str = option("softmax", "feature map of the linear attention", choices=tuple(FEATURES))

    causal = False

    def modules(self, attention: nn.Module, layer: int, host: Host) -> nn.Module:
        width = head_sizes(attention).value_dim
        proj = nn.utils.skip_init(nn.Linear, width, width)  # draws no random numbers
        nn.init.zeros_(proj.weight)
        nn.init.zeros_(proj.bias)
        return proj

    @property
    def idle(self) -> bool:
        return self.critical == 1

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        n = call.query.shape[2]
        if n != call.key.shape[2] or n <= self.block or call.range()[0] is not None:
            return None
        chosen, marginal = classify(call.query, call.key, self.critical, self.negligible, self.block)
        found = Blocks.of(chosen, self.block, self.block)
        return Sorted(found.counts, found.indices, self.block, self.block, marginal=marginal)

    def mix(self, call: Call, blocks: Blocks, kept: Kept) -> Tensor:
        assert isinstance(blocks, Sorted) and blocks.marginal is not None
        exact = block_attention.attention(
            call.query, call.key, call.value, blocks, scaling=call.scaling, causal=call.causal
        )
        num_blocks = blocks.marginal.shape[-1]
        if sum(shares(num_blocks, self.critical, self.negligible)) == num_blocks:
            return exact
        return exact + kept.module(linear(call.query, call.key, call.value, blocks.marginal, self.block, self.features))


METHOD = SLA
