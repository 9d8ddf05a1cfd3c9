"""Magnitude pruning: the weights of least absolute value become zero.

    S_ij = |W_ij|,    W_ij <- 0  where S_ij is among the least

(paper, section 3: each layer has a threshold of its own). W [out, in]. It needs no data and is what every later method
is compared with.

Departures: the threshold follows from the sparsity that is asked for, not from a multiple of the layer's standard
deviation, and nothing is trained: `prune/squarehead` trains what remains. n:m and blocks, whose weights count by their
mean, are additions.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.options import option
from hasten.math.shapes import Float
from hasten.prune import _patterns
from hasten.prune.base import WeightPruning

CARD = Card(
    title="Learning both Weights and Connections for Efficient Neural Networks",
    paper="1506.02626",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="AlexNet 9x and VGG-16 13x fewer weights without loss of accuracy, after training what remains",
    claimed=None,
    identity={"sparsity": 0.0},
    hosts=("decoder", "diffusion_lm", "vit", "denoiser", "module"),
    experiment=("stdlib-lm(task=generate)", "prune/magnitude(sparsity=0.5)"),
    when="No calibration data, convolutional networks, and holding the zeros of a model that was trained with them.",
    when_not="Language models above 30%: prune/wanda keeps far more for a minute of calibration.",
)


def naive_magnitude(
    weight: Float[Tensor, "rows columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    by_row: bool = False,
) -> Float[Tensor, "rows columns"]:
    """The equation, weight by weight (for blocks: block by block) from the least up."""
    found = weight.float().clone()
    rows, columns = found.shape
    some, size = _patterns.of(pattern), _patterns.block(pattern)
    if some is not None:
        parts = [[(r, c) for c in range(at, min(at + some[1], columns))] for r in range(rows)
                 for at in range(0, columns, some[1])]  # fmt: skip
        for part in parts:
            for r, c in sorted(part, key=lambda rc: (-found[rc].abs().item(), rc))[some[0] :]:
                found[r, c] = 0
        return found
    high, wide = size or (1, 1)
    groups = [(r, c) for r in range(0, rows, high) for c in range(0, columns, wide)]
    held = {at: found[at[0] : at[0] + high, at[1] : at[1] + wide].abs().double() for at in groups}
    lines = [[at for at in groups if at[0] == r] for r in range(rows)] if by_row and not size else [groups]
    for line in lines:
        left = sum(held[at].numel() for at in line) * sparsity
        for r, c in sorted(line, key=lambda at: (held[at].mean().item(), -at[0], -at[1])):
            left -= held[r, c].numel()
            if left < 0:
                break
            found[r : r + high, c : c + wide] = 0
    return found


def magnitude(
    weight: Float[Tensor, "rows columns"],
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    by_row: bool = False,
) -> Float[Tensor, "rows columns"]:
    """As `naive_magnitude`, with one sort.

    Args:
        sparsity: fraction that becomes zero, rounded down to whole weights or blocks.
        pattern: unstructured, n:m (n of each m in a row stay) or blocks such as 16x1.
        by_row: single weights compete within their row, not in the whole matrix.

    Returns:
        fp32 weights with zeros.
    """
    whole = weight.float()
    return torch.where(_patterns.keep(whole.abs(), sparsity, pattern, by_row), whole, 0)


@dataclasses.dataclass(frozen=True)
class Magnitude(WeightPruning):
    by_row: bool = option(False, "each row gets the same sparsity; else weights compete in the whole matrix")

    statistic = "none"

    def prune(self, weight: Tensor, statistic: None, sparsity: float) -> Tensor:
        return magnitude(weight, sparsity=sparsity, pattern=self.pattern, by_row=self.by_row)


METHOD = Magnitude
