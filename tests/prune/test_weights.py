"""Pruning of weights on the classes that people use, in every layout, and in the cases that go wrong."""

import json

import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.hosts.sparse import BitmapLinear, BlockSparseLinear
from hasten.hosts.weights import Unfolded
from hasten.kernels import bitmap, block_sparse
from hasten.prune._weights import densify
from hosts.tiny import DECODERS, llama, padded_batch, write
from standins import timm

BATCH = padded_batch()
BLOCKS, SINGLE, DENSE = "pattern='8x1'", "sparsity=0.6", "layout=dense"
KINDS = {BLOCKS: BlockSparseLinear, SINGLE: BitmapLinear, DENSE: nn.Linear}
every_layout = pytest.mark.parametrize("options", [BLOCKS, SINGLE, DENSE])


def of_dtype(model, dtype):
    """With weights of a dtype; buffers (a rotary embedding's) stay as a loaded model has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model, batch=BATCH):
    with torch.no_grad():
        return model(**batch).logits


def images(seed=0):
    return torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(seed))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 16, (1, 3), padding="same", bias=False),
        nn.ReLU(), nn.Conv2d(16, 12, 1), nn.Flatten(), nn.Linear(12 * 5 * 4, 10),
    ).eval()  # fmt: skip


@every_layout
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox_parallel", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders(name, dtype, options, tmp_path):
    """What remains is multiplied as the dense layers with zeros would, it undoes, saves and loads."""
    model = of_dtype(DECODERS[name](), dtype)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    kinds = {path: type(part) for path, part in model.named_modules()}
    handle = hasten.apply(model, f"prune/wanda({options})", calibration=[BATCH])
    report = handle.report["prune/wanda"]
    after = logits(model)
    assert after.dtype == dtype and not torch.equal(after, before)
    weights = handle.host.weights()
    left = set(report["left_dense"])
    for path, weight in weights.items():
        assert path in left or type(weight.part) is (kinds[path] if options == DENSE else KINDS[options])
    assert report["sparsity"] == pytest.approx(0.6 if options == SINGLE else 0.5, abs=0.05)
    for path, weight in weights.items():
        assert path in left or 0.4 < float((weight.matrix == 0).float().mean()) < 0.7
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    assert torch.equal(logits(loaded.model), after)
    json.dumps(report)
    written = write(model, BATCH)
    densify(handle.host)
    assert not any(isinstance(part, BlockSparseLinear | BitmapLinear) for part in model.modules())
    assert torch.allclose(logits(model), after, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        assert torch.equal(write(model, BATCH), written)
    handle.undo()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["prune/magnitude", "prune/sparsegpt", "prune/owl"])
def test_gpt2_keeps_what_each_method_keeps(name):
    """Conv1D holds its weight the other way round."""
    handle = hasten.apply(DECODERS["gpt2"](), f"{name}(layout=dense, sparsity=0.5)", calibration=[BATCH])
    assert handle.report[name]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert not handle.report[name]["left_dense"] and len(handle.host.weights()) == 16


@every_layout
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_convolutional_networks(method, options, tmp_path):
    model, x = convolutional(), images()
    before = model(x)
    handle = hasten.apply(model, f"prune/{method}({options})", calibration=[images(1)])
    after = model(x)
    assert after.shape == before.shape and not torch.equal(after, before)
    assert handle.report[f"prune/{method}"]["sparsity"] == pytest.approx(0.6 if options == SINGLE else 0.5, abs=0.06)
    if options == BLOCKS:
        assert isinstance(model[0], Unfolded) and isinstance(model[2].layer, BlockSparseLinear)
    else:
        assert type(model[0]) is nn.Conv2d and bool((model[2].weight == 0).any())
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"), convolutional())
    assert torch.equal(loaded.model(x), after)
    densify(handle.host)
    assert type(model[0]) is nn.Conv2d and torch.allclose(model(x), after, rtol=1e-4, atol=1e-5)
    assert torch.equal(handle.undo()(x), before)


@every_layout
def test_vision_transformers(options):
    pictures = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vit = timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5).eval()
    with torch.no_grad():
        before = vit(pictures)
        handle = hasten.apply(vit, f"prune/wanda({options})", calibration=[pictures])
        assert isinstance(vit.blocks[1].attn.qkv, KINDS[options]) and type(vit.head) is nn.Linear
        assert not torch.equal(vit(pictures), before)
        assert torch.equal(handle.undo()(pictures), before)


def test_layers_that_others_read_are_left_or_stay_what_they_are():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(20, 32), nn.Linear(32, 8)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            hidden = self.inner(x)
            return self.outer(hidden + self.attention(hidden, hidden, hidden)[0])

    for plan in (f"prune/wanda({SINGLE})", f"prune/magnitude({SINGLE})"):
        handle = hasten.apply(Model().eval(), plan, calibration=[torch.randn(3, 5, 20)])
        assert next(iter(handle.report.values()))["left_dense"] == ["attention.out_proj"]
        assert isinstance(handle.model.inner, BitmapLinear)


def test_dense_layout_is_labelled_simulated():
    handle = hasten.apply(llama(), "prune/magnitude(layout=dense)")
    assert "no time and no memory is saved" in handle.simulated
    report = handle.report["prune/magnitude"]
    assert report["weight_bytes_after"] == report["weight_bytes_before"] and report["kernel"] == "dense"
    assert report["zeros_in_dense_layers"] == 28
    below = hasten.apply(llama(), "prune/magnitude(sparsity=0.3)")
    assert "no time and no memory is saved" in below.simulated


@pytest.mark.parametrize(("kernel", "options"), [(block_sparse, BLOCKS), (bitmap, SINGLE)])
def test_without_a_kernel_it_is_simulated_and_right(kernel, options, monkeypatch):
    real = hasten.apply(llama(), f"prune/magnitude({options})")
    assert real.simulated is None and real.report["prune/magnitude"]["kernel"].startswith("native")
    wanted = logits(real.model)
    monkeypatch.setattr(kernel, "library", lambda isa=None: None)
    handle = hasten.apply(llama(), f"prune/magnitude({options})")
    assert "no native kernel" in handle.simulated
    assert torch.allclose(logits(handle.model), wanted, rtol=1e-4, atol=1e-5)


def test_less_memory():
    for options, most in ((BLOCKS, 0.8), ("pattern='8x1', sparsity=0.8", 0.4), (SINGLE, 0.65), ("sparsity=0.9", 0.4)):
        report = hasten.apply(llama(), f"prune/magnitude({options})").report["prune/magnitude"]
        assert report["weight_bytes_after"] < most * report["weight_bytes_before"], options


def test_ignore():
    handle = hasten.apply(llama(), f"prune/wanda({SINGLE}, ignore=['*.mlp.*', '*.0.*'])", calibration=[BATCH])
    pruned = [path for path, part in handle.model.named_modules() if isinstance(part, BitmapLinear)]
    assert len(pruned) == 3 * 4 and all(".self_attn." in path and ".0." not in path for path in pruned)
    assert not any((weight.matrix == 0).any() for path, weight in handle.host.weights().items() if path not in pruned)
    with pytest.raises(UsageError, match="finds no layer to prune"):
        hasten.apply(llama(), "prune/magnitude(ignore=['*'])")


def test_pruned_models_can_be_pruned_further():
    model = llama()
    hasten.apply(model, f"prune/magnitude({SINGLE})").bake()
    handle = hasten.apply(model, "prune/wanda(sparsity=0.8)", calibration=[BATCH])
    assert handle.report["prune/wanda"]["sparsity"] == pytest.approx(0.8, abs=0.03)
    model, x = convolutional(), images()
    first = hasten.apply(model, f"prune/magnitude({BLOCKS})")
    before = model(x)
    second = hasten.apply(model, "prune/wanda(pattern='8x1', sparsity=0.7)", calibration=[images(1)])
    assert second.report["prune/wanda"]["sparsity"] == pytest.approx(0.7, abs=0.05)
    assert model(x).shape == before.shape and not torch.equal(model(x), before)
    assert torch.equal(second.undo()(x), before)
    assert [type(part) for part in first.undo()] == [type(part) for part in convolutional()]


def test_training_mode_and_requires_grad_of_what_stays_dense():
    model = llama().train()
    hasten.apply(model, "prune/magnitude(layout=dense)")
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_input():
    for options in ("sparsity=1.0", "sparsity=-0.1", "pattern=often", "pattern='2:4', sparsity=0.7", "layout=fast"):
        with pytest.raises(PlanError):
            hasten.apply(llama(), f"prune/magnitude({options})")
    broken = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 4))
    with torch.no_grad():
        broken[1].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="weight of 1 holds NaN"):
        hasten.apply(broken, "prune/magnitude")
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 4)).eval()
    weight = model[0].weight
    with pytest.raises(UsageError, match="NaN or infinity"):
        hasten.apply(model, "prune/wanda", calibration=[torch.full((2, 64), torch.inf)])
    assert model[0].weight is weight

    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            return x

    with pytest.raises(UsageError, match="calibration reached none"):
        hasten.apply(Deaf().eval(), "prune/wanda", calibration=[torch.randn(2, 8)])


def test_a_saved_plan_of_another_model(tmp_path):
    handle = hasten.apply(convolutional(), f"prune/magnitude({BLOCKS})")
    folder = handle.save(tmp_path / "saved")
    with pytest.raises(UsageError, match="same model"):
        hasten.load_pretrained(folder, nn.Sequential(nn.Linear(3, 4)))
    other = convolutional()
    other[6] = nn.Linear(7, 10)
    with pytest.raises(UsageError, match="6 as 10 x 240"):
        hasten.load_pretrained(folder, other)
