"""SLA: three classes of blocks, the linear branch, and tuning it into a trained model."""

import pytest
import torch
from torch.nn import functional as F

from conformance.attention import check_training_of_a_denoiser, decoder, dit, vit
from conformance.attention import classify as classify_pictures
from hasten.api import apply, load_pretrained
from hasten.attention.sla import SLA, classify, linear, naive_sla, shares, sla
from hasten.core.errors import PlanError, UsageError

SMALL = {"critical": 0.3, "negligible": 0.2, "block": 4}


def tensors(batch, heads, n, d=8, e=8, hk=None, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = (heads, n, d), (hk or heads, n, d), (hk or heads, n, e)
    return *(torch.randn(batch, *shape, dtype=dtype) for shape in shapes), torch.randn(e, e) / 3, torch.randn(e) / 3


def cases():
    yield {"args": tensors(2, 2, 29), "kwargs": {"block": 4}, "grad": True}
    yield {"args": (*tensors(1, 4, 40, e=6, hk=2), 0.3, 0.25, 8), "grad": True}
    yield {"args": (*tensors(1, 2, 33), 0.2, 0.4, 5, "elu", 0.5), "grad": True}
    yield {"args": (*tensors(1, 2, 24), 0.2, 0.0, 4, "relu"), "grad": True, "tolerance": 1e-4}
    yield {"args": (*tensors(1, 2, 16), 0.5, 0.6, 4)}  # nothing in between
    *given, weight, bias = tensors(1, 2, 24, dtype=torch.bfloat16)
    yield {"args": (*given, weight.bfloat16(), bias.bfloat16(), 0.2, 0.1, 4), "tolerance": 4e-2}


def test_classes_of_the_defaults():
    assert shares(100, 0.05, 0.1) == (5, 10)
    assert shares(16, 0.05, 0.1) == (1, 1), "at least one block is critical"
    assert shares(4, 1.0, 0.1) == (4, 0)
    q, k, *_ = tensors(2, 3, 80)
    chosen, marginal = classify(q, k, 0.05, 0.1, 4)
    assert (chosen.sum(-1) == 1).all() and (marginal.sum(-1) == 17).all() and not (chosen & marginal).any()


def test_all_critical_is_softmax_attention():
    q, k, v, weight, bias = tensors(2, 2, 30)
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sla(q, k, v, weight, bias, critical=1.0, block=4), wanted)


def test_all_marginal_is_linear_attention():
    q, k, v, *_ = tensors(1, 2, 30)
    found = linear(q, k, v, torch.ones(1, 2, 8, 8, dtype=torch.bool), 4, "softmax")
    a, b = q.softmax(-1), k.softmax(-1)
    torch.testing.assert_close(found, (a @ b.mT @ v) / (a @ b.mT).sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_the_linear_branch_carries_what_sparse_attention_misses():
    """With the best proj (least squares) the error to dense attention falls well below that of the critical part."""
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 2, 128, 8) * 0.5, torch.randn(1, 2, 128, 8), torch.randn(1, 2, 128, 8) + 0.5
    wanted = F.scaled_dot_product_attention(q, k, v)
    zero = torch.zeros(8, 8), torch.zeros(8)
    sparse = sla(q, k, v, *zero, critical=0.1, block=8)
    _, marginal = classify(q, k, 0.1, 0.1, 8)
    rest = linear(q, k, v, marginal, 8, "softmax")
    given = F.pad(rest, (0, 1), value=1.0).flatten(0, 2)
    fitted = torch.linalg.lstsq(given, (wanted - sparse).flatten(0, 2)).solution
    found = sla(q, k, v, fitted[:-1].T.contiguous(), fitted[-1], critical=0.1, block=8)
    assert (found - wanted).square().mean() < 0.9 * (sparse - wanted).square().mean()


def test_tuning_starts_from_sparse_attention_and_learns(tmp_path):
    teacher, handle = apply(dit(), ""), apply(dit(), SLA(**SMALL))
    own = {name: p for name, p in handle.model.named_parameters() if "hasten_attention" in name}
    assert len(own) == 6 and all((p == 0).all() for p in own.values())
    given = {"timestep": torch.tensor([5, 9]), "class_labels": torch.tensor([1, 3])}
    sample = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = teacher.model(sample, **given).sample
    losses = []
    for _ in range(30):
        loss = (handle.model(sample, **given).sample - wanted).square().mean()
        loss.backward()
        with torch.no_grad():
            for weight in own.values():
                weight -= 0.05 * weight.grad / (weight.grad.norm() + 1e-9)
        handle.model.zero_grad()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.8 * losses[0]
    loaded = load_pretrained(handle.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded.model(sample, **given).sample, handle.model(sample, **given).sample)


def test_pictures_and_the_report():
    handle = apply(vit(), SLA(**SMALL))
    classify_pictures(handle)
    facts = handle.report["attention/sla"]
    assert facts["sparse_calls"] == 3 and facts["dense_calls"] == 0 and 0.25 < facts["density"] < 0.4
    small = apply(vit(), SLA())
    classify_pictures(small)
    assert small.report["attention/sla"]["dense_calls"] == 3, "37 tokens are one block"


def test_text_is_refused():
    with pytest.raises((UsageError, PlanError)):
        apply(decoder(), SLA())


def test_pure_function_at_the_paper_block_size():
    given = tensors(1, 1, 200, seed=6)
    torch.testing.assert_close(sla(*given), naive_sla(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "checkpointing"])
def test_training_in_half_precision_and_with_checkpointing(mode):
    check_training_of_a_denoiser(SLA(**SMALL), mode)
