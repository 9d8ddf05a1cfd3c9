"""The places of a JSON schema and how they read a value, byte by byte.

A state is a set of stacks, as `anyOf` may leave several ways to go on; a stack is (frame, stack below), empty when the
value is complete; a frame is (node, where in it ...).
"""

import json
from typing import Any

from hasten.decode._constraints import Regex

Stack = tuple[Any, ...]
BLANK = frozenset(b" \n\t\r")
SHORT = {ord(key): ord(value) for key, value in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True)}
HEX = frozenset(b"0123456789abcdefABCDEF")
WRITABLE = frozenset(byte for byte in range(256) if byte >= 32 or byte in SHORT.values())
FIRST = {  # of a UTF-8 character: bytes that follow, and the range of the next one
    **{byte: (1, 0x80, 0xBF) for byte in range(0xC2, 0xE0)},
    **{byte: (2, 0x80, 0xBF) for byte in range(0xE0, 0xF0)},
    **{byte: (3, 0x80, 0xBF) for byte in range(0xF0, 0xF5)},
    0xE0: (2, 0xA0, 0xBF), 0xED: (2, 0x80, 0x9F), 0xF0: (3, 0x90, 0xBF), 0xF4: (3, 0x80, 0x8F),
}  # fmt: skip


def move(stack: Stack, byte: int) -> list[Stack]:
    """The stacks after one more byte."""
    return stack[0][0].step(stack[0], stack[1], byte) if stack else []


class Node:
    """One place of the schema. `alive`: some value fits; found out by `_Compiler`."""

    alive = False

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        """The stacks after a value's first byte."""
        raise NotImplementedError

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        """The stacks after a further byte of it."""
        raise NotImplementedError

    def ends(self, frame: Any) -> bool:
        """Whether the value may be over without a byte that says so: numbers."""
        return False

    def lives(self) -> bool:
        """Whether some value fits, as far as is known of the parts."""
        return True

    def same(self) -> list["Node"]:
        """The nodes whose values are this one's."""
        return []


class Wait(Node):
    """Frame (self, node, whitespace left): before a value."""

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        if byte in BLANK:
            return [((self, frame[1], frame[2] - 1), rest)] if frame[2] else []
        return frame[1].open(byte, rest)


WAIT = Wait()


class Literals(Node):
    """One of several texts; frame (self, what is left of those that still fit)."""

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = tuple(texts)

    def lives(self) -> bool:
        return bool(self.texts)

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return self.step((self, self.texts), rest, byte)

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        left = tuple(text[1:] for text in frame[1] if text[0] == byte)
        more = tuple(text for text in left if text)
        return [rest] * (len(more) < len(left)) + [((self, more), rest)] * bool(more)


class Number(Node):
    """Frame (self, phase): after a sign, 0, digits, point, fraction, e, its sign, exponent."""

    AFTER = {"-": "0d", "0": ".e", "d": "d.e", ".": "f", "f": "fe", "e": "sx", "s": "x", "x": "x"}

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return self.step((self, "start"), rest, byte)

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        phase = frame[1]
        after = "-0d" if phase == "start" else self.AFTER[phase]
        if byte == 45:
            to = "-" if phase == "start" else "s"
        elif 48 <= byte <= 57:
            to = next((one for one in after if one in "dfx"), "?")
            to = "0" if byte == 48 and "0" in after else to
        else:
            to = {46: ".", 43: "s", 69: "e", 101: "e"}.get(byte, "?")
        if to in after and not (self.whole and to in ".e"):
            return [((self, to), rest)]
        return move(rest, byte) if self.ends(frame) else []

    def ends(self, frame: Any) -> bool:
        return frame[1] in ("0", "d", "f", "x")


class String(Node):
    """Frame (self, characters so far, the pattern's state, what the next bytes have to be or None)."""

    def __init__(self, least: int, most: int | None, pattern: str | None) -> None:
        self.least, self.most, self.regex = least, most, None
        if pattern is not None:
            self.regex = Regex(pattern, search=True)
            self.regex.walk(WRITABLE)
            self.lengths = self._lengths(self.regex)

    def lives(self) -> bool:
        if self.regex is not None:
            return self.regex.start() is not None and self._can(self.regex.start(), 0)
        return self.most is None or self.least <= self.most

    def _lengths(self, regex: Regex) -> list[int]:
        """Of each state of the pattern, how many characters may follow in all, as the bits of a number."""
        cap = (1 << (self.most or self.least + len(regex.sets)) + 1) - 1
        found = [int(regex.finished(state)) for state in range(len(regex.sets))]
        after = [
            {(to, byte & 0xC0 != 0x80) for byte, to in moves.items() if to is not None and byte in WRITABLE}
            for moves in regex.moves
        ]
        changed = True
        while changed:
            changed = False
            for state in reversed(range(len(found))):
                bits = found[state]
                for to, starts in after[state]:
                    bits |= found[to] << starts & cap
                changed, found[state] = changed or bits != found[state], bits
        return found

    def _can(self, state: Any, count: int) -> bool:
        """Whether the string can come to an end after `count` characters."""
        if self.most is not None and count > self.most:
            return False
        if self.regex is None:
            return True
        bits = self.lengths[state] >> max(0, self.least - count)
        least = max(count, self.least)
        return bool(bits if self.most is None else bits & ((1 << max(0, self.most - least + 1)) - 1))

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return [((self, 0, self.regex and self.regex.start(), None), rest)] if byte == 34 else []

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        _, count, state, need = frame
        if need is not None:
            return self._needed(frame, rest, byte)
        if byte == 34:
            done = count >= self.least and (self.regex is None or self.regex.finished(state))
            return [rest] if done else []
        if byte == 92:
            if self.regex is not None:
                able = any(self._character(frame, rest, one, None) for one in SHORT.values())
            else:
                able = self._can(None, self._more(count))
            return [((self, count, state, "\\"), rest)] if able else []
        if byte < 32 or (byte >= 128 and byte not in FIRST):
            return []
        return self._character(frame, rest, byte, FIRST.get(byte))

    def _more(self, count: int) -> int:
        return min(count + 1, self.least) if self.most is None else count + 1

    def _character(self, frame: Any, rest: Stack, byte: int, need: Any) -> list[Stack]:
        """A character's first byte, as the pattern sees it."""
        count, state = self._more(frame[1]), frame[2]
        if self.regex is not None:
            state = self.regex.step(state, byte)
            if state is None:
                return []
        return [((self, count, state, need), rest)] if self._can(state, count) else []

    def _needed(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        _, count, state, need = frame
        if isinstance(need, tuple):  # inside a character: bytes that follow, and the next one's range
            left, low, high = need
            if not low <= byte <= high:
                return []
            if self.regex is not None:
                state = self.regex.step(state, byte)
                if state is None or not self._can(state, count):
                    return []
            return [((self, count, state, (left - 1, 0x80, 0xBF) if left > 1 else None), rest)]
        if need == "\\":
            if byte in SHORT:
                return self._character(frame, rest, SHORT[byte], None)
            if byte == 117 and self.regex is None:
                return [((self, self._more(count), state, "u"), rest)]
            return []
        return [((self, count, state, to or None), rest) for to in _escaped(need, byte)]


def _escaped(need: str, byte: int) -> list[str]:
    """How u and its digits go on, "" at the end. After a high surrogate (L, then M) a low one comes: l and digits."""
    kind, digits = need[0], need[1:] + chr(byte).upper()
    if kind in "LM":
        return ["M" if kind == "L" else "l"] * (byte == (92 if kind == "L" else 117))
    if byte not in HEX:
        return []
    first, last = int(digits.ljust(4, "0"), 16), int(digits.ljust(4, "F"), 16)
    inside, outside = first <= 0xDFFF and last >= 0xDC00, first < 0xDC00 or last > 0xDFFF
    fits = inside if kind == "l" else outside
    if not fits or len(digits) < 4:
        return [kind + digits] * fits
    return ["L"] if kind == "u" and 0xD800 <= first <= 0xDBFF else [""]


class Array(Node):
    """Frame (self, first or next, items so far, whitespace left)."""

    def __init__(self, items: Node, least: int, most: int | None, spaces: int) -> None:
        self.items, self.least, self.most, self.spaces = items, least, most, spaces

    def lives(self) -> bool:
        return (self.most is None or self.least <= self.most) and (self.least == 0 or self.items.alive)

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return [((self, "first", 0, self.spaces), rest)] if byte == 91 else []

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        _, phase, count, left = frame
        if byte in BLANK:
            return [((self, phase, count, left - 1), rest)] if left else []
        if byte == 93:
            return [rest] if count >= self.least else []
        if not self.items.alive or (self.most is not None and count >= self.most):
            return []
        more = min(count + 1, self.least) if self.most is None else count + 1
        after = ((self, "next", more, self.spaces), rest)
        if phase == "first":
            return self.items.open(byte, after)
        return [((WAIT, self.items, self.spaces), after)] if byte == 44 else []


class Object(Node):
    """Frame (self, first, key or next, keys so far, whitespace left), (self, "colon", keys, left, the value's node),
    (self, "name", keys, rests of names that still fit) or (self, "extra", keys, its text, what the next bytes are)."""

    def __init__(self, names: dict[bytes, Node], needed: frozenset[bytes], extra: Node | None, spaces: int) -> None:
        self.names, self.needed, self.extra, self.spaces = names, needed, extra, spaces
        self.texts = {name: json.dumps(name.decode(), ensure_ascii=False).encode()[1:] for name in names}

    def lives(self) -> bool:
        return all(self.names[name].alive for name in self.needed)

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return [((self, "first", frozenset(), self.spaces), rest)] if byte == 123 else []

    def step(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        phase, seen = frame[1], frame[2]
        if phase == "name":
            left = [(text[1:], name) for text, name in frame[3] if text[0] == byte]
            done = [self._colon(seen | {name}, self.names[name], rest) for text, name in left if not text]
            more = tuple(one for one in left if one[0])
            return done + [((self, "name", seen, more), rest)] * bool(more)
        if phase == "extra":
            return self._extra(frame, rest, byte)
        if byte in BLANK:
            return [((self, phase, seen, frame[3] - 1, *frame[4:]), rest)] if frame[3] else []
        if phase == "colon":
            after = ((self, "next", seen, self.spaces), rest)
            return [((WAIT, frame[4], self.spaces), after)] if byte == 58 else []
        if byte == 125:
            return [rest] if phase != "key" and self.needed <= seen else []
        if phase == "next":
            return [((self, "key", seen, self.spaces), rest)] if byte == 44 and self._keys(seen, rest) else []
        return self._keys(seen, rest) if byte == 34 else []

    def _keys(self, seen: frozenset[bytes], rest: Stack) -> list[Stack]:
        left = tuple((self.texts[name], name) for name, node in self.names.items() if name not in seen and node.alive)
        stacks: list[Stack] = [((self, "name", seen, left), rest)] * bool(left)
        if self.extra is not None and self.extra.alive:
            stacks.append(((self, "extra", seen, b"", None), rest))
        return stacks

    def _extra(self, frame: Any, rest: Stack, byte: int) -> list[Stack]:
        _, _, seen, text, need = frame
        if need is not None:
            left, low, high = need
            if not low <= byte <= high:
                return []
            need = (left - 1, 0x80, 0xBF) if left > 1 else None
        elif byte == 34:
            assert self.extra is not None
            return [] if text in self.names or text in seen else [self._colon(seen | {text}, self.extra, rest)]
        elif byte < 32 or byte == 92 or (byte >= 128 and byte not in FIRST):
            return []
        else:
            need = FIRST.get(byte)
        return [((self, "extra", seen, text + bytes([byte]), need), rest)]

    def _colon(self, seen: frozenset[bytes], node: Node, rest: Stack) -> Stack:
        return ((self, "colon", seen, self.spaces, node), rest)


class AnyOf(Node):
    """One of several; `$ref` is one of one."""

    def __init__(self, options: list[Node]) -> None:
        self.options = options

    def lives(self) -> bool:
        return any(one.alive for one in self.options)

    def same(self) -> list[Node]:
        return self.options

    def open(self, byte: int, rest: Stack) -> list[Stack]:
        return [stack for one in self.options if one.alive for stack in one.open(byte, rest)]
