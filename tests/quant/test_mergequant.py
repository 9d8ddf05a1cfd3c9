"""MergeQuant: scales that were folded away, outlier channels, and the models around them."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError
from hasten.quant._int8 import Int8Linear
from hasten.quant._norms import Int8Norm
from hasten.quant.base import densify
from hasten.quant.mergequant import mergequant
from standins import timm


def problem(tokens, columns, rows, outliers=0, seed=0):
    make = torch.Generator().manual_seed(seed + columns)
    x = torch.randn(tokens, columns, generator=make)
    x[:, :outliers] *= 40
    return torch.randn(rows, columns, generator=make), x


def cases():
    yield {"args": problem(50, 20, 3), "grad": False}
    yield {"args": problem(40, 33, 5, outliers=2), "kwargs": {"bits": 4}, "grad": False}
    yield {"args": problem(30, 16, 4, outliers=1), "kwargs": {"spread": 1.5, "clip": False}, "grad": False}
    yield {"args": problem(700, 10, 2, outliers=1), "kwargs": {"spread": 0.0}, "grad": False}
    weight, x = problem(20, 12, 3)
    x[:, 4] = 0
    yield {"args": (weight.bfloat16(), x), "grad": False}


def output(weight, x, **options):
    """x W^T as the merged layers compute it."""
    codes, scales, steps, source, place = mergequant(weight, x, **options)
    most = 2 ** (options.get("bits", 8) - 1) - 1
    whole = (x / steps).round()
    extra = whole[:, source]
    q = torch.cat([whole.clamp(-most, most), (extra.abs() - place * most).clamp(0, most) * extra.sign()], 1)
    return q @ codes.float().T * scales


def error(weight, x, **options):
    exact = x @ weight.T
    return float((output(weight, x, **options) - exact).norm() / exact.norm())


def test_reconstruction_saves_the_other_channels_from_an_outlier():
    """One column for an outlier makes the rest of its weight's row small beside it."""
    weight, x = problem(400, 128, 64, outliers=2)
    quiet = weight.clone()
    quiet[:, :2] /= 40  # an outlier that its weights make up for is left alone
    assert not len(mergequant(quiet, x)[3]) and len(mergequant(weight, x)[3])
    for bits, gain in ((4, 2.0), (8, 2.0)):
        assert gain * error(weight, x, bits=bits) < error(weight, x, bits=bits, spread=0.0)


def test_clipping_pays_at_few_bits():
    make = torch.Generator().manual_seed(3)
    weight, x = torch.randn(32, 64, generator=make), torch.randn(500, 64, generator=make)
    x[::100] *= 6
    assert error(weight, x, bits=4) < error(weight, x, bits=4, clip=False)


def test_added_columns_are_few():
    weight, x = problem(100, 64, 8)
    x *= torch.logspace(0, 3, 64)
    codes, _, _, source, _ = mergequant(weight, x, spread=1.0)
    assert codes.shape[1] == 64 + len(source) and 0 < len(source) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outlier", [False, True])
def test_decoder_and_back(dtype, outlier, tmp_path):
    model = common.build()
    if outlier:
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[3] = 30
    model = model.to(dtype)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
        handle = hasten.apply(model, "quant/mergequant", calibration=common.calibration())
        after = model(ids).logits
        norms = [part for part in model.modules() if isinstance(part, Int8Norm)]
        merged = [part for part in model.modules() if isinstance(part, Int8Linear) and part.inputs == "codes"]
        facts = handle.report["quant/mergequant"]
        assert len(norms) == 4 and len(merged) == 10 and facts["merged_norms"] == 4 and facts["merged_layers"] == 10
        assert (facts["added_columns"] > 0) == outlier
        assert after.dtype == dtype and (after - before).float().norm() < 0.08 * before.float().norm()
        loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
        if dtype == torch.float32:
            assert torch.equal(loaded.model(ids).logits, after)
        densify(loaded.host)
        assert not any(isinstance(part, Int8Linear | Int8Norm) for part in loaded.model.modules())
        assert (loaded.model(ids).logits - before).float().norm() < 0.08 * before.float().norm()
        assert torch.equal(handle.undo()(ids).logits, before)


@pytest.mark.parametrize("bits, most", [(8, 0.05), (4, 0.5)])
def test_vision_transformer(bits, most):
    vit = timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5).eval()
    torch.manual_seed(0)
    for part in vit.parameters():
        part.data += 0.05 * torch.randn_like(part)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vit(images)
        handle = hasten.apply(vit, f"quant/mergequant(bits={bits})", calibration=[images])
        assert (vit(images) - before).norm() < most * before.norm()
    assert handle.report["quant/mergequant"]["merged_norms"] == 4
    assert ("held_as" in handle.report["quant/mergequant"]) == (bits == 4)
    assert handle.undo() is vit and not any(isinstance(part, Int8Norm) for part in vit.modules())


def test_other_methods_bits():
    with pytest.raises(PlanError, match="4, 6, 8, 16"):
        hasten.apply(common.build(), "quant/mergequant(bits=3)", calibration=common.calibration())
