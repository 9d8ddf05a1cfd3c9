"""SliceGPT: nothing changes while no axis is deleted, the best axes stay, and the model really becomes narrower."""

import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.slicing import PlainNorm, Turning, Wiring
from hosts.tiny import DECODERS, padded_batch

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "neox_parallel", "neox_sequential", "opt", "gemma", "gptj",
         "gpt_neo"]  # fmt: skip


def stream(tokens, width, seed):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=make) @ torch.randn(width, width, generator=make)


def cases():
    yield {"args": ([stream(40, 12, 0)], 7)}
    yield {"args": ([stream(9, 5, 1), stream(1, 5, 2)], 1)}
    yield {"args": ([stream(33, 16, 3).bfloat16()], 16)}
    yield {"args": ([stream(4, 10, 4)], 3)}  # fewer tokens than channels


@pytest.mark.parametrize("name", DENSE)
def test_turning_all_axes_changes_nothing(name):
    """Theorem 1: with every axis kept, random bases leave the logits as they are."""
    model = DECODERS[name]()
    with torch.no_grad():
        for part in model.modules():
            if "Norm" in type(part).__name__ and getattr(part, "bias", None) is not None:
                part.bias.normal_()
            if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
                part.weight.add_(0.3 * torch.randn_like(part.weight))
        wanted = model(**padded_batch()).logits
        host = recognise(model)
        wiring = Wiring(host)
        make = torch.Generator().manual_seed(1)
        random = [
            torch.randn(wiring.width, wiring.width, generator=make, dtype=torch.float64)
            for _ in range(len(wiring.stages) + 1)
        ]
        wiring.narrowed([torch.linalg.qr(one).Q for one in random], wiring.width)
        found = model(**padded_batch()).logits
        mask = padded_batch()["attention_mask"].bool()
        assert torch.allclose(found[mask], wanted[mask], atol=2e-3 * float(wanted.abs().max()))
        host.changes.undo()
        assert torch.equal(model(**padded_batch()).logits[mask], wanted[mask])


@pytest.mark.parametrize("name", DENSE)
def test_the_model_is_narrower_and_near(name):
    model = DECODERS[name]()
    batches = [padded_batch() for _ in range(2)]
    with torch.no_grad():
        wanted = model(**padded_batch()).logits
    weights = sum(p.numel() for p in model.parameters())
    handle = hasten.apply(model, "prune/slicegpt(keep=0.75)", calibration=batches)
    turned = [part for part in model.modules() if isinstance(part, Turning)]
    assert len(turned) == len(handle.host.layers) * (1 if handle.host.anatomy.parallel else 2)
    assert handle.report["prune/slicegpt"]["width"] == 24 and handle.host.embedding.weight.shape[1] == 24
    assert sum(p.numel() for p in model.parameters()) < weights
    with torch.no_grad():
        found = model(**padded_batch()).logits
    mask = padded_batch()["attention_mask"].bool()
    assert 0 < (found[mask] - wanted[mask]).norm() < wanted[mask].norm()
    out = model.generate(padded_batch()["input_ids"], attention_mask=padded_batch()["attention_mask"], max_new_tokens=3)
    assert out.shape[1] == padded_batch()["input_ids"].shape[1] + 3


def test_a_stream_without_the_axes_loses_nothing():
    """A model whose stream lives in 24 of 32 channels is sliced to 24 without a change."""
    model = DECODERS["llama"]()
    gone = torch.arange(24, 32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[gone] = 0
            block.mlp.down_proj.weight[gone] = 0
        wanted = model(**padded_batch()).logits
        hasten.apply(model, "prune/slicegpt(keep=0.75)", calibration=[padded_batch()])
        mask = padded_batch()["attention_mask"].bool()
        assert torch.allclose(model(**padded_batch()).logits[mask], wanted[mask], atol=1e-4)


def test_slices_by_variance_beat_slices_of_the_first_axes():
    model = DECODERS["llama"]()
    mask = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**padded_batch()).logits[mask]
        errors = []
        for plain in (False, True):
            host = recognise(model)
            wiring = Wiring(host)
            if plain:
                bases = [torch.eye(32, dtype=torch.float64)[:, :24]] * (len(wiring.stages) + 1)
                wiring.narrowed(bases, 24)
                errors.append(float((model(**padded_batch()).logits[mask] - wanted).norm()))
                host.changes.undo()
            else:
                handle = hasten.apply(model, "prune/slicegpt(keep=0.75)", calibration=[padded_batch()])
                errors.append(float((model(**padded_batch()).logits[mask] - wanted).norm()))
                handle.undo()
    assert errors[0] < 0.8 * errors[1]


def test_quantization_comes_after():
    model = DECODERS["llama"]()
    plan = "prune/slicegpt(keep=0.75) + quant/gptq(bits=8, group=32)"
    handle = hasten.apply(model, plan, calibration=[padded_batch()])
    assert handle.report["quant/gptq"]["quantized"] == len(handle.host.layers) * 7  # the turns stay exact
    assert model(**padded_batch()).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gptj", "gpt2", "qwen3"])
def test_shifts_of_norms_survive_saving(name, tmp_path):
    """A freshly built LayerNorm has a shift of zero; what reads it still gets a bias to load into."""
    model = DECODERS[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "ln" in path and path.endswith("bias"):
                parameter.normal_()
        handle = hasten.apply(model, "prune/slicegpt(keep=0.75)", calibration=[padded_batch()])
        wanted = handle.model(**padded_batch()).logits
        loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
        assert torch.equal(loaded.model(**padded_batch()).logits, wanted)


def test_norm_keeps_the_original_width():
    x = torch.randn(3, 6)
    wide = torch.nn.functional.pad(x, (0, 2))
    assert torch.allclose(PlainNorm(8, 1e-6)(x), wide[:, :6] * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6))


def test_what_cant_be_sliced_is_said():
    for name in ("mixtral", "gemma2"):  # experts; norms after the sublayers
        with pytest.raises(UsageError, match="can't be narrowed"):
            hasten.apply(DECODERS[name](), "prune/slicegpt", calibration=[padded_batch()])
    with pytest.raises(UsageError, match="left out already"):
        hasten.apply(DECODERS["llama"](), "prune/llm_drop(drop=1) + prune/slicegpt", calibration=[padded_batch()])
    batch = padded_batch() | {"attention_mask": torch.zeros_like(padded_batch()["attention_mask"])}
    with pytest.raises(UsageError, match="no real token"):
        hasten.apply(DECODERS["llama"](), "prune/slicegpt", calibration=[batch])
