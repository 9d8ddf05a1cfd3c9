"""SqueezeLLM: each row of a weight has its own few values, placed where the loss is sensitive; a few weights stay.

The values of a row are the centroids of k-means, weighted by the diagonal of the Fisher information F, which stands
for the Hessian of the loss (paper, equation 4; section 4.1):

    Q(w)* = argmin over Q of  sum_i F_ii (w_i - Q(w_i))^2,    F = 1/|D| sum over d in D of g_d g_d^T

Before that, W = D + S: the largest weights and the most sensitive ones are held in S, as they are (section 4.2), and
take no part in the clusters of D. Shapes: weight, F and codes [out, in], tables [out, 2^bits].

Departures: outliers are a share of each matrix, not what exceeds a multiple of its interquartile range that gives
that share in the whole model. k-means is nearly exact (`math.kmeans`), where the official code takes scikit-learn's
from one random start. A held weight is code plus remainder, so that no code has to mean zero. Values and indices of S
are 32 bits each, not 16; rows of S that are long are not taken out. A convolution has one table per output channel.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math import kmeans
from hasten.math.shapes import Float, Int
from hasten.quant.base import FULL_BITS, Codes, Sparse, whole_group

CARD = Card(
    title="SqueezeLLM: Dense-and-Sparse Quantization",
    paper="2306.07629",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="LLaMA at 3 bits on an A6000: up to 2.3x per generated token over FP16, perplexity gap up to 2.1x smaller",
    claimed=2.3,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "vit", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/squeezellm(bits=3)"),
    when="Three bits and long rows: one table serves a whole row, so nearly nothing is stored beside the codes.",
    when_not="Rows of a few hundred weights, whose tables weigh as much as the codes; or no memory for gradients.",
)
Parts = tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows entries"], Float[Tensor, "rows columns"]]


def naive_squeezellm(
    weight: Float[Tensor, "rows columns"],
    fisher: Float[Tensor, "rows columns"],
    *,
    bits: int = 3,
    outliers: float = 0.0045,
    sensitive: float = 0.0005,
) -> Parts:
    """The least weighted error of each row in fp64, found by trying every run of its sorted weights."""
    w, f, held = weight.double(), fisher.double(), set()
    places = [(n, k) for n in range(w.shape[0]) for k in range(w.shape[1])]
    for score, share in ((f, sensitive), (w.abs(), outliers)):
        left = sorted((place for place in places if place not in held), key=lambda place: -float(score[place]))  # noqa: B023
        held |= set(left[: int(w.numel() * share)])
    codes, tables, rest = torch.zeros(weight.shape, dtype=torch.uint8), [], torch.zeros(weight.shape)
    for n in range(w.shape[0]):
        importance = torch.tensor([0.0 if (n, k) in held else float(f[n, k]) for k in range(w.shape[1])]).double()
        if importance.sum() == 0:
            importance = torch.tensor([0.0 if (n, k) in held else 1.0 for k in range(w.shape[1])]).double()
        table = kmeans.exact(w[n], importance, 2**bits)[0].float()
        for k in range(w.shape[1]):
            codes[n, k] = int((table - weight[n, k].float()).abs().argmin())
            if (n, k) in held:
                rest[n, k] = weight[n, k].float() - table[int(codes[n, k])]
        tables.append(table)
    return codes, torch.stack(tables), rest


def squeezellm(
    weight: Float[Tensor, "rows columns"],
    fisher: Float[Tensor, "rows columns"],
    *,
    bits: int = 3,
    outliers: float = 0.0045,
    sensitive: float = 0.0005,
) -> Parts:
    """The same for all rows at once; rows of more than 64 weights within about a percent of the least error.

    Returns:
        Codes uint8 [rows, columns]; tables fp32 [rows, 2^bits], ascending; what is added to the table's entries,
        zero but where a weight is held, fp32 [rows, columns].
    """
    w, f = weight.float(), fisher.float()
    held = torch.zeros_like(w, dtype=torch.bool)
    for score, share in ((f, sensitive), (w.abs(), outliers)):
        most = score.masked_fill(held, -1.0).flatten().topk(int(w.numel() * share)).indices
        held.view(-1)[most] = True
    importance = f.masked_fill(held, 0.0)
    importance = torch.where(importance.sum(1, keepdim=True) > 0, importance, (~held).float())
    tables = kmeans.kmeans(w, importance, 2**bits)
    codes = kmeans.nearest(w, tables)
    rest = torch.where(held, w - tables.gather(1, codes.long()), 0.0)
    return codes, tables, rest


@dataclasses.dataclass(frozen=True)
class SqueezeLLM(Method):
    bits: int = option(3, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, FULL_BITS))
    outliers: float = option(0.0045, "share of the weights that are held as they are for their size", least=0, most=0.1)
    sensitive: float = option(0.0005, "share that is held for its effect on the loss", least=0, most=0.1)
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    statistic = "fisher"

    def quantize(self, weight: Tensor, fisher: Tensor) -> Codes:
        codes, tables, rest = squeezellm(
            weight, fisher, bits=self.bits, outliers=self.outliers, sensitive=self.sensitive
        )
        numbers = torch.arange(len(tables), dtype=torch.int32, device=weight.device)[:, None]
        sparse = Sparse.of(rest) if self.outliers or self.sensitive else None
        return Codes(codes, torch.ones_like(tables[:, :1]), numbers, whole_group(0, weight), self.bits, tables=tables,
                     outliers=sparse)  # fmt: skip


METHOD = SqueezeLLM
