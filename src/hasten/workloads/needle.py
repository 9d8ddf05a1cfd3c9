"""Needles in a haystack of bytes: lines that state a code, planted in a text, and the question that asks for one.

A needle is the line `# code vetiqo=483920`: a key of six letters, a code of six digits. The question is the same line
up to `=`; the answer is the code. A text holds several needles, so that the key has to be matched; a code that is no
longer in the cache can only be guessed, each digit with a chance of 0.1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hasten.core.errors import UsageError

KEY = 6  # letters
DIGITS = 6
OPENING = b"# code "
NEAR = 120  # bytes in which a line break is looked for
LINE = len(OPENING) + KEY + 1 + DIGITS + 1  # bytes, with the newline
_CONSONANTS, _VOWELS = b"bcdfghjklmnpqrstvwxz", b"aeiou"


@dataclasses.dataclass(frozen=True)
class Needle:
    key: bytes
    code: bytes

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Needle":
        letters = [(_CONSONANTS, _VOWELS)[place % 2] for place in range(KEY)]
        key = bytes(letter[rng.integers(len(letter))] for letter in letters)
        return cls(key, b"%0*d" % (DIGITS, rng.integers(10**DIGITS)))

    @property
    def question(self) -> bytes:
        return OPENING + self.key + b"="

    @property
    def line(self) -> bytes:
        return self.question + self.code + b"\n"


Encode = Callable[[bytes], np.ndarray]  # text to token ids


def as_bytes(content: bytes) -> np.ndarray:
    """One token a byte, the `Encode` of models without a tokenizer."""
    return np.frombuffer(content, np.uint8)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a prompt, as token ids int64 [tokens]: the haystack, the question after it, the true answer."""

    haystack: np.ndarray
    question: np.ndarray
    answer: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        return np.concatenate([self.haystack, self.question])


def plant(
    text: np.ndarray, lines: list[tuple[int, np.ndarray]], newline: int | None = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Puts each (place, line) into a text at the line break that follows the place, or there if none is near.

    Args:
        text: token ids [tokens]; places count them, in rising order.
        newline: the token that ends a line; None plants at the places themselves.

    Returns:
        the longer text [tokens + lines], and where each line begins in it, int64 [lines].
    """
    pieces, starts, taken, length = [], [], 0, 0
    for place, line in lines:
        place = max(place, taken)
        near = text[place : place + NEAR]
        breaks = np.flatnonzero(near == newline) if newline is not None else near[:0]
        cut = place + int(breaks[0]) + 1 if len(breaks) else place
        pieces += [text[taken:cut], line]
        length += cut - taken
        starts.append(length)
        taken, length = cut, length + len(line)
    return np.concatenate([*pieces, text[taken:]]), np.array(starts, np.int64)


def training_row(
    stream: np.ndarray, length: int, pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A window of the stream in which `pairs` needles stand twice, at distances spread evenly over their logarithm.

    Returns:
        uint8 [length], and True [length] where the second line of a pair repeats the code.
    """
    events = []
    room = length - 2 * pairs * LINE
    for _ in range(pairs):
        needle = Needle.draw(rng)
        distance = int(np.exp(rng.uniform(np.log(32), np.log(room - 32))))
        first = int(rng.integers(0, room - distance))
        events += [(first, needle.line, False), (first + distance, needle.line, True)]
    events.sort(key=lambda event: event[0])
    start = int(rng.integers(0, len(stream) - room))
    row, starts = plant(stream[start : start + room], [(place, as_bytes(line)) for place, line, _ in events])
    answers = np.zeros(length, bool)
    for begin, (_, _, second) in zip(starts, events, strict=True):
        if second:
            answers[begin + LINE - 1 - DIGITS : begin + LINE - 1] = True
    return row, answers


def drill_row(
    stream: np.ndarray, length: int, most: int, gap: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The lines of 1 to `most` needles, over and over in changing order, with up to `gap` bytes of text in between.

    Returns:
        what `training_row` returns.
    """
    needles = [Needle.draw(rng) for _ in range(rng.integers(1, most + 1))]
    pieces, answers, filled, shown = [], np.zeros(length + gap + LINE + 1, bool), 0, 0
    while filled < length:
        for which in rng.permutation(len(needles)):
            pieces.append(as_bytes(needles[which].line))
            end = filled + LINE - 1
            if shown >= len(needles) and end < len(answers):
                answers[end - DIGITS : end] = True
            shown, filled = shown + 1, filled + LINE
            if gap and (size := int(rng.integers(0, gap + 1))):
                start = int(rng.integers(0, len(stream) - size))
                pieces += [stream[start : start + size], as_bytes(b"\n")]
                filled += size + 1
    return np.concatenate(pieces)[:length], answers[:length]


def haystack(
    stream: np.ndarray, length: int, depths: list[float], rng: np.random.Generator, encode: Encode | None = None
) -> tuple[np.ndarray, list[Needle]]:
    """A window of the stream with one needle at each depth, and a line break at its end.

    Args:
        length: tokens of the result.
        depths: rising fractions of the length, 0 the beginning.
        encode: the model's tokenizer; None is one token a byte, with the needles between lines.

    Returns:
        token ids [length] and the needles, in the order of the depths.

    Raises:
        UsageError: the needles don't fit into the length, or the stream is too short.
    """
    needles = [Needle.draw(rng) for _ in depths]
    lines = [encode(b"\n" + needle.line) if encode else as_bytes(needle.line) for needle in needles]
    room = length - sum(map(len, lines))
    if room < length // 2:
        raise UsageError(f"{len(depths)} needles do not fit into {length} tokens: take a longer prompt or fewer depths")
    if len(stream) <= room:
        raise UsageError(f"the text has {len(stream)} tokens, and prompts of {length} need more: give a longer text")
    start = int(rng.integers(0, len(stream) - room))
    text = stream[start : start + room].copy()
    if encode is None:
        text[-1] = 10
    places = [(int(depth * room), line) for depth, line in zip(depths, lines, strict=True)]
    return plant(text, places, None if encode else 10)[0], needles


def questions(
    stream: np.ndarray, count: int, length: int, depths: int, seed: int, encode: Encode | None = None
) -> list[Asked]:
    """`count` questions about prompts of `length` tokens; each prompt holds `depths` needles and is asked for all.

    The needles stand in the middle of equal parts of the prompt; the questions go on from one prompt to the next, so
    that every depth is asked for equally often.
    """
    rng = np.random.default_rng(seed)
    found: list[Asked] = []
    lead, encode_all = (b"", as_bytes) if encode is None else (b"\n", encode)
    room = length - len(encode_all(lead + Needle(b"vetiqo", b"").question))
    while len(found) < count:
        text, needles = haystack(stream, room, [(i + 0.5) / depths for i in range(depths)], rng, encode)
        for one in needles:
            question, whole = encode_all(lead + one.question), encode_all(lead + one.question + one.code)
            most = min(len(question), len(whole) - 1)  # a token may span the end of the question
            same = next((at for at in range(most) if question[at] != whole[at]), most)
            found.append(Asked(*(part.astype(np.int64) for part in (text, whole[:same], whole[same:]))))
    return found[:count]


@torch.inference_mode()
def recall(handle: Any, asked: list[Asked], device: torch.device, blind: bool = False) -> np.ndarray:
    """The probability given to each right token of an answer, through the arm's own cache; their mean, [questions].

    It is what sampling would get right: 1 when every digit is known for sure, 0.1 when nothing is known.

    Args:
        blind: the haystack goes into the cache before the question is seen, so that a method that drops tokens
            can't know what will be asked.
    """

    def run(tokens: np.ndarray, keep: int) -> torch.Tensor:
        rows = torch.from_numpy(tokens)[None].to(device)
        logits = handle.model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return logits[0, -keep:]

    found = []
    for one in asked:
        cache = handle.host.new_cache()
        if blind:
            run(one.haystack, 1)
        logits = run(one.question if blind else one.prompt, 1)
        if len(one.answer) > 1:
            logits = torch.cat([logits, run(one.answer[:-1], len(one.answer) - 1)])
        chances = logits.float().softmax(-1).cpu()
        found.append(chances.gather(-1, torch.from_numpy(one.answer)[:, None]).mean().item())
    return np.array(found)
