"""Routing tokens: the router's cases, what is labelled divergent, thresholds, and whose tokens come out."""

import copy

import pytest
import torch

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError
from hasten.decode import _router, r2r
from hasten.decode._router import NEVER, Router
from hasten.decode.base import speculation

GREEDY = {"do_sample": False, "eos_token_id": None}
SMALL = {"tokens": 8, "segment": 4, "width": 16, "blocks": 1, "epochs": 4, "lr": 1e-2}


def subject():
    context = {"draft": noisy(target(), 0.3), "calibration": [ragged(3, 7, seed=5)]}
    return {"model": target, "options": {**SMALL, "rate": 0.3}, "context": context, "run": run}


def router(hidden, embedding, top, width=12, blocks=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Router(hidden, embedding, top, width=width, blocks=blocks, expansion=3, dropout=0.5)
        for parameter in made.parameters():
            parameter.data.normal_(std=0.5)
    return made.eval()


def cases():
    for rows, hidden, embedding, top, words, blocks, dtype in (
        (1, 8, 8, 5, 5, 2, torch.float32),
        (7, 6, 10, 3, 31, 1, torch.float32),
        (3, 5, 4, 9, 17, 0, torch.float32),
        (4, 8, 8, 4, 13, 2, torch.bfloat16),
    ):
        generator = torch.Generator().manual_seed(rows)
        h, z, table = (torch.randn(rows, n, generator=generator).to(dtype) for n in (hidden, words, embedding))
        table = torch.randn(words, embedding, generator=generator).to(dtype)
        tokens = torch.randint(0, words, (rows,), generator=generator)
        yield {"args": (h, z, tokens, table, router(hidden, embedding, top, blocks=blocks), 0.4), "tolerance": 1e-4}


def test_thresholds():
    chances, labels = torch.tensor([0.9, 0.8, 0.6, 0.4, 0.3, 0.1]), torch.tensor([1.0, 0, 1, 0, 1, 0])
    for rate, asked in ((0.5, 3), (1 / 6, 1), (0.0, 0), (1.0, 6)):
        assert (chances >= _router.threshold(chances, labels, rate, 0.95)).sum() == asked
    for recall, lowest in ((0.3, 0.9), (0.6, 0.6), (0.95, 0.3), (1.0, 0.3)):
        assert _router.threshold(chances, labels, None, recall) == pytest.approx(lowest)
    assert _router.threshold(chances, torch.zeros(6), None, 0.95) == NEVER


def test_the_router_learns_from_each_of_its_inputs():
    generator = torch.Generator().manual_seed(0)
    h, z, e = torch.randn(1200, 6, generator=generator), torch.randn(1200, 4, generator=generator), torch.randn(1200, 5)
    held = torch.arange(1200) % 5 == 4
    for part in (h, z, e):
        labels = (part[:, 0] > 1).float()  # one in six
        made = router(6, 5, 4, width=16, blocks=1)
        facts = _router.fit(
            made, (h, z, e), labels, held, lr=1e-2, decay=0.0, batch=128, epochs=30, patience=10, seed=0
        )
        chances, truth = made(h, z, e).sigmoid()[held], labels[held] > 0.5
        assert (chances[truth] > 0.5).float().mean() > 0.85  # the rare class is not given up
        assert (chances[~truth] < 0.5).float().mean() > 0.85
        assert facts["epochs"] <= 30 and not made.training


def test_fitting_ends_when_validation_gets_no_better():
    h, z, e = (torch.randn(100, 3, generator=torch.Generator().manual_seed(n)) for n in range(3))
    labels, held = torch.arange(100) % 2 == 0, torch.arange(100) % 5 == 4
    facts = _router.fit(
        router(3, 3, 3), (h, z, e), labels.float(), held,
        lr=5e-2, decay=0.0, batch=16, epochs=60, patience=3, seed=0,
    )  # fmt: skip
    assert 3 < facts["epochs"] < 60


def twins(seed=0):
    """A large model with a token whose twin means the same, and a small one that prefers the twin."""
    large = target(seed=seed)
    with torch.no_grad():
        for kind in range(3, 20):
            large.model.embed_tokens.weight[kind + 17] = large.model.embed_tokens.weight[kind]
            large.lm_head.weight[kind + 17] = large.lm_head.weight[kind] * 0.9999
        small = copy.deepcopy(large)
        small.lm_head.weight[20:37], small.lm_head.weight[3:20] = (
            large.lm_head.weight[3:20],
            large.lm_head.weight[20:37],
        )
    return large, small


def test_a_token_of_the_same_meaning_is_neutral():
    large, small = twins()
    host = hasten.apply(large, "").host
    method = r2r.R2R(**{**SMALL, "margin": 0.05})
    *_, differs, divergent, _ = method.examples(host, small, ragged(4), 7)
    assert differs.float().mean() > 0.5 and divergent.sum() == 0
    *_, differs, divergent, _ = method.examples(host, noisy(large, 1.0), ragged(4), 7)
    assert differs.float().mean() > 0.3 and divergent.sum() > 0.5 * differs.sum()
    assert not divergent[~differs].any()


@torch.no_grad()
def plain_label(large, small, prompt, method, ends=()):
    """By whole forwards, token by token: what `examples` does in batches and with a cache."""

    def follow(ids, count):
        total = []
        for _ in range(count):
            best, token = large(ids).logits[:, -1].float().log_softmax(-1).max(-1)
            ids = torch.cat([ids, token[:, None]], 1)
            total.append(best.item())
            if int(token) in ends:
                break
        return ids, total

    labels, ids = [], prompt
    for _ in range(method.tokens):
        chances = large(ids).logits[0, -1].float().log_softmax(-1)
        choice, own = int(small(ids).logits[0, -1].argmax()), int(chances.argmax())
        after = torch.cat([ids, torch.tensor([[choice]])], 1)
        other = [chances[choice].item(), *(follow(after, method.segment - 1)[1] if choice not in ends else [])]
        mine = follow(ids, method.segment)[1]
        labels.append(choice != own and sum(mine) / len(mine) - sum(other) / len(other) > method.margin)
        ids = torch.cat([ids, torch.tensor([[own]])], 1)
    return labels


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("ends", [(), (5, 9, 13, 17, 21, 25, 29)])
def test_labels_are_those_of_whole_forwards(kind, ends):
    large = target(kind, eos_token_id=None)
    small = noisy(large, 0.4)
    method = r2r.R2R(tokens=7, segment=5, margin=0.4, ends=ends)
    batch = ragged(3, 9)
    *_, labels, row = method.examples(hasten.apply(large, "").host, small, batch, 5)
    for place in range(3):
        prompt = batch["input_ids"][place][batch["attention_mask"][place].bool()][None]
        assert labels[row == place].bool().tolist() == plain_label(large, small, prompt, method, ends)
    assert 0 < labels.sum() < len(labels)


def test_nothing_is_labelled_after_the_end_of_a_text():
    large = target(eos_token_id=None)
    free = large.generate(**ragged(3), max_new_tokens=8, do_sample=False)[:, 9:]
    large.config.eos_token_id = int(free[1, 3])
    method = r2r.R2R(**SMALL)
    *_, row = method.examples(hasten.apply(large, "").host, noisy(large, 0.3), ragged(3), 7)
    stops = [(free[place] == large.config.eos_token_id).nonzero().flatten().tolist() for place in range(3)]
    assert row.bincount().tolist() == [stop[0] + 1 if stop else 8 for stop in stops] and stops[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_always_is_the_large_model_and_never_the_small_one(kind):
    large = target(kind)
    small = noisy(large, 0.3)
    context = {"draft": small, "calibration": [ragged(3, 7, seed=5)]}
    for rate, model, passes in ((1.0, large, 14), (0.0, small, 0)):
        wanted = model.generate(**ragged(4), max_new_tokens=14, **GREEDY)
        handle = hasten.apply(large, [r2r.R2R(**SMALL, rate=rate)], **context)
        assert torch.equal(handle.generate(**ragged(4), max_new_tokens=14, **GREEDY), wanted)
        counters = speculation(handle.host).counters
        assert (counters.target_passes, counters.draft_passes, counters.tokens) == (passes, 14, 4 * 14)
        assert counters.accepted == (0 if passes else 4 * 14)
        handle.undo()


@torch.no_grad()
def plainly(large, small, learnt, ids, new):
    """One row without padding or cache; returns the tokens and how many are the large model's."""
    asked = 0
    for _ in range(new):
        out = small(ids, output_hidden_states=True)
        token = out.logits[:, -1].argmax(-1)
        state, table = out.hidden_states[-1][:, -1], small.get_input_embeddings().weight
        if r2r.naive_r2r(state, out.logits[:, -1], token, table, learnt, learnt.threshold)[1]:
            token, asked = large(ids).logits[:, -1].argmax(-1), asked + 1
        ids = torch.cat([ids, token[:, None]], 1)
    return ids, asked


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_each_row_gets_what_it_gets_alone(kind):
    """What the large model missed is read at the right places, whichever rows asked."""
    large = target(kind, eos_token_id=None)
    small = noisy(large, 0.3)
    method = r2r.R2R(**{**SMALL, "tokens": 20, "epochs": 2}, rate=0.4)
    handle = hasten.apply(large, [method], draft=small, calibration=[ragged(8, 9)])
    batch, learnt = ragged(4, 9), speculation(handle.host).drafter.learnt
    out = handle.generate(**batch, max_new_tokens=20, **GREEDY)
    counters, asked = speculation(handle.host).counters, 0
    for place, row in enumerate(out):
        mask = batch["attention_mask"][place].bool()
        wanted, count = plainly(large, small, learnt, batch["input_ids"][place][mask][None], 20)
        assert torch.equal(row[9:], wanted[0, -20:])
        asked += count
    assert counters.drafted - counters.accepted == asked and 5 < asked < 75
    assert 0 < counters.target_passes <= min(20, asked)


def test_rows_end_and_are_padded():
    large = target()
    handle = hasten.apply(
        large, [r2r.R2R(**SMALL, rate=0.25)], draft=noisy(large, 0.3), calibration=[ragged(4, 7, seed=5)]
    )
    free = handle.generate(**ragged(4), max_new_tokens=20, **GREEDY)
    ends = [int(free[0, 12]), int(free[2, 16])]
    out = handle.generate(**ragged(4), max_new_tokens=20, do_sample=False, eos_token_id=ends)
    for row, whole in zip(out, free, strict=True):
        stops = torch.isin(whole[9:], torch.tensor(ends)).nonzero().flatten().tolist()
        length = 9 + (stops[0] + 1 if stops else 20)
        assert torch.equal(row[:length], whole[:length]) and not row[length:].any()


def test_draws_are_the_two_models_own():
    """Sampled, always and never: the shares of the first token are those of either model."""
    large = target(vocab_size=5, eos_token_id=None)
    small = noisy(large, 0.8)
    ids = torch.tensor([[1, 3, 2]]).repeat(4000, 1)
    for rate, model in ((1.0, large), (0.0, small)):
        handle = hasten.apply(
            large, [r2r.R2R(**SMALL, rate=rate)], draft=small, calibration=[{"input_ids": torch.tensor([[1, 2, 4]])}]
        )
        out = handle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=True, seed=0, top_k=0
        )
        shares = out[:, 3].bincount(minlength=5) / 4000
        assert torch.allclose(shares, model(ids[:1]).logits[0, -1].float().softmax(-1), atol=0.03)
        handle.undo()


def test_the_rate_is_met_on_text_like_the_calibration():
    large = target(eos_token_id=None)
    calibration = [ragged(8, 9, seed) for seed in range(4)]
    method = r2r.R2R(**{**SMALL, "tokens": 16, "epochs": 10}, rate=0.3)
    handle = hasten.apply(large, [method], draft=noisy(large, 0.3), calibration=calibration)
    facts = handle.report["decode/r2r"]
    assert facts["examples"] == 32 * 16 and 0.25 < facts["rate"] < 0.35
    assert 0 < facts["divergent"] <= facts["differing"] < 0.9
    handle.generate(**ragged(8, 9, 9), max_new_tokens=16, **GREEDY)
    assert 0.1 < 1 - speculation(handle.host).counters.acceptance < 0.6


def test_models_that_agree_need_no_large_one():
    large = target()
    handle = hasten.apply(large, [r2r.R2R(**SMALL)], draft=noisy(large, 0.0), calibration=[ragged(3, 7, seed=5)])
    assert handle.report["decode/r2r"]["divergent"] == 0
    handle.generate(**ragged(2), max_new_tokens=8, **GREEDY)
    assert speculation(handle.host).counters.target_passes == 0


def test_an_evicting_cache_sees_the_prompt_alone():
    large = target()
    ids = torch.randint(3, 37, (2, 60), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **GREEDY}
    kept = "kv/cake(keep=0.5, window=8, decode=false)"
    only = hasten.apply(large, kept)
    wanted = only.generate(ids, **options)
    only.undo()
    both = hasten.apply(
        large, f"{kept} + decode/r2r(tokens=4, segment=2, width=8, blocks=0, epochs=1, rate=1)",
        draft=noisy(large, 0.3), calibration=[ragged(3, 7, seed=5)],
    )  # fmt: skip
    assert torch.equal(both.generate(ids, **options), wanted)


def test_what_is_missing_is_said_before_anything_runs():
    large = target()
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(large, "decode/r2r", draft=noisy(large, 0.1))
    with pytest.raises(PlanError, match="rate must be at least 0"):
        r2r.R2R(rate=1.5)
    assert not hasattr(large, "drafter")
