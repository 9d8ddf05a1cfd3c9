"""Trees of candidates: any tree in any round gives the tokens of plain generation, whatever is asked for."""

import functools
import random

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import hasten
from conformance.decode import ragged, target
from hasten.core.errors import UsageError
from hasten.decode._drafting import Drafting
from hasten.decode._loop import Drafter, Speculation
from hasten.decode._proposals import Proposal, Proposer
from hasten.decode._rows import Rows, Tree
from hasten.decode._sampling import accept_tree

WORDS = 37


def random_tree(rng, most, size):
    """Parents of a tree of at most `most` levels, in an order that is no level order."""
    parents, depths = [], []
    for place in range(size):
        above = [n for n in range(place) if depths[n] < most - 1]
        parent = rng.choice([-1, *above, *above])
        parents.append(parent)
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return Tree(torch.tensor(parents))


class Knowing(Proposer):
    """Proposes another tree every round; a random path of it begins with what the row will say, up to some depth."""

    def __init__(self, run, wanted, seed, deepest, least):
        super().__init__(run)
        self.wanted, self.rng, self.deepest, self.least = wanted, random.Random(seed), deepest, least

    def propose(self, most):
        size = self.rng.randint(self.least, 9)
        if not most or not size:
            return self.none()
        tree = random_tree(self.rng, min(most, self.deepest), size)
        return Proposal(torch.tensor([self.guesses(tree, row) for row in self.run.rows]), tree)

    def guesses(self, tree, row):
        done = self.run.ids.shape[1] + len(self.run.stops.new[row])
        truth = self.wanted[row, done:].tolist() if row < len(self.wanted) else []
        path = self.rng.choice(tree.paths)
        right = dict(zip(path[: self.rng.randint(0, len(path))], truth, strict=False))
        tokens = []
        for place, parent in enumerate(tree.parents.tolist()):
            siblings = [n for n in range(len(tree.paths)) if tree.parents[n] == parent]
            taken = {right[n] for n in siblings if n in right} | {tokens[n] for n in siblings if n < place}
            tokens.append(right.get(place, self.rng.choice([token for token in range(WORDS) if token not in taken])))
        return tokens


class Trees(Drafting):
    """Trees of `Knowing`; not a method of a plan."""

    longest, widest = 4, 9

    def __init__(self, wanted, seed=0, deepest=4, least=0):
        self.make = functools.partial(Knowing, wanted=wanted, seed=seed, deepest=deepest, least=least)

    def proposer(self, run):
        return self.make(run)


def with_trees(model, batch, wanted, seed=0, deepest=4, least=0, streamer=None, **options):
    """What generation with trees gives, and its counters."""
    spec = Speculation(Trees(wanted, seed, deepest, least), Drafter(None, None))
    loop = functools.partial(spec, streamer=streamer)
    return model.generate(**batch, **options, custom_generate=loop), spec.counters


def compare(model, batch, seeds=3, **options):
    options = {"max_new_tokens": 24, "do_sample": False} | options
    wanted = model.generate(**batch, **options)
    accepted = 0
    for seed in range(seeds):
        got, counters = with_trees(model, batch, wanted, seed, **options)
        assert torch.equal(got, wanted), f"seed {seed}"
        accepted += counters.accepted
        assert sum(counters.accepted_at) == counters.accepted <= counters.drafted == sum(counters.drafted_at)
        assert counters.rounds == counters.target_passes
    assert accepted > 5 * seeds
    return wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("eos", [None, 20, [20, 9, 14]])
def test_padded_rows_end_where_they_end(kind, eos):
    compare(target(kind), ragged(5, 9), seeds=4, eos_token_id=eos, max_new_tokens=40)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_a_row_alone_and_rows_without_padding(kind):
    model = target(kind)
    ids = torch.randint(3, WORDS, (6, 5), generator=torch.Generator().manual_seed(0))
    for rows in (1, 6):
        compare(model, {"input_ids": ids[:rows], "attention_mask": torch.ones_like(ids[:rows])}, eos_token_id=None)


@pytest.mark.parametrize("new", [1, 2, 3, 6])
def test_short_outputs(new):
    model, batch = target(), ragged(3)
    options = {"max_new_tokens": new, "do_sample": False}
    wanted = model.generate(**batch, **options)
    for seed in range(5):
        assert torch.equal(with_trees(model, batch, wanted, seed, **options)[0], wanted)


def test_a_tree_in_the_first_pass_of_padded_rows():
    """Padding sees nothing there; what comes of that must not reach real tokens."""
    model, batch = target(), ragged(5, 9)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model.to(dtype)
        options = {"max_new_tokens": 20 if dtype == torch.float64 else 2, "do_sample": False, "eos_token_id": None}
        wanted = model.generate(**batch, **options)
        for seed in range(3):
            got, counters = with_trees(model, batch, wanted, seed, least=4, **options)
            assert torch.equal(got, wanted) and counters.accepted


def test_the_whole_context_of_learned_positions():
    compare(target("gpt2", n_positions=20), ragged(4, 8), max_new_tokens=None, max_length=20, seeds=6)


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 15},
        {"repetition_penalty": 1.3, "suppress_tokens": [5, 6, 7, 8], "encoder_repetition_penalty": 1.2},
        {"suppress_tokens": [5, 6, 7, 8]},
    ],
)
def test_processors_see_the_path_of_each_node(more):
    compare(target(), ragged(4), eos_token_id=20, **more)


def test_criteria_of_ones_own():
    class Even(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return (ids[:, -3:] % 2 == 0).all(1)

    for eos in (None, 20):
        compare(target(), ragged(4), stopping_criteria=StoppingCriteriaList([Even()]), eos_token_id=eos)


def test_a_stream_is_the_output_in_order():
    class Stream:
        parts, ended = [], False

        def put(self, value):
            self.parts.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    model, stream = target(), Stream()
    batch = {"input_ids": torch.arange(3, 10)[None]}
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(**batch, **options)
    got, counters = with_trees(model, batch, wanted, streamer=stream, **options)
    assert torch.equal(got, wanted) and stream.ended
    assert sum(stream.parts, [])[-(got.shape[1] - 7) :] == got[0, 7:].tolist()
    assert any(len(part) > 1 for part in stream.parts[1:])


def test_a_conversation_goes_on_with_its_cache():
    """The cache that a call with trees hands back holds the tokens of the output in their order."""
    model = target()
    ids = torch.arange(3, 10)[None]
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=15, **options)
    longer = torch.cat([first.sequences, torch.tensor([[4, 5]])], 1)
    second = model.generate(longer, max_new_tokens=15, **options).sequences
    for seed in range(4):
        one, _ = with_trees(model, {"input_ids": ids}, first.sequences, seed, max_new_tokens=15, **options)
        assert torch.equal(one.sequences, first.sequences)
        for part, plain in zip(one.past_key_values.layers, first.past_key_values.layers, strict=True):
            length = min(part.keys.shape[2], plain.keys.shape[2])
            assert length >= 20
            torch.testing.assert_close(part.keys[:, :, :length], plain.keys[:, :, :length])
            torch.testing.assert_close(part.values[:, :, :length], plain.values[:, :, :length])
        more = {"past_key_values": one.past_key_values, "max_new_tokens": 15}
        two, counters = with_trees(model, {"input_ids": longer}, second, seed, **more, **options)
        assert torch.equal(two.sequences, second) and counters.accepted


@pytest.mark.parametrize("plan", ["kv/cake(keep=0.5, window=8, decode=false)", "kv/cake(keep=1.0, window=8)"])
def test_a_cache_that_keeps_books_of_its_own(plan):
    """Its order stays, with holes where nodes were refused."""
    model = target()
    ids = torch.randint(3, WORDS, (3, 60), generator=torch.Generator().manual_seed(0))
    hasten.apply(model, plan)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compare(model, batch, eos_token_id=None, max_new_tokens=16)
    compare(model, {name: part[:1] for name, part in batch.items()}, eos_token_id=None, max_new_tokens=16, seeds=6)


def test_holes_are_gathered_away():
    model = target()
    ids = torch.randint(3, WORDS, (6, 5), generator=torch.Generator().manual_seed(0))
    gathered = []

    class Watched(Rows):
        def _gather(self, filled):
            gathered.append(self.slots - filled)
            super()._gather(filled)

    from hasten.decode import _loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loop, "Rows", Watched)
        compare(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, eos_token_id=None, max_new_tokens=70)
    assert len(gathered) > 3


def test_attention_without_masks_of_its_own_is_refused():
    model = target()
    model.set_attn_implementation("eager")
    batch = {"input_ids": torch.arange(3, 10)[None]}
    wanted = model.generate(**batch, max_new_tokens=9, do_sample=False)
    with pytest.raises(UsageError, match="attn_implementation='sdpa'"):
        with_trees(model, batch, wanted, least=2, max_new_tokens=9, do_sample=False)


def filled(rows, slots, size, ragged_before):
    """Rows whose slots hold their own number, `size` of them a tree's."""
    model = target()
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        numbers = torch.arange(slots, dtype=torch.float64) + 100 * torch.arange(rows)[:, None] + 1000 * layer
        entries = numbers[:, None, :, None].expand(rows, 2, slots, 8).contiguous()
        cache.update(entries, -entries, layer)
    made = Rows(model, cache, limit=slots + 9, width=size + 2)
    made.slots = slots
    if ragged_before:
        made.real = torch.ones(rows, slots, dtype=torch.bool)
        made.real[0, :2] = False
        made.count = made.real.sum(1)
    return made


@pytest.mark.parametrize("ragged_before", [False, True])
def test_keep_path_moves_each_rows_path_to_the_front(ragged_before):
    """Sources and destinations overlap in one storage: each entry is read before it is written over."""
    rng = random.Random(0)
    for _ in range(60):
        rows, size, deepest = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 9)
        tree, slots = random_tree(rng, deepest, size), size + 30
        paths = [rng.choice([(), *tree.paths]) for _ in range(rows)]
        told, depth = [len(path) for path in paths], max(tree.depth_list) + 1
        path_BD = torch.tensor([[*path, *[rng.randrange(size)] * (depth - len(path))] for path in paths])
        made = filled(rows, slots, size, ragged_before)
        before = [slots - size - (2 if ragged_before and row == 0 else 0) for row in range(rows)]
        made.keep_path(path_BD, torch.tensor(told), told, size)
        assert made.slots == made.cache.get_seq_length() <= slots - size + max(told)
        for row, path in enumerate(paths):
            real = made.real[row] if made.real is not None else torch.ones(made.slots, dtype=torch.bool)
            skipped = slots - size - before[row]
            wanted = [*range(skipped, slots - size), *[slots - size + node for node in path]]
            for layer, part in enumerate(made.cache.layers):
                found = (part.keys[row, :, real] - 100 * row - 1000 * layer)[:, :, 3]
                assert found.tolist() == [wanted, wanted]
                assert torch.equal(part.values[row, :, real], -part.keys[row, :, real])
            assert made.count is None or made.count[row] == len(wanted)


def naive_accept(choice, tokens, parents):
    """From the root on, the child that is what the target chose there."""
    found = []
    for row in range(len(tokens)):
        at, path, said = -1, [], [int(choice[row, 0])]
        while True:
            fitting = [n for n, p in enumerate(parents) if p == at and int(tokens[row, n]) == said[-1]]
            if not fitting:
                break
            at = fitting[0]
            path.append(at)
            said.append(int(choice[row, at + 1]))
        found.append((path, said))
    return found


def test_the_accepted_path_is_the_targets_choices():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(200):
        size = rng.randint(1, 12)
        tree = random_tree(rng, rng.randint(1, 5), size)
        tokens = torch.zeros(3, size, dtype=torch.long)
        for row in range(3):
            for parent in {*tree.parents.tolist()}:
                children = (tree.parents == parent).nonzero()[:, 0]
                tokens[row, children] = torch.randperm(max(3, len(children)), generator=generator)[: len(children)]
        choice = torch.randint(0, 3, (3, size + 1), generator=generator)
        said, accepted, path = accept_tree(choice, tokens, tree)
        assert said.shape == (3, max(tree.depth_list) + 2) and path.shape == (3, max(tree.depth_list) + 1)
        for row, (places, wanted) in enumerate(naive_accept(choice, tokens, tree.parents.tolist())):
            count = int(accepted[row])
            lengths.add(count)
            assert path[row, :count].tolist() == places and said[row, : count + 1].tolist() == wanted
    assert lengths >= {0, 1, 2, 3}


def test_a_tree_without_nodes_is_no_candidates():
    said, accepted, path = accept_tree(
        torch.tensor([[3], [4]]), torch.zeros(2, 0, dtype=torch.long), Tree(torch.zeros(0, dtype=torch.long))
    )
    assert said.tolist() == [[3], [4]] and accepted.tolist() == [0, 0] and path.shape == (2, 0)
