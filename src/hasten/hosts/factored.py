"""Linear layers whose weight is a product of two thin matrices, for training: W [out, in] = B [out, r] A [r, in].

A step multiplies by A and then by B, r (out + in) products a token where the dense layer makes out in, and gradients
and optimizer states have the factors' sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.core.errors import UsageError
from hasten.hosts.base import Host
from hasten.hosts.changes import Changes
from hasten.hosts.weights import linear_of


class FactoredLinear(nn.Module):
    """x -> B (A x) + bias.

    Args:
        b, a: [out, r] and [r, in]; fresh parameters are made of them.
        bias: [out] or None; a parameter is taken over as it is.

    Raises:
        UsageError: the factors do not fit together.
    """

    bias: nn.Parameter | None
    matrix_names = ("b", "a")  # what `Host.matrices` lists

    def __init__(self, b: Tensor, a: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
            raise UsageError(f"factors are [out, r] and [r, in], not {tuple(b.shape)} and {tuple(a.shape)}")
        self.b, self.a = nn.Parameter(b.detach().clone()), nn.Parameter(a.detach().clone())
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach().clone())
        self.bias = bias
        self.out_features, self.in_features = b.shape[0], a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def weight(self) -> Tensor:
        """B A, [out, in], made anew at each reading; some models ask for its dtype or device."""
        return self.b @ self.a

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, self.a), self.b, self.bias)

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """A plain linear layer with the product as its weight; the bias is the same parameter."""
        made = linear_of((self.b.float() @ self.a.float()).to(self.b.dtype), None)
        made.weight.requires_grad_(self.b.requires_grad)
        made.bias = self.bias  # type: ignore[assignment]
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A with equal Gram matrices, B' = U sqrt(S) and A' = sqrt(S) V^T.

    The singular values come from the r x r matrix between the factors' orthogonal bases, so the product is never made.
    In each column of U the entry of largest magnitude is positive.

    Args:
        b, a: [out, r] and [r, in], r at most out and in.

    Returns:
        [out, r] and [r, in] in the dtypes given.
    """
    left, upper = torch.linalg.qr(b.float())
    right, lower = torch.linalg.qr(a.float().T)
    u, s, vt = torch.linalg.svd(upper @ lower.T)
    return _split(left @ u, s, vt @ right.T, b.dtype)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of that rank, B [out, r] and A [r, in]."""
    u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return _split(u[:, :rank], s[:rank], vt[:rank], weight.dtype)


def _split(u: Tensor, s: Tensor, vt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign().squeeze(0)
    root = s.sqrt() * torch.where(sign == 0, 1.0, sign)
    return (u * root).to(dtype), (root[:, None] * vt).to(dtype)


def thin(linear: nn.Linear, share: float) -> int | None:
    """The rank of a layer's factors, `share` of its smaller side; None where they would hold as much as the weight."""
    rank = max(1, round(share * min(linear.out_features, linear.in_features)))
    return rank if rank * (linear.out_features + linear.in_features) < linear.weight.numel() else None


def factorable(host: Host, share: float) -> dict[str, int]:
    """Paths and ranks of the linear layers that can become thin factors.

    Left out are layers that share their weight or do not train, subclasses of `nn.Linear`, and layers too small.
    """
    users: dict[int, int] = {}
    for _, parameter in host.model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = {}
    for path, linear in host.linears().items():
        rank = thin(linear, share)
        own = type(linear) is nn.Linear and users[id(linear.weight)] == 1 and linear.weight.requires_grad
        if own and rank is not None:
            found[path] = rank
    return found


def factor(host: Host, ranks: dict[str, int], changes: Changes) -> dict[nn.Parameter, Tensor]:
    """Puts factors in the place of linear layers; `changes` has the undo.

    Returns:
        Each new factor and the weight that it stems from.
    """
    sources: dict[nn.Parameter, Tensor] = {}
    for path, linear in host.linears().items():
        if path in ranks:
            made = FactoredLinear(*truncated(linear.weight, ranks[path]), linear.bias).train(linear.training)
            changes.module(host.model, path, made)
            sources[made.b] = sources[made.a] = linear.weight
    return sources


def factored(host: Host) -> dict[str, FactoredLinear]:
    """The model's factored layers by path."""
    return {path: part for path, part in host.model.named_modules() if isinstance(part, FactoredLinear)}


def merge(host: Host) -> None:
    """Makes all factored layers plain linear layers for good."""
    changes = Changes()
    for path, layer in factored(host).items():
        changes.module(host.model, path, layer.dense())
