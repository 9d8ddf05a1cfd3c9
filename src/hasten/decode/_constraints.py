"""What a text may be, checked byte by byte as it is written: the protocol, and regular expressions.

A constraint is a set of texts. Its states stand for beginnings of them: `start` is the state of the empty text, a state
plus bytes is a state or None, which says that no text of the set begins so. Every state can still become a whole text:
nothing that is accepted leads into a dead end of the constraint itself.

Regular expressions are Python's, read by its own parser and matched as a whole, without what is not regular: no
look-around, no back-references, no word boundaries; `^` and `$` only where they change nothing. Text is UTF-8; `\\d`,
`\\w` and `\\s` mean their ASCII characters.
"""

import re._parser as parser  # type: ignore[import-not-found]  # the only reader of Python's syntax that gives a tree
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from hasten.core.errors import UsageError

TOP = 0x10FFFF
MOST = 20_000  # places of an expression, with repetitions written out
WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
CLASSES = {"DIGIT": [(48, 57)], "WORD": WORD, "SPACE": [(9, 13), (32, 32)]}
SETS = tuple[tuple[int, int], ...]


class Constraint:
    """Base: a subclass gives `start`, `step`, `finished` and `closed`; states are hashable."""

    def start(self) -> Hashable | None:
        """The state of the empty text; None where there is no text at all that fits."""
        raise NotImplementedError

    def step(self, state: Any, byte: int) -> Any:
        """The state one byte later, or None."""
        raise NotImplementedError

    def advance(self, state: Any, data: bytes) -> Any:
        """The state some bytes later, or None."""
        for byte in data:
            state = self.step(state, byte)
            if state is None:
                return None
        return state

    def finished(self, state: Any) -> bool:
        """Whether the text may end here."""
        raise NotImplementedError

    def closed(self, state: Any) -> bool:
        """Whether it has to."""
        raise NotImplementedError

    def fits(self, text: bytes) -> bool:
        """Whether a whole text is one of the set."""
        state = self.start()
        state = None if state is None else self.advance(state, text)
        return state is not None and self.finished(state)


class Regex(Constraint):
    """A regular expression as an automaton over bytes, made deterministic as far as it is walked."""

    def __init__(self, pattern: str, search: bool = False) -> None:
        """search: the expression may match anywhere in the text (JSON schema's meaning), else it is the whole text.

        Raises:
            UsageError: a wrong expression, one that is not regular, or one that is too large.
        """
        self.pattern = pattern
        try:
            tree = parser.parse(pattern)
        except (re_error, OverflowError, RecursionError) as error:
            raise UsageError(f"the regular expression {pattern!r} can't be read: {error}") from None
        self.nowhere: list[list[int]] = []  # of each place: where one gets without a byte
        self.edges: list[list[tuple[int, int, int]]] = []  # and with one: lowest and highest byte, and the place
        self.dot = [(0, TOP)] if tree.state.flags & parser.SRE_FLAG_DOTALL else [(0, 9), (11, TOP)]
        known = parser.SRE_FLAG_DOTALL | parser.SRE_FLAG_UNICODE | parser.SRE_FLAG_VERBOSE
        if tree.state.flags & ~known:
            self._refuse("flags other than (?s) and (?x)")
        begin, self.end = self._place(), self._place()
        for part in _alternatives(list(tree)):
            first = bool(part) and part[0][0] is parser.AT and part[0][1] in _BEGINS
            last = bool(part) and part[-1][0] is parser.AT and part[-1][1] in _ENDS
            inner = part[first : len(part) - last]
            here = begin if first or not search else self._any(begin)
            there = self._sequence(inner, here)
            self.nowhere[there if last or not search else self._any(there)].append(self.end)
        self._prune()
        self.names: dict[frozenset[int], int] = {}
        self.sets: list[frozenset[int]] = []
        self.moves: list[dict[int, int | None]] = []
        self.first = self._state([begin])

    def start(self) -> int | None:
        return self.first

    def step(self, state: int, byte: int) -> int | None:
        moves = self.moves[state]
        if byte not in moves:
            moves[byte] = self._state(
                to for place in self.sets[state] for low, high, to in self.edges[place] if low <= byte <= high
            )
        return moves[byte]

    def finished(self, state: int) -> bool:
        return self.end in self.sets[state]

    def closed(self, state: int) -> bool:
        return self.finished(state) and not any(self.edges[place] for place in self.sets[state])

    def walk(self, alphabet: Iterable[int], most: int = 2_000) -> None:
        """Makes all states that bytes of the alphabet lead to.

        Raises:
            UsageError: they are more than `most`.
        """
        alphabet = list(alphabet)
        done = 0
        while done < len(self.sets):
            if done > most:
                raise UsageError(f"the pattern {self.pattern!r} has too many states: make its repetitions shorter")
            for byte in alphabet:
                self.step(done, byte)
            done += 1

    # Building.

    def _place(self) -> int:
        if len(self.edges) > MOST:
            raise UsageError(f"the regular expression {self.pattern[:60]!r} is too large: make its repetitions shorter")
        self.nowhere.append([])
        self.edges.append([])
        return len(self.edges) - 1

    def _refuse(self, what: str) -> None:
        raise UsageError(f"the regular expression {self.pattern!r} has {what}, which can't be checked byte by byte")

    def _sequence(self, parts: Iterable[Any], here: int) -> int:
        for part in parts:
            here = self._part(part, here)
        return here

    def _part(self, part: Any, here: int) -> int:
        """Adds one part of the tree after a place; returns the place after it."""
        kind, content = part
        if kind is parser.LITERAL:
            return self._characters([(content, content)], here)
        if kind is parser.NOT_LITERAL:
            return self._characters(_inverse([(content, content)]), here)
        if kind is parser.ANY:
            return self._characters(self.dot, here)
        if kind is parser.IN:
            return self._characters(self._set(content), here)
        if kind is parser.BRANCH:
            there = self._place()
            for option in content[1]:
                self.nowhere[self._sequence(option, here)].append(there)
            return there
        if kind is parser.SUBPATTERN and not content[1] and not content[2]:
            return self._sequence(content[3], here)
        if kind in (parser.MAX_REPEAT, parser.MIN_REPEAT):
            least, most, inner = content
            return self._repeat(least, most, inner, here)
        self._refuse("an anchor inside" if kind is parser.AT else f"{str(kind).lower().replace('_', ' ')}")
        raise AssertionError

    def _repeat(self, least: int, most: Any, inner: Any, here: int) -> int:
        for _ in range(least):
            here = self._sequence(inner, here)
        there = self._place()
        self.nowhere[here].append(there)
        if most is parser.MAXREPEAT:
            back = self._place()
            self.nowhere[there].append(back)
            self.nowhere[self._sequence(inner, back)].append(there)
            return there
        for _ in range(int(most) - least):
            here = self._sequence(inner, here)
            self.nowhere[here].append(there)
        return there

    def _any(self, here: int) -> int:
        loop = self._place()
        self.nowhere[here].append(loop)
        self.nowhere[self._characters([(0, TOP)], loop)].append(loop)
        return loop

    def _set(self, content: Any) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        inverse = False
        for kind, value in content:
            if kind is parser.NEGATE:
                inverse = True
            elif kind is parser.LITERAL:
                found.append((value, value))
            elif kind is parser.RANGE:
                found.append(value)
            else:
                name = str(value).removeprefix("CATEGORY_")
                ranges = CLASSES[name.removeprefix("NOT_")]
                found += _inverse(ranges) if name.startswith("NOT_") else ranges
        return _inverse(found) if inverse else found

    def _characters(self, ranges: Iterable[tuple[int, int]], here: int) -> int:
        there = self._place()
        for sequence in utf8(ranges):
            at = here
            for low, high in sequence[:-1]:
                to = self._place()
                self.edges[at].append((low, high, to))
                at = to
            self.edges[at].append((*sequence[-1], there))
        return there

    def _prune(self) -> None:
        """Takes out the places from which there is no way to the end."""
        into: list[list[int]] = [[] for _ in self.edges]
        for place, (still, edges) in enumerate(zip(self.nowhere, self.edges, strict=True)):
            for to in (*still, *(edge[2] for edge in edges)):
                into[to].append(place)
        alive, open_ = {self.end}, [self.end]
        while open_:
            for place in into[open_.pop()]:
                if place not in alive:
                    alive.add(place)
                    open_.append(place)
        self.nowhere = [[to for to in still if to in alive] for still in self.nowhere]
        self.edges = [[edge for edge in edges if edge[2] in alive] for edges in self.edges]
        self.alive = alive

    def _state(self, places: Iterable[int]) -> int | None:
        """The number of the state that holds these places and all that can be had from them without a byte."""
        found, open_ = set(), list(places)
        while open_:
            place = open_.pop()
            if place not in found:
                found.add(place)
                open_ += self.nowhere[place]
        key = frozenset(place for place in found & self.alive if self.edges[place] or place == self.end)
        if not key:
            return None
        if key not in self.names:
            self.names[key] = len(self.sets)
            self.sets.append(key)
            self.moves.append({})
        return self.names[key]


re_error = parser.error
_BEGINS = (parser.AT_BEGINNING, parser.AT_BEGINNING_STRING)
_ENDS = (parser.AT_END, parser.AT_END_STRING)


def _alternatives(parts: list[Any]) -> list[list[Any]]:
    """The outermost alternatives, each a list of parts; anchors may stand at their ends."""
    if len(parts) == 1 and parts[0][0] is parser.BRANCH:
        return [list(option) for option in parts[0][1][1]]
    return [parts]


def _inverse(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """All other characters."""
    found, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return [*found, (at, TOP)] if at <= TOP else found


def utf8(ranges: Iterable[tuple[int, int]]) -> Iterator[SETS]:
    """Byte sequences of characters: each a range of bytes at every place, their products being the ranges given."""
    for low, high in ranges:
        for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, TOP)):
            if max(low, first) <= min(high, last):
                yield from _split(max(low, first), min(high, last))


def _split(low: int, high: int) -> Iterator[SETS]:
    one, other = chr(low).encode(), chr(high).encode()
    for place in range(1, len(one)):
        tail = (1 << 6 * place) - 1
        if low | tail == high | tail:
            continue
        if low & tail:
            yield from _split(low, low | tail)
            yield from _split((low | tail) + 1, high)
            return
        if high & tail != tail:
            yield from _split(low, (high & ~tail) - 1)
            yield from _split(high & ~tail, high)
            return
    yield tuple(zip(one, other, strict=True))
