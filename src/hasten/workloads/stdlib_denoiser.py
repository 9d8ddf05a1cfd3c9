"""stdlib-denoiser: a small masked-diffusion language model on the source of Python's standard library, a byte a token."""

from torch import nn

MASK = 256
VOCABULARY = 257
CONTEXT = 1024


def stdlib_denoiser(*, seed: int = 0) -> nn.Module:
    """A Llama of 0.8M weights that reads in both directions: byte 256 is the mask, blocks are of 16 bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        mask_token_id=MASK,
        block_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
