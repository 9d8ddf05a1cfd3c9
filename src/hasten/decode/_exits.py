"""Exit heads, and how they are fitted with the model frozen.

`ImageLocal` and `ImageGlobal` are LGViT's heads; `TokenLocal` and `TokenGlobal` their likes for a stream of tokens. All
read standardised tokens: each is shifted and scaled to mean 0 and variance 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]  # a weight and its bias, or keys and values


def standard(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def local_pooled(x: Tensor, head: dict[str, Any], grid: tuple[int, ...]) -> Tensor:
    """The mean over patches x [B, N, D] of a local head's features, [B, D]; the last layer runs on the mean only."""
    z = F.gelu(F.linear(x, *head["first"]))
    if "taps" in head:
        scale, shift = head["affine"]
        z = convolved(torch.addcmul(shift, z, scale), head["taps"], grid)
        z = F.gelu(z)
    return F.linear(z.mean(1), *head["last"]) + x.mean(1)


def convolved(z: Tensor, taps: Pair, grid: tuple[int, ...]) -> Tensor:
    """A depth-wise 3x3 convolution of patches [B, N, D] on their grid."""
    picture = z.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.conv2d(picture, *taps, padding=1, groups=z.shape[-1]).flatten(2).mT


def global_pooled(x: Tensor, head: dict[str, Any], grid: tuple[int, ...]) -> Tensor:
    """The mean of attention among every r-th row and column of patches x [B, N, D], [B, D]."""
    q, k, v = split_heads(sampled(x, head["stride"], grid), head["qkv"], head["num_heads"])
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).mean(2, keepdim=True)  # [B, H, 1, M]
    return F.linear((weights @ v)[:, :, 0].flatten(1), *head["last"])


def sampled(x: Tensor, stride: int, grid: tuple[int, ...]) -> Tensor:
    return x.unflatten(1, grid)[:, ::stride, ::stride].flatten(1, 2)


def split_heads(x: Tensor, qkv: Tensor, num_heads: int) -> Sequence[Tensor]:
    """Queries, keys and values [B, H, M, d] of x [B, M, D]."""
    return F.linear(x, qkv).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def heads_of(width: int) -> int:
    """Attention heads of a global head: 8 as in LGViT, or the most below that divide the width."""
    return next(number for number in (8, 6, 4, 3, 2, 1) if width % number == 0)


class ImageHead(nn.Module):
    """A head with one classifier for each classifier of the model; `prefix` tokens stand before the patches.

    The pooled features are added to the class token in the first classifier, to the distillation token in the second.
    """

    def __init__(self, width: int, classes: int, ends: int, prefix: int, threshold: float) -> None:
        super().__init__()
        self.prefix, self.threshold = prefix, threshold
        self.ends = nn.ModuleList(nn.Linear(width, classes) for _ in range(ends))

    def leave(self, x: Tensor, grid: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """Logits [B, C] of each classifier for x [B, N, D], and whether their mean is surer than the threshold."""
        x = standard(x)
        logits = self.classify(x, self.pooled(x[:, self.prefix :], grid))
        return logits, torch.stack(logits).mean(0).detach().float().softmax(-1).amax(-1) > self.threshold

    def classify(self, x: Tensor, pooled: Tensor) -> list[Tensor]:
        tokens = (x[:, i] if self.prefix else 0 for i in range(len(self.ends)))
        return [end(pooled + token) for end, token in zip(self.ends, tokens, strict=True)]

    def pooled(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def features(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, M, D], whose mean over M is `pooled`."""
        raise NotImplementedError

    def begin(self) -> None:
        """Adds the layers that only fitting needs."""

    def fold(self) -> None:
        """Makes them a part of the others."""

    def weights(self) -> dict[str, Any]:
        """As `naive_lgvit` takes them."""
        return {"classifiers": [(end.weight, end.bias) for end in self.ends]}  # type: ignore[union-attr]


class ImageLocal(ImageHead):
    """1x1 convolution, with `depthwise` a depth-wise 3x3 one, 1x1 convolution, and the patches added.

    In fitting a batch norm follows each; `fold` makes them a part of the convolutions.
    """

    def __init__(self, width: int, *more: Any, depthwise: bool) -> None:
        super().__init__(width, *more)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.taps = nn.Conv2d(width, width, 3, padding=1, groups=width) if depthwise else None
        self.scale = nn.Parameter(torch.ones(width)) if depthwise else None
        self.shift = nn.Parameter(torch.zeros(width)) if depthwise else None

    def begin(self) -> None:
        self.norms: Any = nn.ModuleList(
            nn.BatchNorm1d(self.first.out_features) for _ in range(2 + (self.taps is not None))
        )

    def weights(self) -> dict[str, Any]:
        made = super().weights() | {
            "first": (self.first.weight, self.first.bias),
            "last": (self.last.weight, self.last.bias),
        }
        if self.taps is not None:
            made |= {"taps": (self.taps.weight, self.taps.bias), "affine": (self.scale, self.shift)}
        return made

    def pooled(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        return local_pooled(patches, self.weights(), grid)

    def features(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        norms = [lambda z, norm=norm: norm(z.flatten(0, 1)).view_as(z) for norm in self.norms]
        z = norms[0](F.gelu(self.first(patches)))
        if self.taps is not None:
            z = norms[1](F.gelu(convolved(z, self.weights()["taps"], grid)))
        return norms[-1](self.last(z)) + patches

    @torch.no_grad()
    def fold(self) -> None:
        affine = []
        for norm in self.norms:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            affine.append((scale, norm.bias - norm.running_mean * scale))
        if self.scale is not None and self.shift is not None:
            self.scale.copy_(affine[0][0])
            self.shift.copy_(affine[0][1])
        before, after = affine[-2], affine[-1]
        self.last.bias.add_(self.last.weight @ before[1]).mul_(after[0]).add_(after[1])
        self.last.weight.mul_(before[0]).mul_(after[0][:, None])
        del self.norms


class ImageGlobal(ImageHead):
    """Attention with a bias in its last projection only, among every `stride`-th row and column of the patches."""

    def __init__(self, width: int, *more: Any, stride: int) -> None:
        super().__init__(width, *more)
        self.stride, self.num_heads = stride, heads_of(width)
        self.qkv, self.last = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def weights(self) -> dict[str, Any]:
        return super().weights() | {
            "qkv": self.qkv.weight,
            "last": (self.last.weight, self.last.bias),
            "stride": self.stride,
            "num_heads": self.num_heads,
        }

    def pooled(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        return global_pooled(patches, self.weights(), grid)

    def features(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        q, k, v = split_heads(sampled(patches, self.stride, grid), self.qkv.weight, self.num_heads)
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TokenLocal(nn.Module):
    """x + last(gelu(z)), z = gelu(first(x)), or with `depthwise` its depth-wise convolution over three tokens."""

    def __init__(self, width: int, depthwise: bool) -> None:
        super().__init__()
        self.memory = depthwise
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.taps = nn.Parameter(torch.tensor([0.0, 0.0, 1.0])[:, None].repeat(1, width)) if depthwise else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def remember(self, x: Tensor) -> Pair:
        z = F.gelu(self.first(standard(x)))[:, None]
        return z, z[..., :0]

    def forward(self, x: Tensor, memory: Pair | None, visible: Tensor | None) -> Tensor:
        if self.taps is None:
            return x + self.last(F.gelu(self.first(standard(x))))
        assert memory is not None
        past, new = memory[0][:, 0], x.shape[1]
        places = torch.arange(past.shape[1] - new, past.shape[1], device=x.device)[:, None]
        places = places + torch.arange(-2, 1, device=x.device)  # [T, 3]
        there = (places >= 0)[None]
        places = places.clamp(min=0)
        if visible is not None:
            there = there & visible.gather(2, places.expand(len(visible), -1, -1))
        z = ((past[:, places] * there[..., None]) * self.taps).sum(2)
        return x + self.last(F.gelu(z))


class TokenGlobal(nn.Module):
    """x + own(x) + attention to every `stride`-th of the tokens so far, on a quarter of the width."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.memory, self.stride = True, stride
        inner = max(1, width // 4)
        self.num_heads = heads_of(inner)
        self.own, self.last = nn.Linear(width, width), nn.Linear(inner, width)
        self.query, self.keys, self.values = (nn.Linear(width, inner, bias=False) for _ in range(3))
        for part in (self.own, self.last):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def remember(self, x: Tensor) -> Pair:
        x = standard(x)[:, None]
        return self.keys(x), self.values(x)

    def forward(self, x: Tensor, memory: Pair | None, visible: Tensor | None) -> Tensor:
        assert memory is not None
        z = standard(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (
            self.query(z), memory[0][:, 0, :: self.stride], memory[1][:, 0, :: self.stride]))  # fmt: skip
        mask = None if visible is None else visible[:, None, :, :: self.stride]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if mask is not None:  # a row of padding may hide every key
            out = torch.where(mask.any(-1, keepdim=True), out, 0)
        return x + self.own(z) + self.last(out.transpose(1, 2).flatten(2))


def distilled(logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
    """(1 - alpha) cross-entropy + alpha T^2 KL(teacher || exit) at temperature T, means over [M, C]."""
    soft = F.kl_div(
        (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * temperature**2 * soft


def homogeneous(features: list[Tensor], gram: bool) -> Tensor:
    """Mean squared distance of each of the features [B, M, D] from the last; of their D x D products where `gram`."""
    if gram:
        features = [one.mT @ one / one.shape[1] for one in features]
    return sum((F.mse_loss(one, features[-1]) for one in features[:-1]), torch.zeros((), device=features[-1].device))


def heterogeneous(features: Tensor, last: Tensor) -> Tensor:
    """KL(last || features), distributions over the D channels of [B, M, D]; summed over M, mean over B."""
    return F.kl_div(features.log_softmax(-1), last.log_softmax(-1), reduction="batchmean", log_target=True)


def fit_images(
    heads: list[ImageHead],
    streams: list[Tensor],
    last: Tensor,
    teacher: Tensor,
    labels: Tensor,
    grid: tuple[int, ...],
    method: Any,
    generator: torch.Generator,
) -> float:
    """Fits all heads at once, as LGViT's second stage does; returns the mean loss of the last epoch.

    Args:
        streams: what enters each head, [N, tokens, D]; `last`: what leaves the last block.
        teacher: the model's logits, [N, C]; `labels`: int64 [N].
        method: its options `epochs`, `rows`, `lr`, `alpha`, `temperature`, `homogeneous`, `heterogeneous`.
    """
    for head in heads:
        head.begin()
        head.to(last.device).train()
    local = [i for i, head in enumerate(heads) if isinstance(head, ImageLocal)]
    pooled = [i for i, head in enumerate(heads) if isinstance(head, ImageGlobal)]

    def loss_of(rows: Tensor) -> Tensor:
        loss, features = torch.zeros((), device=last.device), []
        for head, stream in zip(heads, streams, strict=True):
            x = standard(stream[rows].float())
            features.append(head.features(x[:, head.prefix :], grid))
            logits = torch.stack(head.classify(x, features[-1].mean(1))).mean(0)
            loss = loss + distilled(logits, teacher[rows], labels[rows], method.alpha, method.temperature)
        final = standard(last[rows].float())[:, heads[0].prefix :]
        for group in (local, pooled):
            if not group:
                continue
            loss = loss + method.homogeneous * homogeneous([features[i] for i in group], gram=group is pooled)
            for i in dict.fromkeys((group[0], group[-1])):
                goal = final if group is local else sampled(final, heads[i].stride, grid)  # type: ignore[arg-type]
                loss = loss + method.heterogeneous * heterogeneous(features[i], goal)
        return loss

    def batches() -> list[Tensor]:
        order = torch.randperm(len(last), generator=generator, device=last.device)
        parts = list(order.split(method.rows))
        return parts[:-1] if len(parts) > 1 and len(parts[-1]) < 2 else parts

    found = descend(heads, batches, loss_of, method)
    for head in heads:
        head.eval()
        head.fold()
    return found


def fit_tokens(
    heads: list[Any],
    texts: list[tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]],
    logits: Callable[[Tensor], Tensor],
    method: Any,
    generator: torch.Generator,
) -> float:
    """Fits the heads of a decoder by the prediction terms alone; returns the mean loss of the last epoch.

    Args:
        texts: of each batch what enters each head and what leaves the last block, [B, T, D], the next token int64
            [B, T], where it counts bool [B, T], and which tokens each sees, bool [B or 1, T, T].
        logits: from what the last norm reads to float32 logits.
        method: its options `epochs`, `lr`, `alpha`, `temperature`; `tokens`: positions of a batch that count at most.
    """
    for head in heads:
        head.to(texts[0][1].device).train()

    def loss_of(index: int) -> Tensor:
        streams, last, following, real, visible = texts[index]
        place = real.flatten().nonzero()[:, 0]
        order = torch.randperm(len(place), generator=generator, device=place.device)[: method.tokens]
        place = place[order]
        with torch.no_grad():
            teacher = logits(last.flatten(0, 1)[place])
        loss, labels = torch.zeros((), device=last.device), following.flatten()[place]
        for head, stream in zip(heads, streams, strict=True):
            x = stream.float()
            states = head(x, head.remember(x) if head.memory else None, visible)
            exit_logits = logits(states.flatten(0, 1)[place])
            loss = loss + distilled(exit_logits, teacher, labels, method.alpha, method.temperature)
        return loss

    def batches() -> list[int]:
        return torch.randperm(len(texts), generator=generator, device=generator.device).tolist()

    return descend(heads, batches, loss_of, method)


@torch.enable_grad()
def descend(
    heads: Sequence[nn.Module], batches: Callable[[], list[Any]], loss_of: Callable[[Any], Tensor], method: Any
) -> float:
    """AdamW with cosine decay; the model's own weights get no gradient."""
    weights = [parameter for head in heads for parameter in head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=method.lr, weight_decay=0.01)
    schedule, total = None, 0.0
    for _ in range(method.epochs):
        parts, total = batches(), 0.0
        if schedule is None:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, method.epochs * len(parts))
        for part in parts:
            loss = loss_of(part)
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                weight.grad = grad
            optimizer.step()
            schedule.step()
            total += loss.item() / len(parts)
    optimizer.zero_grad()
    return total
