"""LLM-Drop: the importance, what goes, and that it is really gone."""

import pytest
import torch

import hasten.api
from conformance.denoising import hidden, tiny
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import recognise
from hasten.prune.llm_drop import LLMDrop, llm_drop, naive_llm_drop
from hosts import test_vit as vits
from hosts.tiny import DECODERS, llama, padded_batch, write

BATCH = padded_batch()


def cases():
    def case(batch, tokens, width, tolerance=1e-5, dtype=torch.float32, step=0.3, padding=0):
        generator = torch.Generator().manual_seed(batch * tokens * width)
        before = torch.randn(batch, tokens, width, generator=generator)
        after = before + step * torch.randn(batch, tokens, width, generator=generator)
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[-1, :padding] = False
        return {"args": (before.to(dtype), after.to(dtype), mask), "grad": False, "tolerance": tolerance}

    yield case(1, 1, 3)
    yield case(2, 7, 33, padding=3)
    yield case(3, 5, 8, step=1e-3, padding=5, tolerance=2e-5)
    yield case(2, 4, 64, step=10.0, dtype=torch.bfloat16)
    yield case(1, 9, 16, dtype=torch.float16)


def test_importance_of_known_turns():
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [5.0, 5.0]]])
    after = torch.tensor([[[0.0, 2.0], [-1.0, 0.0], [6.0, 8.0], [1.0, -1.0]]])  # 90, 180 and 0 degrees; padding
    total, number = llm_drop(before, after, torch.tensor([[True, True, True, False]]))
    assert number == 3
    torch.testing.assert_close(total, torch.tensor(1.0 + 2.0 + 0.0))


def chosen(host_model, options, batch=BATCH):
    handle = hasten.api.apply(host_model, LLMDrop(**options), calibration=[batch])
    return handle, handle.report["prune/llm_drop"]["left_out"]


def weaken(model, index, part):
    """Makes one sublayer add almost nothing, so that it must be judged least important."""
    host = recognise(model)
    own = host.anatomy[part]
    last = host.blocks[index].get_submodule((own.after or own.modules)[-1])
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_parallel", "opt"])
def test_the_weak_sublayers_go(name):
    for target, part in (("attention", "attention"), ("mlp", "mlp")):
        model = DECODERS[name]()
        for index in (1, 2):
            weaken(model, index, part)
        handle, left_out = chosen(model, {"drop": 2, "target": target})
        assert left_out == {part: [1, 2]}
        assert [handle.host.has(i, part) for i in range(4)] == [True, False, False, True]
        assert handle.report["prune/llm_drop"]["weights_kept"] < 1
        assert write(model, BATCH).shape == (2, 17)


def test_joint_ranks_both_kinds_in_one_list():
    model = llama()
    weaken(model, 0, "attention")
    weaken(model, 2, "mlp")
    weaken(model, 3, "mlp")
    handle, left_out = chosen(model, {"drop": 3, "target": "joint"})
    assert left_out == {"attention": [0], "mlp": [2, 3]}
    assert len(handle.host.layers) == 4


def test_a_block_without_both_sublayers_is_removed_whole():
    model = llama()
    for part in ("attention", "mlp"):
        weaken(model, 1, part)
    handle, left_out = chosen(model, {"drop": 2, "target": "joint"})
    assert left_out == {"attention": [1], "mlp": [1]} and len(handle.host.layers) == 3
    assert model.config.num_hidden_layers == 3


def test_block_drop():
    model = llama()
    for part in ("attention", "mlp"):
        weaken(model, 2, part)
    handle, left_out = chosen(model, {"keep": 0.75, "target": "block"})
    assert left_out == {"block": [2]} and len(handle.host.layers) == 3


def test_the_attention_that_matters_most_always_stays():
    for options in ({"drop": 99}, {"drop": 99, "target": "joint"}, {"drop": 99, "target": "block"}):
        handle, _ = chosen(llama(), options)
        assert sum(handle.host.has(i, "attention") for i in range(len(handle.host.layers))) == 1
        assert write(handle.model, BATCH).shape == (2, 17)


def test_padding_does_not_count():
    """Rows with padding on the left are judged as the same rows without it (positions are relative in a Llama)."""
    padded, bare = {k: v[1:] for k, v in BATCH.items()}, {"input_ids": BATCH["input_ids"][1:, 3:]}
    reports = [
        chosen(llama(), {}, batch)[0].report["prune/llm_drop"]["importance_attention"] for batch in (padded, bare)
    ]
    torch.testing.assert_close(torch.tensor(reports[0]), torch.tensor(reports[1]), rtol=1e-4, atol=1e-5)


def test_batches_weigh_by_their_tokens():
    whole = chosen(llama(), {})[0].report["prune/llm_drop"]["importance_attention"]
    rows = [{k: v[:1] for k, v in BATCH.items()}, {k: v[1:] for k, v in BATCH.items()}]
    parts = hasten.api.apply(llama(), LLMDrop(), calibration=rows).report["prune/llm_drop"]["importance_attention"]
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(parts), rtol=1e-4, atol=1e-5)


def test_what_can_not_be_says_why():
    from transformers import BertConfig, BertForMaskedLM, OPTConfig, OPTForCausalLM

    with pytest.raises(PlanError, match="pass calibration"):
        hasten.api.apply(llama(), "prune/llm_drop")
    with pytest.raises(PlanError, match="only one of them"):
        LLMDrop(keep=0.5, drop=2)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "hidden_size": 32}
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=48))
    with pytest.raises(PlanError, match="works on decoder and diffusion_lm and vit models"):
        hasten.api.apply(bert, "prune/llm_drop", calibration=[BATCH])
    late = OPTForCausalLM(OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False))
    with pytest.raises(UsageError, match="residual stream"):
        hasten.api.apply(late, "prune/llm_drop", calibration=[BATCH])
    assert len(chosen(late, {"target": "block", "drop": 1})[0].host.layers) == 1
    nothing = {"input_ids": BATCH["input_ids"], "attention_mask": torch.zeros_like(BATCH["attention_mask"])}
    with pytest.raises(UsageError, match="no real token"):
        chosen(llama(), {}, nothing)


def test_naive_on_a_whole_layer():
    """The executor's number is the naive sum over a real model's stream, divided by its tokens."""
    model = llama()
    host, sums = recognise(model), {}

    def see(index, part, before, after):
        sums[index, part] = naive_llm_drop(before, after, host.mask)

    host.observe_sublayers([BATCH], see)
    wanted = [float(sums[i, "attention"][0]) / sums[i, "attention"][1] for i in range(4)]
    got = chosen(model, {})[0].report["prune/llm_drop"]["importance_attention"]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hf_vit", "hf_deit", "timm_vit", "timm_scaled", "timm_distilled"])
def test_vision_transformers_lose_their_weak_sublayers(name):
    model = vits.build(name)
    images = vits.inputs_of(name)
    weaken(model, 1, "attention")
    weaken(model, 1, "mlp")
    with torch.no_grad():
        before = vits.logits(model, images)
        for target, part in (("attention", "attention"), ("mlp", "mlp")):
            handle = hasten.api.apply(model, LLMDrop(drop=1, target=target), calibration=[images])
            assert handle.report["prune/llm_drop"]["left_out"] == {part: [1]}
            assert not handle.host.has(1, part) and handle.report["prune/llm_drop"]["weights_kept"] < 1
            after = vits.logits(model, images)
            assert 0 < (after - before).norm() < 0.1 * before.norm()
            handle.undo()
        assert torch.equal(vits.logits(model, images), before)


def test_masked_diffusion_models_lose_sublayers():
    handle, left_out = chosen(tiny(), {"drop": 1}, hidden(1))
    assert len(left_out["attention"]) == 1 and handle.host.kind == "diffusion_lm"
