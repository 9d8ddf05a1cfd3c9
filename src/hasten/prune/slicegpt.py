"""SliceGPT: the residual stream is turned into its principal axes, and those of least variance are deleted everywhere.

An RMSNorm without scale commutes with orthogonal matrices, so a network does not change when the stream X between
sublayers is held as X Q and the matrices around are turned to fit (theorem 1). With Q_l the eigenvectors of

    C_l = sum over the tokens of X_l^T X_l                                              (section 3.3)

in order of falling eigenvalues, only the first d columns are kept: W_in -> Q_l^T W_in, W_out -> W_out Q_{l+1}, and the
residual connection is multiplied by Q_l^T Q_{l+1}. Norm scales are folded into the matrices behind them, the mean that
a LayerNorm subtracts into those before. C_l is that of the model sliced up to there. X [tokens, D], Q [D, d].

Departures: the head reads the sliced stream (the official code's option `slice_head`), so that all widths are equal;
d is a multiple of 8, as there.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts.context import Context
from hasten.hosts.slicing import Wiring
from hasten.math.shapes import Float

CARD = Card(
    title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    paper="2401.15024",
    seams=("weights.keep",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="Llama-2-70B with 25% sliced away: 64% of the compute on 24 GB cards, 99% of the zero-shot accuracy",
    claimed=1.5,
    identity={"keep": 1.0},
    needs=("calibration",),
    hosts=("decoder",),
    experiment=("stdlib-lm(task=perplexity)", "prune/slicegpt(keep=0.85)"),
    when="Wide models whose stream has directions that hardly vary: every product becomes smaller, with no kernel.",
    when_not="Small models trained to capacity: all their directions count, and the turned residual costs products.",
)

INTERVAL = 8  # the width is a multiple of it


def naive_slicegpt(streams: list[Float[Tensor, "tokens width"]], kept: int) -> Float[Tensor, "width width"]:
    """The projection on the first principal axes, from a singular value decomposition of all tokens.

    Args:
        streams: what entered the sublayer, batch by batch.
        kept: axes that stay.

    Returns:
        Q Q^T, fp64 [width, width].
    """
    axes = torch.linalg.svd(torch.cat([one.double() for one in streams]), full_matrices=True).Vh[:kept]
    projection = torch.zeros(axes.shape[1], axes.shape[1], dtype=torch.float64)
    for axis in axes:
        projection += torch.outer(axis, axis)
    return projection


def slicegpt(streams: list[Float[Tensor, "tokens width"]], kept: int) -> Float[Tensor, "width width"]:
    """As `naive_slicegpt`, from the eigenvectors of the covariance."""
    basis = principal(iter(streams), kept)
    return basis @ basis.T


def principal(streams: Iterator[Tensor], kept: int) -> Tensor:
    """The first `kept` eigenvectors of sum X^T X as columns, fp64 [width, kept].

    Raises:
        UsageError: the calibration data gives numbers that are not finite, or no token at all.
    """
    total: Any = 0
    tokens = 0
    for x in streams:
        total = total + x.double().T @ x.double()
        tokens += len(x)
    if not tokens:
        raise UsageError("the calibration data holds no real token: its attention_mask is 0 everywhere")
    if not total.isfinite().all():
        raise UsageError("the calibration inputs give NaN or infinity in the residual stream: check data and dtype")
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :kept]


@dataclasses.dataclass(frozen=True)
class SliceGPT(Method):
    """Deletes principal axes of the residual stream."""

    keep: float = option(0.75, "fraction of the stream's width that stays", above=0, most=1)

    def width(self, original: int) -> int:
        """The sliced width."""
        return max(INTERVAL, int(original * self.keep) // INTERVAL * INTERVAL)

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Slices a decoder.

        Raises:
            UsageError: no decoder, one that is wired otherwise, or too narrow.
        """
        if self.keep == 1:
            return {}
        wiring, before = Wiring(host), _bytes(host)
        width = self.width(wiring.width)
        if width >= wiring.width:
            raise UsageError(f"a stream of {wiring.width} can't be sliced to a multiple of {INTERVAL} below it")
        bases = wiring.signals(context.calibration or [], lambda _, streams: principal(streams, width))
        mark = len(host.changes)
        try:
            wiring.narrowed(bases, width)
        except BaseException:
            host.changes.undo(mark)
            raise
        context.note(self.name, width=width, of=wiring.width, weight_bytes_before=before,
                     weight_bytes_after=_bytes(host), kernel="dense, narrower")  # fmt: skip
        return {"width": width}

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        if record:
            Wiring(host).narrowed(None, record["width"])


def _bytes(host: Any) -> int:
    return sum(parameter.nbytes for parameter in host.model.parameters())


METHOD = SliceGPT
