"""The layers that hold quantized weights, by the names that saved plans use. Each class has

kind                          that name
empty(**shape, device=None)   an empty layer for `load_state_dict`; shape() is what it takes, JSON-able
dense() -> nn.Linear, dense_weight() -> fp32 [out, in]
bytes()                       memory of its buffers
way()                         what multiplies here: "native, AVX512", or a text that starts with "PyTorch"
"""

import importlib

from torch import nn

from hasten.core.errors import UsageError

LAYERS = {
    "codes": ("hasten.quant._linear", "QuantLinear"),
    "int8": ("hasten.quant._int8", "Int8Linear"),
    "int8_norm": ("hasten.quant._norms", "Int8Norm"),
    "balanced": ("hasten.quant._balanced", "BalancedLinear"),
    "mixed": ("hasten.quant._mixed", "MixedLinear"),
    "six_bit_inputs": ("hasten.quant._six", "SixBitLinear"),
    "block_sparse": ("hasten.hosts.sparse", "BlockSparseLinear"),
    "bitmap": ("hasten.hosts.sparse", "BitmapLinear"),
}


def is_quantized(part: nn.Module) -> bool:
    return getattr(part, "kind", None) in LAYERS


def layer_class(name: str) -> type[nn.Module]:
    """The class of a layer.

    Raises:
        UsageError: an unknown name.
    """
    if name not in LAYERS:
        raise UsageError(f"the saved plan has a layer of the kind {name!r}; this version knows {', '.join(LAYERS)}")
    module, cls = LAYERS[name]
    return getattr(importlib.import_module(module), cls)  # type: ignore[no-any-return]
