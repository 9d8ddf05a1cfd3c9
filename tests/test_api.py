"""The public verbs: what they refuse before anything is changed, and what they give back."""

import pytest
import torch

import hasten
from conformance.kv import build
from hasten.core.errors import PlanError, UsageError


def ids(rows=1, length=12):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def test_needs_are_checked_before_the_model_is_touched():
    model = build()
    before = [id(part) for part in model.modules()]
    with pytest.raises(PlanError) as found:
        hasten.apply(model, "quant/gptq + decode/speculative + optim/sinkgd")
    assert "optim/sinkgd acts on training" in str(found.value)
    with pytest.raises(PlanError) as found:
        hasten.apply(model, "quant/gptq + decode/speculative")
    assert len(found.value.problems) == 2
    with pytest.raises(PlanError, match="works on vit"):
        hasten.apply(model, "tokens/mctf")
    assert [id(part) for part in model.modules()] == before


def test_a_failing_install_leaves_the_model_as_it_was(monkeypatch):
    import hasten.kv.base as kv

    model = build()
    wanted = model(ids()).logits
    modules = [id(part) for part in model.modules()]
    monkeypatch.setattr(kv, "install", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.raises(RuntimeError, match="planted"):
        hasten.apply(model, "prune/llm_drop(keep=0.5) + kv/cake", calibration=[ids()])
    assert [id(part) for part in model.modules()] == modules and torch.equal(model(ids()).logits, wanted)


def test_calibration_in_every_form():
    tokenizer = lambda text, return_tensors: {"input_ids": torch.tensor([[ord(c) % 60 + 1 for c in text]])}  # noqa: E731
    for given in ([ids()], [{"input_ids": ids()}], ["some text to calibrate on"]):
        handle = hasten.apply(build(), "prune/llm_drop(keep=0.5)", calibration=given, tokenizer=tokenizer)
        assert len(handle.host.cache_layers) < 3
    for bad, message in (([], "empty"), ([3], "holds a int"), (["text"], "tokenizer")):
        with pytest.raises(UsageError, match=message):
            hasten.apply(build(), "prune/llm_drop(keep=0.5)", calibration=bad)


def test_bake_is_permanent():
    handle = hasten.apply(build(), "prune/llm_drop(keep=0.5)", calibration=[ids()])
    assert handle.bake() is handle.model
    with pytest.raises(UsageError, match="permanent"):
        handle.undo()


def test_save_and_load_errors(tmp_path):
    with pytest.raises(UsageError, match="holds no readable"):
        hasten.load_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        hasten.apply(build(), "").save(tmp_path / "file")
    (tmp_path / "hasten.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="format 99"):
        hasten.load_pretrained(tmp_path)


def test_a_saved_combination_loads(tmp_path):
    plan = "prune/llm_drop(keep=0.7) + quant/gptq(bits=8, group=32) + kv/cake(keep=0.5, window=4)"
    handle = hasten.apply(build(), plan, calibration=[ids(4, 40)])
    wanted = handle.model.generate(
        ids(), attention_mask=torch.ones(1, 12, dtype=torch.long), max_new_tokens=6, do_sample=False
    )
    loaded = hasten.load_pretrained(handle.save(tmp_path / "all"))
    found = loaded.model.generate(
        ids(), attention_mask=torch.ones(1, 12, dtype=torch.long), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(wanted, found) and str(loaded.plan) == str(handle.plan)


def test_generate_leaves_the_model_alone():
    model = build()
    plain = model.generate(
        ids(2), attention_mask=torch.ones(2, 12, dtype=torch.long), max_new_tokens=8, do_sample=False
    )
    out = hasten.generate(model, ids(2), "decode/speculative", draft=build(), max_new_tokens=8, do_sample=False)
    assert torch.equal(out.tokens, plain) and out.counters.drafted > 0
    assert not hasattr(model, "drafter")


def test_unknown_models_are_told_how_to_be_described():
    with pytest.raises(UsageError):
        hasten.apply(torch.nn.PReLU(), "quant/gptq", calibration=[torch.zeros(1, 1, 2, 2)])
