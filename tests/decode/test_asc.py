"""ASC: the vector, the bound that gives its strength, where it is added, and that drafting changes nothing."""

import copy

import pytest
import torch

import hasten
from conformance.decode import noisy, ragged, run, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode.asc import ASC, asc
from hosts.tiny import DECODERS

WORDY, BRIEF = 21, 13


def cases():
    for pairs, width, positions, words, kl, dtype in (
        (1, 3, 1, 2, 0.5, torch.float32),
        (7, 33, 5, 11, 0.01, torch.float32),
        (4, 8, 9, 37, 2.0, torch.float32),
        (3, 16, 6, 10, 0.3, torch.bfloat16),
        (5, 6, 4, 7, 0.3, torch.float16),
    ):
        generator = torch.Generator().manual_seed(pairs)
        shapes = (pairs, width), (pairs, width), (positions, words), (positions, words)
        yield {"args": (*(torch.randn(s, generator=generator).to(dtype) * 2 for s in shapes), kl), "tolerance": 2e-5}


def thoughts(rows=6, words=37, seed=0):
    """Right-padded pairs: the wordy rows say one token over and over, the concise ones another."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, words, (2 * rows, 16), generator=generator)
    ids[rows:, :6] = ids[:rows, :6]
    mask = torch.ones_like(ids)
    thought = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(2 * rows):
        length = 9 + row % 2 if row < rows else 13 + row % 3
        ids[row, 7:length:2] = BRIEF if row < rows else WORDY
        ids[row, length:], mask[row, length:] = 0, 0
        thought[row, 6:length] = True
    concise = torch.arange(2 * rows) < rows
    return {"input_ids": ids, "attention_mask": mask, "concise": concise, "thought": thought}


def subject():
    return {"model": target, "options": {"kl": 2.0}, "context": {"calibration": [thoughts()]}, "run": run}


def steered(model, batches=None, **options):
    return hasten.apply(model, ASC(**options), calibration=batches or [thoughts()])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bound_holds_for_small_shifts(seed):
    """Along a line of logits the measured divergence is the one that was asked for, the better the smaller it is."""
    generator = torch.Generator().manual_seed(seed)
    z, u = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    off = []
    for kl in (1e-1, 1e-2, 1e-3):
        _, gamma = asc(torch.ones(1, 2), torch.zeros(1, 2), z, u, kl)
        p, q = z.log_softmax(-1), (z + gamma * u).log_softmax(-1)
        off.append(abs((p.exp() * (p - q)).sum(-1).mean().item() / kl - 1))
    assert off[0] < 0.3 and off[2] < 0.03 and off[2] < off[1] < off[0]


def test_the_strength_bounds_the_divergence_in_a_model():
    """Thoughts read with the shift on move the next token's distribution by what was asked for."""
    kl, batch = 1e-3, thoughts()
    model = target()
    wordy = {name: part[~batch["concise"]] for name, part in batch.items()}
    plain = model(wordy["input_ids"]).logits.log_softmax(-1)
    fast = steered(model, kl=kl)
    layer = fast.report["decode/asc"]["layer"]
    block = fast.host.layers[layer].block
    where = (torch.arange(16) >= 5)[None, :, None]
    shift = fast.model.steering.shift.clone()
    fast.undo()
    handle = block.register_forward_hook(lambda _, given, out: out + where * shift)
    moved = model(wordy["input_ids"]).logits.log_softmax(-1)
    handle.remove()
    divergence = (plain.exp() * (plain - moved)).sum(-1)
    inside = torch.zeros_like(wordy["thought"])
    inside[:, :-1] = wordy["thought"][:, 1:]
    assert divergence[inside].mean().item() == pytest.approx(kl, rel=0.1)


@pytest.mark.parametrize("read", ["last", "mean"])
def test_the_vector_by_hand(read):
    batch, model = thoughts(), target()
    hidden = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1].float()
    rows = []
    for row, thought in zip(hidden, batch["thought"], strict=True):
        rows.append(row[thought].mean(0) if read == "mean" else row[thought][-1])
    wanted = torch.stack(rows[:6]).mean(0) - torch.stack(rows[6:]).mean(0)
    parts = [{name: part[start::2] for name, part in batch.items()} for start in (0, 1)]
    for batches in ([batch], parts):
        fast = steered(model, batches, read=read, layer=0, gamma=0.5)
        torch.testing.assert_close(fast.model.steering.shift.float(), 0.5 * wanted)
        fast.undo()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "neox_parallel"])
def test_added_at_every_step_from_the_prompts_last_token_on(name):
    ids = torch.randint(3, 37, (3, 6), generator=torch.Generator().manual_seed(1))
    model = DECODERS[name]().double()
    fast = steered(model, gamma=3.0, layer=1)
    shift = fast.model.steering.shift.clone()
    outs = [fast.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    fast.undo()
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    block = hasten.apply(model, "").host.layers[1].block

    def add(_, given, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + (torch.arange(hidden.shape[1]) >= 5)[None, :, None] * shift
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle, wanted = block.register_forward_hook(add), ids
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    assert torch.equal(outs[0], wanted) and torch.equal(outs[1], wanted) and not torch.equal(plain, wanted)


@pytest.mark.parametrize("masked", [True, False])
def test_padding_changes_nothing(masked):
    fast = steered(target(), kl=2.0)
    batch = ragged()
    given = batch if masked else {"input_ids": batch["input_ids"]}
    together = fast.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        alone = fast.generate(
            batch["input_ids"][row, real][None], max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0, real.sum() :], together[row, 9:])


def test_a_conversation_goes_on_with_its_cache():
    """Of a prompt that is partly in the cache the last token alone is shifted, as of one that is not."""
    from transformers import DynamicCache

    model, ids = target(), ragged(1)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    fast = steered(model, kl=2.0)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    wanted = fast.generate(ids, **options)
    assert torch.equal(fast.generate(ids, past_key_values=cache, **options), wanted)


@pytest.mark.parametrize("rows", [1, 4])
def test_with_drafting(rows):
    batch = ragged(4) if rows == 4 else {name: part[3:] for name, part in ragged(4).items()}
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    wanted = steered(target(), kl=2.0).generate(**batch, **options)
    for plan in (["decode/asc(kl=2.0)", "decode/speculative"], ["decode/speculative", "decode/asc(kl=2.0)"]):
        both = hasten.apply(target(), plan, draft=noisy(target(), 0.1), calibration=[thoughts()])
        assert torch.equal(both.generate(**batch, **options), wanted)


def test_rows_that_end_leave_the_others_alone():
    """Drafting drops a row that has ended; the others are shifted on."""
    wanted = steered(target(), kl=2.0).generate(**ragged(), max_new_tokens=20, do_sample=False, eos_token_id=None)
    end = int(wanted[1, 12])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": end}
    plain = steered(target(), kl=2.0).generate(**ragged(), **options)
    both = hasten.apply(
        target(), "decode/asc(kl=2.0) + decode/speculative", draft=noisy(target(), 0.1), calibration=[thoughts()]
    )
    assert torch.equal(both.generate(**ragged(), **options), plain)


def test_beams_and_several_answers():
    fast = steered(target(), kl=2.0)
    out = fast.generate(**ragged(), max_new_tokens=6, num_beams=2, num_return_sequences=2, do_sample=False)
    assert out.shape[0] == 8


def test_half_precision_finds_nearly_the_same_strength():
    strengths = []
    for dtype in (torch.float32, torch.bfloat16):
        fast = steered(copy.deepcopy(target()).to(dtype), kl=0.5)
        assert fast.model.steering.shift.dtype == dtype
        strengths.append(fast.report["decode/asc"]["gamma"])
    assert strengths[1] == pytest.approx(strengths[0], rel=0.15)


def test_it_makes_the_wordy_less_likely():
    """What the concise rows say becomes likelier than what the wordy ones say."""
    ids, margins = thoughts()["input_ids"][:, :7], []
    for gamma in (0.0, 1.0, 2.0):
        logits = steered(target(), gamma=gamma, layer=1, read="mean").model(ids).logits[:, -1]
        margins.append((logits[:, BRIEF] - logits[:, WORDY]).mean().item())
    assert margins[0] < margins[1] < margins[2]


def test_what_can_not_be_says_why():
    batch = thoughts()
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(target(), "decode/asc")
    for change, words in (
        ({"concise": None}, "give dicts with `concise`"),
        ({"concise": torch.ones(12, dtype=torch.bool)}, "12 concise thoughts and 0 at length"),
        ({"concise": torch.tensor(True)}, "give a truth value for each"),
        ({"thought": torch.zeros(12, 16, dtype=torch.bool)}, "a calibration row has no thought"),
    ):
        given = {name: part for name, part in (batch | change).items() if part is not None}
        model = target()
        with pytest.raises(UsageError, match=words):
            hasten.apply(model, "decode/asc", calibration=[given])
        assert not hasattr(model, "steering")
    same = {name: part[:6].repeat(2, 1) for name, part in batch.items() if name != "concise"}
    with pytest.raises(UsageError, match="are the same after block"):
        hasten.apply(target(), "decode/asc", calibration=[same | {"concise": batch["concise"]}])
    with pytest.raises(UsageError, match="there is no block 2; the model has 2"):
        steered(target(), layer=2)
    model = target()
    steered(model)
    with pytest.raises(UsageError, match="steered already"):
        steered(model)
