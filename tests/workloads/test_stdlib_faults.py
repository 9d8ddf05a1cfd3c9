"""stdlib-faults: faults are one edit of a function's text that still parses; quality sees where the two part."""

import ast

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import UsageError
from hasten.workloads import text
from hasten.workloads._pairs import IGNORED, Pair, Pairs
from hasten.workloads.stdlib_faults import fault, functions

SMALL = "stdlib-faults(texts=16, examples=8, length=128, rows=4)"
CODE = """
class A:
    @property
    def low(self, n, limit):
        if n <= limit and self.ready is True:  # a note
            return (n + 1) * 2
        return limit
"""


def test_functions_are_taken_out_and_dedented():
    (found,) = functions(CODE)
    assert found.startswith("def low(self, n, limit):\n    if n <= limit") and found.endswith("return limit\n")
    assert functions("def broken(:") == []


def test_a_fault_is_one_place_and_parses():
    (function,) = functions(CODE)
    rng = np.random.default_rng(0)
    found = {fault(function, rng) for _ in range(80)}
    assert len(found) > 8 and function not in found
    for wrong in found:
        ast.parse(wrong)
        start = next(at for at, pair in enumerate(zip(function, wrong, strict=False)) if pair[0] != pair[1])
        end = next(at for at in range(1, 99) if function[-at] != wrong[-at])
        assert len(function) - end - start < 12 and "# a note" in wrong
    for text_, other in (("n <= limit", "n < limit"), ("limit and self", "limit or self"), ("n + 1", "n + 2"),
                         ("n + 1", "n - 1"), ("is True", "is False"), ("if n <=", "if self <=")):  # fmt: skip
        assert function.replace(text_, other) in found, other
    assert fault("def f():\n    pass\n", rng) is None and fault("def f():\n    return 'é' < 1\n", rng) is None


def test_pairs_of_both_parts():
    workload = hasten.workload(SMALL)
    assert hasten.workload(str(workload)) == workload
    for held_out, count in ((False, 16), (True, 8)):
        pairs = workload.pairs(held_out, count)
        assert len(pairs) == count
        source = b"".join(bytes(one) for one in text.documents(held_out))
        for pair in pairs:
            assert pair.tokens != pair.variant and max(len(pair.tokens), len(pair.variant)) <= 128
            assert bytes(pair.tokens[1:]).split(b"\n")[0] in source
    batch = next(iter(workload.batches(0)))
    assert {key: tuple(part.shape) for key, part in batch.items()} == dict.fromkeys(
        ("input_ids", "variant_ids", "labels"), (4, 128)
    )
    assert bool((batch["labels"][:, 0] == IGNORED).all())


def test_quality_is_of_the_first_difference():
    class Sure(torch.nn.Module):
        """Says that the last byte comes again."""

        def forward(self, input_ids):
            scores = torch.nn.functional.one_hot(input_ids, 256).float() * 9
            return type("Output", (), {"logits": scores})()

    workload = hasten.workload(SMALL)
    object.__setattr__(
        workload, "pairs", lambda held_out, count: [Pair([0, 65, 65], [0, 65, 66]), Pair([0, 66], [0, 0])]
    )
    found = workload.evaluate(Sure())
    assert found[0] == pytest.approx(np.log1p(np.exp(-9)), rel=1e-3) and found[1] == pytest.approx(9, rel=1e-3)


def test_one_seed_is_one_run_and_padding_is_not_trained_on():
    workload = hasten.workload(SMALL)
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    assert torch.equal(*first)
    model = workload.build(0)
    short, long = (next(iter(torch.utils.data.DataLoader(Pairs([Pair([0, 97, 98], [0, 98])], n)))) for n in (4, 32))
    torch.testing.assert_close(workload.loss(model, short), workload.loss(model, long))
    torch.testing.assert_close(workload.losses(model, long)[0], workload.loss(model, long))
    with pytest.raises(UsageError, match="raise length, lower rows"):
        hasten.workload("stdlib-faults(texts=16, rows=64, length=128)").batches(0)
