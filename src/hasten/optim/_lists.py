"""Sums over lists of tensors, which stay on the tensors' device."""

import torch
from torch import Tensor


def full(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in fp32; those in fp32 and fp64 as they are."""
    return [one if one.dtype in (torch.float32, torch.float64) else one.float() for one in tensors]


def dot(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    """The inner product of two lists, taken as one long vector each: 0-d."""
    return torch.stack([(one * other).sum() for one, other in zip(ones, others, strict=True)]).sum()


def norm1(tensors: list[Tensor]) -> Tensor:
    """The l1 norm of a list, taken as one long vector: 0-d."""
    return torch.stack(list(torch._foreach_norm(tensors, 1))).sum()


def norms2(tensors: list[Tensor]) -> Tensor:
    """The l2 norm of each tensor, [k]."""
    return torch.stack(list(torch._foreach_norm(tensors, 2)))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of two 0-d tensors, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-38), torch.zeros_like(numerator))
