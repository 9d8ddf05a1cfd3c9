"""stdlib-faults: functions of Python's standard library, each beside a variant with a fault made by its syntax tree.

The bundled model `draft` (2 layers, a token a byte) is fine-tuned on the functions; quality is how sure it is, on
held-out functions, of the right byte against the variant's where the two part. A fault is one of: a comparison or an
operator exchanged (`<` for `<=`, `and` for `or`), a whole number one too large, True for False, another of the
function's names. The rest of the text stays as it is written. Before it is tuned the model has 0.72 nats, where 0.69
is guessing; of rates from 0.0005 to 0.002, 0.001 was the steadiest of those that came below 0.6 in 100 steps.
"""

import ast
import dataclasses
import functools
import textwrap

import numpy as np
from torch import nn

from hasten.core.options import option
from hasten.workloads import models, text, weights
from hasten.workloads._pairs import Pair, PairWorkload

FAULTS = 8  # variants of a held-out function at most
OTHER = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is not": "is", "is": "is not",
         "not in": "in", "in": "not in", "+": "-", "-": "+", "*": "+", "//": "*", "%": "*", "/": "*", "and": "or",
         "or": "and", "True": "False", "False": "True"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StdlibFaults(PairWorkload):
    length: int = option(128, "bytes of a function at most", least=16, most=1024)
    texts: int = option(800, "functions for training", least=16, most=100_000)
    steps: int = option(120, "steps of the baseline's schedule", least=10)
    examples: int = option(400, "held-out pairs at most that quality is measured on", least=8, most=65536)
    target: float = option(0.6, "held-out loss of telling right from wrong at which training stops", above=0)

    @classmethod
    def title(cls) -> str:
        return "stdlib-faults"

    def build(self, seed: int) -> nn.Module:
        """The trained model; the seed changes the order of the batches only."""
        return weights.load_weights(models.stdlib_llama("draft"), "draft").to(self.device()).train()

    def pairs(self, held_out: bool, count: int) -> list[Pair]:
        return list(_pairs(held_out, count, self.length))


@functools.lru_cache(maxsize=4)
def _pairs(held_out: bool, count: int, length: int) -> tuple[Pair, ...]:
    rng = np.random.default_rng(7 + held_out)
    documents = text.documents(held_out)
    found: list[Pair] = []
    for place in rng.permutation(len(documents)):
        source = bytes(documents[place][1:])
        if len(source) > 60_000:
            continue
        for function in functions(source.decode("utf-8", "replace")):
            if len(function) >= length:
                continue
            made = [fault(function, rng) for _ in range(FAULTS if held_out else 1)]
            for one in sorted({wrong for wrong in made if wrong is not None}):
                if len(one) < length:
                    found.append(Pair([text.DOCUMENT, *function.encode()], [text.DOCUMENT, *one.encode()]))
        if len(found) >= count:
            break
    return tuple(found[:count])


def functions(source: str) -> list[str]:
    """The source of each function and method, without decorators, indented as if at the top of a file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.splitlines(keepends=True)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])) for node in nodes]


def fault(function: str, rng: np.random.Generator) -> str | None:
    """The function with one fault; None where there is nothing to get wrong, or its text is not plain.

    Args:
        function: source of one function, as `functions` gives it.
    """
    if not function.isascii():
        return None
    try:
        tree = ast.parse(function)
    except SyntaxError:
        return None
    starts = np.cumsum([0, *map(len, function.splitlines(keepends=True))])
    edits = [one for node in ast.walk(tree) for one in _edits(node, function, starts)] + _renamed(tree, starts)
    if not edits:
        return None
    begin, end, new = edits[rng.integers(len(edits))]
    wrong = function[:begin] + new + function[end:]
    try:
        ast.parse(wrong)
    except SyntaxError:
        return None
    return wrong if wrong != function else None


def _span(node: ast.AST, starts: np.ndarray) -> tuple[int, int]:
    return int(starts[node.lineno - 1] + node.col_offset), int(starts[node.end_lineno - 1] + node.end_col_offset)  # type: ignore[attr-defined]


def _edits(node: ast.AST, function: str, starts: np.ndarray) -> list[tuple[int, int, str]]:
    """(begin, end, new text) of the faults that a node of the tree allows."""
    if isinstance(node, ast.Constant):
        begin, end = _span(node, starts)
        written = function[begin:end]
        if written in ("True", "False"):
            return [(begin, end, OTHER[written])]
        return [(begin, end, str(int(written) + 1))] if written.isdigit() and len(written) < 5 else []
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.BinOp):
        sides = [node.left, node.right]
    elif isinstance(node, ast.BoolOp):
        sides = list(node.values)
    else:
        return []
    found = []
    for left, right in zip(sides[:-1], sides[1:], strict=True):
        begin, end = _span(left, starts)[1], _span(right, starts)[0]
        between = function[begin:end]
        written = between.strip(" ()\n\\")
        if written in OTHER and "#" not in between:
            at = begin + between.index(written)
            found.append((at, at + len(written), OTHER[written]))
    return found


def _renamed(tree: ast.AST, starts: np.ndarray) -> list[tuple[int, int, str]]:
    """Each name that is read, as the next of the function's own names."""
    local = sorted(
        {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    )
    if len(local) < 2:
        return []
    return [
        (*_span(node, starts), local[(local.index(node.id) + 1) % len(local)])
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local
    ]


WORKLOAD = StdlibFaults
