"""MergeQuant: static scales for each input channel, folded into the norm before and the weight after.

    x_q[j] = round(x[j] / s_j),  s_j = c_j max |x[j]| / (2^(b-1) - 1)     the norm's gain g becomes g / s: it gives x_q
    y = sum_j x_q[j] (s_j W[n, j])                                       W diag(s) is what is rounded, row by row

so that neither rounding nor scaling is a step of its own at run time (quantization step migration). A channel far above
the others would take all of the range of W diag(s); it is given several columns, each with its share of the number
(dimension reconstruction); c_j cuts off what costs more range than it is worth (adaptive clipping). Shapes: W [out,
in], inputs for calibration [tokens, in], s [in].

Departures (the abstract was read, not all of the paper): a channel gets ceil(m_j / (spread * median m)) columns, m_j
being s_j times the root mean square of W[:, j], and its number is dealt out over them from the first on, so that it is
rounded more finely too; columns are added, none are pruned to make up for it. c_j is the ratio with the least squared
error of x[j]. Weights are rounded to nearest with a searched range, without the paper's further compensation. 8 bits
are the default, where the paper takes 4: this is what the kernels multiply; codes of fewer bits are multiplied as 8.
Layers that no norm feeds (after attention, in the middle of the MLP) round their inputs per token at run time. Norms
are fused where nothing but linear layers reads them.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.hosts import Context, Host
from hasten.hosts.feeding import Feed, norms_before
from hasten.hosts.streaming import STATISTICS, gather
from hasten.hosts.weights import Weight, is_held
from hasten.kernels.int8_norm import PLACES
from hasten.math.shapes import Float, Int
from hasten.quant import base
from hasten.quant._int8 import CODES, Int8, rowwise
from hasten.quant._norms import Int8Norm

CARD = Card(
    title="MergeQuant: Accurate 4-bit Static Quantization of Large Language Models by Channel-wise Calibration",
    paper="2503.07654",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Llama-2-7B at W4A4 over FP16: up to 1.77x in decoding, 2.06x end to end; 70B within 1.3 points",
    claimed=2.06,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=perplexity)", "quant/mergequant"),
    when="Pre-norm transformers, many tokens at a time, and calibration data like what comes later.",
    when_not="Inputs unlike the calibration data: what is larger than they were is cut off. Then quant/zeroquant.",
)

RATIOS = tuple(1 - step / 50 for step in range(25))  # of a channel's largest number, that are tried as its range
SHRINK = 20  # ranges of a row of W diag(s) that are tried, 1 % apart
SEARCHED = 512  # tokens that ranges are chosen by
MOST_ADDED = 0.25  # columns, of the inputs; where there are more outliers, the limit is raised
Merged = tuple[
    Int[Tensor, "rows all"], Float[Tensor, "rows"], Float[Tensor, "columns"], Int[Tensor, "extra"], Int[Tensor, "extra"]
]


def naive_mergequant(
    weight: Float[Tensor, "rows columns"],
    tokens: Float[Tensor, "tokens columns"],
    *,
    bits: int = 8,
    spread: float = 4.0,
    clip: bool = True,
) -> Merged:
    """The definitions, channel by channel and row by row."""
    most, columns = 2 ** (bits - 1) - 1, weight.shape[1]
    some = tokens[:: -(-len(tokens) // SEARCHED)].float()
    found: list[float] = []
    for j in range(columns):
        top, x = tokens[:, j].float().abs().max(), some[:, j]
        tried = [top * ratio / most for ratio in (RATIOS if clip else RATIOS[:1])]
        errors = [(((x / s).round().clamp(-most, most) * s - x) ** 2).sum() if s > 0 else x.sum() for s in tried]
        found.append(float(tried[min(range(len(tried)), key=lambda i: float(errors[i]))]))
    found = [s if s > 0 else 1.0 for s in found]
    sizes = [float(weight[:, j].float().square().mean().sqrt()) * s for j, s in enumerate(found)]
    live = sorted(size for size in sizes if size > 0)
    limit, counts = spread * (live[(len(live) - 1) // 2] if live else 1.0), [1] * columns
    while spread > 0:
        counts = [min(PLACES, max(1, int(torch.ceil(torch.tensor(size / limit))))) for size in sizes]
        if sum(counts) - columns <= MOST_ADDED * columns:
            break
        limit *= 2
    steps = [torch.tensor(s) / count for s, count in zip(found, counts, strict=True)]
    pairs = [(j, place) for j in range(columns) for place in range(1, counts[j])]
    codes, scales = [], []
    for row in weight.float():
        wide = torch.stack([row[j] * steps[j] for j in [*range(columns), *(j for j, _ in pairs)]])
        q, scale = rowwise(wide[None], bits, SHRINK if clip else 1)
        codes.append(q[0])
        scales.append(scale[0])
    source, place = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return torch.stack(codes), torch.stack(scales), torch.stack(steps), source, place


def mergequant(
    weight: Float[Tensor, "rows columns"],
    tokens: Float[Tensor, "tokens columns"],
    *,
    bits: int = 8,
    spread: float = 4.0,
    clip: bool = True,
) -> Merged:
    """(codes int8, scales, steps s, source, place) of a weight behind a norm.

    Args:
        tokens: what the norm gave for calibration data.
        spread: a channel whose column of W diag(s) is above so many times the median size gets more; 0: none does.
        clip: search ranges, rather than take the largest number.

    Returns:
        codes [out, in + extra], scales [out], steps [in], and for each extra column its input and place.
    """
    most, columns = 2 ** (bits - 1) - 1, weight.shape[1]
    top, x = tokens.float().abs().amax(0), tokens[:: -(-len(tokens) // SEARCHED)].float()
    steps, least = top * RATIOS[0] / most, torch.full_like(top, torch.inf)
    for ratio in RATIOS if clip else ():
        s = top * ratio / most
        error = ((x / s).round_().clamp_(-most, most).mul_(s) - x).square().sum(0)
        steps, least = torch.where(error < least, s, steps), torch.minimum(error, least)
    steps = torch.where(steps > 0, steps, 1.0)
    sizes = weight.float().square().mean(0).sqrt() * steps
    live = sizes[sizes > 0]
    limit, counts = spread * float(live.median() if len(live) else 1.0), torch.ones_like(steps, dtype=torch.int64)
    while spread > 0:
        counts = (sizes / limit).ceil().long().clamp(1, PLACES)
        if int(counts.sum()) - columns <= MOST_ADDED * columns:
            break
        limit = limit * 2
    steps = steps / counts
    source = torch.repeat_interleave(torch.arange(columns, device=steps.device), counts - 1)
    first = (counts - 1).cumsum(0) - (counts - 1)
    place = torch.arange(len(source), device=steps.device) - first[source] + 1
    folded = weight.float() * steps
    codes, scales = rowwise(torch.cat([folded, folded[:, source]], 1), bits, SHRINK if clip else 1)
    return codes, scales, steps, source, place


@dataclasses.dataclass(frozen=True)
class MergeQuant(Method):
    bits: int = option(8, "bits of weights and of merged activations; 16 changes nothing", choices=(4, 6, 8, 16))
    spread: float = option(4.0, "a channel with so many times the median size gets more columns; 0: none", least=0)
    clip: bool = option(True, "search ranges for the least error")
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        """Swaps norms and layers, block by block.

        Returns:
            {"layers": {path: record}, "norms": {path: shape}}.
        """
        if self.bits >= base.FULL_BITS:
            return {"layers": {}, "norms": {}}
        chosen, batches = base.choose(self, host), context.calibration or []
        before = sum(weight.bytes() for weight in chosen.values())
        mark = len(host.changes)
        done = _Done()
        try:
            plain = [path for path, weight in chosen.items() if weight.plain and not is_held(weight.part)]
            feeds = {feed.readers[0]: feed for feed in norms_before(host, batches[0], plain)}
            with torch.no_grad():
                for inputs in gather(host, batches, chosen, STATISTICS["tokens"]):
                    for paths, tokens in inputs.shared():
                        feed = feeds.get(paths[0])
                        weights = {path: chosen[path] for path in paths}
                        if feed is not None and set(feed.readers) == set(paths):
                            self._merge(host, feed, weights, tokens, done)
                        else:
                            self._plain(host, weights, done)
                    done.dense += inputs.uncalled()
        except BaseException:
            host.changes.undo(mark)
            raise
        dense = sum(chosen[path].bytes() for path in done.dense)
        facts = {"left_dense": done.dense, "merged_norms": len(done.norms), "merged_layers": done.merged,
                 "added_columns": done.added}  # fmt: skip
        if self.bits < 8:  # noqa: PLR2004
            facts["held_as"] = f"codes of {self.bits} bits are held and multiplied as 8"
        base.note(self.name, host, context, done.layers, before, dense, facts)
        return {"layers": done.layers, "norms": done.norms}

    def restore(self, host: Host, record: dict[str, Any]) -> None:
        """Puts empty layers and norms in place; `load_state_dict` fills them."""
        base.restore_layers(host, record["layers"])
        for path, shape in record["norms"].items():
            norm = host.model.get_submodule(path)
            host.replace(path, Int8Norm.empty(norm, **shape, device=host.device).train(norm.training))

    def _merge(self, host: Host, feed: Feed, weights: dict[str, Weight], tokens: Tensor, done: "_Done") -> None:
        matrix = torch.cat([weight.matrix.float() for weight in weights.values()])
        codes, scales, steps, source, place = mergequant(matrix, tokens, bits=self.bits, spread=self.spread,
                                                         clip=self.clip)  # fmt: skip
        columns = torch.arange(len(steps), device=steps.device)
        belongs = torch.cat([columns, source]) if len(source) else None
        divisors = torch.cat([steps, steps[source]])
        whole = Int8(codes, scales, CODES, divisors, belongs)
        for (path, weight), part in zip(
            weights.items(), whole.split([w.shape[0] for w in weights.values()]), strict=True
        ):
            done.layers[path] = base.swap(host, weight, part.layer(weight.bias, weight.dtype))
        norm = Int8Norm.of(feed.norm, feed.affine, steps, source, place, 2 ** (self.bits - 1) - 1)
        host.replace(feed.path, norm.train(feed.norm.training))
        done.norms[feed.path] = norm.shape()
        done.merged += len(weights)
        done.added += len(source)

    def _plain(self, host: Host, weights: dict[str, Weight], done: "_Done") -> None:
        for path, weight in weights.items():
            if is_held(weight.part):
                done.layers[path] = base.swap(host, weight, weight.part.quantized())  # type: ignore[operator]
            elif weight.plain:
                form = Int8(*rowwise(weight.matrix, self.bits, SHRINK if self.clip else 1))
                done.layers[path] = base.swap(host, weight, form.layer(weight.bias, weight.dtype))
            else:
                done.dense.append(path)


@dataclasses.dataclass
class _Done:
    layers: dict[str, Any] = dataclasses.field(default_factory=dict)
    norms: dict[str, Any] = dataclasses.field(default_factory=dict)
    dense: list[str] = dataclasses.field(default_factory=list)
    merged: int = 0
    added: int = 0


METHOD = MergeQuant
