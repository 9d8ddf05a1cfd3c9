"""A feed-forward layer with ReLU, of which only the active neurons are computed: decoding with sparse activations.

    z = x gate^T + gate_bias          all neurons
    a = z where z > threshold, else 0
    y = (a * (x up^T + up_bias)) down^T + down_bias        gated (Llama); without `up`: y = a down^T + down_bias

Shapes: x [..., width], gate and up [hidden, width], down_t [hidden, out] (down transposed, so that a neuron's weights
lie side by side). A shifted ReLU, relu(z - s), is a `gate_bias` of -s with threshold 0; FATReLU is a threshold above 0.

The result is that of the dense layer but for the order of additions. What is saved with a share s of inactive neurons:
gated s of two of three matrices, else s of one of two. Several tokens share what is active for any of them.

One signature, three ways to compute it:

- `native`: the C++ kernel `relu_ffn.cpp`, on a CPU, up to eight tokens, weights in fp32 or bf16, no gradients.
- `torch`: up to eight tokens: the active rows are gathered and multiplied. Any device.
- `dense`: more tokens, or gradients: plain products, differentiable in everything, no gain.
"""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hasten.core.errors import UsageError
from hasten.kernels import native
from hasten.math.shapes import Float

KINDS = {torch.float32: 0, torch.bfloat16: 1}
MOST = 8  # tokens for which inactive neurons are left out
GATHERED = 5  # gathering a row and multiplying the copy costs as much as multiplying this many
_PIECES, _LEAST = 8, 64  # of hidden neurons that threads take; neurons of a piece at least


class _Layer(ctypes.Structure):
    """The kernel's `struct Layer`."""

    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "x", "y", "partial")
        ),
        *((n, ctypes.c_int64) for n in ("kind", "count", "width", "hidden", "out", "pieces", "threads")),
        ("threshold", ctypes.c_float),
    ]


@functools.cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The built kernel; None where it can't be built."""
    found = native.library("relu_ffn.cpp", isa=isa)
    if found is not None:
        found.hasten_relu_ffn.restype = None
        found.hasten_relu_ffn.argtypes = [ctypes.POINTER(_Layer)]
    return found


def path(count: int = 1, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """How `relu_ffn` computes `count` tokens without gradients: `native`, `torch` or `dense` (no gain)."""
    if count > MOST:
        return "dense"
    return "native" if torch.device(device).type == "cpu" and dtype in KINDS and library() is not None else "torch"


def naive_relu_ffn(
    x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """`relu_ffn` token by token and neuron by neuron in fp32."""
    found = []
    for token in x.reshape(-1, x.shape[-1]).float():
        y = torch.zeros(down_t.shape[1]) if down_bias is None else down_bias.float()
        for i in range(len(gate)):
            z = gate[i].float() @ token + (0 if gate_bias is None else gate_bias[i].float())
            if z > threshold:
                if up is not None:
                    z = z * (up[i].float() @ token + (0 if up_bias is None else up_bias[i].float()))
                y = y + z * down_t[i].float()
        found.append(y)
    return torch.stack(found).view(*x.shape[:-1], -1).to(x.dtype)


def relu_ffn(
    x: Float[Tensor, "... width"],
    gate: Float[Tensor, "hidden width"],
    down_t: Float[Tensor, "hidden out"],
    up: Float[Tensor, "hidden width"] | None = None,
    gate_bias: Float[Tensor, "hidden"] | None = None,
    up_bias: Float[Tensor, "hidden"] | None = None,
    down_bias: Float[Tensor, "out"] | None = None,
    threshold: float = 0.0,
) -> Float[Tensor, "... out"]:
    """The layer's output in x's dtype; sums in fp32 on the native path.

    Works under `torch.compile` and `torch.export` as the operator `hasten::relu_ffn` where no gradient is needed.

    Args:
        threshold: not negative; neurons at or below it are inactive.
    """
    given = x, gate, down_t, up, gate_bias, up_bias, down_bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return dense_ffn(*given, threshold)
    if type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        return _compute(*given, threshold)  # the dispatcher costs more than a small product
    return torch.ops.hasten.relu_ffn(*given, threshold)


def dense_ffn(
    x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, threshold: float,
) -> Tensor:  # fmt: skip
    """The layer by products with whole matrices."""
    z = F.linear(x, gate, gate_bias)
    a = torch.where(z <= threshold, 0, z)  # NaN stays
    if up is not None:
        a = a * F.linear(x, up, up_bias)
    y = a @ down_t
    return y if down_bias is None else y + down_bias


def torch_ffn(
    x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, threshold: float,
) -> Tensor:  # fmt: skip
    """The layer by products with gathered rows: those of neurons that are active for any token, if they are few."""
    z = F.linear(x, gate, gate_bias)
    a = torch.where(z <= threshold, 0, z)
    active = (a != 0).flatten(0, -2).any(0).nonzero()[:, 0] if a.ndim > 1 else a.nonzero()[:, 0]
    if len(active) * GATHERED < len(gate):
        a, down_t = a[..., active], down_t[active]
        up, up_bias = (None if t is None else t[active] for t in (up, up_bias))
    if up is not None:
        a = a * F.linear(x, up, up_bias)
    y = a @ down_t
    return y if down_bias is None else y + down_bias


def native_ffn(
    x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, threshold: float, *, isa: str | None = None,
) -> Tensor:  # fmt: skip
    """The layer through the kernel; CPU tensors, matrices contiguous and of one dtype, fp32 or bf16."""
    run = library(isa)
    assert run is not None, "ask path() first"
    dtype, (hidden, out), count = x.dtype, down_t.shape, math.prod(x.shape[:-1])
    x = x.detach() if dtype is torch.float32 and x.is_contiguous() else x.detach().float().contiguous()
    biases = [b if b is None or b.dtype is torch.float32 else b.float() for b in (gate_bias, up_bias, down_bias)]
    pieces = max(1, min(_PIECES, hidden // _LEAST))
    y, partial = torch.empty(*x.shape[:-1], out), torch.empty(pieces, count, out)
    if count:
        given = (gate, up, down_t, *biases, x, y, partial)
        pointers = [None if t is None else t.data_ptr() for t in given]
        sizes = KINDS[gate.dtype], count, x.shape[-1], hidden, out, pieces, torch.get_num_threads()
        run.hasten_relu_ffn(ctypes.byref(_Layer(*pointers, *sizes, threshold)))
    return y if dtype is torch.float32 else y.to(dtype)


def _check(x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None, *biases: Tensor | None) -> None:
    """Refuses what the kernel can't read safely.

    Raises:
        UsageError: shapes that do not go together.
    """
    (hidden, out), width = down_t.shape, x.shape[-1]
    matrices = {"gate": (gate, (hidden, width)), "up": (up, (hidden, width))}
    vectors = zip(("gate_bias", "up_bias", "down_bias"), biases, ((hidden,), (hidden,), (out,)), strict=True)
    for name, part, shape in (*((n, *both) for n, both in matrices.items()), *vectors):
        if part is not None and part.shape != shape:
            raise UsageError(f"{name} must be {list(shape)} for inputs of {width} and down_t of {hidden} x {out}; "
                             f"it is {list(part.shape)}")  # fmt: skip


def _compute(
    x: Tensor, gate: Tensor, down_t: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, threshold: float,
) -> Tensor:  # fmt: skip
    _check(x, gate, down_t, up, gate_bias, up_bias, down_bias)
    way = path(math.prod(x.shape[:-1]), x.device, gate.dtype)
    matrices = [t for t in (gate, up, down_t) if t is not None]
    if way == "native" and not all(t.is_contiguous() and t.dtype is gate.dtype for t in matrices):
        way = "torch"
    run = {"native": native_ffn, "torch": torch_ffn, "dense": dense_ffn}[way]
    return run(x, gate, down_t, up, gate_bias, up_bias, down_bias, threshold)


_operator = torch.library.custom_op(
    "hasten::relu_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor down_t, Tensor? up, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? down_bias, float threshold) -> Tensor",
)(_compute)


@_operator.register_fake
def _(x: Tensor, gate: Tensor, down_t: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], down_t.shape[1])


@register_flop_formula(torch.ops.hasten.relu_ffn)
def _flops(x: Any, gate: Any, down: Any, up: Any = None, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """At most: how many neurons are active is not known from shapes."""
    return 2 * math.prod(x[:-1]) * (math.prod(gate) + math.prod(down) + (math.prod(up) if up else 0))
