"""FlexQ: weights of 6 bits everywhere; inputs of 6 bits too, and of 8 in the layers whose output suffers from 6.

    q_w = clamp(round(w / s), -32, 31),    s = max |group| / 31,    of each group of 128 weights; of inputs just so
    e = ||(X - Q_6(X)) W^T||^2 / ||X W^T||^2;    inputs have 8 bits where e > sensitive, else 6

No calibration beyond e. Shapes: weight [out, in], tokens (inputs of the layer) [tokens, in], codes [out, in], scales
[out, groups].

Departures: the paper finds the sensitive layers by the model's perplexity, kind of layer by kind, and its code fixes
what it found for Llama (the down projections); here each layer's own output error decides, so other models have their
own (by the default bound, most down projections of the bundled small Llama and nothing else). 8-bit inputs share a
scale in runs of 64, the product's, 6-bit ones in runs of 128, the paper's. The paper's kernel multiplies planes of
bits, so that 6-bit inputs take less time than 8-bit ones. A processor's products have whole bytes: 6-bit inputs save
nothing here, and are multiplied in fp32 once they are rounded; `activations=8` gives all layers 8 bits, which is faster
and loses less.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math.shapes import Float, Int
from hasten.quant._six import SixBitInputs, round_inputs
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="FlexQ: Efficient Post-training INT6 Quantization for LLM Serving via Algorithm-System Co-Design",
    paper="2508.04405",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="LLaMA on GPUs: 1.33x inference and 1.21x memory over SmoothQuant at 6 bits; perplexity within 0.05 of FP16",
    claimed=1.33,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/flexq"),
    when="Quality next to that of the whole model, at three eighths of the memory of 16 bits.",
    when_not="Where 4 bits are good enough, quant/gptq reads a third less; activations=8 is faster on processors.",
)

LOWEST, HIGHEST = -32, 31
Found = tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows groups"], float]


def naive_flexq(weight: Float[Tensor, "rows columns"], tokens: Float[Tensor, "tokens columns"], *,
                group: int = 128) -> Found:  # fmt: skip
    """The equations, weight by weight and token by token."""
    rows, columns = weight.shape
    codes, scales = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, -(-columns // group))
    for n in range(rows):
        for g, part in enumerate(weight[n].float().split(group)):
            largest = part.abs().max()
            scales[n, g] = largest / HIGHEST if largest > 0 else 1.0
            for k, w in enumerate(part):
                codes[n, g * group + k] = int(torch.clamp(torch.round(w / scales[n, g]), LOWEST, HIGHEST)) - LOWEST
    lost = whole = 0.0
    for x in tokens.float():
        rounded = []
        for part in x.split(128):
            step = part.abs().max() / 31
            rounded.append((part / step).round() * step if step > 0 else part)
        for n in range(rows):
            whole += float((x * weight[n].float()).sum()) ** 2
            lost += float(((torch.cat(rounded) - x) * weight[n].float()).sum()) ** 2
    return codes, scales, lost / whole if whole else 0.0


def flexq(weight: Float[Tensor, "rows columns"], tokens: Float[Tensor, "tokens columns"], *, group: int = 128) -> Found:
    """Codes (0 to 63, zero is 32) and scales of the weight, and the share of its output that 6-bit inputs lose."""
    w = weight.float()
    codes, scales = [], []
    for part in w.split(group, dim=1):
        largest = part.abs().amax(1)
        scale = torch.where(largest > 0, largest / HIGHEST, 1.0)
        codes.append(torch.clamp(torch.round(part / scale[:, None]), LOWEST, HIGHEST) - LOWEST)
        scales.append(scale)
    x = tokens.float()
    whole = float((x @ w.t()).square().sum())
    lost = float(((round_inputs(x) - x) @ w.t()).square().sum())
    return torch.cat(codes, 1).to(torch.uint8), torch.stack(scales, 1), lost / whole if whole else 0.0


@dataclasses.dataclass(frozen=True)
class FlexQ(Method):
    bits: int = option(6, "bits of a weight; 16 leaves the model as it is", choices=(6, FULL_BITS))
    group: int = option(128, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    sensitive: float = option(0.001, "share of its output's energy from whose loss on a layer's inputs have 8 bits",
                              least=0)  # fmt: skip
    activations: int = option(6, "6: inputs of layers that bear it have 6 bits; 8: all have 8", choices=(6, 8))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")
    statistic = "tokens"

    def problems(self) -> list[str]:
        return group_problems(self.group)

    def quantize(self, weight: Tensor, tokens: Tensor) -> Codes:
        group = whole_group(self.group, weight)
        codes, scales, lost = flexq(weight, tokens, group=group)
        six = self.activations == 6 and lost <= self.sensitive
        form, zeros = SixBitInputs if six else Codes, torch.full_like(scales, -LOWEST)
        return form(codes, scales, zeros, group, 6, activations=8)


METHOD = FlexQ
