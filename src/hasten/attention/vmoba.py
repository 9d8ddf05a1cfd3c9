"""VMoBA: mixture-of-block attention for video diffusion models (arXiv 2506.23858, section 3.3).

The keys are cut into blocks whose shape changes from layer to layer: runs of frames, columns through all frames, boxes.
A query sees the blocks whose mean key is most like it, and heads that concentrate on few blocks get few.

    s[i, j] = q_i . mean(K_j) of all queries i and blocks j of a head, brought to 0..1 by the head's extremes
    chosen = the own block of each query, then the largest s of the whole head, until they hold `threshold` of sum(s)
    o_i = softmax over the keys of the chosen blocks of i;  layer l: 1D, 2D, 3D for l mod 3 = 0, 1, 2

q, k, v [B, H, N, d]; N tokens in frames x rows x columns. Gradients flow through the attention, not the choice.

Departures: each row of a batch has its own threshold (the authors' code ranks a packed batch together). Sides of blocks
that don't divide the grid are lowered to the next divisor (theirs must divide). A picture is one frame: its 1D blocks
are runs of rows, and 2D and 3D blocks are both tiles. Class tokens of a ViT see all, and all see them. Where the own
blocks hold the threshold no other is chosen (their code then still takes one). Their full attention in the first
sampling steps and layers is left out.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.attention._routed import naive_routed, routed, tiles
from hasten.attention.base import Kept, SparseAttention
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.attention import Call
from hasten.math.blocks import Blocks, spread
from hasten.math.shapes import Bool, Float, Int

CARD = Card(
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    paper="2506.23858",
    seams=("attention.mask",),
    effects=("time", "quality"),
    lossless=False,
    claim="1.48x faster training of video diffusion at 93x576x1024 (55K tokens); 1.35x sampling without training",
    claimed=1.48,
    identity={"threshold": 1.0},
    experiment=(
        "digits-dit(task=train, side=64, layers=2, rows=4, steps=80, target=0.52)",
        "attention/vmoba(tile=[8,8], box=[4,8,8])",
    ),
    when="Denoisers of thousands of tokens, trained or tuned with it; videos above all.",
    when_not="Pictures of a few hundred tokens: choosing costs as much as attending. Text, where a choice over all "
    "queries of a head would look ahead.",
    hosts=("denoiser", "vit"),
)


def naive_vmoba(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], sides: tuple[int, ...], threshold: float = 0.25,
    prefix: int = 0, scaling: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and chosen blocks, pair by pair; see `vmoba`."""
    batch, heads, n, _ = q.shape
    places, order, block = layout(grid, sides, prefix)
    count = int(places[prefix:].max()) + 1
    chosen = torch.zeros(batch, heads, n, count + (prefix > 0), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            like = {}
            for j in range(count):
                mean = k[b, h, places == j].detach().float().mean(0)
                like |= {(i, j): float(q[b, h, i].detach().float() @ mean) for i in range(prefix, n)}
            low, high = min(like.values()), max(like.values())
            like = {pair: (s - low) / (high - low) if high - low > 1e-6 else s - low for pair, s in like.items()}
            own = [(i, int(places[i])) for i in range(prefix, n)]
            held, total = sum(like[pair] for pair in own), sum(like.values())
            taken = list(own)
            for pair in sorted(like.keys() - set(own), key=lambda pair: -like[pair]):
                if held >= threshold * total and threshold < 1:
                    break
                held += like[pair]
                taken.append(pair)
            for i, j in taken:
                chosen[b, h, i, j] = True
    if prefix:
        chosen[..., -1] = True
        chosen[:, :, :prefix] = True
    out, _ = naive_routed(q, k[:, :, order], v[:, :, order], chosen, block, scaling, False)
    return out, chosen


def vmoba(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], grid: tuple[int, ...],
    sides: tuple[int, ...], threshold: float = 0.25, prefix: int = 0, scaling: float | None = None,
) -> tuple[Float[Tensor, "b h n e"], Bool[Tensor, "b h n c"]]:  # fmt: skip
    """Attention to the chosen blocks.

    Args:
        grid: sides of the token grid, N = prefix + their product; sides: of a block, divisors of the grid's.
        threshold: share of a head's similarities that the chosen blocks hold.
        prefix: tokens before the grid; they are one more block, the last.

    Returns:
        output, and the blocks that each query chose.
    """
    _, order, block = layout(grid, sides, prefix, q.device)
    q, k, v = (x[:, :, order] for x in (q, k, v))
    chosen = choose(q, k, block, threshold, prefix)
    back = order.argsort()
    return routed(q, k, v, chosen, block, scaling, False)[0][:, :, back], chosen[:, :, back]


def choose(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], block: int, threshold: float, prefix: int
) -> Bool[Tensor, "b h n c"]:
    """The blocks of each query; queries and keys in block order, the prefix last."""
    batch, heads, n, _ = q.shape
    inside = n - prefix
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        means = k[:, :, :inside].float().unflatten(2, (-1, block)).mean(3)  # [B, Hk, C, d]
        like = q[:, :, :inside].float() @ spread(means, heads).transpose(-1, -2)  # [B, H, n, C]
        low, high = like.flatten(2).aminmax(dim=-1, keepdim=True)
        wide = high - low
        wide = wide.masked_fill(wide <= 1e-6, 1.0)
        like = like.sub_(low[..., None]).div_(wide[..., None])
        number = torch.arange(inside // block, device=q.device)
        chosen = largest(like, number.repeat_interleave(block)[:, None] == number, threshold)
        if prefix:
            chosen = F.pad(chosen, (0, 1, 0, prefix), value=True)
    return chosen


def largest(like: Float[Tensor, "b h n c"], own: Bool[Tensor, "n c"], threshold: float) -> Bool[Tensor, "b h n c"]:
    """The entries of `own` and the fewest largest others that with them hold `threshold` of each head's sum.

    Equal entries at the border are all taken.
    """
    if threshold >= 1:
        return torch.ones_like(like, dtype=torch.bool)
    batch, heads = like.shape[:2]
    held = (like * own).sum((2, 3), dtype=torch.float64)  # [B, H]
    missing = threshold * like.sum((2, 3), dtype=torch.float64) - held
    others = like.masked_fill(own, -1.0).flatten(2)
    ranked = descending(others)
    enough = ranked.clamp(min=0).cumsum(-1, dtype=torch.float64) >= missing[..., None]
    # Where rounding keeps even the sum of all from being enough, all are taken.
    last = torch.where(enough.any(-1), enough.int().argmax(-1), ranked.shape[-1] - 1)
    border = ranked.gather(-1, last[..., None]).masked_fill(missing[..., None] <= 0, torch.inf)
    return (others >= border).view_as(like) | own


def descending(x: Tensor) -> Tensor:
    """The last dimension sorted; numpy's sort of numbers without their places is many times faster on a CPU."""
    if not x.is_cpu:
        return x.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)


def layout(
    grid: tuple[int, ...], sides: tuple[int, ...], prefix: int = 0, device: torch.device | None = None
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], int]:
    """How the tokens lie in blocks: the block of each token, the tokens in block order, and a block's tokens.

    Prefix tokens are the last block, which may be shorter; there are never more of them than a block has.
    """
    places = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (side, part) in enumerate(zip(grid, sides, strict=True)):
        shape = [1] * len(grid)
        shape[axis] = side
        number = torch.arange(side, device=device) // part
        places = places * (side // part) + number.view(shape)
    places = places.flatten()
    order = places.argsort(stable=True)
    last = int(places.max()) + 1
    first = torch.arange(prefix, device=device)
    return torch.cat([first * 0 + last, places]), torch.cat([order + prefix, first]), len(order) // last


def divisor(side: int, most: int) -> int:
    """The largest divisor of `side` that is at most `most`."""
    return next(part for part in range(min(side, most), 0, -1) if side % part == 0)


@dataclasses.dataclass(frozen=True)
class VMoBA(SparseAttention):
    threshold: float = option(0.25, "share of a head's similarities that the chosen blocks hold", above=0, most=1)
    frames: int = option(2, "frames of a 1D block (rows of a picture)", least=1)
    tile: tuple[int, ...] = option((3, 4), "rows and columns of a 2D block, which goes through all frames", least=1)
    box: tuple[int, ...] = option((4, 6, 4), "frames, rows and columns of a 3D block", least=1)

    causal = False

    def problems(self) -> list[str]:
        found = [] if len(self.tile) == 2 else [f"tile has two sides, not {len(self.tile)}"]
        return found if len(self.box) == 3 else [*found, f"box has three sides, not {len(self.box)}"]

    def sides(self, layer: int, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The sides of a block in one layer, divisors of the grid's."""
        kind = layer % 3
        if len(grid) == 3:
            wanted = ((self.frames, *grid[1:]), (grid[0], *self.tile), self.box)[kind]
        else:
            wanted = ((self.frames, *grid[1:]), self.tile, self.box[1:])[kind]
        return tuple(divisor(side, most) for side, most in zip(grid, wanted, strict=True))

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        if call.grid is None or self.threshold == 1:  # attention to another text, or tokens that are no grid
            return None
        device = call.query.device
        key = "layout", call.grid, call.prefix, str(device)
        _, order, block = kept.once(
            key, lambda: layout(call.grid, self.sides(kept.index, call.grid), call.prefix, device)
        )
        if call.prefix > block or len(order) <= block:
            return None
        # Queries of one block choose alike, so tiles of queries are cut in the blocks' order too.
        query, key = call.query[:, :, order], call.key[:, :, order]
        chosen = choose(query, key, block, self.threshold, call.prefix)
        both = order[None, None]
        return dataclasses.replace(tiles(chosen, block), q_order=both, k_order=both)


METHOD = VMoBA
