"""torchao's four-bit weights on a CPU in an interpreter of its own, run by `bench.peers.PeerWorker`.

The wheel of torchao 0.18.0 has no CPU kernels of its own; what its weight-only configuration calls is PyTorch's
`_weight_int4pack_mm_for_cpu`, or, compiled and frozen, the faster of that and Inductor's own template.
"""

import copy

import numpy as np
import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_

state = {}


class Products(torch.nn.Module):
    """The products of one input with many weights."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def start(threads):
    torch.set_num_threads(threads)
    return {"torch": torch.__version__, "modes": ["eager", "compiled"]}


def load(mode, file, x, rows, columns, count, group):
    """`count` copies of the quantized matrix in memory of their own, with bfloat16 inputs: its only fast dtype."""
    state.clear()
    torch._dynamo.reset()
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(torch.from_numpy(np.fromfile(file, dtype=np.float32)).view(rows, columns))
    holder = torch.nn.Sequential(layer)
    quantize_(holder, PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False))
    module = Products([copy.deepcopy(holder[0]) for _ in range(count)])
    state["x"] = torch.from_numpy(np.fromfile(x, dtype=np.float32)).bfloat16().view(1, columns)
    state["run"] = module
    if mode == "compiled":
        config = torch._inductor.config
        config.freezing = config.max_autotune = True
        config.max_autotune_gemm_backends = "CPP,ATEN"
        state["run"] = torch.compile(module)
    multiply()
    part = module.layers[0].weight
    return count * (part.qdata.nbytes + part.scale_and_zero.nbytes)


@torch.no_grad()
def multiply():
    state["out"] = state["run"](state["x"])


def output(index):
    """The product with one of the matrices, [rows]."""
    return state["out"][index].float().view(-1).tolist()
