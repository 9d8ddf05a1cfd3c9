"""Pairs of a target and a draft on which decode methods are held to the common tests and to their own."""

import copy
import importlib.util
import pathlib
from typing import Any

import torch
import transformers as hf
from torch import nn

WORDS = {"vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def target(kind: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model in float64, where passes of different shapes do not differ by enough to change a choice."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SMALL | {"num_key_value_heads": 2} | WORDS | changes)))
        elif kind == "gpt2":
            words = {name: value for name, value in WORDS.items() if name != "max_position_embeddings"}
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
            model = hf.GPT2LMHeadModel(hf.GPT2Config(**(words | sizes | changes)))
        else:
            model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**(SMALL | WORDS | changes)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.25)
    return model.double().eval()


def noisy(model: nn.Module, scale: float) -> nn.Module:
    """A draft that often agrees with the model: its copy with noise on every weight."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * scale * parameter.std().nan_to_num())
    return draft


def ragged(rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths."""
    ids = torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row * 2 % (length - 1)] = 0
        mask[row, : row * 2 % (length - 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _own(name: str) -> Any:
    file = pathlib.Path(__file__).parents[1] / f"decode/test_{name}.py"
    if not file.exists() or "\ndef subject(" not in file.read_text():
        return None
    spec = importlib.util.spec_from_file_location(f"subject_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.subject


def run(handle: Any) -> torch.Tensor:
    return handle.generate(**ragged(), max_new_tokens=12, do_sample=False, eos_token_id=None)


def subject(method_class: type) -> dict[str, Any]:
    """The pair of models, unless the method's own tests give another subject (`subject()`)."""
    own = _own(method_class.title().split("/")[1])
    if own is not None:
        return own()
    small = {"tokens": 4, "epochs": 2, "layers": 1} if "tokens" in method_class.__dataclass_fields__ else {}
    context = {"draft": noisy(target(), 0.1), "calibration": [ragged(3, 7, seed=5)]}
    return {"model": target, "options": small, "context": context, "run": run}
