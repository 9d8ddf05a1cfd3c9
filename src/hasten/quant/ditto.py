"""Ditto's codes: every block of 256 weights has a codebook of its own; a weight is the number of an entry, in 4 bits.

The codebook C of a block B is found by k-means (paper, abstract: a codebook per block, indices of few bits):

    least over C of  sum_{w in B} min_j (w - C_j)^2,    code = argmin_j |w - C_j|,    |C| = 2^b

Shapes: weight and codes [out, in], tables [blocks, 2^b], the table of each block of a row [out, ceil(in / block)].

Departures: the paper's other half, a pass of LLVM that finds loops of matrix-vector products in the C program of a
model and puts calls of BLAS there, and the executable that it gives, have no counterpart: PyTorch's products are
BLAS's already. Here a native kernel multiplies the codes, and the dense weights are never in memory. Blocks follow
each other within a row, so the last one of a row may have fewer weights; rows shorter than a block share one codebook
as far as whole rows fit. k-means is nearly exact (`math.kmeans`), not from a random start. Entries are fp32, 2 bits
a weight of a whole block. The paper was read in its abstract and in summaries, and no official code was found: 4 bits
and blocks of 256 are what the published version is said to take (the first preprint: 3 bits).
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.options import Method, option
from hasten.math import kmeans
from hasten.math.shapes import Float, Int
from hasten.quant.base import FULL_BITS, Codes, group_problems, whole_group

CARD = Card(
    title="Compiling Code LLMs into Lightweight Executables",
    paper="2603.29813",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Code Llama 7B and two others on an Apple M4: up to 10.5x the speed of their own inference, 6.4x less memory",
    claimed=10.5,
    identity={"bits": 16},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "quant/ditto(bits=4)"),
    when="No calibration data, and weights whose distribution even steps serve badly.",
    when_not="With calibration data: quant/squeezellm has one table for a whole row and places it by sensitivity.",
)
Parts = tuple[Int[Tensor, "rows columns"], Float[Tensor, "blocks entries"], Int[Tensor, "rows groups"]]


def naive_ditto(weight: Float[Tensor, "rows columns"], *, bits: int = 4, block: int = 256) -> Parts:
    """The least error of each block in fp64, found by trying every run of its sorted weights."""
    rows, columns = weight.shape
    codes, numbers = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, -(-columns // block))
    together = max(1, block // columns)
    tables: list[Tensor] = []
    for n in range(0, rows, together):
        for g in range(-(-columns // block)):
            part = weight[n : n + together, g * block : (g + 1) * block].float()
            table = kmeans.exact(part.flatten(), None, 2**bits)[0].float()
            numbers[n : n + together, g] = len(tables)
            tables.append(table)
            for row in range(len(part)):
                for k, value in enumerate(part[row]):
                    codes[n + row, g * block + k] = int((table - value).abs().argmin())
    return codes, torch.stack(tables), numbers.int()


def ditto(weight: Float[Tensor, "rows columns"], *, bits: int = 4, block: int = 256) -> Parts:
    """The same for all blocks at once; blocks of more than 64 weights within about a percent of the least error.

    Returns:
        Codes uint8 [rows, columns]; tables fp32 [blocks, 2^bits], ascending; int32 [rows, groups], each group's table.
    """
    rows, columns = weight.shape
    height, width, groups = (
        max(1, block // columns),
        min(block, columns),
        -(-columns // block),
    )  # height: rows of a block
    add = (0, groups * width - columns, 0, -rows % height)

    def blocks(whole: Tensor) -> Tensor:
        """[blocks, weights]"""
        return whole.unflatten(0, (-1, height)).unflatten(2, (groups, width)).transpose(1, 2).flatten(2).flatten(0, 1)

    parts = blocks(F.pad(weight.float(), add))
    there = blocks(F.pad(torch.ones_like(weight, dtype=torch.float32), add)) if any(add) else None
    tables = kmeans.kmeans(parts, there, 2**bits)
    codes = kmeans.nearest(parts, tables).view(-1, groups, height, width).transpose(1, 2).flatten(0, 1).flatten(1)
    numbers = torch.arange(len(tables), dtype=torch.int32, device=weight.device).view(-1, groups)
    return codes[:rows, :columns], tables, numbers.repeat_interleave(height, 0)[:rows]


@dataclasses.dataclass(frozen=True)
class Ditto(Method):
    bits: int = option(4, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, FULL_BITS))
    block: int = option(256, "weights that share a codebook, a power of two from 16 up; 0: the whole row", least=0)
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return [problem.replace("group", "block") for problem in group_problems(self.block)]

    def quantize(self, weight: Tensor, statistic: None) -> Codes:
        codes, tables, numbers = ditto(weight, bits=self.bits, block=self.block or weight.shape[1])
        ones = torch.ones_like(numbers, dtype=torch.float32)
        return Codes(codes, ones, numbers, whole_group(self.block, weight), self.bits, tables=tables)


METHOD = Ditto
