"""Steps with gradients whose rows and columns have equal norms: what SinkGD does to all its matrices, in one pass.

The arithmetic of an iteration is one product of a row and a vector and one sum of vectors, so memory decides. PyTorch
reads a stack of matrices from memory for each of them and writes copies between; `sinkhorn.cpp` takes one matrix at a
time, reads it from memory once and keeps it in the core's cache for the iterations.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.kernels import native

SMALL = 1e-30  # far below the square of any entry that counts, the largest being 1
FEW = 16_384  # numbers in all, below which a second thread costs more than it gives


def sinkhorn(gradient: Tensor, iterations: int) -> Tensor:
    """Rows to l2 norm sqrt(n), then columns to sqrt(m), `iterations` times; rows and columns of zeros stay.

    Args:
        gradient: [..., m, n], of any float type.

    Returns:
        X: [..., m, n] in fp32; it does not depend on the gradient's scale.
    """
    if gradient.device.type != "cpu" or _sharded(gradient) or kernel() is None:
        return _in_torch(gradient, iterations)
    matrices = gradient.detach().float().contiguous()
    out = torch.zeros_like(matrices)
    shape = (-1, *gradient.shape[-2:])
    parts = out.view(shape).unbind()
    _run(parts, matrices.view(shape).unbind(), None, iterations, 0.0, [-1.0] * len(parts), [1.0] * len(parts))
    return out


def _in_torch(gradient: Tensor, iterations: int) -> Tensor:
    m, n = gradient.shape[-2:]
    g = gradient.float()
    g = g / g.flatten(-2).abs().amax(-1)[..., None, None].clamp_min(SMALL)  # the result does not depend on G's scale
    s = g * g
    v = torch.ones_like(g[..., :1, :])  # [..., 1, n]; row vectors, for which the products are several times faster
    for _ in range(iterations):
        u = n / (v @ s.mT).clamp_min(SMALL)  # [..., 1, m]
        v = m / (u @ s).clamp_min(SMALL)
    return g.mul_(u.sqrt().mT).mul_(v.sqrt())


def sinkhorn_step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor] | None,
    *,
    iterations: int,
    momentum: float,
    lr: Sequence[float],
    decay: Sequence[float],
) -> bool:
    """W <- (1 - lr decay) W - lr X in place, X the `sinkhorn` of the gradient or of its average, looked ahead.

    With A <- A + (1 - momentum)(G - A) the latter is A + (1 - momentum)(G - A).

    Args:
        weights, gradients, averages: matrices [m_i, n_i] each, in fp32, contiguous and on the CPU; no averages: none.
        lr, decay: one of each for each matrix.

    Returns:
        Whether it was done; False, and nothing is changed, where the native kernel can't take these tensors.
    """
    every = [*weights, *gradients, *(averages or ())]
    if kernel() is None or not all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() and not _sharded(t) for t in every
    ):
        return False
    keeps = [1 - rate * part for rate, part in zip(lr, decay, strict=True)]
    _run(weights, gradients, averages, iterations, momentum, lr, keeps)
    return True


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor; its products know how to talk to the other processes


def _run(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor] | None,
    iterations: int,
    momentum: float,
    rates: Sequence[float],
    keeps: Sequence[float],
) -> None:
    count, numbers = len(weights), sum(weight.numel() for weight in weights)
    shapes = (ctypes.c_int64 * (2 * count))(*(side for weight in weights for side in weight.shape))
    run = kernel()
    assert run is not None
    threads = 1 if numbers < FEW else torch.get_num_threads()
    lists = [_pointers(weights), _pointers(gradients), _pointers(averages) if averages is not None else None]
    factors = ((ctypes.c_float * count)(*one) for one in (rates, keeps))
    run(*lists, shapes, *factors, count, iterations, momentum, threads)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@functools.cache
def kernel() -> Callable[..., None] | None:
    """The native kernel, built at the first call; None where it can't be built."""
    library = native.library("sinkhorn.cpp")
    if library is None:
        return None
    function = library.hasten_sinkhorn_step
    function.restype = None
    function.argtypes = [
        *[ctypes.c_void_p] * 6,
        *[ctypes.c_int64] * 2,
        ctypes.c_float,
        ctypes.c_int,
    ]
    return function
