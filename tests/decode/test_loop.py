"""What a person asks of generate: stopping, processors, streaming, caches, the shape of the answer, clear refusals."""

import pytest
import torch

import hasten
from conformance.decode import SMALL, noisy, ragged, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode._loop import Drafter, Speculation
from hasten.decode._rows import Rows
from hasten.decode.base import Generated, speculation
from hasten.decode.speculative import Speculative

PLAN = "decode/speculative(candidates=4)"
GREEDY = {"do_sample": False, "eos_token_id": None}


def pair(scale=0.1, **changes):
    model = target(**changes)
    return model, noisy(model, scale)


def compare(batch, scale=0.1, model=None, **options):
    """Output without and with drafting."""
    model = target() if model is None else model
    options = {"max_new_tokens": 24, "do_sample": False} | options
    wanted = model.generate(**batch, **options)
    fast = hasten.apply(model, PLAN, draft=noisy(model, scale))
    return wanted, model.generate(**batch, **options), fast


@pytest.mark.parametrize("eos", [None, 20, [20, 9, 14]])
def test_rows_end_and_are_padded_as_in_transformers(eos):
    wanted, got, fast = compare(ragged(4), eos_token_id=eos, max_new_tokens=40)
    assert torch.equal(got, wanted)
    counters = speculation(fast.host).counters
    ends = torch.isin(wanted[:, 9:], torch.tensor(eos if eos is not None else -1)).int()
    length = torch.where(ends.any(1), ends.argmax(1) + 1, 40)
    assert counters.tokens == int(length.sum())
    assert counters.target_passes == counters.rounds < 40


@pytest.mark.parametrize("new", [1, 2, 5, 6])
def test_short_outputs(new):
    wanted, got, _ = compare(ragged(3), max_new_tokens=new)
    assert torch.equal(got, wanted)


def test_the_whole_context_of_learned_positions():
    """A row ahead of the others must not look up a position that does not exist."""
    model = target("gpt2", n_positions=20)
    wanted, got, _ = compare(ragged(4, 8), model=model, max_new_tokens=None, max_length=20)
    assert torch.equal(got, wanted) and got.shape[1] == 20


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 15},
        {"suppress_tokens": [5, 6, 7, 8]},
    ],
)
def test_logits_processors_mean_what_they_mean_in_transformers(more):
    wanted, got, _ = compare(ragged(3), eos_token_id=20, **more)
    assert torch.equal(got, wanted)


def test_stop_strings_and_criteria_end_each_row():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

    words = {chr(ord("a") + i): i for i in range(26)} | {chr(ord("A") + i): 26 + i for i in range(11)}
    letterwise = Tokenizer(models.BPE(words, merges=[]))
    letterwise.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letterwise)
    model = target()
    free = model.generate(**ragged(3), max_new_tokens=24, do_sample=False)[:, 9:]
    letters = {value: key for key, value in words.items()}
    stop = "".join(letters[i] for i in free[1, 6:8].tolist())
    wanted, got, fast = compare(ragged(3), model=model, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(got, wanted) and wanted.shape[1] <= 33
    fast.undo()

    class Even(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return (ids[:, -3:] % 2 == 0).all(1)

    for eos in (None, 20):
        wanted, got, fast = compare(
            ragged(3), model=model, stopping_criteria=StoppingCriteriaList([Even()]), eos_token_id=eos
        )
        assert torch.equal(got, wanted)
        fast.undo()
    hasten.apply(model, PLAN, draft=noisy(model, 0.1))
    with pytest.raises(UsageError, match="stop_strings need the tokenizer"):
        model.generate(**ragged(1), max_new_tokens=4, stop_strings=["ab"])


def test_a_stream_is_the_output_in_order():
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)

    class Stream:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    stream = Stream()
    out = fast.generate(torch.arange(3, 10)[None], max_new_tokens=20, do_sample=False, streamer=stream)
    assert sum(stream.parts, []) == out[0].tolist() and stream.ended and len(stream.parts) > 3
    with pytest.raises(UsageError, match="a streamer shows one row"):
        fast.generate(**ragged(2), max_new_tokens=4, streamer=stream)


def test_a_seed_repeats_a_sample():
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    draws = [fast.generate(**ragged(2), max_new_tokens=12, do_sample=True, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(0)
    one = fast.generate(**ragged(2), max_new_tokens=12, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(one, fast.generate(**ragged(2), max_new_tokens=12, do_sample=True))
    with pytest.raises(UsageError, match="not both"):
        fast.generate(**ragged(2), max_new_tokens=4, seed=1, generator=torch.Generator())


def test_several_sequences_for_each_prompt():
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    out = fast.generate(
        **ragged(2), max_new_tokens=6, do_sample=True, num_return_sequences=3, seed=0, eos_token_id=None
    )
    assert out.shape == (6, 15) and len({tuple(row) for row in out.tolist()}) > 2


def test_counters_of_a_perfect_draft():
    model = target()
    ids = torch.arange(3, 10)[None]
    made = hasten.generate(model, ids, PLAN, draft=noisy(model, 0.0), max_new_tokens=20, **GREEDY)
    assert isinstance(made, Generated) and made.tokens.shape == (1, 27)
    counters = made.counters
    assert (counters.rounds, counters.target_passes, counters.tokens) == (4, 4, 20)
    assert counters.accepted == counters.drafted == counters.draft_passes == 16 and counters.acceptance == 1
    assert counters.drafted_at == counters.accepted_at == [4, 4, 4, 4]
    assert all(seconds > 0 for seconds in counters.seconds.values()) and not hasattr(model, "drafter")
    plain = hasten.generate(model, {"input_ids": ids}, max_new_tokens=20, **GREEDY)
    assert torch.equal(plain.tokens, made.tokens) and plain.counters.target_passes == 20


def test_as_a_custom_loop_of_transformers():
    model, draft = pair()
    ids = torch.arange(3, 10)[None]
    wanted = model.generate(ids, max_new_tokens=20, do_sample=False)
    spec = Speculation(Speculative(candidates=3), Drafter(draft, None))
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=spec), wanted)
    assert spec.counters.tokens == wanted.shape[1] - 7


def test_a_conversation_goes_on_with_its_cache():
    model, draft = pair()
    ids = torch.arange(3, 10)[None]
    first = model.generate(ids, max_new_tokens=9, **GREEDY)
    longer = torch.cat([first, torch.tensor([[4, 5]])], 1)
    second = model.generate(longer, max_new_tokens=9, **GREEDY)
    fast = hasten.apply(model, PLAN, draft=draft)
    one = fast.generate(ids, max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(one.sequences, first) and one.past_key_values.get_seq_length() == first.shape[1] - 1
    two = fast.generate(longer, max_new_tokens=9, past_key_values=one.past_key_values, **GREEDY)
    assert torch.equal(two, second)


def test_the_output_can_be_trained_on():
    model, draft = pair()
    out = hasten.generate(model, torch.arange(3, 10)[None], PLAN, draft=draft, max_new_tokens=9, do_sample=False).tokens
    model(input_ids=out, labels=out).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_holes_are_gathered_away():
    """Rows that accept differently leave holes; the cache stays within a third of what the fullest row needs."""
    model, draft = pair(0.15)
    ids = torch.randint(3, 37, (6, 5), generator=torch.Generator().manual_seed(0))
    widest = []

    class Watched(Rows):
        def keep(self, *args):
            super().keep(*args)
            if self.real is not None:
                widest.append(self.slots / int(self.count.max()))

    from hasten.decode import _loop

    hasten.apply(model, PLAN, draft=draft)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loop, "Rows", Watched)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, **GREEDY)
    assert len(widest) > 10 and 1.1 < max(widest) < 1.34


def test_local_attention_counts_tokens_not_holes():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    kinds = [[["global", "local"], 1]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoForCausalLM(
            GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=kinds, window_size=4, vocab_size=37,
                         max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, pad_token_id=0)
        ).double().eval()  # fmt: skip
    ids = torch.randint(3, 37, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted, got, fast = compare(batch, model=model)
    assert torch.equal(got, wanted) and speculation(fast.host).counters.acceptance < 0.9


def test_it_saves_with_its_draft(tmp_path):
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    wanted = fast.generate(**ragged(2), max_new_tokens=12, do_sample=False)
    drafted = speculation(fast.host).counters.accepted
    loaded = hasten.load_pretrained(fast.save(tmp_path / "pair"))
    assert torch.equal(loaded.generate(**ragged(2), max_new_tokens=12, do_sample=False), wanted)
    assert speculation(loaded.host).counters.accepted == drafted > 0


def test_it_composes_with_dropped_sublayers_and_an_evicting_cache():
    model = target()
    fast = hasten.apply(model, "prune/llm_drop(keep=0.5)", calibration=[ragged(3)])
    wanted = fast.generate(**ragged(3), max_new_tokens=16, do_sample=False)
    fast.undo()
    draft = noisy(model, 0.1)
    both = hasten.apply(model, f"prune/llm_drop(keep=0.5) + {PLAN}", calibration=[ragged(3)], draft=draft)
    assert torch.equal(both.generate(**ragged(3), max_new_tokens=16, do_sample=False), wanted)
    both.undo()
    ids = torch.randint(3, 37, (2, 60), generator=torch.Generator().manual_seed(0))
    small = hasten.apply(model, f"kv/cake(keep=0.5, window=8, decode=false) + {PLAN}", draft=draft)
    out = small.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    small.undo()
    only = hasten.apply(model, "kv/cake(keep=0.5, window=8, decode=false)")
    plain = only.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 2}, "not beam search"),
        ({"assistant_model": "draft"}, "drafts already"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores is not kept"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"position_ids": torch.arange(5, 14)[None].repeat(2, 1)}, "sets the positions itself"),
        ({"cache_implementation": "static"}, "can't take back"),
        ({"max_new_tokens": 200}, "the model has a context of 128 tokens"),
    ],
)
def test_requests_that_are_refused(options, problem):
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    given = {"max_new_tokens": 4} | options
    if "assistant_model" in given:
        given["assistant_model"] = draft
    with pytest.raises(UsageError, match=problem):
        fast.generate(**ragged(2), **given)


def test_embeddings_as_input_are_refused():
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    with pytest.raises(UsageError, match="token ids and an attention mask only"):
        fast.generate(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64), max_new_tokens=4)


def test_models_that_do_not_fit_are_refused_before_anything_changes():
    from transformers import MistralConfig, MistralForCausalLM

    model, draft = pair()
    window = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, vocab_size=37, sliding_window=8))
    for given, problem in (
        (target(vocab_size=36), "vocabulary of 37 tokens and the draft one of 36"),
        (model, "the draft is the model itself"),
        (window, "sliding-window"),
        (torch.nn.Linear(2, 2), "no transformers model"),
    ):
        with pytest.raises(UsageError, match=problem):
            hasten.apply(model, PLAN, draft=given)
        assert "generate" not in vars(model) and not hasattr(model, "drafter")
    with pytest.raises(UsageError, match="sliding-window"):
        hasten.apply(window, PLAN, draft=draft)
    with pytest.raises(PlanError, match="draft"):
        hasten.apply(model, PLAN)
    with pytest.raises(PlanError, match=r"decode\.draft"):
        hasten.apply(model, f"{PLAN} + decode/specdec_pp", draft=draft, calibration=[ragged(2)])
    hasten.apply(model, PLAN, draft=draft)
    with pytest.raises(UsageError, match="installed on this model already"):
        hasten.apply(model, PLAN, draft=noisy(target(), 0.1))


def test_undo_leaves_nothing():
    model, draft = pair()
    draft.train()
    before = set(vars(model)), list(model.state_dict())
    hasten.apply(model, PLAN, draft=draft).undo()
    assert (set(vars(model)), list(model.state_dict())) == before and draft.training


def test_what_a_request_lacks_is_said_before_anything_runs():
    model, draft = pair()
    fast = hasten.apply(model, PLAN, draft=draft)
    with pytest.raises(UsageError, match="the prompt is empty"):
        fast.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(UsageError, match="the model has a context of 128 tokens"):
        fast.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=124)
    fast.undo()
    hasten.apply(model, PLAN, draft=target(max_position_embeddings=16))
    with pytest.raises(UsageError, match="the draft has a context of 16 tokens"):
        model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=20)
    fast = hasten.apply(target(), PLAN, draft=draft)
    model = fast.undo()
    draft.config.eos_token_id = 5
    with pytest.raises(UsageError, match="ends a text with token 2 and the draft with 5"):
        hasten.apply(model, PLAN, draft=draft)
    with pytest.raises(UsageError, match="resize_token_embeddings"):
        hasten.apply(model, PLAN, draft=target(vocab_size=40))
    assert not hasattr(model, "drafter")
