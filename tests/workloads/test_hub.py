"""hf: workloads on folders that a person has: a causal LM, an image classifier, and what can't be used."""

import json

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError

QUICK = {"memory": False, "gated": False, "budget": "15s", "precision": 0.3}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "lm"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=256,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_language_model_and_a_text(language, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    name = f"hf:{language}(text='{text}', prompt=24, new=6, examples=8)"
    workload = hasten.workload(name)
    assert str(hasten.workload(str(workload))) == str(workload)
    result = hasten.compare(name, ["prune/llm_drop(keep=0.7)"], out=tmp_path / "out", **QUICK)
    row = result.plans[0]
    assert (
        row.pairs > 0
        and row.quality_base == pytest.approx(np.log(256), rel=0.1)
        and row.operations < row.operations_base
    )


def test_training_needs_a_target(language):
    with pytest.raises(PlanError, match="needs target="):
        hasten.workload(f"hf:{language}(task=train)")
    workload = hasten.workload(f"hf:{language}(task=train, target=3.0, scratch=true, rows=2, length=16)")
    batch = next(iter(workload.batches(0)))
    assert workload.loss(workload.build(0), batch).item() == pytest.approx(np.log(256), rel=0.1)


def test_an_image_classifier(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    workload = hasten.workload(f"hf:{tmp_path / 'vit'}(examples=32)")
    handle = hasten.apply(workload.trained(), "")
    assert workload.quality(handle).shape == (32,) and workload.serve(handle, workload.requests(0)[0]).shape == (16, 10)
    images = np.random.default_rng(0).integers(0, 255, (40, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 10)
    own = hasten.workload(f"hf:{tmp_path / 'vit'}(data='{tmp_path / 'data.npz'}', batch=2)")
    assert own.requests(0)[0].shape == (2, 1, 16, 16)
    with pytest.raises(UsageError, match="can't be read"):
        hasten.workload(f"hf:{tmp_path / 'vit'}(data=none.npz)").requests(0)


def test_what_can_not_be_used(tmp_path, language):
    with pytest.raises(UsageError, match="no local folder, and the hub can't be reached"):
        hasten.workload("hf:nobody/nothing")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    with pytest.raises(UsageError, match="write a workload of your own"):
        hasten.workload(f"hf:{tmp_path}")
    with pytest.raises(PlanError, match="does not exist"):
        hasten.workload(f"hf:{language}(text=nowhere.txt)")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UsageError, match="give a longer text"):
        hasten.workload(f"hf:{language}(text='{short}', prompt=64)").requests(0)


def test_a_draft_from_a_folder(language, tmp_path):
    name = f"hf:{language}(draft_model='{language}', prompt=24, new=6, examples=8)"
    workload = hasten.workload(name)
    fast = hasten.apply(workload.trained(), "decode/speculative", draft=workload.draft())
    request = workload.requests(0)[0]
    plain = hasten.apply(workload.trained(), "")
    assert workload.same(workload.serve(fast, request), workload.serve(plain, request))
    assert hasten.workload(f"hf:{language}").draft() is None
    with pytest.raises(UsageError, match="can't be loaded"):
        hasten.workload(f"hf:{language}(draft_model='{tmp_path}')").draft()
