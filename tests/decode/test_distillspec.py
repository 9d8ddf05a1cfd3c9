"""Training the draft: the divergences and their gradients, what is learnt and from what, and who drafts with it."""

import math

import pytest
import torch

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError, UsageError
from hasten.core.plans import Plan
from hasten.decode import distillspec as module
from hasten.decode.base import speculation
from hasten.decode.distillspec import DistillSpec, distillspec

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
SMALL = {"tokens": 4, "prompt": 6, "steps": 2, "batch": 3}
CALIBRATION = [ragged(3, 7, seed=5)]
NAME = "decode/distillspec"


def exact():
    return "decode/distillspec(tokens=4, prompt=6, steps=2, batch=3)", {"calibration": CALIBRATION}


def subject():
    context = {"draft": noisy(target(), 0.1), "calibration": CALIBRATION}
    return {"model": target, "options": SMALL, "context": context, "run": run}


def pair(rows, length, words, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(rows, length, words, generator=generator) for _ in range(2))
    real = torch.rand(rows, length, generator=generator) < 0.7
    real[0, 0] = True
    return p.to(dtype), q.to(dtype), real


def cases():
    for seed, divergence in enumerate(("fkl", "rkl", "jsd", "tvd")):
        yield {"args": (*pair(3, 5, 7, seed), divergence, 0.5), "grad": True}
        yield {"args": (*pair(1, 1, 11, seed), divergence, 0.2), "grad": True}
        yield {"args": (*pair(2, 3, 5, seed, torch.bfloat16), divergence, 0.9), "tolerance": 1e-5}


def test_divergences_by_hand():
    p, q = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.25, 0.25, 0.5]]])
    real = torch.ones(1, 1, dtype=torch.bool)
    logits = (p + 1e-12).log(), q.log()
    assert distillspec(*logits, real, "tvd").item() == pytest.approx(0.5)
    assert distillspec(*logits, real, "fkl").item() == pytest.approx(math.log(2), abs=1e-5)
    m = [0.375, 0.375, 0.25]
    wanted = 0.5 * sum(a * math.log(a / b) for a, b in zip([0.5, 0.5], m, strict=False))
    wanted += 0.5 * sum(a * math.log(a / b) for a, b in zip([0.25, 0.25, 0.5], m, strict=True))
    assert distillspec(*logits, real, "jsd", 0.5).item() == pytest.approx(wanted, abs=1e-5)
    assert distillspec(logits[0], logits[0] + 3, real, "rkl").item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jsd", "tvd"])
def test_training_makes_the_draft_agree(divergence):
    model = target()
    given = noisy(model, 0.25)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    options = {"tokens": 12, "prompt": 8, "steps": 40, "batch": 8, "lr": 3e-3}
    fast = hasten.apply(
        model,
        [DistillSpec(divergence=divergence, **options)],
        draft=given,
        calibration=[ragged(16, 9, seed=s) for s in (5, 6)],
    )
    facts = fast.report[NAME]
    assert facts["acceptance_after"] > facts["acceptance_before"] + 0.05
    assert facts["last_loss"] < facts["first_loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())
    trained = speculation(fast.host).drafter.model
    assert trained is not given and not torch.equal(trained.lm_head.weight, given.lm_head.weight)
    assert all(part.requires_grad and part.grad is None for part in trained.parameters())
    assert all(part.grad is None for part in model.parameters())


@pytest.mark.parametrize(
    ("mix", "writers"),
    [({"on_policy": 1.0}, {"draft"}), ({"on_policy": 0.0}, set()), ({"on_policy": 0.0, "other": "target"}, {"target"}),
     ({"on_policy": 0.5, "other": "target"}, {"draft", "target"})],
)  # fmt: skip
def test_who_writes_the_text(mix, writers, monkeypatch):
    model, seen = target(), set()
    written = DistillSpec.written
    method = DistillSpec(**(SMALL | mix | {"steps": 12}))
    fit = DistillSpec.fit

    def during(self, *given):
        def watched(self, writer, *rest):
            seen.add("target" if writer is model else "draft")
            return written(self, writer, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DistillSpec, "written", watched)
            return fit(self, *given)

    monkeypatch.setattr(DistillSpec, "fit", during)
    hasten.apply(model, [method], draft=noisy(model, 0.1), calibration=CALIBRATION)
    assert seen == writers


def test_own_text_is_learnt_from_behind_real_tokens_only(monkeypatch):
    """Rows of 7, 5 and 3 tokens, the last 4 positions: of the shortest row two count, which follow a token."""
    counted = []
    monkeypatch.setattr(
        module, "distillspec", lambda p, q, real, *rest: counted.append(real.sum(1)) or distillspec(p, q, real, *rest)
    )
    texts = {"input_ids": torch.arange(3, 24).view(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    texts["attention_mask"][1, :2] = 0
    texts["attention_mask"][2, :4] = 0
    model = target()
    spare = {"input_ids": torch.arange(3, 10)[None]}
    method = DistillSpec(**(SMALL | {"on_policy": 0.0}))
    hasten.apply(model, [method], draft=noisy(model, 0.1), calibration=[texts, spare])
    assert sorted(counted[0].tolist()) == [2, 4, 4]


@pytest.mark.parametrize(
    "then", ["decode/speculative(candidates=3)", "decode/specdec_pp(tokens=4, epochs=2, layers=1)"]
)
def test_other_methods_draft_with_it(then, tmp_path):
    model = target()
    wanted = model.generate(**ragged(3), **GREEDY)
    plan = f"decode/distillspec(then={then}, tokens=4, prompt=6, steps=2, batch=3)"
    assert str(Plan.parse(plan)) == str(Plan.parse(str(Plan.parse(plan))))
    fast = hasten.apply(model, plan, draft=noisy(model, 0.1), calibration=CALIBRATION)
    assert torch.equal(fast.generate(**ragged(3), **GREEDY), wanted)
    counters = speculation(fast.host).counters
    loaded = hasten.load_pretrained(fast.save(tmp_path / "saved"))
    assert torch.equal(loaded.generate(**ragged(3), **GREEDY), wanted)
    again = speculation(loaded.host).counters
    assert (again.accepted, again.drafted) == (counters.accepted, counters.drafted) and counters.drafted > 0


@pytest.mark.parametrize("overlap", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_pearl_drafts_with_it(overlap):
    model = target()
    wanted = model.generate(**ragged(2), **GREEDY)
    plan = f"decode/distillspec(then=decode/pearl(overlap={overlap}), tokens=4, prompt=6, steps=2, batch=3)"
    fast = hasten.apply(model, plan, draft=noisy(model, 0.1), calibration=CALIBRATION)
    assert torch.equal(fast.generate(**ragged(2), **GREEDY), wanted)
    assert fast.report[NAME]["seconds"] > 0
    fast.undo()


def test_half_precision_is_trained_in_single():
    model = target().bfloat16()
    given = noisy(model, 0.3)
    fast = hasten.apply(model, [DistillSpec(**SMALL)], draft=given, calibration=CALIBRATION)
    trained = speculation(fast.host).drafter.model
    assert {part.dtype for part in trained.parameters()} == {torch.bfloat16}
    assert math.isfinite(fast.report[NAME]["last_loss"])


def test_what_does_not_go_together():
    with pytest.raises(PlanError, match="then=decode/prompt_lookup drafts with no small model"):
        DistillSpec(then="decode/prompt_lookup")
    with pytest.raises(PlanError, match="then=decode/distillspec"):
        DistillSpec(then=DistillSpec())
    with pytest.raises(PlanError, match="drafts with no small model"):
        DistillSpec(then="prune/llm_drop")
    with pytest.raises(PlanError, match=r"decode\.draft"):
        Plan.parse("decode/distillspec + decode/speculative")
    model = target()
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(model, "decode/distillspec", draft=noisy(model, 0.1))
    with pytest.raises(UsageError, match="vocabulary of 37 tokens and the draft one of 36"):
        hasten.apply(model, [DistillSpec(**SMALL)], draft=target(vocab_size=36), calibration=CALIBRATION)
    assert not hasattr(model, "drafter")
