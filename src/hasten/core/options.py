"""Options are frozen dataclasses whose fields say what they mean and which values they take.

For example:

    @dataclass(frozen=True)
    class LLMDrop(Method):
        keep: float = option(0.75, "fraction of attention sublayers that stay", above=0, most=1)
"""

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any

from hasten.core.errors import PlanError, UsageError, nearest


def option(
    default: Any,
    doc: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] | None = None,
) -> Any:
    """A field with its default, its meaning and its range.

    Args:
        least, most: inclusive bounds; `above`, `below`: exclusive ones. For a tuple they hold for each entry.
        choices: the allowed values.
    """
    limits = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"doc": doc, "choices": tuple(choices) if choices is not None else None, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of everything that is given by a name and options. Values are checked on construction, all at once.

    Raises:
        PlanError: one or more values have a wrong type or range.
    """

    def __post_init__(self) -> None:
        problems = []
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                converted = convert(value, hints[field.name])
                check_range(converted, field.metadata)
            except ValueError as problem:
                problems.append(f"{self.title()}: {field.name} {problem}")
                continue
            if converted is not value:
                object.__setattr__(self, field.name, converted)
        if not problems:
            problems = [f"{self.title()}: {problem}" for problem in self.problems()]
        if problems:
            raise PlanError(problems)

    def problems(self) -> list[str]:
        """Sentences about values that do not go together; a class with such rules overrides this."""
        return []

    @classmethod
    def title(cls) -> str:
        """The name that a person types, for messages."""
        return cls.__name__

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, which may be written in another form (a method as text)."""
        hints, found = typing.get_type_hints(type(self)), {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and value != convert(field.default, hints[field.name]):
                found[field.name] = value
        return found

    @classmethod
    def documented(cls) -> list[tuple[str, str, Any, str]]:
        """(name, type, default, meaning with its range) of every option."""
        hints = typing.get_type_hints(cls)
        return [
            (f.name, spell_type(hints[f.name]), f.default, f.metadata.get("doc", "") + spell_range(f.metadata))
            for f in dataclasses.fields(cls)
        ]

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> typing.Self:
        """From parsed options; unknown names are errors with the nearest known one.

        Raises:
            PlanError: unknown options, and wrong values of the known ones.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        problems = [
            f"{cls.title()} has no option {name!r}{nearest(name, known)}"
            + (f" it has: {', '.join(known)}" if known else " it has none")
            for name in given
            if name not in known
        ]
        try:
            built = cls(**{name: value for name, value in given.items() if name in known})
        except PlanError as more:
            raise PlanError(problems + more.problems) from None
        if problems:
            raise PlanError(problems)
        return built

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={spell(value)}" for name, value in self.changed().items())
        return self.title() + (f"({inner})" if inner else "")


@dataclasses.dataclass(frozen=True)
class Method(Options):
    """Base of all methods: fields are options, the module's path is the name, the module's CARD is its card."""

    @classmethod
    def title(cls) -> str:
        return cls.__module__.removeprefix("hasten.").replace(".", "/")

    @property
    def name(self) -> str:
        return self.title()

    @property
    def family(self) -> str:
        return self.name.split("/", 1)[0]

    @property
    def card(self) -> Any:
        return sys.modules[type(self).__module__].CARD  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return super().__str__()


def convert(value: Any, hint: Any) -> Any:
    """The value as the annotated type; only lossless conversions (an int for a float, a list for a tuple).

    Raises:
        ValueError: `must be ..., not ...`.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = typing.get_args(hint)
        if value is None and type(None) in inner:
            return None
        for one in inner:
            if one is type(None):
                continue
            try:
                return convert(value, one)
            except UsageError:
                raise
            except ValueError:
                continue
    elif typing.get_origin(hint) is tuple:
        one = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(convert(entry, one) for entry in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                raise ValueError(f"must be a finite number, not {spell(value)}")
            return number
    elif hint is Any:
        return value
    elif isinstance(hint, type) and issubclass(hint, Method):
        return method_from(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"must be {spell_type(hint)}, not {spell(value)}")


def method_from(value: Any) -> Method:
    """A method given as an object, as text, or as parsed (name, options)."""
    from hasten.core.plans import Plan, Spec  # a method as an option of another is a plan of one

    if isinstance(value, Method):
        return value
    if isinstance(value, Spec):
        return value.build()
    if isinstance(value, str):
        methods = Plan.parse(value).methods
        if len(methods) == 1:
            return methods[0]
    raise ValueError(f"must be one method, not {spell(value)}")


def check_range(value: Any, metadata: Any) -> None:
    """Raises ValueError when a number (each entry of a tuple) is out of the field's range or no allowed choice."""
    choices = metadata.get("choices")
    for one in value if isinstance(value, tuple) else (value,):
        if one is None:
            continue
        if choices is not None and one not in choices:
            words = [str(choice) for choice in choices]
            raise ValueError(f"must be one of {', '.join(words)}, not {spell(one)}{nearest(str(one), words)}")
        if isinstance(one, int | float) and not isinstance(one, bool):
            least, most, above, below = (metadata.get(k) for k in ("least", "most", "above", "below"))
            if (
                (least is not None and one < least)
                or (most is not None and one > most)
                or (above is not None and one <= above)
                or (below is not None and one >= below)
            ):
                raise ValueError(f"must be {spell_range(metadata).strip(' ()')}, not {spell(one)}")


def spell_range(metadata: Any) -> str:
    """` (above 0, at most 1)` for a field with bounds, else an empty string."""
    words = [
        f"{word} {metadata[key]}"
        for key, word in (("least", "at least"), ("above", "above"), ("most", "at most"), ("below", "below"))
        if metadata.get(key) is not None
    ]
    if metadata.get("choices"):
        words.append("one of " + ", ".join(str(choice) for choice in metadata["choices"]))
    return f" ({', '.join(words)})" if words else ""


def spell_type(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(spell_type(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list, each entry {spell_type(typing.get_args(hint)[0])}"
    if isinstance(hint, type) and issubclass(hint, Method):
        return "a method"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def spell(value: Any) -> str:
    """A value as a plan's text writes it; the parser reads it back unchanged."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w\-./]*", value) and value.lower() not in ("true", "false", "none", "null"):
            return value
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(spell(one) for one in value) + "]"
    return str(value)
