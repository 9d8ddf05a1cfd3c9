"""The model as its own draft: the exit rule, shared weights, the borrowed cache, and which sublayers are left out."""

import pytest
import torch

import hasten
from conformance.decode import noisy, ragged, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode._skipping import sharing, skipping, speed_of
from hasten.decode._writing import prompts
from hasten.decode.base import speculation
from hasten.decode.self_speculative import SelfSpeculative, self_speculative
from hasten.hosts import recognise

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
PLAN = "decode/self_speculative(most=4, threshold=0.3, written=8)"
CALIBRATION = [ragged(3, 7, seed=5)]


def exact():
    return PLAN, {"calibration": CALIBRATION}


def rounds(number, rows, most, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(number, rows, most, generator=generator).to(dtype)
    return confidence, torch.rand(number, rows, most, generator=generator) < confidence.float()


def cases():
    yield {"args": (*rounds(30, 1, 12, 0), 0.6)}
    yield {"args": (*rounds(17, 5, 7, 1), 0.3, 0.5, 0.1, 0.2, 0.5)}
    yield {"args": (*rounds(9, 3, 1, 2, torch.bfloat16), 0.9)}
    yield {"args": (*rounds(5, 2, 4, 3), 0.0, 0.9, 0.3, 0.0, 0.0)}
    yield {"args": (*rounds(0, 2, 4, 3), 0.5)}


def test_gamma_follows_the_acceptance_rate():
    """By hand: AR 0.5 then 0.75, below and above an aim of 0.6; a round drafted in full leaves gamma where it is."""
    confidence = torch.tensor([[[0.9, 0.2, 0.9]], [[0.9, 0.1, 0.9]], [[0.9, 0.9, 0.9]]])
    lengths, gammas = self_speculative(confidence, torch.ones(3, 1, 3, dtype=torch.bool), 0.5, 0.6, 0.1, 0.5, 0.5)
    assert lengths.tolist() == [2, 2, 3]
    assert gammas.tolist() == pytest.approx([0.5, 0.55, 0.5, 0.5])


def test_weights_are_the_models_own():
    model = target()
    before = sum(parameter.numel() for parameter in model.parameters())
    fast = hasten.apply(model, PLAN, calibration=CALIBRATION)
    draft = speculation(fast.host).drafter.model
    own = {id(parameter) for parameter in model.model.parameters()} | {id(model.lm_head.weight)}
    assert {id(parameter) for parameter in draft.parameters()} < own
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert draft.config is not model.config and model.config.num_hidden_layers == 2
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert draft.lm_head.weight is model.lm_head.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_draft_is_the_model_without_its_parts(kind):
    model = target(kind)
    ids = torch.arange(3, 12)[None]
    wanted = model(ids).logits
    host = recognise(model)
    draft = skipping(host, {"attention": [1], "mlp": [0]})
    host.drop(1, "attention")
    host.drop(0, "mlp")
    torch.testing.assert_close(draft(ids).logits, model(ids).logits)
    host.changes.undo()
    assert torch.equal(model(ids).logits, wanted) and draft.cache_of == [0]
    assert skipping(host, {"attention": [0]}).cache_of == [1]  # its one layer with attention reads the second's entries
    whole = skipping(host, {"block": [0]})
    assert whole.config.num_hidden_layers == 1 and whole.cache_of == [1] and model.config.num_hidden_layers == 2


@pytest.mark.parametrize("rows", [1, 4])
def test_borrowed_entries_are_those_of_the_model(rows, monkeypatch):
    """With nothing left out the draft is the model on the model's cache: whatever it drafts is accepted."""
    from hasten.decode import self_speculative as module

    model = target()
    monkeypatch.setattr(module, "skipping", lambda host, skipped: skipping(host, {}))
    fast = hasten.apply(model, "decode/self_speculative(most=3, threshold=0, written=4)", calibration=CALIBRATION)
    batch = ragged(rows)
    out = fast.generate(**batch, **GREEDY)
    counters = speculation(fast.host).counters
    fast.undo()
    assert torch.equal(out, model.generate(**batch, **GREEDY))
    assert counters.accepted == counters.drafted > 0
    assert counters.target_passes == 1 + -(-23 // 4) and counters.draft_passes == max(counters.drafted // rows, 17)


def test_low_confidence_ends_a_draft():
    lengths = []
    for threshold in (0.0, 0.3, 1.0):
        model = target()
        method = SelfSpeculative(most=6, threshold=threshold, adaptive=False, written=4)
        fast = hasten.apply(model, [method], calibration=CALIBRATION)
        fast.generate(**ragged(1), **GREEDY)
        counters = speculation(fast.host).counters
        lengths.append(counters.drafted / counters.drafted_at[0])
    assert lengths[0] > 4 > lengths[1] > lengths[2] == 1


def test_the_useless_part_is_left_out():
    """Of a model in which one mlp and one attention do nothing, those are found, and the draft is never wrong."""
    model = target(num_hidden_layers=3)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    fast = hasten.apply(model, "decode/self_speculative(skip=0.3, written=8, threshold=0)", calibration=CALIBRATION)
    report = fast.report["decode/self_speculative"]
    assert report["skipped"] == {"attention": [2], "mlp": [1]} and report["agreement"] == 1
    assert report["cost"] == pytest.approx(1 - 2 / 7, abs=1e-3) and report["parts"] == 6
    fast.generate(**ragged(2), **GREEDY)
    assert speculation(fast.host).counters.acceptance == 1


def test_speed_of_rounds_gone_through():
    row = [True, True, False, True, True, True, False]
    agrees = torch.tensor([row])
    # K = 2: rounds keep (2 and one more), (2 and one more), (0 and one more): 7 tokens for 3 (1 + 2 c)
    assert speed_of(agrees, 0.25, 2) == pytest.approx((7 / (3 * 1.5), 2))
    assert speed_of(agrees, 0.25, 3) == pytest.approx((7 / (2 * 1.75), 3))
    assert speed_of(~agrees.new_ones(2, 5), 0.5, 4) == (1 / 1.5, 1)


def test_whole_layers():
    model = target(num_hidden_layers=3)
    fast = hasten.apply(model, "decode/self_speculative(unit=layer, skip=0.4, written=4)", calibration=CALIBRATION)
    report = fast.report["decode/self_speculative"]
    assert list(report["skipped"]) == ["block"] and len(report["skipped"]["block"]) == 1
    assert speculation(fast.host).drafter.model.config.num_hidden_layers == 2


def test_it_shares_a_quantized_models_codes(tmp_path):
    model = target().float()
    plan = "quant/gptq(bits=4, group=32)"
    only = hasten.apply(model, plan, calibration=[ragged(4, 30)])
    wanted = only.generate(**ragged(3), **GREEDY)
    only.undo()
    both = hasten.apply(model, f"{plan} + {PLAN}", calibration=[ragged(4, 30)])
    assert torch.equal(both.generate(**ragged(3), **GREEDY), wanted)
    draft = speculation(both.host).drafter.model
    codes = {buffer.data_ptr() for name, buffer in model.named_buffers() if name.endswith("packed")}
    shared = {buffer.data_ptr() for name, buffer in draft.named_buffers() if name.endswith("packed")}
    assert shared and shared <= codes
    loaded = hasten.load_pretrained(both.save(tmp_path / "saved"))
    assert torch.equal(loaded.generate(**ragged(3), **GREEDY), wanted)
    both.undo()
    only = hasten.apply(model, plan, calibration=[ragged(4, 30)])
    sizes = [(only if name == "alone" else loaded).save(tmp_path / name) for name in ("alone", "pair")]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in sizes]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_with_a_cache_of_another_method():
    model = target()
    ids = torch.randint(3, 37, (2, 60), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kv = "kv/cake(keep=0.5, window=8, decode=false)"
    only = hasten.apply(model, kv)
    wanted = only.generate(**batch, **GREEDY)
    only.undo()
    both = hasten.apply(model, f"{kv} + {PLAN}", calibration=CALIBRATION)
    assert torch.equal(both.generate(**batch, **GREEDY), wanted)
    assert speculation(both.host).counters.draft_passes > 0


def test_a_taken_forward_is_refused_before_anything_changes():
    model = target(num_hidden_layers=4)
    before = list(model.state_dict())
    with pytest.raises(UsageError, match="is taken over by a method of the plan"):
        hasten.apply(model, f"prune/unified_layer_skipping + {PLAN}", calibration=CALIBRATION)
    assert list(model.state_dict()) == before and "generate" not in vars(model)
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(model, PLAN)
    with pytest.raises(UsageError, match="holds no real token"):
        hasten.apply(model, PLAN, calibration=[{k: v * 0 for k, v in ragged(2).items()}])
    assert not hasattr(model, "drafter")


def test_prompts_end_with_their_last_real_token():
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    made = list(prompts([batch, {"input_ids": ids[:, :3]}], ids.device, rows=3, last=3))
    assert made[0][0].tolist() == [[5, 6, 7], [8, 9, 4]] and made[0][1] is None
    assert made[1][0].tolist() == [[5, 6, 7]]
    ids, real = next(prompts([batch | {"attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]])}], ids.device))
    assert real.tolist() == [[False, False, True], [True, True, True]] and ids[real].tolist() == [5, 0, 8, 4]


def test_a_copy_leaves_the_model_alone():
    model = noisy(target(), 0.0)
    made = sharing(model)
    names = [name for name, _ in made.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert made.model.layers[0] is not model.model.layers[0]
