"""Retrieval from a store: the common cases, the trie, one tree for several rows, stores on disk."""

import numpy as np
import pytest
import torch

import hasten
from conformance.decode import ragged, target
from hasten.core.errors import PlanError, UsageError
from hasten.decode.base import speculation
from hasten.decode.rest import Rest, Store, joined, rest, suffix_order

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
PLAN = "decode/rest(least=1, candidates=4, nodes=12)"


def words(rows=8, length=40, seed=3):
    return {"input_ids": torch.randint(0, 37, (rows, length), generator=torch.Generator().manual_seed(seed))}


def exact():
    return "decode/rest(least=1, candidates=2, nodes=3)", {"calibration": [words()]}


def subject():
    from conformance.decode import run

    context = {"calibration": [words(), ragged(3, 7, seed=5)]}
    return {"model": target, "options": {"least": 1, "candidates": 4, "nodes": 12}, "context": context, "run": run}


def text(size, kinds, seed, parted=True):
    made = np.random.default_rng(seed).integers(0, kinds, size).astype(np.int32)
    if parted:
        made[:: max(2, size // 5)] = -1
        made[-1:] = -1
    return made


def cases():
    for size, kinds, match, least, matches, candidates, nodes in (
        (400, 3, 16, 2, 5000, 10, 64),
        (300, 2, 4, 1, 7, 5, 9),  # more matches than are followed
        (61, 5, 3, 3, 50, 1, 4),
        (7, 40, 2, 2, 9, 3, 5),  # no match
        (2, 1, 1, 1, 1, 2, 3),
        (500, 1, 5, 2, 100, 3, 2),  # one long repetition
    ):
        store = text(size, kinds, seed=size)
        for end in (text(20, kinds, seed=1, parted=False), text(1, kinds, seed=2, parted=False)):
            yield {"args": (store, end.tolist(), match, least, matches, candidates, nodes)}
    yield {
        "args": (text(90, 3, 5, parted=False), [0, 1, 2, 0], 3, 1, 50, 4, 16)
    }  # the end of the store is a text's end
    yield {"args": (np.array([2**31 - 1, 5, 2**31 - 1, 6], np.int32), [2**31 - 1], 2, 1, 9, 2, 5)}  # large ids


@pytest.mark.parametrize("depth", [1, 2, 5, 26, 999])
def test_suffixes_are_sorted(depth):
    tokens = text(200, 3, seed=0)
    order = suffix_order(tokens, depth)
    ends = [tuple(tokens[i : i + depth].view(np.uint32).tolist()) for i in order]
    assert ends == sorted(ends) and sorted(order.tolist()) == list(range(200))


def test_nodes_are_a_tree_of_the_heaviest():
    store = text(3000, 4, seed=7)
    found = rest(store, [1, 2], 2, 2, 5000, 6, 40)
    paths = [path for path, _ in found]
    weights = [weight for _, weight in found]
    assert len(set(paths)) == 40 and weights == sorted(weights, reverse=True)
    assert all(path[:-1] in ((), *paths[:i]) for i, path in enumerate(paths))
    for path, weight in found:
        whole = [1, 2, *path]
        assert weight == sum(store[i : i + len(whole)].tolist() == whole for i in range(len(store)))


def test_nothing_is_copied_across_texts():
    store = np.array([1, 2, 3, -1, 9, 9, 1, 2, 4, -1], np.int32)
    assert rest(store, [1, 2], 2, 2, 10, 5, 10) == [((3,), 1), ((4,), 1)]
    assert rest(store, [3, 9], 2, 2, 10, 5, 10) == []
    assert rest(store, [4], 2, 1, 10, 5, 10) == []  # it ends a text: found, and nothing follows


def test_rows_share_one_tree_by_rank():
    left = [((5,), 6), ((5, 6), 4), ((8,), 2), ((5, 7), 2)]
    right = [((9,), 3), ((9, 1), 3), ((9, 1, 2), 2)]
    parents, tokens = joined([left, right, []], 4)
    assert parents == [-1, 0, 1, -1]  # two rows agree on the first two places; then 2/3 of a row, then 2/8 twice
    assert tokens == [[5, 6, 0, 8], [9, 1, 2, 0], [0, 0, 0, 0]]
    assert joined([left], 9) == ([-1, 0, -1, 0], [[5, 6, 8, 7]])
    assert joined([[], []], 9) == ([], [[], []])


def test_a_store_of_the_answer_takes_few_passes():
    """Every row's own continuation is in the store: what the tree holds is accepted to its full depth."""
    model = target()
    batch = ragged(4, 9)
    wanted = model.generate(**batch, **GREEDY)
    for rows in (1, 4):
        part = {name: value[:rows] for name, value in batch.items()}
        made = hasten.generate(model, part, "decode/rest(candidates=7, nodes=32)", calibration=[wanted], **GREEDY)
        assert torch.equal(made.tokens, wanted[:rows])
        assert made.counters.target_passes <= 6 and made.counters.draft_passes == 0  # 24 tokens, 8 a pass at best


def test_attention_without_a_tree_mask_gets_a_chain():
    model = target()
    model.set_attn_implementation("eager")
    batch = ragged(3, 9)
    wanted = model.generate(**batch, **GREEDY)
    made = hasten.generate(model, batch, PLAN, **exact()[1], **GREEDY)
    assert torch.equal(made.tokens, wanted) and made.counters.drafted > 0
    assert made.counters.drafted_at[0] >= made.counters.drafted_at[-1]


def test_files_as_stores(tmp_path):
    model = target(vocab_size=256)
    ids = torch.tensor([list(b"def f(x):")])
    wanted = model.generate(ids, **GREEDY)
    np.save(tmp_path / "rows.npy", wanted.numpy())
    (tmp_path / "text.bin").write_bytes(bytes(wanted[0].tolist()))
    counts = []
    for name in ("rows.npy", "text.bin"):
        made = hasten.generate(model, ids, [Rest(store=str(tmp_path / name))], **GREEDY)
        assert torch.equal(made.tokens, wanted)
        counts.append(made.counters.accepted)
    assert counts[0] == counts[1] >= 20


def test_stores_that_do_not_fit_are_refused(tmp_path):
    model = target()
    np.save(tmp_path / "real.npy", np.zeros(4))
    np.save(tmp_path / "large.npy", np.array([3, 37]))
    np.save(tmp_path / "below.npy", np.array([3, -1]))
    (tmp_path / "empty").write_bytes(b"")
    for name, problem in (
        ("real.npy", "float64.*give whole numbers"),
        ("large.npy", "holds the token 37, and the model has the tokens 0 to 36"),
        ("below.npy", "the model has the tokens"),
        ("empty", "holds no tokens"),
        ("nothing", "can't be read"),
    ):
        with pytest.raises(UsageError, match=problem):
            hasten.apply(model, [Rest(store=str(tmp_path / name))])
        assert not hasattr(model, "drafter")
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(model, "decode/rest")
    with pytest.raises(PlanError, match="least=5 is above match=4"):
        Rest(match=4, least=5)


def test_it_saves_with_its_store(tmp_path):
    fast = hasten.apply(target(), PLAN, **exact()[1])
    wanted = fast.generate(**ragged(3), **GREEDY)
    before = speculation(fast.host).counters
    loaded = hasten.load_pretrained(fast.save(tmp_path / "saved"))
    assert torch.equal(loaded.generate(**ragged(3), **GREEDY), wanted)
    after = speculation(loaded.host).counters
    assert (after.accepted, after.drafted) == (before.accepted, before.drafted) and after.drafted > 0
    assert isinstance(speculation(loaded.host).drafter.learnt, Store)
