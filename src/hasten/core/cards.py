"""A card: literals at the head of a method's file, read without importing the file."""

import ast
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from hasten.core.errors import HastenError
from hasten.core.families import SEAMS

HEAD_BYTES = 4096
EFFECTS = ("time", "memory", "steps", "quality")
NEEDS = ("calibration", "draft", "teacher", "cuda", "steps", "losses", "proxy", "downstream")


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of a method before it is imported; every field is a literal.

    Attributes:
        title: the paper's exact title.
        paper: arXiv id or DOI.
        seams: the places of a program that the method takes over (`core.families.SEAMS`).
        effects: what it changes, any of time, memory, steps, quality.
        lossless: whether it promises the same output (or the same distribution of outputs).
        claim: the paper's headline figure with its setting.
        claimed: that figure as a speed ratio (1.0 is no change), or None where the paper gives none.
        identity: options under which nothing may change, or a sentence that says why there are none.
        needs: what must be handed over or be there (`NEEDS`).
        hosts: kinds of host it works on (decoder, diffusion_lm, vit, denoiser, module), empty for any in training.
        experiment: (workload, plan): the smallest honest experiment, about 3 minutes on two cores.
        tune: option to its (lowest, highest) value, both above 0: what `hasten tune` searches, evenly in the logarithm.
        when: when to use it; `when_not`: when not to.
    """

    title: str
    paper: str
    seams: tuple[str, ...]
    effects: tuple[str, ...]
    lossless: bool
    claim: str
    claimed: float | None
    identity: Mapping[str, Any] | str
    experiment: tuple[str, str]
    when: str
    when_not: str
    needs: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    tune: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("seam", self.seams, SEAMS),
            ("effect", self.effects, EFFECTS),
            ("need", self.needs, NEEDS),
        ):
            for word in given:
                assert word in known, f"unknown {kind} {word!r} on the card of {self.title!r}"
        for name, (low, high) in self.tune.items():
            assert 0 < low < high, f"the range of {name} on the card of {self.title!r} is not 0 < low < high"


def read_card(file: pathlib.Path) -> Card:
    """Reads the card from the first 4 KB of a method's file without importing it.

    Raises:
        HastenError: there is no complete `CARD = Card(...)` of literals in the head.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES).decode(errors="ignore")
    start = head.find("\nCARD = Card(")
    end = head.find("\n)", start)
    if start < 0 or end < 0:
        raise HastenError(f"{file} has no complete 'CARD = Card(...)' in its first {HEAD_BYTES} bytes")
    call = ast.parse(head[start + 1 : end + 2]).body[0].value  # type: ignore[attr-defined]
    return Card(**{word.arg: ast.literal_eval(word.value) for word in call.keywords})
