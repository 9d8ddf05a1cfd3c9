"""cifar: archives of tiny pictures and random weights made on the spot; the published ones where HASTEN_DATA is set."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads import cifar

COLOURS = np.linspace(20, 235, 10)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two pictures a class, whose grey says the class, and a network that stores nothing special."""
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "cifar10_jpeg").mkdir()
    (tmp_path / "resnet_cifar10").mkdir()
    for split in ("test", "train"):
        with zipfile.ZipFile(tmp_path / f"cifar10_jpeg/{split}.zip", "w") as archive:
            for label, name in enumerate(cifar.CLASSES):
                for number in range(2):
                    content = io.BytesIO()
                    Image.fromarray(np.full((32, 32, 3), COLOURS[label], np.uint8)).save(content, "JPEG", quality=95)
                    archive.writestr(f"{split}/{name}/{number:04}.jpg", content.getvalue())
            archive.writestr("readme.txt", "not a picture")
    torch.manual_seed(0)
    for name, depth in (("resnet20", 3), ("resnet32", 5)):
        state = {f"module.{key}": tensor for key, tensor in cifar.ResNet(depth).state_dict().items()}
        torch.save({"state_dict": state, "best_prec1": 10.0}, tmp_path / cifar.FILES[name])
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    return tmp_path


def test_pictures_come_evenly_and_normalised(home):
    pixels, labels = cifar._images("test", 10)
    assert labels.tolist() == list(range(10)) and pixels.shape == (10, 3, 32, 32)
    grey = (torch.tensor(COLOURS) // 1 / 255 - 0.485) / 0.229
    torch.testing.assert_close(pixels[:, 0].mean((1, 2)).double(), grey, atol=0.02, rtol=0)


def test_the_shortcut_takes_every_second_pixel_and_pads_both_sides():
    block = cifar.Block(16, 32, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and not out[:, :8].any() and not out[:, 24:].any()


def test_it_serves_and_is_quantized(home):
    workload = hasten.workload("cifar(examples=20, batch=1, calibrate=8)")
    assert hasten.workload(str(workload)) == workload
    model = workload.trained()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    plain = hasten.apply(model, "")
    assert plain.host.kind == "module" and workload.quality(plain).shape == (20,)
    request = workload.requests(0)[0]
    before = workload.serve(plain, request)
    fast = hasten.apply(model, "quant/round_to_nearest(bits=8, activations=32)", calibration=workload.calibration())
    after = workload.serve(fast, request)
    assert after.shape == (1, 10) and 0 < (after - before).norm() < 0.1 * before.norm()


def test_what_is_missing_or_wrong_is_named(home, monkeypatch):
    with pytest.raises(PlanError, match="resnet20, resnet32, resnet56"):
        hasten.workload("cifar(model=resnet18)")
    with pytest.raises(UsageError, match="has no resnet_cifar10/resnet56"):
        hasten.workload("cifar(model=resnet56)").trained()
    os.replace(home / cifar.FILES["resnet32"], home / cifar.FILES["resnet20"])
    with pytest.raises(UsageError, match="does not hold the weights of resnet20"):
        hasten.workload("cifar").trained()
    (home / cifar.FILES["resnet20"]).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="does not hold the weights of resnet20"):
        hasten.workload("cifar").trained()
    with pytest.raises(UsageError, match="holds 20 images, and 1000 are asked for"):
        hasten.workload("cifar").quality(None)
    (home / "cifar10_jpeg/train.zip").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="can't be read as a zip"):
        hasten.workload("cifar(calibrate=8)").calibration()
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="set HASTEN_DATA to the folder that holds cifar10_jpeg/test.zip"):
        hasten.workload("cifar").requests(0)


@pytest.mark.skipif(not os.environ.get("HASTEN_DATA"), reason="HASTEN_DATA is not set")
def test_the_published_network_is_as_good_as_on_jpegs():
    workload = hasten.workload("cifar(examples=300)")
    assert workload.quality(hasten.apply(workload.trained(), "")).mean() == pytest.approx(0.81, abs=0.06)
