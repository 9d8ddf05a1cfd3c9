"""Block-sparse pruning: what goes, that it is held in blocks, and eight bits."""

import pytest
import torch

import hasten
from hasten.core.errors import PlanError
from hasten.hosts.sparse import BlockSparseLinear
from hasten.kernels import native
from hasten.prune.block_sparse import BlockSparse, block_sparse
from hosts.tiny import llama, padded_batch

BATCH = padded_batch()


def matrix(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)


def cases():
    norms = lambda n: torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.1  # noqa: E731
    for rows, columns, options in [
        (33, 7, {}),
        (20, 17, {"sparsity": 0.8, "pattern": "4x1"}),
        (9, 30, {"sparsity": 0.3, "pattern": "4x4"}),
        (1, 1, {"sparsity": 0.9}),
    ]:
        yield {"args": (matrix(rows, columns),), "kwargs": options, "tolerance": 0, "grad": False}
        yield {"args": (matrix(rows, columns), norms(columns)), "kwargs": options, "tolerance": 0, "grad": False}
    yield {"args": (matrix(24, 12, torch.bfloat16),), "kwargs": {"pattern": "8x1"}, "tolerance": 0, "grad": False}
    yield {"args": (matrix(24, 12, torch.float16), norms(12)), "kwargs": {}, "tolerance": 0, "grad": False}


def test_golden_value():
    weight = torch.tensor([[1.0, -5.0, 2.0], [1.0, 1.0, -1.0], [4.0, 0.1, 0.2], [0.0, 0.1, 9.0]])
    wanted = [[0, -5, 0], [0, 1, 0], [4, 0, 0.2], [0, 0, 9]]
    assert torch.allclose(block_sparse(weight, pattern="2x1"), torch.tensor(wanted))
    inputs = torch.tensor([1.0, 1.0, 100.0])
    by_input = block_sparse(weight, inputs, pattern="2x1")
    assert torch.allclose(by_input, torch.tensor([[0, -5, 2], [0, 1, -1], [0, 0, 0.2], [0, 0, 9]]))


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("bits", [32, 8])
def test_layers_hold_the_blocks(score, bits):
    model = llama()
    before = {path: part.weight.clone() for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    method = BlockSparse(sparsity=0.75, pattern="4x1", score=score, bits=bits)
    handle = hasten.apply(model, method, calibration=[BATCH] if score == "wanda" else None)
    held = {path: part for path, part in model.named_modules() if isinstance(part, BlockSparseLinear)}
    assert len(held) == 7 * len(handle.host.layers)
    for path, part in held.items():
        dense, kept = part.dense_weight(), part.dense_weight() != 0
        assert 0.24 < float(kept.float().mean()) < 0.27 and part.bits == bits
        assert (dense - before[path])[kept].norm() <= (0.02 if bits == 8 else 0) * before[path][kept].norm()
    report = handle.report["prune/block_sparse"]
    assert report["sparsity"] == pytest.approx(0.75, abs=0.01)
    if native.compiler() is not None:
        assert "simulated" not in report


def test_eight_bits_change_little_and_are_saved(tmp_path):
    logits = {}
    for bits in (32, 8):
        handle = hasten.apply(llama(), BlockSparse(sparsity=0.5, bits=bits))
        logits[bits] = handle.model(**BATCH).logits
    assert (logits[8] - logits[32]).norm() < 0.1 * logits[32].norm()
    loaded = hasten.load_pretrained(handle.save(tmp_path / "saved"))
    assert torch.equal(loaded.model(**BATCH).logits, logits[8])


def test_convolutions_of_a_plain_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(20, 8, 1)).eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x)
        for bits, error in ((32, 1e-5), (8, 0.03)):
            dense = hasten.apply(model, 'prune/block_sparse(sparsity=0.5, pattern="4x1", layout=dense)')
            wanted = dense.model(x)
            dense.undo()
            handle = hasten.apply(model, BlockSparse(sparsity=0.5, pattern="4x1", bits=bits))
            assert (handle.model(x) - wanted).norm() <= error * wanted.norm()
            handle.undo()
            assert torch.equal(model(x), plain)


def test_what_can_not_be_says_why():
    with pytest.raises(PlanError, match="blocks such as 16x1"):
        BlockSparse(pattern="2:4")
    with pytest.raises(PlanError, match="leave layout=dense out"):
        BlockSparse(bits=8, layout="dense")
    with pytest.raises(PlanError, match="pass calibration"):
        hasten.apply(llama(), BlockSparse(score="wanda"))
