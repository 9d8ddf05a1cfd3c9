"""APE: the equation, sequential encoding where it must be equal, padding, real models, and what it refuses."""

import pytest
import torch

import hasten.api
from conformance.kv import build
from conformance.kv_contexts import parts
from hasten.core.errors import UsageError
from hasten.kv._parallel import SCORES, part


def cases():
    def case(
        batch, rows, heads, kv_heads, n, contexts, others, temperature, scale, dtype=torch.float32, tolerance=1e-4
    ):
        generator = torch.Generator().manual_seed(batch + 7 * n)

        def make(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        shown = torch.arange(contexts) < torch.tensor([contexts - 3 * row for row in range(rows)])[:, None]
        among = torch.ones(batch, n, others, dtype=torch.bool).tril(others - n)
        among[-1, :, : max(0, others - n - 2)] = False
        args = (
            make(batch, heads, n, 8), make(rows, kv_heads, contexts, 8), make(rows, kv_heads, contexts, 6),
            make(batch, kv_heads, others, 8), make(batch, kv_heads, others, 6), shown, among, temperature, scale,
        )  # fmt: skip
        return {"args": args, "grad": False, "tolerance": tolerance}

    yield case(1, 1, 2, 2, 1, 9, 4, 0.9, 0.9)
    yield case(2, 2, 4, 2, 5, 13, 11, 0.7, 1.0)
    yield case(3, 1, 6, 2, 3, 17, 3, 1.0, 0.8)
    yield case(3, 3, 6, 3, 2, 19, 8, 0.5, 0.6)
    yield case(2, 2, 4, 1, 4, 12, 7, 0.9, 0.9, torch.bfloat16, 3e-2)


def encoded(model, pieces, question):
    ids = torch.cat([*pieces, question])[None]
    return model(ids).logits[:, -len(question) :]


@torch.no_grad()
def test_one_context_without_correction_is_sequential_encoding():
    model, text = build(), parts()
    wanted = encoded(model, [text["prefix"], text["third"]], text["question"])
    handle = hasten.api.apply(model, "kv/ape(temperature=1.0, scale=1.0)")
    cache = handle.host.read([text["third"]], text["prefix"])
    found = handle.model(text["question"][None], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_contexts_are_a_set_and_the_question_follows_the_longest():
    handle, text = hasten.api.apply(build(), "kv/ape"), parts()
    contexts = [text["first"], text["second"], text["third"]]
    one, other = (handle.host.read(order, text["prefix"]) for order in (contexts, contexts[::-1]))
    assert one.get_seq_length() == len(text["prefix"]) + len(text["third"])
    found = [handle.model(text["question"][None], past_key_values=cache).logits for cache in (one, other)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_lower_temperature_and_scale_move_the_output():
    text, outs = parts(), []
    for options in ("temperature=1.0, scale=1.0", "temperature=0.5, scale=1.0", "temperature=1.0, scale=0.5"):
        handle = hasten.api.apply(build(), f"kv/ape({options})")
        cache = handle.host.read([text["first"], text["third"]], text["prefix"])
        outs.append(handle.model(text["question"][None], past_key_values=cache).logits)
    assert all((a - b).abs().max() > 1e-4 for a, b in ((outs[0], outs[1]), (outs[0], outs[2]), (outs[1], outs[2])))


@torch.no_grad()
def test_scores_of_many_queries_are_held_in_parts(monkeypatch):
    query, keys, values = torch.randn(2, 4, 7, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    seen = torch.rand(1, 7, 50) > 0.3
    whole = part(query, keys, values, 0.3, seen)
    monkeypatch.setattr("hasten.kv._parallel.SCORES", 3 * 2 * 4 * 50)
    for one, other in zip(whole, part(query, keys, values, 0.3, seen), strict=True):
        torch.testing.assert_close(one, other)
    assert SCORES > 1e6


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours():
    handle, text = hasten.api.apply(build(), "kv/ape"), parts()
    lists = [[text["first"], text["second"]], [text["third"], text["first"], text["second"]]]
    question = text["question"].repeat(2, 1)
    mask = torch.ones_like(question)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    both = handle.generate(question, attention_mask=mask, contexts=lists, prefix=text["prefix"], **options)
    alone = [
        handle.generate(one[None], contexts=contexts, prefix=text["prefix"], **options)
        for one, contexts in zip((question[0], question[1, 3:]), lists, strict=True)
    ]
    for step, scores in enumerate(both.scores):
        for row, single in enumerate(alone):
            torch.testing.assert_close(scores[row], single.scores[step][0], rtol=0, atol=1e-5)
    assert both.sequences.shape == (2, 7 + 6) and torch.equal(both.sequences[:, :7], question)


@torch.no_grad()
def test_a_context_is_read_once_and_more_rows_share_it():
    handle, text = hasten.api.apply(build(), "kv/ape"), parts()
    question = text["question"].repeat(3, 1)
    forwards = []
    handle.model.model.register_forward_hook(lambda *_: forwards.append(1))
    out = handle.generate(
        question, contexts=[text["first"], text["second"]], prefix=text["prefix"], max_new_tokens=3, do_sample=False
    )
    assert torch.equal(out[0], out[1]) and handle.report["kv/ape"]["tokens_read"] == 5 + 12 + 9
    assert len(forwards) == 2 + 3, "prefix, both contexts side by side, question, two tokens"
    handle.generate(question, contexts=[text["second"]], prefix=text["prefix"], max_new_tokens=3, do_sample=False)
    assert len(forwards) == 5 + 3 and handle.report["kv/ape"]["tokens_read"] == 26


@torch.no_grad()
def test_beams_and_a_cache_that_goes_on():
    handle, text = hasten.api.apply(build(), "kv/ape"), parts()
    contexts, question = [text["first"], text["second"]], text["question"][None]
    beams = handle.generate(question, contexts=contexts, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape == (1, 11)
    cache = handle.host.read(contexts)
    first = handle.generate(question, past_key_values=cache, max_new_tokens=3, do_sample=False)
    again = handle.generate(first, past_key_values=cache, max_new_tokens=3, do_sample=False)
    at_once = handle.generate(question, contexts=contexts, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, at_once)
    cache.crop(-6)
    assert cache.get_seq_length() == 12 + 7 + 5 - 6


def test_what_a_request_must_be():
    handle, text = hasten.api.apply(build(), "kv/ape"), parts()
    question = text["question"][None]
    for contexts in ([], [torch.zeros(0, dtype=torch.int64)], text["first"], [text["first"].float()]):
        with pytest.raises(UsageError):
            handle.generate(question, contexts=contexts)
    with pytest.raises(UsageError, match="one list for each"):
        handle.generate(question, contexts=[[text["first"]], [text["second"]]])
    with pytest.raises(UsageError, match="goes with contexts"):
        handle.generate(question, prefix=text["prefix"])
    with pytest.raises(UsageError, match="not both"):
        handle.generate(question, contexts=[text["first"]], past_key_values=handle.host.new_cache())
    with pytest.raises(UsageError, match="question"):
        handle.generate(contexts=[text["first"]])


@torch.no_grad()
def test_learned_positions_will_do():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=128, bos_token_id=1, eos_token_id=2)
    model, text = GPT2LMHeadModel(config).eval(), parts()
    wanted = encoded(model, [text["prefix"], text["third"]], text["question"])
    handle = hasten.api.apply(model, "kv/ape(temperature=1.0, scale=1.0)")
    cache = handle.host.read([text["third"]], text["prefix"])
    places = torch.arange(20, 27)[None]
    found = handle.model(text["question"][None], past_key_values=cache, position_ids=places).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_attention_that_changes_cached_keys_is_refused():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=61, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
        first_k_dense_replace=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    with pytest.raises(UsageError, match="can't see the attention"):
        hasten.api.apply(model, "kv/ape")
    assert model.config._attn_implementation == "sdpa"


def test_layers_with_windows_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=61, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with pytest.raises(UsageError, match="sliding"):
        hasten.api.apply(model, "kv/ape")
    assert not hasattr(model, "shelf") and model.config._attn_implementation == "sdpa"
