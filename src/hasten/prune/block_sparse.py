"""Block-sparse products: weights go in blocks of r rows and c columns, and a kernel multiplies the blocks that remain.

    S_B = mean over (i, j) in block B of |W_ij|      (score=wanda: of |W_ij| ||X_j||_2)
    W_B <- 0  where S_B is among the least,    y = x W^T + b over the blocks that remain (paper, section 3.2)

W [out, in], x [tokens, in]; blocks compete within a matrix. In the paper's kernel a block is 4x1 and its numbers are
eight-bit codes, multiplied by AVX-512 VNNI with the sums of several rows and tokens held in registers; here `bits=8` is
that, with a scale for each row of W and, found while running, for each token; `bits=32` keeps the weights as they are.

Departures: blocks are 16x1 by default, which read activations less often than 4x1 (`hasten.kernels.block_sparse`); the
scales of activations are found while running, not by calibration; the kernel is compiled C++, not made at run time for
each shape, and fuses the bias only. The paper's models were trained while they were pruned; here nothing is trained,
and `prune/squarehead` trains what remains.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.hosts.weights import is_held
from hasten.math.shapes import Float
from hasten.prune import _patterns
from hasten.prune.base import WeightPruning

CARD = Card(
    title="An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on CPUs",
    paper="2306.16601",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Products of 70% to 90% sparse eight-bit weights up to 5x as fast as oneDNN's dense ones, on a Xeon",
    claimed=5.0,
    identity={"sparsity": 0.0},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "prune/block_sparse(sparsity=0.5)"),
    when="CPUs, 70% of the weights and more, and a model that is trained after pruning.",
    when_not="Pruning without training: single weights (prune/wanda) keep more; and below about 60% of zeros.",
)


def naive_block_sparse(
    weight: Float[Tensor, "rows columns"],
    norms: Float[Tensor, " columns"] | None = None,
    *,
    sparsity: float = 0.5,
    pattern: str = "16x1",
) -> Float[Tensor, "rows columns"]:
    """The equation, block by block from the least score up."""
    found = weight.float().clone()
    size = _patterns.block(pattern)
    assert size is not None
    blocks = []
    for r in range(0, found.shape[0], size[0]):
        for c in range(0, found.shape[1], size[1]):
            inside = [(i, j) for i in range(r, min(r + size[0], found.shape[0]))
                      for j in range(c, min(c + size[1], found.shape[1]))]  # fmt: skip
            scores = [abs(found[at].item()) * (1 if norms is None else norms[at[1]].item()) for at in inside]
            blocks.append((sum(scores) / len(scores), -r, -c, inside))
    gone = 0
    for *_, inside in sorted(blocks):
        gone += len(inside)
        if gone > found.numel() * sparsity:
            break
        for at in inside:
            found[at] = 0
    return found


def block_sparse(
    weight: Float[Tensor, "rows columns"],
    norms: Float[Tensor, " columns"] | None = None,
    *,
    sparsity: float = 0.5,
    pattern: str = "16x1",
) -> Float[Tensor, "rows columns"]:
    """As `naive_block_sparse`, with one sort.

    Args:
        norms: ||X_j||_2 of each input, or None to go by magnitude.
        sparsity: fraction of the weights that become zero, rounded down to whole blocks.
        pattern: rows x columns of a block; those at the edges may be smaller.

    Returns:
        fp32 weights with zeros. Of blocks of equal scores the earlier one stays.
    """
    whole = weight.float()
    scores = whole.abs() if norms is None else whole.abs() * norms.float()
    return torch.where(_patterns.keep(scores, sparsity, pattern), whole, 0)


@dataclasses.dataclass(frozen=True)
class BlockSparse(WeightPruning):
    pattern: str = option("16x1", "rows x columns of a block; 4x1, 8x1, 16x1 and 32x1 have the fastest kernels")
    score: str = option(
        "magnitude", "what counts: magnitude, or wanda (with calibration)", choices=("magnitude", "wanda")
    )
    bits: int = option(32, "of the weights that remain; 8: inputs are rounded too", choices=(8, 32))

    def problems(self) -> list[str]:
        if _patterns.block(self.pattern) is None:
            return [f"pattern must be blocks such as 16x1 (rows x columns), not {self.pattern}"]
        if self.bits == 8 and self.layout == "dense":
            return ["bits=8 is held in sparse layers: leave layout=dense out"]
        return super().problems()

    @property
    def card(self) -> Any:
        return dataclasses.replace(CARD, needs=("calibration",) if self.score == "wanda" else ())

    def prune(self, weight: Tensor, norms: Tensor | None, sparsity: float) -> Tensor:
        return block_sparse(weight, norms, sparsity=sparsity, pattern=self.pattern)

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        """Prunes, then rounds what remains where eight bits are wanted."""
        record = super().install(host, context)
        if self.bits == 8:
            held = 0
            for path, one in record["layers"].items():
                part = host.model.get_submodule(path)
                small = getattr(part, "layer", part).quantized()  # type: ignore[operator]
                host.replace(path if is_held(part) else f"{path}.layer", small)
                one["shape"], held = small.shape(), held + small.bytes()
            if record["layers"]:
                context.note(self.name, bytes_in_8_bits=held)
        return record


METHOD = BlockSparse
