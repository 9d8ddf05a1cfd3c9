"""The inverse of a layer's Hessian as a triangular factor, for methods that solve for weights column by column."""

import torch
from torch import Tensor

from hasten.core.errors import UsageError
from hasten.math.shapes import Float


def damped(hessian: Float[Tensor, "columns columns"], damp: float) -> Float[Tensor, "columns columns"]:
    """H + damp * mean(diag H) * I; inputs that were always zero count as the mean of the others."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    made = hessian.clone()
    made.diagonal().add_(mean * (damp + dead))
    return made


def inverse_factor(hessian: Float[Tensor, "columns columns"], damp: float) -> Float[Tensor, "columns columns"]:
    """Upper Cholesky factor U of the inverse of the damped Hessian, H^-1 = U^T U.

    Row q of U is, up to its length, row q of the inverse of H without its first q rows and columns. Where the factor
    can't be computed, damping grows tenfold.

    Raises:
        UsageError: no factor even with `damp` 1.
    """
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while damp <= 1:
        factor = damped(hessian, damp)  # each step overwrites it: at large widths these matrices are most of the memory
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
            if not failed and factor.isfinite().all():
                return factor
        damp = max(10 * damp, 1e-4)
    raise UsageError("the calibration inputs of a layer give no invertible Hessian: use more or other calibration data")
