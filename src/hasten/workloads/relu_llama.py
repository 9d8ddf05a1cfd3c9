"""A Llama with real activation sparsity: shifted ReLUs before its matrices (llama2.c's pull request 468).

    inputs of attention and of the feed-forward part   relu(rmsnorm(x) - 1)
    gate of the feed-forward part                       relu(w1 h - 0.25), in the place of silu

The last norm is plain. All else is transformers' `LlamaForCausalLM`.
"""

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

NORM_SHIFT, GATE_SHIFT = 1.0, 0.25


class ShiftedReLU(nn.Module):
    """relu(x - shift)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x - self.shift)

    def extra_repr(self) -> str:
        return f"shift={self.shift}"


class ShiftedReLURMSNorm(LlamaRMSNorm):
    """relu(rmsnorm(x) - 1)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(hidden_states) - NORM_SHIFT)


class ReLULlamaForCausalLM(LlamaForCausalLM):
    """Takes a `LlamaConfig`; its `hidden_act` is not read."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, ShiftedReLURMSNorm(config.hidden_size, eps=config.rms_norm_eps))
            layer.mlp.act_fn = ShiftedReLU(GATE_SHIFT)
