"""LGViT: a small head after several blocks; what it is sure of leaves, and the blocks behind are not run.

    exit after block m  <=>  max_c softmax(head_m(X_m))_c > threshold                X_m [B, N, D] after block m
    local head, shallow:  conv1x1(gelu(dw3x3(gelu(conv1x1(X))))) + X    (the deeper half of them without dw3x3)
    global head, deep:    attention among every r-th row and column of X, r = 2, then 3
    logits = W (mean over patches of the head's features + class token) + b
    loss = sum_m (1 - alpha) CE(y) + alpha T^2 KL(final || m)  + homogeneous * sum ||F_m - F_last of its kind||^2
           + heterogeneous * sum KL(X_final || F_m), first and last of a kind     (section 4; official code)

Departures: the second stage only; the model handed over is the first stage's result and stays as it is, so heads
read standardised tokens. Without labels y is the model's own choice. KL is not also divided by the number of classes,
products F^T F of global heads are divided by the number of tokens. In a decoder, which the paper has not, heads add to
the stream in front of the model's own last norm and head: causal convolutions of three tokens, then attention to every
r-th token; only the prediction terms; see `hosts.token_exits` for caches.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode import _exits
from hasten.decode._decoding import Decoding
from hasten.hosts import exits as image_exits
from hasten.hosts import token_exits
from hasten.hosts.context import Context

CARD = Card(
    title="LGViT: Dynamic Early Exiting for Accelerating Vision Transformer",
    paper="2308.00255",
    seams=("layers.exit",),
    effects=("time", "quality"),
    lossless=False,
    claim="about 1.8x at competitive accuracy: ViT-B/16, DeiT-B and Swin-B on three data sets, one image at a time",
    claimed=1.8,
    identity={"threshold": 1.0},
    experiment=("digits-vit(batch=1)", "decode/lgvit(exits=[2, 4])"),
    when="Single images or texts of mixed difficulty, in a deep model whose middle blocks know most answers already.",
    when_not="Large batches of text, which wait for their hardest row; shallow models; tasks that need every block.",
    needs=("calibration",),
    hosts=("vit", "decoder"),
)


def naive_lgvit(
    hidden: list[Tensor],
    final: Tensor,
    heads: list[dict[str, Any]],
    grid: tuple[int, int],
    prefix: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Head by head, image by image, patch by patch, in float32.

    Args:
        hidden: the tokens [B, N, D] at each exit; `final`: the model's own logits [B, C].
        heads: `first`, `last`: (weight [D, D], bias [D]); of some `taps` ([D, 1, 3, 3], [D]) behind `affine` (scale,
            shift); or `qkv` [3 D, D], `num_heads`, `stride` and `last`. `classifiers`: (weight [C, D], bias [C]) each.
        grid: rows and columns of the patches; `prefix`: tokens before them, the first of which the classifiers add.

    Returns:
        logits [B, C] and the exit that gave them, [B], len(heads) for the model itself.
    """
    logits, place = final.float().clone(), torch.full((len(final),), len(heads))
    for b in range(len(final)):
        for m, head in reversed(list(enumerate(heads))):
            x = hidden[m][b].float()
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            pooled = (_naive_global if "qkv" in head else _naive_local)(x[prefix:], head, grid)
            ends = [
                w.float() @ (pooled + (x[i] if prefix else 0)) + bias.float()
                for i, (w, bias) in enumerate(head["classifiers"])
            ]
            scores = torch.stack(ends).mean(0)
            if scores.exp().max() / scores.exp().sum() > threshold:
                logits[b], place[b] = scores, m
    return logits, place


def _gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / 2**0.5))


def _naive_local(x: Tensor, head: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    first, last = ([part.float() for part in head[name]] for name in ("first", "last"))
    z = torch.stack([_gelu(first[0] @ one + first[1]) for one in x])
    if "taps" in head:
        scale, shift = (part.float() for part in head["affine"])
        taps, bias = (part.float() for part in head["taps"])
        spread = []
        for row in range(grid[0]):
            for column in range(grid[1]):
                total = bias.clone()
                for i in range(3):
                    for j in range(3):
                        r, c = row + i - 1, column + j - 1
                        if 0 <= r < grid[0] and 0 <= c < grid[1]:
                            total = total + taps[:, 0, i, j] * (z[r * grid[1] + c] * scale + shift)
                spread.append(_gelu(total))
        z = torch.stack(spread)
    return torch.stack([last[0] @ one + last[1] + patch for one, patch in zip(z, x, strict=True)]).mean(0)


def _naive_global(x: Tensor, head: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    kept = [x[r * grid[1] + c] for r in range(0, grid[0], head["stride"]) for c in range(0, grid[1], head["stride"])]
    projected = torch.stack([head["qkv"].float() @ one for one in kept])
    q, k, v = projected.view(len(kept), 3, head["num_heads"], -1).unbind(1)
    out = torch.zeros(len(kept), head["num_heads"], q.shape[-1])
    for h in range(head["num_heads"]):
        for i in range(len(kept)):
            scores = torch.stack([(q[i, h] * k[j, h]).sum() for j in range(len(kept))]) / q.shape[-1] ** 0.5
            out[i, h] = sum(weight * v[j, h] for j, weight in enumerate(scores.exp() / scores.exp().sum()))
    weight, bias = head["last"]
    return torch.stack([weight.float() @ one.flatten() + bias.float() for one in out]).mean(0)


def lgvit(
    hidden: list[Tensor],
    final: Tensor,
    heads: list[dict[str, Any]],
    grid: tuple[int, int],
    prefix: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """As `naive_lgvit`: at each exit all images that are still there at once; last layers see the mean only."""
    logits, place = final.float().clone(), torch.full((len(final),), len(heads), device=final.device)
    going = torch.arange(len(final), device=final.device)
    for m, head in enumerate(heads):
        x = _exits.standard(hidden[m][going].float())
        weights = {name: _float(value) for name, value in head.items()}
        pooled = (_exits.global_pooled if "qkv" in head else _exits.local_pooled)(x[:, prefix:], weights, grid)
        ends = [
            nn.functional.linear(pooled + (x[:, i] if prefix else 0), *end)
            for i, end in enumerate(weights["classifiers"])
        ]
        scores = torch.stack(ends).mean(0)
        sure = scores.softmax(-1).amax(-1) > threshold
        logits[going[sure]], place[going[sure]] = scores[sure], m
        going = going[~sure]
    return logits, place


def _float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_float(one) for one in value)
    return value.float() if isinstance(value, Tensor) else value


@dataclasses.dataclass(frozen=True)
class LGViT(Decoding):
    """Lets images (or tokens) leave after the first head that is sure of them."""

    threshold: float = option(0.8, "leaves where the head gives one class more than this; 1 never", above=0, most=1)
    exits: tuple[int, ...] = option((), "blocks run before each head; none: 8 in the last two thirds (paper)", least=1)
    local: int | None = option(
        None, "how many of the heads, from the first, are local; none: half, rounded up", least=0
    )
    alpha: float = option(
        0.3,
        "share of the distance to the final logits in the loss; 1, with temperature=1, where text is scarce",
        least=0,
        most=1,
    )
    temperature: float = option(2.0, "T, temperature of that distance", above=0)
    homogeneous: float = option(0.01, "weight of the distance to the last head of the same kind", least=0)
    heterogeneous: float = option(0.01, "weight of the distance to the last block's tokens", least=0)
    epochs: int = option(30, "passes over the calibration inputs (paper: 50)", least=1)
    rows: int = option(32, "images of a batch in fitting (paper: 64)", least=2)
    tokens: int = option(1024, "of a decoder's batch the positions at most that count in fitting", least=1)
    lr: float = option(3e-3, "learning rate, AdamW, cosine (paper: 5e-5, on whole data sets)", above=0)

    def problems(self) -> list[str]:
        problems = []
        if list(self.exits) != sorted(set(self.exits)):
            problems.append(f"exits={list(self.exits)} must rise")
        if self.local is not None and self.exits and self.local > len(self.exits):
            problems.append(f"local={self.local} is more than there are exits")
        return problems

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Fits the heads on the calibration inputs and puts them in.

        The streams that enter the heads are held for all of these inputs at once. After runs the report's `left_after`
        says how many images (or tokens) left after so many blocks.

        Raises:
            UsageError: a model that exits don't fit, an exit that is not there, or calibration that can't be used.
        """
        places = self._check(host)
        if not places:
            return {}
        started = time.perf_counter()
        heads = self._blank(host, places, context.seed)
        generator = torch.Generator(host.device).manual_seed(context.seed)
        learn = self._learn_images if host.kind == "vit" else self._learn_tokens
        facts = learn(host, context.calibration or [], places, heads, generator)
        context.note(self.name, exits=places, **facts, seconds=round(time.perf_counter() - started, 3))
        counts: dict[str, int] = {}
        context.note(self.name, left_after=counts)
        self._put(host, places, heads, counts)
        return {}

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        places = self._check(host)
        if places:
            self._put(host, places, self._blank(host, places, 0), {})

    def _check(self, host: Any) -> list[int]:
        """How many blocks run before each head; none where nothing would ever leave."""
        if host.kind == "vit":
            image_exits.classifiers(host)
        else:
            token_exits.check_token_exits(host)
        depth = len(host.layers)
        if self.exits and self.exits[-1] >= depth:
            raise UsageError(f"{self.name}: exits after 1 to {depth - 1} blocks, this model has {depth}")
        if depth < 2:
            raise UsageError(f"{self.name} needs at least two blocks: a model of one has nothing to skip")
        return [] if self.threshold >= 1 else list(self.exits or default_exits(depth))

    def _blank(self, host: Any, places: list[int], seed: int) -> list[Any]:
        """Heads before fitting; of the local ones the first half is depth-wise, of the global ones has r = 2."""
        number = len(places)
        local = (number + 1) // 2 if self.local is None else min(self.local, number)
        depthwise, halved = (local + 1) // 2, local + (number - local + 1) // 2
        heads: list[Any] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if host.kind == "decoder":
                width = host.lm_head.weight.shape[1]
                heads += [_exits.TokenLocal(width, i < depthwise) for i in range(local)]
                heads += [_exits.TokenGlobal(width, 2 if i < halved else 3) for i in range(local, number)]
            else:
                ends = image_exits.classifiers(host)
                shape = (ends[0].in_features, ends[0].out_features, len(ends), host.num_prefix_tokens, self.threshold)
                heads += [_exits.ImageLocal(*shape, depthwise=i < depthwise) for i in range(local)]
                heads += [_exits.ImageGlobal(*shape, stride=2 if i < halved else 3) for i in range(local, number)]
        return heads

    def _put(self, host: Any, places: list[int], heads: list[nn.Module], counts: dict[str, int]) -> None:
        like = next(host.blocks.parameters())
        ready = {
            place - 1: head.to(like.device, like.dtype).eval().requires_grad_(False)
            for place, head in zip(places, heads, strict=True)
        }
        if host.kind == "vit":
            image_exits.put_image_exits(host, ready, counts)
        else:
            token_exits.put_token_exits(host, ready, counts, self.threshold)

    def _learn_images(
        self, host: Any, batches: list[dict[str, Any]], places: list[int], heads: list[Any], generator: torch.Generator
    ) -> dict[str, Any]:
        blocks, seen, teachers = [place - 1 for place in places], [], []
        grids: set[Any] = set()
        for streams, output, grid in image_exits.streams(host, batches, [*blocks, len(host.blocks) - 1]):
            seen.append(streams)
            teachers.append(getattr(output, "logits", output).float())
            grids.add(grid)
        if len(grids) != 1 or None in grids:
            raise UsageError(f"{self.name} needs calibration images of one size, whose patches form one grid")
        teacher = torch.cat(teachers)
        if len(teacher) < 2:
            raise UsageError(f"{self.name} needs more than one calibration image")
        labels = torch.cat([
            batch["labels"].to(logits.device) if "labels" in batch else logits.argmax(-1)
            for batch, logits in zip(batches, teachers, strict=True)
        ])  # fmt: skip
        streams = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        loss = _exits.fit_images(heads, streams[:-1], streams[-1], teacher, labels, grids.pop(), self, generator)
        return {"images": len(teacher), "loss": loss}

    def _learn_tokens(
        self, host: Any, batches: list[dict[str, Any]], places: list[int], heads: list[Any], generator: torch.Generator
    ) -> dict[str, Any]:
        blocks, texts, norm, head = [place - 1 for place in places], [], host.final_norm, host.lm_head
        dtype = next(host.blocks.parameters()).dtype

        def logits(states: Tensor) -> Tensor:
            states = states.to(dtype)
            return head(states if norm is None else norm(states)).float()

        found = image_exits.streams(host, batches, [*blocks, len(host.blocks) - 1])
        for batch, (streams, output, _) in zip(batches, found, strict=True):
            fits = streams[-1].shape[-1] == head.weight.shape[1]
            with torch.no_grad():
                fits = fits and torch.allclose(logits(streams[-1]), output.logits.float(), rtol=1e-2, atol=1e-2)
            if not fits:
                raise UsageError(
                    f"{self.name}: {type(host.model).__name__} does more to its last states than a norm and a head, so "
                    "that an exit's logits can't be computed"
                )
            ids = batch["input_ids"].to(host.device)
            mask = batch.get("attention_mask")
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(host.device).bool()
            labels = batch["labels"].to(host.device) if "labels" in batch else ids
            following = labels[:, 1:].clamp(min=0)
            counted = real[:, 1:] & real[:, :-1] & (labels[:, 1:] >= 0)
            visible = token_exits.visible_to(real, ids.shape[1], ids.shape[1], host.device)
            end = ids.shape[1] - 1
            if bool(counted.any()):
                visible = visible[:, :end, :end]  # type: ignore[index]
                texts.append(
                    ([one[:, :end] for one in streams[:-1]], streams[-1][:, :end], following, counted, visible)
                )
        if not texts:
            raise UsageError(f"{self.name} needs calibration texts of at least two tokens")
        loss = _exits.fit_tokens(heads, texts, logits, self, generator)
        return {"tokens": sum(int(counted.sum()) for _, _, _, counted, _ in texts), "loss": loss}


def default_exits(depth: int) -> list[int]:
    """At most 8, spread evenly over the blocks from a third of the depth on: 4 to 11 of 12, as in the paper."""
    first = max(1, depth // 3)
    number = min(8, depth - first)
    if number == 1:
        return [first]
    return [first + round(i * (depth - 1 - first) / (number - 1)) for i in range(number)]


METHOD = LGViT
