"""The heads and their tree: the common cases, the greedy tree, typical acceptance, fitting, wrong models."""

import itertools
import math

import pytest
import torch

import hasten
from conformance.decode import ragged, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode._medusa_tree import planted, sparse_tree, typical
from hasten.decode._rows import Tree
from hasten.decode.base import speculation
from hasten.decode.medusa import IGNORED, HeadProposer, Heads, Medusa, medusa
from hasten.hosts import Context

PLAN = "decode/medusa(heads=3, nodes=10, epochs=6, batch=32, lr=0.01, tokens=8, temperature=0)"
GREEDY = {"do_sample": False, "eos_token_id": None}
FULL = tuple(path for depth in (1, 2, 3) for path in itertools.product(range(2), repeat=depth))


def exact():
    return PLAN, {"calibration": [ragged(8, 12, seed=5)]}


def parts(heads, layers, words, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    blocks = [(normal(heads, width, width) * 0.3, normal(heads, width)) for _ in range(layers)]
    return blocks, normal(heads, words, width)


def cases():
    for rows, heads, layers, words, width, choices, dtype in (
        (1, 1, 1, 11, 8, ((0,),), torch.float32),
        (3, 3, 1, 37, 8, FULL, torch.float32),
        (2, 5, 2, 7, 5, ((0,), (3,), (0, 0), (0, 6), (3, 1), (0, 6, 2)), torch.float32),
        (4, 2, 0, 5, 3, ((0,), (1,), (4,), (1, 0)), torch.float64),
        (5, 3, 1, 9, 4, FULL, torch.bfloat16),
    ):
        blocks, last = parts(heads, layers, words, width, seed=heads, dtype=dtype)
        hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        if dtype == torch.bfloat16:  # rounding must not swap two guesses: words far apart, every product exact
            blocks = [(weight * 0, bias * 0) for weight, bias in blocks]
            hidden, last = torch.ones_like(hidden), torch.arange(27).view(3, 9, 1).expand(3, 9, 4).to(dtype)
        yield {"args": (hidden, blocks, last, choices), "tolerance": 1e-4}


def test_heads_begin_as_the_models_own_guess():
    model = target()
    heads = Medusa(heads=2, layers=3, nodes=4).blank(hasten.apply(model, "").host, None)
    hidden = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(heads(hidden), model.lm_head(hidden).expand(2, -1, -1))
    assert heads.last.dtype == torch.float64 and not any(part.requires_grad for part in heads.parameters())


def test_a_round_by_hand():
    """Two words more likely than the rest at each head: the tree (0), (1), (0, 0), (1, 1)."""
    last = torch.tensor([[[0.0], [3.0], [2.0]], [[5.0], [1.0], [4.0]]])
    blocks = [(torch.zeros(2, 1, 1), torch.zeros(2, 1))]
    logits, tokens = medusa(torch.ones(1, 1), blocks, last, ((0,), (1,), (0, 0), (1, 1)))
    assert tokens.tolist() == [[1, 2, 0, 2]] and logits[0, 1].tolist() == [5, 1, 4]
    tree, places, ranks = planted(((0,), (1,), (0, 0), (1, 1)), torch.device("cpu"))
    assert tree.parents.tolist() == [-1, -1, 0, 1] and places.tolist() == [0, 1, 2, 3] and ranks == 2


def expected(accuracy, tree):
    """Accepted tokens of a pass if the heads were right independently."""
    return sum(math.prod(accuracy[k][rank] for k, rank in enumerate(path)) for path in tree)


def test_the_greedy_tree_is_the_best_of_all_trees():
    accuracy = [[0.5, 0.3, 0.1], [0.45, 0.3, 0.2]]
    paths = [path for depth in (1, 2) for path in itertools.product(range(3), repeat=depth)]
    for nodes in (1, 2, 4, 6, 8):
        chosen = sparse_tree(accuracy, nodes)
        trees = [
            some
            for some in itertools.combinations(paths, nodes)
            if all(len(path) == 1 or path[:-1] in some for path in some)
        ]
        best = max(expected(accuracy, some) for some in trees)
        assert len(chosen) == nodes and expected(accuracy, chosen) == pytest.approx(best)
        assert list(chosen) == sorted(chosen, key=lambda path: (len(path), path))


def test_a_tree_grows_by_neighbours_until_there_are_no_more():
    assert sparse_tree([[0.2, 0.7], [0.5, 0.1]], 3) == ((0,), (1,), (1, 0))
    assert sparse_tree([[0.5, 0.0, 0.9], [0.1, 0.9, 0.0]], 3) == ((0,), (0, 0), (0, 1))  # behind a guess that is wrong
    assert sparse_tree([[0.0, 0.0], [0.0]], 9) == ((0,), (1,), (0, 0), (1, 0))


def typical_row(scores, tokens, parents, epsilon, delta):
    """Which path of candidates is accepted, and what follows it, for one row in plain Python."""
    p = scores.softmax(-1).tolist()
    found = {(): 0.0}
    for node in range(len(tokens)):
        path, likely, at = [], 0.0, node
        while at >= 0:
            path.insert(0, at)
            at = parents[at]
        for one in path:
            row = p[parents[one] + 1]
            entropy = -sum(value * math.log(value) for value in row if value > 0)
            if row[tokens[one]] <= min(epsilon, delta * math.exp(-entropy)):
                break
            likely += math.log(row[tokens[one]])
        else:
            found[tuple(path)] = likely
    path = max(found, key=lambda path: (len(path), found[path]))
    return [*(tokens[n] for n in path), int(scores[path[-1] + 1 if path else 0].argmax())], list(path)


def test_typical_acceptance_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(40):
        scores = 3 * torch.randn(4, 15, 6, generator=generator)
        scores[:, :, 0] = -torch.inf  # a processor ruled it out
        tokens = torch.zeros(4, 14, dtype=torch.long)
        tree, _, _ = planted(FULL, torch.device("cpu"))
        for first in (0, *range(2, 14, 2)):
            for row in range(4):
                tokens[row, first : first + 2] = torch.randperm(6, generator=generator)[:2]
        verdict = typical(scores, tokens, tree, 0.2, 0.4)
        for row in range(4):
            said, path = typical_row(scores[row], tokens[row].tolist(), tree.parents.tolist(), 0.2, 0.4)
            count = int(verdict.accepted[row])
            lengths.add(count)
            assert verdict.tokens[row, : count + 1].tolist() == said and verdict.path[row, :count].tolist() == path
    assert lengths == {0, 1, 2, 3}


def test_typical_thresholds():
    """An even choice of four has exp(-H) = 1/4: a candidate of 0.25 stays below delta = 1 only."""
    tree, tokens = Tree(torch.tensor([-1])), torch.tensor([[2]])
    even = torch.zeros(1, 2, 4)
    assert typical(even, tokens, tree, 0.9, 0.99).accepted.item() == 1
    assert typical(even, tokens, tree, 0.9, 1.0).accepted.item() == 0
    assert typical(even, tokens, tree, 0.24, 1.0).accepted.item() == 1


def test_typical_is_said_to_be_lossy_and_is_greedy_where_generation_is():
    assert Medusa().card.lossless and not Medusa(acceptance="typical").card.lossless
    model, batch = target(), ragged(4)
    wanted = model.generate(**batch, max_new_tokens=20, do_sample=False)
    plan = PLAN.replace(")", ", acceptance=typical, epsilon=0.02, delta=0.1)")
    fast = hasten.apply(model, plan, **exact()[1])
    assert torch.equal(fast.generate(**batch, max_new_tokens=20, do_sample=False), wanted)
    counted = {}
    for name, one in (("typical", plan), ("exact", PLAN)):
        fast.undo()
        fast = hasten.apply(model, one, **exact()[1])
        options = {"max_new_tokens": 40, "do_sample": True, "temperature": 1.5, "eos_token_id": None}
        first, again = (fast.generate(**batch, **options, seed=1) for _ in range(2))
        assert torch.equal(first, again)
        counted[name] = speculation(fast.host).counters.rounds
    assert counted["typical"] < counted["exact"]


@pytest.mark.parametrize("padded", [False, True])
def test_examples_are_hidden_states_and_the_tokens_after_the_next(padded):
    model = target()
    host = hasten.apply(model, "").host
    batch = ragged(3, 9)
    if not padded:
        batch = {"input_ids": batch["input_ids"][:1]}
    hidden, wanted = Medusa(heads=3).examples(host, batch, torch.Generator().manual_seed(0))
    found = 0
    for row, ids in enumerate(batch["input_ids"]):
        ids = ids[batch["attention_mask"][row].bool()] if padded else ids
        states = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
        for t in range(len(ids) - 2):
            torch.testing.assert_close(hidden[found], states[t])
            after = ids[t + 2 : t + 5].tolist()
            assert wanted[found].tolist() == after + [IGNORED] * (3 - len(after))
            found += 1
    assert found == len(hidden) == len(wanted)


def test_the_model_writes_the_text_and_only_that_is_learnt():
    model = target()
    host = hasten.apply(model, "").host
    batch = ragged(2, 6)
    written = model.generate(**batch, max_new_tokens=5, **GREEDY)[:, 6:]
    method = Medusa(heads=2, tokens=5, temperature=0)
    hidden, wanted = method.examples(host, batch, torch.Generator())
    model.generation_config.eos_token_id = None
    _, free = method.examples(host, batch, torch.Generator())
    assert sorted(free[free != IGNORED].tolist()) == sorted(written.flatten().tolist() * 2)
    model.generation_config.eos_token_id = [int(written[0, 1])]
    _, ended = method.examples(host, batch, torch.Generator())
    assert (ended != IGNORED).sum() < (free != IGNORED).sum()
    warm = Medusa(heads=2, tokens=5, temperature=5.0)
    first, again, other = (warm.examples(host, batch, torch.Generator().manual_seed(n))[1] for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_heads_learn_what_comes_after_the_next_token():
    """A text that counts in a circle: every head can be right, each by another shift."""
    model = target(hidden_size=64)
    text = (torch.arange(40)[None] + torch.randint(0, 12, (24, 1), generator=torch.Generator().manual_seed(0))) % 12
    plan = "decode/medusa(heads=3, nodes=8, epochs=30, batch=64, lr=0.01)"
    notes = []
    for epochs in (1, 30):
        fast = hasten.apply(model, plan.replace("epochs=30", f"epochs={epochs}"), calibration=[{"input_ids": text}])
        notes.append(fast.report["decode/medusa"])
        fast.undo()
    assert notes[0]["top1"][2] < notes[1]["top1"][2] and notes[0]["losses"][2] > notes[1]["losses"][2]
    assert min(notes[1]["top1"]) > 0.9 and notes[1]["examples"] == 24 * 38 and notes[1]["seconds"] > 0
    assert [path for path in notes[1]["tree"] if not any(path)] == [[0], [0, 0], [0, 0, 0]]


def test_the_models_weights_stay_and_the_heads_are_frozen():
    model = target()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = hasten.apply(model, PLAN, **exact()[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert not any(part.requires_grad for part in model.drafter.parameters())
    assert all(part.requires_grad for name, part in model.named_parameters() if not name.startswith("drafter."))
    fast.undo()
    assert model.state_dict().keys() == before.keys()


def test_it_needs_fewer_passes_on_text_that_it_can_foresee():
    model = target()
    text = model.generate(torch.tensor([[7, 9]]), max_new_tokens=100, **GREEDY)
    plan = "decode/medusa(heads=3, nodes=8, epochs=60, batch=32, lr=0.02)"
    prompt = {"input_ids": text[:, :30], "attention_mask": torch.ones(1, 30, dtype=torch.long)}
    made = hasten.generate(model, prompt, plan, calibration=[text], max_new_tokens=60, **GREEDY)
    assert torch.equal(made.tokens, text[:, :90])
    assert made.counters.target_passes < 40 and made.counters.draft_passes == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_heads_read_where_the_last_accepted_token_stands(monkeypatch, attention):
    """In every round and row: the state before the latest token, which was chosen from it."""
    model = target()
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 37, (4, 9), generator=torch.Generator().manual_seed(0))
    plain, lengths = HeadProposer.propose, set()

    def propose(self, most):
        for place, row in enumerate(self.run.rows if self.hidden is not None else []):
            text = self.run.stops.history(row, ids.device)[None]
            state = model(text, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -2]
            torch.testing.assert_close(self.hidden[place], state, rtol=1e-4, atol=1e-5)
            lengths.add(text.shape[1])
        return plain(self, most)

    monkeypatch.setattr(HeadProposer, "propose", propose)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **GREEDY)
    fast = hasten.apply(model, "decode/medusa(heads=3, nodes=15, epochs=20, batch=32, lr=0.02)", calibration=[text])
    model.drafter.learnt.plant(FULL)
    fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=3)
    assert len(speculation(fast.host).counters.accepted_at) > 1 and len(lengths) > 5


def test_attention_that_takes_no_tree_gets_a_chain():
    model = target()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 37, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(**batch, max_new_tokens=20, **GREEDY)
    for rule in ("exact", "typical"):
        plan = f"decode/medusa(heads=3, nodes=8, epochs=60, batch=32, lr=0.02, acceptance={rule})"
        fast = hasten.apply(model, plan, calibration=[wanted.flip(0)])
        assert torch.equal(fast.generate(**batch, max_new_tokens=20, **GREEDY), wanted)
        counters = speculation(fast.host).counters
        assert counters.acceptance > 0.2 and counters.drafted_at[0] < 4 * counters.rounds
        fast.generate(**batch, max_new_tokens=20, do_sample=True, seed=0)
        fast.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_have_the_models_dtype_and_are_saved_with_it(tmp_path, dtype):
    model = target().to(dtype)
    fast = hasten.apply(model, PLAN, **exact()[1])
    assert model.drafter.learnt.last.dtype == dtype
    ids = torch.arange(3, 12)[None]
    wanted = fast.generate(ids, max_new_tokens=16, do_sample=False)
    counters = speculation(fast.host).counters
    loaded = hasten.load_pretrained(fast.save(tmp_path / "saved"))
    assert loaded.model.drafter.learnt.choices() == model.drafter.learnt.choices() != ()
    loaded.model.to(dtype)
    assert torch.equal(loaded.generate(ids, max_new_tokens=16, do_sample=False), wanted)
    assert speculation(loaded.host).counters.accepted_at == counters.accepted_at


def test_heads_of_another_model_are_refused(tmp_path):
    model = target()
    fast = hasten.apply(model, PLAN, **exact()[1])
    folder = fast.save(tmp_path / "saved")
    with pytest.raises(UsageError, match="37 tokens and width 32, and this one has 37 and 64"):
        hasten.load_pretrained(folder, model=target(hidden_size=64))
    other = hasten.apply(target(seed=1), PLAN, **exact()[1])
    other.model.drafter.load_state_dict(model.drafter.state_dict())
    with pytest.raises(UsageError, match="fitted to another model"):
        other.generate(**ragged(2), max_new_tokens=4)


def test_calibration_that_does_not_do():
    model = target()
    for length, plan, problem in (
        (2, "decode/medusa", "three tokens or more"),
        (100, "decode/medusa(tokens=64)", "beyond the model's context of 128"),
    ):
        with pytest.raises(UsageError, match=problem):
            hasten.apply(model, plan, calibration=[torch.ones(1, length, dtype=torch.long)])
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(model, "decode/medusa")
    assert not hasattr(model, "drafter") and Context().report == {}


def test_heads_without_a_single_right_guess_draft_nothing():
    model, heads = target(), None
    fast = hasten.apply(model, PLAN, **exact()[1])
    heads = model.drafter.learnt
    assert isinstance(heads, Heads)
    heads.plant(())
    wanted = fast.generate(**ragged(2), max_new_tokens=6, do_sample=False)
    counters = speculation(fast.host).counters
    assert counters.drafted == 0
    fast.undo()
    assert torch.equal(model.generate(**ragged(2), max_new_tokens=6, do_sample=False), wanted)
