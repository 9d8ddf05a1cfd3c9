"""The parts of Native Sparse Attention (arXiv 2502.11089): the compression's and the gates' weights, and selection."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.math.blocks import Blocks, visible_blocks
from hasten.math.shapes import Float, Int

_ROWS = 512  # queries whose compressed scores are computed together, up to the last block that one of them sees
_TILE = 64  # tokens of the blocks in which the window is computed


class Compression(nn.Module):
    """phi of equation 7: a block of `length` tokens to one, its mean plus an MLP of the tokens with their places.

    The last layer starts at zero, so that compression starts as the mean.
    """

    def __init__(self, length: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.length = length
        self.place = nn.Parameter(torch.randn(length, dim, generator=generator) * 0.02)
        self.inner = nn.Parameter(torch.randn(dim, length * dim, generator=generator) * (length * dim) ** -0.5)
        self.outer = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return compress(x, self.place, self.inner, self.outer, stride)


class Branches(nn.Module):
    """What NSA adds to one layer: two compressions, for keys and for values, and a gate per head and branch."""

    def __init__(self, heads: int, dim: int, value_dim: int, length: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys = Compression(length, dim, generator)
        self.values = Compression(length, value_dim, generator)
        self.gate = nn.Parameter(torch.zeros(heads, 3, dim))
        self.gate_bias = nn.Parameter(torch.full((heads, 3), -0.6931))  # a third each

    def gates(self, q: Tensor) -> Tensor:
        """[B, H, N, d] to the three branches' shares [B, H, N, 3], each between 0 and 1."""
        return torch.sigmoid(q @ self.gate.to(q.dtype).transpose(1, 2) + self.gate_bias.to(q.dtype)[:, None])


def naive_compress(x: Tensor, place: Tensor, inner: Tensor, outer: Tensor, stride: int) -> Tensor:
    """phi of every whole block, one after the other; see `compress`."""
    length = len(place)
    batch, heads, n, d = x.shape
    out = []
    for b in range(batch):
        for h in range(heads):
            for first in range(0, n - length + 1, stride):
                part = x[b, h, first : first + length]
                out.append(part.mean(0) + outer @ F.gelu(inner @ (part + place).flatten()))
    return torch.stack(out).view(batch, heads, -1, d)


def compress(
    x: Float[Tensor, "b h n d"], place: Float[Tensor, "l d"], inner: Float[Tensor, "c ld"],
    outer: Float[Tensor, "d c"], stride: int,
) -> Float[Tensor, "b h nc d"]:  # fmt: skip
    """phi of the blocks that start every `stride` tokens and are whole: [B, H, (N - l) // stride + 1, d]."""
    length, d = place.shape
    batch, heads, n, _ = x.shape
    if n < length:
        return x.new_zeros(batch, heads, 0, d)
    parts = x.unfold(2, length, stride).transpose(-1, -2)  # [B, H, Nc, l, d]
    hidden = F.linear(parts.flatten(-2), inner.to(x.dtype), (inner @ place.flatten()).to(x.dtype))
    return parts.mean(-2) + F.linear(F.gelu(hidden), outer.to(x.dtype))


def overlaps(num_compressed: int, num_blocks: int, length: int, stride: int, block: int) -> Tensor:
    """How many strides of tokens a compression block and a selection block share, float32 [Nc, Tk] (equation 9)."""
    first = torch.arange(num_compressed)[:, None] * stride
    start = torch.arange(num_blocks) * block
    shared = torch.minimum(first + length, start + block) - torch.maximum(first, start)
    return shared.clamp(min=0).float() / stride


def coarse(
    q: Float[Tensor, "b h nq d"], k: Float[Tensor, "b hk nc d"], v: Float[Tensor, "b hk nc e"], num_blocks: int,
    length: int, stride: int, block: int, scaling: float, past: int, begin: Int[Tensor, "b"] | None = None,
    end: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b h nq e"], Float[Tensor, "b hk nq tk"]]:  # fmt: skip
    """Attention over compressed tokens, and what it says of the selection blocks (equations 8 to 10).

    A query sees the compression blocks that end before or at it and hold no padding.
    """
    batch, heads, nq, d = q.shape
    hk, nc = k.shape[1:3]
    table = overlaps(nc, num_blocks, length, stride, block).to(q.device)
    first = torch.arange(nc, device=q.device) * stride
    outs, scores = [], []
    for start in range(0, nq, _ROWS):
        part = q[:, :, start : start + _ROWS].unflatten(1, (hk, -1))  # [B, Hk, G, n, d]
        at = torch.arange(start, start + part.shape[3], device=q.device) + past
        upto = min(nc, max(0, (start + part.shape[3] + past - length) // stride + 1))
        begins = first[:upto]
        seen = (begins + length - 1 <= at[:, None])[None]  # [1, n, upto]
        if begin is not None:
            seen = seen & (begins >= begin[:, None])[:, None]
        if end is not None:
            seen = seen & (begins + length <= end[:, None])[:, None]
        seen = seen[:, None, None]
        s = (part @ k[:, :, None, :upto].transpose(-1, -2)).float() * scaling
        p = s.masked_fill(~seen, -1e30).softmax(-1) * seen  # 0 where nothing is seen
        outs.append((p.to(v.dtype) @ v[:, :, None, :upto]).flatten(1, 2))
        scores.append(p.detach().sum(2) @ table[:upto])
    return torch.cat(outs, 2), torch.cat(scores, 2)


def choose(
    scores: Float[Tensor, "b hk nq tk"], block: int, count: int, initial: int, local: int, past: int,
    begin: Int[Tensor, "b"] | None = None,
) -> Blocks:  # fmt: skip
    """The `count` best blocks of each query (equations 11, 12): the first ones, its own and those before it always."""
    nq, tk = scores.shape[2:]
    own = (torch.arange(nq, device=scores.device) + past)[:, None] // block
    first = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=scores.device)
    if begin is not None:
        first = (begin // block)[:, None, None, None]
    number = torch.arange(tk, device=scores.device)
    allowed = (number <= own) & (number >= first)
    always = ((number < first + initial) | (number > own - local)) & allowed
    ranked = scores.masked_fill(~allowed, -torch.inf).masked_fill_(always, torch.inf)
    best = ranked.topk(min(count, tk), dim=-1)
    counts = (best.values > -torch.inf).sum(-1, dtype=torch.int32)
    return Blocks(counts, best.indices.int(), 1, block)


def window_blocks(queries: int, keys: int, window: int, device: torch.device | None = None) -> Blocks:
    """The last `window` keys of each query, its own among them; for causal attention."""
    tq, tk = -(-queries // _TILE), -(-keys // _TILE)
    first_q = torch.arange(tq, device=device)[:, None] * _TILE + keys - queries
    ahead = first_q - torch.arange(tk, device=device) * _TILE  # of a tile's first query before its first key
    chosen = visible_blocks(queries, keys, _TILE, _TILE, device) & (ahead - _TILE + 1 < window)
    cut = chosen & (ahead + _TILE > window)
    which = torch.full((tq, tk), -1, dtype=torch.int64, device=device)
    masks = torch.zeros(0, _TILE, _TILE, dtype=torch.bool, device=device)
    if bool(cut.any()):
        kinds, which[cut] = ahead[cut].unique(return_inverse=True)
        apart = torch.arange(_TILE, device=device)[:, None] - torch.arange(_TILE, device=device)
        masks = kinds[:, None, None] + apart < window
    more = {"masks": masks, "mask_of": which[None, None]} if len(masks) else {}
    return Blocks.of(chosen[None, None], _TILE, _TILE, **more)
