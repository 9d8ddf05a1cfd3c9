"""Rejection under a constraint: the law of masking from a few checks, unbiased weights, particles, ends."""

import itertools
import json
import math

import pytest
import scipy.stats
import torch
import transformers as hf

import hasten
from conformance.decode import ragged, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode import awrs as module
from hasten.decode._vocabulary import tokens_as_bytes
from hasten.decode.awrs import AWRS, KINDS, awrs, masked
from hasten.decode.base import speculation


def subject():
    def run(handle):
        return handle.generate(**ragged(), max_new_tokens=12, do_sample=False, eos_token_id=None)

    return {"model": target, "options": {"regex": "[!-$]{3,}"}, "context": {}, "run": run}


def numbers(rows, words, seed, share=0.4, peaked=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(rows, words, generator=generator) * peaked).softmax(-1).to(dtype)
    e = torch.empty(4, rows, words).exponential_(generator=generator)
    mask = torch.rand(rows, words, generator=generator) < share
    return p, lambda row, token: bool(mask[row, token]), e, list(range(rows))


def cases():
    for rows, words, share in ((3, 7, 0.4), (1, 1, 1.0), (2, 90, 0.05), (4, 33, 0.0)):
        for weights, draws in (*((kind, 2) for kind in KINDS), ("geometric", 4)):
            yield {"args": numbers(rows, words, rows, share), "kwargs": {"weights": weights, "draws": draws}}
    for weights in KINDS:
        yield {"args": numbers(5, 40, 8, dtype=torch.bfloat16), "kwargs": {"weights": weights}, "tolerance": 2e-2}
    p, allowed, e, seeds = numbers(4, 30, 9)
    p[:, 5:] = 0  # what top-k leaves
    yield {"args": (p / p.sum(-1, keepdim=True), allowed, e, seeds), "kwargs": {"weights": "recursive"}}


P = torch.tensor([0.45, 0.3, 0.05, 0.2], dtype=torch.float64)


def expectation(weights, good):
    """E[w 1(x = v)] for every token v, over every order of both rounds: exact, without a draw."""
    orders = [(order, chance_of(order)) for order in itertools.permutations(range(len(P)))]
    pairs = [(a, b) for a in orders for b in (orders if weights == "paper" else orders[:1])]
    e = torch.stack([torch.stack([noise_for(a[0]), noise_for(b[0])]) for a, b in pairs], 1)
    tokens, logs, _ = awrs(P.expand(len(pairs), -1), lambda _, v: v in good, e, [0] * len(pairs), weights)
    chances = torch.tensor([a[1] * (b[1] if weights == "paper" else 1) for a, b in pairs], dtype=torch.float64)
    found = torch.zeros_like(P)
    return found.index_add_(0, tokens.clamp(min=0), chances * logs.exp())


def chance_of(order):
    left, chance = 1.0, 1.0
    for v in order:
        chance, left = chance * P[v].item() / left, left - P[v].item()
    return chance


def noise_for(order):
    """Exponential numbers with which the tokens come in this order."""
    e = torch.empty(len(P), dtype=torch.float64)
    for place, v in enumerate(order):
        e[v] = P[v] / (len(P) - place)
    return e


GOOD = [{0, 2}, {2}, {1, 3}, {0, 1, 2, 3}, {3}, {0, 1, 3}]


@pytest.mark.parametrize("good", GOOD)
@pytest.mark.parametrize("weights", ["paper", "recursive"])
def test_weights_are_proper(weights, good):
    """E[w] = Z, and more: E[w f(x)] = sum of p(v) f(v) over allowed v, for every f."""
    wanted = torch.tensor([P[v].item() * (v in good) for v in range(len(P))], dtype=torch.float64)
    torch.testing.assert_close(expectation(weights, good), wanted, rtol=1e-9, atol=1e-12)


def test_the_test_of_weights_finds_a_wrong_one(monkeypatch):
    right = module._first

    def forgets_the_refused_mass(asked, turn, kind):
        token, log = right(asked, turn, kind)
        refused = sum(not known for known in asked.known.values())
        return token, -math.log(refused + 1) if token >= 0 else log

    monkeypatch.setattr(module, "_first", forgets_the_refused_mass)
    gap = (expectation("paper", {0, 2}) - torch.tensor([0.45, 0, 0.05, 0], dtype=torch.float64)).abs().max()
    assert gap > 0.02


@pytest.mark.parametrize(("weights", "draws"), [("geometric", 2), ("geometric", 5), ("adaptive", 2), ("none", 2)])
def test_weights_are_right_on_average(weights, draws):
    """By 4,000 draws; the frequencies of the tokens are those of masking whatever the weights."""
    rows, generator = 4000, torch.Generator().manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.05, 0.25], dtype=torch.float64)
    e = torch.empty(draws, rows, 4).exponential_(generator=generator)
    tokens, logs, checks = awrs(p.expand(rows, -1), lambda _, v: v in (1, 2), e, list(range(rows)), weights, draws)
    counts = tokens.bincount(minlength=4)
    assert counts[0] == counts[3] == 0
    assert scipy.stats.binomtest(int(counts[1]), rows, 6 / 7).pvalue > 1e-4
    if weights != "none":
        for value, wanted in ((logs.exp(), 0.35), (logs.exp() * (tokens == 2), 0.05)):
            assert abs(value.mean() - wanted) < 4.5 * value.std() / rows**0.5
    assert checks.double().mean() < 4


def test_more_draws_have_less_variance():
    rows = 2000
    e = torch.empty(6, rows, 4).exponential_(generator=torch.Generator().manual_seed(1))
    given = (P.expand(rows, -1), lambda _, v: v in (1, 2), e, list(range(rows)))
    spread = [awrs(*given, "geometric", n)[1].exp().std().item() for n in (2, 3, 6)]
    assert spread[0] > 1.2 * spread[1] > 1.2 * 1.2 * spread[2]
    assert awrs(*given, "recursive")[1].exp().std().item() < 0.8 * spread[0]


def test_masking_gives_the_same_token_and_the_exact_weight():
    p, allowed, e, seeds = numbers(50, 40, 3)
    tokens, logs, checks = masked(p, allowed, e)
    assert torch.equal(tokens, awrs(p, allowed, e, seeds)[0]) and checks.tolist() == [40] * 50
    assert logs[0].exp().item() == pytest.approx(sum(p[0, v].item() for v in range(40) if allowed(0, v)), abs=1e-6)


class Masks(hf.LogitsProcessor):
    """Token masking as libraries do it: every token at every step."""

    def __init__(self, checker, width):
        self.checker, self.width = checker, width

    def __call__(self, ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(ids[:, self.width :].tolist()):
            state = self.checker.start()
            for token in tokens:
                state = None if state is None else self.checker.step(state, token)
            for token in range(scores.shape[1]):
                if state is None or self.checker.step(state, token) is not None:
                    out[row, token] = scores[row, token]
        return out


LETTERS = r"([!-$]{2}[\x05-\x0c]){6}"  # 18 tokens of a vocabulary of 37, each a byte


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"repetition_penalty": 1.3}])
def test_tokens_are_those_of_masking_in_transformers(sampled, more):
    """With one seed even the drawn tokens are the same: both take the first of a race among allowed tokens."""
    if "temperature" in more and not sampled:
        pytest.skip("greedy decoding has no temperature")
    model = target()
    fast = hasten.apply(model, AWRS(regex=LETTERS))
    checker = speculation(fast.host).drafter.learnt.constraint
    options = {"max_new_tokens": 18, "do_sample": sampled, "eos_token_id": None, "top_k": 0} | more
    batches = [ragged(1), ragged(1, 12, seed=3)] if sampled else [ragged(4), ragged(1)]
    got = []
    for batch in batches:
        torch.manual_seed(5)
        got.append(fast.generate(**batch, **options))
        counters = speculation(fast.host).counters
        assert all(counters.complete) and counters.checks < 0.6 * 37 * counters.steps
    fast.undo()
    for batch, found in zip(batches, got, strict=True):
        torch.manual_seed(5)
        masks = hf.LogitsProcessorList([Masks(checker, batch["input_ids"].shape[1])])
        assert torch.equal(model.generate(**batch, **options, logits_processor=masks), found)


def tiny(**changes):
    """Five tokens, the last of which ends a text, and a model that is far from certain."""
    model = target(vocab_size=5, num_hidden_layers=1, eos_token_id=4, pad_token_id=4, **changes)
    model.lm_head.weight.data *= 0.6
    return model


SHORT = r"\x00?(\x01\x02|\x02{2,3}|\x03)"
PROMPTS = {
    "input_ids": torch.tensor([[1, 3, 2, 0], [0, 0, 2, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
}


@torch.no_grad()
def texts(model, prompt, ends=True):
    """Every text of `SHORT`: (chance under the model, under one-token-ahead masking, with its end)."""
    found, checker = {}, module.read_constraint(AWRS(regex=SHORT))

    def grow(text, state, chance, local):
        logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1]
        p = logits.softmax(-1).tolist()
        allowed = {v: checker.step(state, v) for v in range(4)}
        go = {v: to for v, to in allowed.items() if to is not None}
        end = p[4] if ends else 1 - sum(p[v] for v in go)
        may = checker.finished(state)
        z = sum(p[v] for v in go) + end * may
        if may:
            found[tuple(text)] = (chance * end, local * end / z)
        for v, to in go.items():
            grow([*text, v], to, chance * p[v], local * p[v] / z)

    grow([], checker.start(), 1.0, 1.0)
    assert sum(local for _, local in found.values()) == pytest.approx(1)
    return found


def written(out, width):
    return [tuple(itertools.takewhile(lambda token: token != 4, row)) for row in out[:, width:].tolist()]


def goodness(found, law):
    counts = [found.count(text) for text in law]
    assert sum(counts) == len(found), "a text that does not fit"
    return scipy.stats.chisquare(counts, [len(found) * chance / sum(law.values()) for chance in law.values()]).pvalue


@pytest.mark.parametrize("plan", [{}, {"masking": True}, {"weights": "paper"}, {"weights": "geometric", "draws": 3}])
@pytest.mark.parametrize("ends", [True, False])
def test_texts_have_the_law_of_masking(plan, ends):
    """Two prompts of different lengths, many rows; with and without a token for the end."""
    model = tiny()
    fast = hasten.apply(model, AWRS(regex=SHORT, **plan))
    batch = {name: value.repeat(600, 1) for name, value in PROMPTS.items()}
    given = {} if ends else {"eos_token_id": None, "suppress_tokens": None}
    out = fast.generate(**batch, max_new_tokens=8, do_sample=True, top_k=0, seed=1, **given)
    counters = speculation(fast.host).counters
    assert all(counters.complete) and counters.resampled == 0
    for row, prompt in enumerate(([1, 3, 2, 0], [2, 1])):
        law = {text: local for text, (_, local) in texts(model, prompt, ends).items()}
        assert goodness(written(out[row::2], 4), law) > 1e-3
        if plan.get("weights"):
            exact = sum(chance for chance, _ in texts(model, prompt, ends).values())
            weights = torch.tensor(counters.log_weights[row::2]).exp()
            assert abs(weights.mean() - exact) < 4.5 * weights.std() / len(weights) ** 0.5


@pytest.mark.parametrize("plan", [{"weights": "recursive"}, {"weights": "paper", "resample": 1.0}, {"masking": True}])
def test_particles_have_the_models_own_law(plan):
    """The kept text is nearly a draw from the model given that it fits, and the mean weight is the chance that it does,
    without bias, resampling or not."""
    model = tiny()
    fast = hasten.apply(model, AWRS(regex=SHORT, particles=20, **plan))
    batch = {name: value.repeat(160, 1) for name, value in PROMPTS.items()}
    out = fast.generate(**batch, max_new_tokens=8, do_sample=True, seed=2)
    counters = speculation(fast.host).counters
    assert all(counters.complete) and counters.resampled > 100 and len(counters.particles[0]) == 20
    apart = []
    for row, prompt in enumerate(([1, 3, 2, 0], [2, 1])):
        exact = texts(model, prompt)
        evidence = sum(chance for chance, _ in exact.values())
        weights = torch.tensor(counters.log_weights[row::2]).exp()
        assert abs(weights.mean() - evidence) < 4.5 * weights.std() / len(weights) ** 0.5
        found = written(out[row::2], 4)
        shares = {text: found.count(text) / len(found) for text in exact}
        assert sum(shares.values()) == pytest.approx(1)
        away = sum(abs(shares[text] - chance / evidence) for text, (chance, _) in exact.items()) / 2
        local = sum(abs(shares[text] - local) for text, (_, local) in exact.items()) / 2
        apart.append((away, local))
    assert all(away < 0.14 and local > away + 0.12 for away, local in apart), apart


def test_the_end_is_forced_and_costs_no_pass():
    model = target()
    fast = hasten.apply(model, AWRS(regex=r"[!-$]{4}"))
    out = fast.generate(**ragged(3), max_new_tokens=12, do_sample=False, eos_token_id=20)
    counters = speculation(fast.host).counters
    assert out.shape == (3, 14) and out[:, -1].tolist() == [20] * 3
    assert counters.target_passes == 4 and all(counters.complete) and counters.tokens == 15
    out = fast.generate(**ragged(3), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert out.shape == (3, 13) and speculation(fast.host).counters.complete == [True] * 3
    out = fast.generate(**ragged(3), max_new_tokens=2, do_sample=False)
    assert out.shape == (3, 11) and speculation(fast.host).counters.complete == [False] * 3
    out = fast.generate(**ragged(3), max_new_tokens=12, do_sample=False, eos_token_id=[20, 30])
    assert set(out[:, -1].tolist()) <= {20, 30} and speculation(fast.host).counters.target_passes == 5


def test_an_end_that_is_text_too_is_only_an_end():
    fast = hasten.apply(target(), AWRS(regex=r"[!-$]+"))
    out = fast.generate(**ragged(2), max_new_tokens=40, do_sample=False, eos_token_id=34)
    for row in out[:, 9:].tolist():
        text = row[: row.index(34)] if 34 in row else row
        assert set(text) <= {33, 35, 36} and text


def test_a_text_may_be_empty():
    fast = hasten.apply(target(), AWRS(regex="(?:)"))
    assert fast.generate(**ragged(2), max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 9)
    assert fast.generate(**ragged(2), max_new_tokens=4, do_sample=False, eos_token_id=7)[:, 9:].tolist() == [[7], [7]]
    assert speculation(fast.host).counters.target_passes == 0


def test_rows_that_end_early_leave_the_others_alone():
    """A batch gives what its rows give alone."""
    model = target()
    fast = hasten.apply(model, AWRS(regex=r"[!-$]{2,9}[\x05-\x0c]"))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 20}
    batch = ragged(4)
    out = fast.generate(**batch, **options)[:, 9:]
    lengths = set()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        alone = fast.generate(ids[mask][None], **options)[0, int(mask.sum()) :]
        lengths.add(len(alone))
        assert out[row, : len(alone)].tolist() == alone.tolist()
    assert len(lengths) > 1


def test_a_model_with_nowhere_to_go_stops_there():
    fast = hasten.apply(target(), AWRS(regex=r"[!-$]{3}\x05[!-$]"))
    out = fast.generate(**ragged(2), max_new_tokens=9, do_sample=False, suppress_tokens=[5], eos_token_id=None)
    counters = speculation(fast.host).counters
    assert out.shape == (2, 12) and counters.complete == [False, False]


def test_allowed_tokens_that_top_k_cuts_are_found():
    fast = hasten.apply(target(), AWRS(regex=LETTERS))
    out = fast.generate(**ragged(3), max_new_tokens=18, do_sample=True, top_k=1, seed=0, eos_token_id=None)
    assert all(speculation(fast.host).counters.complete)
    greedy = fast.generate(**ragged(1), max_new_tokens=1, do_sample=False, eos_token_id=None)
    assert out.shape == (3, 27) and greedy.shape == (1, 10)


def test_a_seed_repeats_and_a_stream_follows():
    class Stream:
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts += value.reshape(-1).tolist()

        def end(self):
            self.parts.append("end")

    for plan in ({}, {"weights": "adaptive", "particles": 3}):
        fast = hasten.apply(target(), AWRS(regex=LETTERS, **plan))
        options = {"max_new_tokens": 18, "do_sample": True, "eos_token_id": None}
        outs = [fast.generate(**ragged(2), **options, seed=seed) for seed in (3, 3, 4)]
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
        stream = Stream()
        out = fast.generate(**ragged(1), **options, seed=3, streamer=stream)
        assert stream.parts == [*out[0].tolist(), "end"]


def test_a_conversation_goes_on_after_particles():
    model = target()
    ids = ragged(1)["input_ids"]
    fast = hasten.apply(model, AWRS(regex=LETTERS, weights="recursive", particles=3))
    options = {"max_new_tokens": 18, "do_sample": True, "eos_token_id": None, "seed": 0}
    one = fast.generate(ids, return_dict_in_generate=True, **options)
    fast.undo()
    after = model.generate(one.sequences, max_new_tokens=5, do_sample=False, past_key_values=one.past_key_values)
    assert torch.equal(after, model.generate(one.sequences, max_new_tokens=5, do_sample=False))


def test_json_is_valid_and_takes_few_checks():
    """A byte-level model writes values that Python reads, with a small share of the checks of masking."""
    workload = hasten.workload("stdlib-lm(prompt=64)")
    schema = {"properties": {"name": {"type": "string", "maxLength": 6}, "on": {"type": "boolean"}},
              "required": ["name", "on"], "additionalProperties": False}  # fmt: skip
    fast = hasten.apply(workload.trained(), AWRS(schema=json.dumps(schema)))
    prompts = torch.cat(workload.requests(0)[:3])
    out = fast.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=60, do_sample=False)
    counters = speculation(fast.host).counters
    for row in out[:, 64:].tolist():
        value = json.loads(bytes(row).rstrip(b"\0"))
        assert set(value) == {"name", "on"} and len(value["name"]) <= 6 and isinstance(value["on"], bool)
    assert counters.checks < 0.1 * 256 * counters.steps


def tokenizers():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = ['{"a": 1, "bé": [true, null]}', "the quick brown fox, 😀", " x  y"] * 5
    level = Tokenizer(models.BPE())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    level.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=letters)
    )
    pieces = [("<unk>", 0.0), ("<s>", 0.0)] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("a", -4.0), ('"', -4.0), ("▁{", -4.0)]
    piece = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    piece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return [hf.PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>") for one in (level, piece)]


@pytest.mark.parametrize("kind", [0, 1])
def test_the_bytes_of_tokens(kind):
    tokenizer = tokenizers()[kind]
    words = tokens_as_bytes(tokenizer, len(tokenizer) + 3)
    assert words[tokenizer.bos_token_id] is None and words[-3:] == [None] * 3
    for text in ('the "a" {é😀}', "quick brown, fox  ", "\n\t\x00x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(words[token] for token in ids) == text.encode()


def test_a_tokenizer_goes_with_the_model(tmp_path):
    tokenizer = tokenizers()[0]
    tokenizer.save_pretrained(tmp_path / "words")
    model = target(vocab_size=len(tokenizer) + 5)
    with pytest.raises(UsageError, match="no tokenizer was found"):
        hasten.apply(model, AWRS())
    assert not hasattr(model, "drafter")
    fast = hasten.apply(model, AWRS(tokenizer=str(tmp_path / "words"), schema='{"enum": ["the fox", null]}'))
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1, "eos_token_id": None}
    out = fast.generate(**ragged(3), **options)
    for row in out[:, 9:].tolist():
        assert json.loads(tokenizer.decode([token for token in row if token])) in ("the fox", None)
    loaded = hasten.load_pretrained(fast.save(tmp_path / "saved"))
    assert torch.equal(loaded.generate(**ragged(3), **options), out)


def test_a_schema_comes_from_a_file_and_goes_into_the_record(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"enum": [" ", "!"]}')
    fast = hasten.apply(target(), f"decode/awrs(schema='{file}')")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    out = fast.generate(**ragged(2), **options)
    assert set(map(bytes, out[:, 9:].tolist())) <= {b'" "', b'"!"'}
    saved = fast.save(tmp_path / "saved")
    file.unlink()
    assert torch.equal(hasten.load_pretrained(saved).generate(**ragged(2), **options), out)
    with pytest.raises(UsageError, match="neither JSON nor a file"):
        hasten.apply(target(), f"decode/awrs(schema='{file}')")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"regex": "a", "schema": "{}"}, "regex or schema, not both"),
        ({"regex": "(a"}, "can't be read"),
        ({"regex": r"[^\s\S]"}, "no text fits the regex"),
        ({"schema": '{"type": "number", "minimum": 1}'}, "minimum, which can't be checked"),
        ({"particles": 4}, "give weights=paper"),
        ({"masking": True, "weights": "paper"}, "leave out weights"),
        ({"draws": 3, "weights": "recursive"}, "give weights=geometric"),
    ],
)
def test_options_that_do_not_go_together(options, problem):
    with pytest.raises(PlanError, match=problem):
        AWRS(**options)


def test_weights_of_greedy_text_are_refused():
    fast = hasten.apply(target(), AWRS(regex="[!-$]+", weights="paper"))
    with pytest.raises(UsageError, match="do_sample=True"):
        fast.generate(**ragged(2), max_new_tokens=4, do_sample=False)
    with pytest.raises(PlanError, match=r"decode\.draft"):
        hasten.apply(target(), "decode/awrs + decode/speculative", draft=target(seed=1))
