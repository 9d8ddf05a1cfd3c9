"""GPTQ against rounding, on the classes that people use, and in the cases that go wrong."""

import pytest
import torch
from torch import nn

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import streaming
from hasten.kernels import lowbit
from hasten.quant._grids import grid
from hasten.quant._linear import QuantLinear
from hasten.quant.base import densify
from hasten.quant.gptq import GPTQ, gptq
from standins import timm


def problem(rows, columns, seed=0, tokens=400):
    """A weight and the Hessian of inputs that are strongly correlated, as activations are."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=make) / columns**0.5
    x = torch.randn(tokens, columns, generator=make) @ (mix @ mix + 0.1 * torch.eye(columns))
    return torch.randn(rows, columns, generator=make) / columns**0.5, 2 / tokens * x.t() @ x


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {"group": 32}),
            (5, 37, {"group": 64, "bits": 3, "symmetric": True}),
            (2, 70, {"group": 32, "bits": 2, "act_order": True}),
            (4, 33, {"group": 64, "bits": 8, "mse": True}),
            (2, 150, {"group": 128, "damp": 0.1}),
        ]
    ):
        yield {"args": problem(rows, columns, seed), "kwargs": options, "grad": False, "tolerance": 1e-4}
    weight, hessian = problem(3, 40, 9)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    yield {"args": (weight.bfloat16(), hessian), "kwargs": {"group": 32}, "grad": False, "tolerance": 1e-4}


def rounded(weight, *, bits, group):
    """Round to nearest with the same ranges."""
    parts = []
    for part in weight.split(group, dim=1):
        scale, zero = (one[:, None] for one in grid(part, bits, False, False))
        parts.append(scale * (torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1) - zero))
    return torch.cat(parts, dim=1)


def values(codes, scales, zeros, group):
    spread = torch.arange(codes.shape[1]) // group
    return scales[:, spread] * (codes.float() - zeros[:, spread])


def error(weight, found, hessian):
    return float(torch.trace((weight - found) @ hessian @ (weight - found).t()))


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"block": 32}, {"bits": 3}, {"bits": 2, "mse": True}])
def test_output_error_is_far_below_that_of_rounding(options):
    weight, hessian = problem(64, 256)
    bits = options.get("bits", 4)
    found = values(*gptq(weight, hessian, group=64, **options), 64)
    assert error(weight, found, hessian) < 0.5 * error(weight, rounded(weight, bits=bits, group=64), hessian)


def test_uncorrelated_inputs_make_it_rounding():
    weight, _ = problem(8, 64)
    codes = gptq(weight, torch.eye(64), group=32)
    assert torch.allclose(values(*codes, 32), rounded(weight, bits=4, group=32), atol=1e-6)


def test_rows_do_not_depend_on_each_other():
    weight, hessian = problem(12, 96)
    whole, first = gptq(weight, hessian, group=32), gptq(weight[:5].clone(), hessian, group=32)
    assert float((whole[0][:5] != first[0]).float().mean()) < 0.01 and torch.allclose(whole[1][:5], first[1], rtol=1e-3)


def test_singular_and_zero_hessians():
    weight, _ = problem(4, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert values(*gptq(weight, x.t() @ x, group=32), 32).isfinite().all()
    still = values(*gptq(weight, torch.zeros(64, 64), group=32), 32)
    assert torch.allclose(still, rounded(weight, bits=4, group=32), atol=1e-6)


def test_options_say_what_is_wrong():
    with pytest.raises(PlanError, match="power of two"):
        GPTQ(group=96)
    with pytest.raises(PlanError, match="2, 3, 4, 6, 8, 16"):
        GPTQ(bits=5)
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(common.build(), "quant/gptq")


def decoder(name):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=61, n_positions=64, **tokens)
        return transformers.GPT2LMHeadModel(config)
    if name == "neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=100, **tokens))
    if name == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=100, word_embed_proj_dim=32, **tokens)
        return transformers.OPTForCausalLM(config)
    return common.build()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_quantize_and_come_back(name, dtype):
    torch.manual_seed(0)
    model = decoder(name).to(dtype).eval()
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
        handle = hasten.apply(model, "quant/gptq(bits=8, group=32)", calibration=common.calibration())
        after = model(ids).logits
        swapped = [path for path, part in model.named_modules() if isinstance(part, QuantLinear)]
        assert len(swapped) == len(handle.host.layers) * {"llama": 7, "opt": 6}.get(name, 4)
        assert after.dtype == dtype and not torch.equal(after, before)
        assert (after - before).float().norm() < 0.05 * before.float().norm()
        assert not any("head" in path or "embed" in path for path in swapped)
        assert handle.report["quant/gptq"]["left_dense"] == []
        assert torch.equal(handle.undo()(ids).logits, before)


def test_vision_transformer():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16,
                       patch_size=4, num_channels=1)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        before = model(pixel_values=images).logits
        hasten.apply(model, "quant/gptq(bits=8)", calibration=[images])
        after = model(pixel_values=images).logits
    assert type(model.classifier) is nn.Linear and (after - before).norm() < 0.05 * before.norm()


def test_timm_vision_transformer():
    vit = timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vit(images)
        hasten.apply(vit, "quant/gptq(bits=8)", calibration=[images])
        assert (vit(images) - before).norm() < 0.05 * before.norm()
    assert isinstance(vit.blocks[1].attn.qkv, QuantLinear) and type(vit.head) is nn.Linear


def test_plain_module_with_a_layer_that_another_reads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.attention, self.outer = nn.Linear(20, 32), attention, nn.Linear(32, 8)

        def forward(self, x):
            hidden = self.inner(x)
            return self.outer(hidden + self.attention(hidden, hidden, hidden)[0])

    model = Model().eval()
    x = torch.randn(3, 5, 20)
    with torch.no_grad():
        before = model(x)
        handle = hasten.apply(model, "quant/gptq(bits=8)", calibration=[x])
        assert handle.report["quant/gptq"]["left_dense"] == ["attention.out_proj"]
        assert isinstance(model.inner, QuantLinear) and (model(x) - before).norm() < 0.05 * before.norm()


def test_ignore_and_what_is_left():
    model = common.build()
    handle = hasten.apply(model, "quant/gptq(ignore=['*.mlp.*'])", calibration=common.calibration())
    assert all(".mlp." not in path for path, part in model.named_modules() if isinstance(part, QuantLinear))
    assert handle.report["quant/gptq"]["quantized"] == 8
    with pytest.raises(UsageError, match="no linear layer"):
        hasten.apply(common.build(), "quant/gptq(ignore=['*'])", calibration=common.calibration())


def test_streamed_hessians_are_those_of_the_quantized_model_so_far():
    """A block sees what the quantized blocks before it give, as one whole forward of the final model shows."""
    model = common.build()
    seen = {}
    gather = streaming.Inputs.shared

    def watched(self):
        for paths, hessian in gather(self):
            seen.update(dict.fromkeys(paths, hessian.clone()))
            yield paths, hessian

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Inputs, "shared", watched)
        hasten.apply(model, "quant/gptq(bits=3, group=32)", calibration=common.calibration())
    inputs = []
    path = "model.layers.1.self_attn.k_proj"
    model.get_submodule(path).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for batch in common.calibration():
            model(**batch)
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs, common.calibration(), strict=True)])
    assert torch.allclose(seen[path], 2 / len(rows) * rows.t() @ rows, rtol=1e-4, atol=1e-5)
    assert seen[path] is seen["model.layers.1.self_attn.q_proj"]


def test_only_one_block_of_hessians_is_held(monkeypatch):
    gathered, alive = [], []
    add = streaming.Inputs._add

    def watched(self, path, x):
        if self not in gathered:
            gathered.append(self)
        add(self, path, x)
        alive.append(sum(matrix.total.numel() for one in gathered for matrix in one._sums.values()))

    monkeypatch.setattr(streaming.Inputs, "_add", watched)
    hasten.apply(common.build(), "quant/gptq", calibration=common.calibration())
    assert len(gathered) == 2 and max(alive) == 3 * 48**2 + 100**2  # attention's two inputs, the MLP's two


def test_plain_modules_are_calibrated_in_portions(monkeypatch):
    monkeypatch.setattr(streaming, "GATHERED_BYTES", 4 * 64**2)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]).eval()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    hasten.apply(model, "quant/gptq", calibration=[torch.randn(2, 7, 64)])
    assert len(calls) == 3 and all(isinstance(part, QuantLinear) for part in model)


def test_unsound_and_empty_inputs():
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    x[2, 5] = torch.nan
    model = nn.Sequential(nn.Linear(64, 16)).eval()
    handle = hasten.apply(model, "quant/gptq", calibration=[x])
    assert handle.report["quant/gptq"]["tokens_left_out"] == 1 and model[0].dense_weight().isfinite().all()
    weight = handle.undo()[0].weight.clone()
    with pytest.raises(UsageError, match="NaN or infinity"):
        hasten.apply(model, "quant/gptq", calibration=[torch.full((2, 64), torch.inf)])
    assert torch.equal(model[0].weight, weight)
    hasten.apply(model, "quant/gptq(bits=8)", calibration=[torch.zeros(2, 64)])
    assert torch.allclose(model[0].dense_weight(), weight, atol=2e-3)
    with torch.no_grad():
        broken = nn.Sequential(nn.Linear(64, 16))
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="weight of 0"):
        hasten.apply(broken, "quant/gptq", calibration=[torch.randn(2, 64)])


def test_save_load_and_dense(tmp_path):
    model = common.build()
    plan = "quant/gptq(act_order=true, group=32, activations=32)"
    handle = hasten.apply(model, plan, calibration=common.calibration())
    folder = handle.save(tmp_path / "saved")
    loaded = hasten.load_pretrained(folder)
    ids = torch.randint(1, 61, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded.model(ids).logits, expected)
        densify(handle.host)
        assert not any(isinstance(part, QuantLinear) for part in model.modules())
        assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_simulated_where_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(lowbit, "kernel", lambda bits, isa=None: None)
    handle = hasten.apply(common.build(), "quant/gptq", calibration=common.calibration())
    assert "no C++ compiler" in handle.simulated
