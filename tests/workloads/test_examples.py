"""Examples that make files for workloads, on tiny data of the same formats."""

import gzip
import importlib.util
import pathlib
import struct

import numpy as np
import pytest

import hasten
from hasten.core.errors import UsageError

EXAMPLES = pathlib.Path(hasten.__file__).parents[2] / "examples"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The example with 90 and 10 images that are as grey as their label says."""
    spec = importlib.util.spec_from_file_location("train_pictures", EXAMPLES / "train_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "mnist").mkdir()
    for split, count in (("train", 95), ("t10k", 12)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"mnist/{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    monkeypatch.setattr(module, "TRAIN", 90)
    monkeypatch.setattr(module, "TEST", 10)
    return module


def test_pictures_are_what_the_workload_reads(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["train_pictures.py", str(out), "--minutes", "0.02"])
    pictures.main()
    workload = hasten.workload(f"hf:{out / 'vit'}(data='{out / 'mnist.npz'}', examples=10, batch=2)")
    handle = hasten.apply(workload.trained(), "")
    assert handle.host.kind == "vit" and workload.quality(handle).shape == (10,)
    pixels = workload._images(True)[0]
    assert len(pixels) == 10 and len(workload._images(False)[0]) == 90
    assert (pixels - pictures.pixels(np.load(out / "mnist.npz")["images"][90:])).abs().max() < 1e-6


def test_a_file_that_is_cut_off_is_named(pictures, tmp_path, monkeypatch):
    file = tmp_path / "mnist/t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    monkeypatch.setattr("sys.argv", ["train_pictures.py", str(tmp_path / "out"), "--minutes", "0.02"])
    with pytest.raises(UsageError, match="t10k-images-idx3-ubyte.gz is no IDX file"):
        pictures.main()
    assert not (tmp_path / "out").exists()
