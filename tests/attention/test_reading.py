"""Caches that are read in parts: a step sees the same however it comes, alone, in a chunk, padded or taken back."""

import pytest
import torch

import hasten
from conformance.attention import decoder
from hasten.attention import _reading_cache
from hasten.attention._reading import Chosen, Look, masked, mixed
from hasten.attention._reading_cache import ReadLayer
from hasten.core.errors import UsageError

PLANS = [
    "attention/delta(budget=16, recent=4, page=4, full=1, choose=[1])",
    "attention/recycled(budget=16, every=3)",
    "attention/recycled(budget=16, threshold=0.5, check=2)",
    "attention/token_select(top=8, first=2, last=4, theta=0.5, chunk=null)",
    "attention/double_sparsity(keep=0.4, channels=0.25, full=1)",
]
plans = pytest.mark.parametrize("plan", PLANS)
PROMPT = 40


def build(sharp=8.0):
    """Attention far from uniform, so that the choice of tokens matters."""
    model = decoder()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "q_proj" in path or "k_proj" in path:
                weight.mul_(sharp)
    return model


def tokens(rows, count, seed=1):
    return torch.randint(1, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def applied(plan, model=None):
    return hasten.apply(model or build(), plan, calibration=[tokens(4, 30, seed=5)])


@torch.no_grad()
def logits(handle, ids, ends, mask=None, cache=None):
    """Logits of forwards that end at the given columns, joined, and the cache."""
    cache = handle.host.new_cache() if cache is None else cache
    out, start = [], cache.get_seq_length()
    for end in ends:
        more = {}
        if mask is not None:  # positions of the row's own text, as generate gives them
            places = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            more = {"attention_mask": mask[:, :end], "position_ids": places}
        out.append(handle.model(ids[:, start:end], past_key_values=cache, **more).logits)
        start = end
    return torch.cat(out, dim=1), cache


def one_by_one(end, start=PROMPT):
    return [start, *range(start + 1, end + 1)]


@plans
def test_a_chunk_after_the_prompt_is_its_tokens_one_by_one(plan):
    handle, ids = applied(plan), tokens(2, 64)
    alone, _ = logits(handle, ids, one_by_one(64))
    for ends in ([PROMPT, 45, 52, 64], [PROMPT, 64]):  # attended one by one, and with one mask
        assert max(b - a for a, b in zip(ends, ends[1:], strict=False)) > _reading_cache.LOOP or len(ends) > 2
        together, _ = logits(handle, ids, ends)
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    dense, _ = logits(hasten.apply(build(), ""), ids, one_by_one(64))
    assert (dense - alone)[:, PROMPT:].abs().max() > 0.01
    torch.testing.assert_close(alone[:, :PROMPT], dense[:, :PROMPT])


@plans
def test_a_row_is_the_same_alone_and_padded_beside_a_longer_one(plan):
    handle, ids, longer = applied(plan), tokens(1, 58), tokens(1, 67, seed=2)
    alone, _ = logits(handle, ids, one_by_one(58))
    both = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1), longer])
    mask = torch.ones_like(both)
    mask[0, :9] = 0
    padded, _ = logits(handle, both, one_by_one(67, PROMPT + 9), mask)
    torch.testing.assert_close(padded[0, 9:], alone[0], rtol=0, atol=2e-5)
    short = torch.cat([torch.cat([torch.zeros(1, 55, dtype=torch.long), ids[:, :12]], dim=1), longer])
    mask[0, :55] = 0
    padded, _ = logits(handle, short, [64, 65, 66, 67], mask)  # a row that is read whole beside one that is not
    few, _ = logits(hasten.apply(build(), ""), ids[:, :12], [9, 10, 11, 12])
    if "double" not in plan:  # it reads a fraction of any row
        torch.testing.assert_close(padded[0, 55:], few[0], rtol=0, atol=2e-5)
    assert padded.isfinite().all()


@plans
def test_tokens_taken_back_leave_no_trace(plan):
    handle, ids = applied(plan), tokens(2, 62)
    straight, _ = logits(handle, ids, one_by_one(62))
    _, cache = logits(handle, ids, one_by_one(50))
    logits(handle, torch.cat([ids[:, :50], tokens(2, 5, seed=9)], dim=1), [53, 55], cache=cache)
    cache.crop(-5)
    again, _ = logits(handle, ids, range(51, 63), cache=cache)
    assert torch.equal(again, straight[:, 50:])


@plans
def test_beams_take_their_state_along(plan):
    handle, ids = applied(plan), tokens(2, 60)
    _, cache = logits(handle, ids, one_by_one(50))
    cache.reorder_cache(torch.tensor([1, 1]))
    swapped, _ = logits(handle, ids[[1, 1]], range(51, 61), cache=cache)
    straight, _ = logits(handle, ids[[1, 1]], one_by_one(60))
    torch.testing.assert_close(swapped, straight[:, 50:], rtol=0, atol=2e-5)
    beams = handle.model.generate(ids[:, :PROMPT], max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.shape == (2, PROMPT + 6)


def test_the_report_counts_what_is_read():
    handle = applied("attention/recycled(budget=10, every=4)")
    cache = handle.host.new_cache()
    logits(handle, tokens(1, 48), one_by_one(48), cache=cache)
    parts = [10 / n if n % 4 else 1.0 for n in range(41, 49)]  # the prompt's last token and each fourth read everything
    report = handle.report["attention/recycled"]
    assert report["read"] == pytest.approx(sum(parts) / 8) and report["steps"] == 8


@plans
def test_without_a_prompt_longer_than_the_budget_nothing_changes(plan):
    ids = tokens(2, 14)
    plan = plan.replace("keep=0.4", "budget=16")
    found, _ = logits(applied(plan), ids, one_by_one(14, 9))
    wanted, _ = logits(hasten.apply(build(), ""), ids, one_by_one(14, 9))
    assert torch.equal(found, wanted)


def test_speculation_writes_what_plain_decoding_writes():
    handle, ids = applied(PLANS[1]), tokens(1, PROMPT)
    with torch.no_grad():
        plain = handle.model.generate(ids, max_new_tokens=20, do_sample=False)
        drafted = handle.model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, drafted)


def test_masks_of_one_forward_hold_each_query_to_its_own_choice():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    value = torch.randn(1, 2, 20, 8, generator=generator)

    class Call:
        pass

    call = Call()
    call.query, call.key, call.value, call.scaling = query, key, value, 0.4
    choices = [None, Chosen(torch.tensor([[[3, 9, 0]]]).int()), Chosen(torch.tensor([[[1, 19], [4, 2]]]).int())]
    found = masked(call, choices, None)
    for i, choice in enumerate(choices):
        columns = 18 + i
        look = Look(
            query[:, :, i : i + 1], key[:, :, :columns], value[:, :, :columns], None, 0, 1, 0, 0.4, ReadLayer(), {}, {}
        )
        torch.testing.assert_close(found[:, :, i : i + 1], mixed(look, choice))


@plans
@pytest.mark.parametrize("ends", [[PROMPT, 41, 42], [PROMPT, 44], [PROMPT, 60]])
def test_rows_with_holes_are_read_whole(plan, ends):
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, 30:38] = 0
    found, _ = logits(applied(plan), ids, ends, mask)
    wanted, _ = logits(hasten.apply(build(), ""), ids, ends, mask)
    assert torch.equal(found[mask[:, : ends[-1]] == 1], wanted[mask[:, : ends[-1]] == 1])


def test_models_that_it_refuses():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=31, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UsageError, match="sliding"):
        hasten.apply(MistralForCausalLM(config), PLANS[0])


@plans
def test_beside_dropped_layers_and_drafts(plan):
    ids, calibration = tokens(1, PROMPT), [tokens(4, 30, seed=5)]
    thin = f"prune/llm_drop(keep=0.7) + {plan}"
    handle = hasten.apply(build(), thin, calibration=calibration)
    plain = handle.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert len(handle.host.cache_layers) == 2
    drafted = hasten.apply(build(), f"{thin} + decode/speculative", calibration=calibration, draft=build(1.0))
    assert torch.equal(drafted.model.generate(ids, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("plan", PLANS[:2])
@pytest.mark.parametrize("kind", ["GPT2", "Qwen2"])
def test_other_decoders(plan, kind):
    import transformers

    shapes = {
        "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
        "Qwen2": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                  "num_key_value_heads": 1},
    }  # fmt: skip
    config = getattr(transformers, kind + "Config")(vocab_size=61, bos_token_id=1, eos_token_id=None, **shapes[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    handle, ids = applied(plan, model), tokens(2, 52)
    alone, _ = logits(handle, ids, one_by_one(52))
    together, _ = logits(handle, ids, [PROMPT, 45, 52])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert handle.report[plan.split("(")[0]]["read"] < 0.9


@torch.no_grad()
def test_a_sparse_prompt_and_a_sparse_reading_share_a_plan():
    """One decides about the prompt, the other about the steps after it; a third that reads too is refused."""
    import hasten
    from conformance.attention import decoder, tokens
    from hasten.core.errors import PlanError

    ids = tokens()[0]
    prompt, both = "attention/pbs_attn(block=4, segment=8, threshold=0.5)", {}
    reading = "attention/delta(budget=16, recent=4, page=4, full=0, choose=[0])"
    for plan in ("", prompt, reading, f"{prompt} + {reading}"):
        handle = hasten.apply(decoder(), plan)
        cache = handle.host.new_cache()
        first = handle.model(ids[:, :40], past_key_values=cache).logits[:, -1]
        rest = [handle.model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(40, 46)]
        both[plan] = first, torch.stack(rest)
    whole = both[f"{prompt} + {reading}"]
    assert torch.equal(whole[0], both[prompt][0]) and not torch.equal(whole[0], both[""][0])
    assert not torch.equal(whole[1], both[prompt][1]) and not torch.equal(whole[1], both[reading][1])
    with pytest.raises(PlanError, match="cache.read"):
        hasten.apply(decoder(), f"{reading} + attention/recycled")
