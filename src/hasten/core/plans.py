"""Plans: an ordered, checked list of methods, from text, from YAML, and back.

The grammar:

    plan    = "baseline" | method {"+" method}
    method  = name ["(" [option {"," option}] ")"]
    option  = name "=" (number | true | false | none | 'text' | word | "[" values "]" | method)
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hasten.core import names
from hasten.core.errors import PlanError, UsageError
from hasten.core.families import ORDER
from hasten.core.options import Method

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w./]))"
    r"|(?P<word>[A-Za-z_][\w\-./]*)"
    r"|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<mark>[+()=,\[\]]))"
)
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
_ESCAPES = {"n": "\n", "t": "\t"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A name and its options as written, before they are looked up."""

    name: str
    options: dict[str, Any]

    def build(self) -> Method:
        return names.load(self.name).from_options(self.options)


class _Reader:
    """A recursive-descent reader of the grammar above."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place = text, [], 0
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if not match:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise self.error(f"unexpected {text[at]!r}", at)
            kind = match.lastgroup or ""
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            at = match.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, what: str, at: int | None = None) -> PlanError:
        at = self.tokens[self.place][2] if at is None else at
        return PlanError(
            [
                f"{what} at character {at + 1} of {self.text!r}; "
                "a plan is written like 'family/method(option=value) + family/method'"
            ]
        )

    def take(self, kind: str, value: str | None = None) -> str | None:
        found_kind, found, _ = self.tokens[self.place]
        if found_kind == kind and (value is None or found == value):
            self.place += 1
            return found
        return None

    def need(self, kind: str, value: str | None, what: str) -> str:
        found = self.take(kind, value)
        if found is None:
            got = self.tokens[self.place][1]
            raise self.error(f"expected {what}, found {got!r}" if got else f"expected {what}")
        return found

    def plan(self) -> list[Spec]:
        specs = [self.method()]
        while self.take("mark", "+"):
            specs.append(self.method())
        self.need("end", None, "'+' or the end")
        return specs

    def method(self) -> Spec:
        name = self.need("word", None, "a method's name")
        return Spec(name, self.arguments() if self.take("mark", "(") else {})

    def arguments(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.take("mark", ")"):
            name = self.need("word", None, "an option's name or ')'")
            if name in options:
                raise self.error(f"the option {name!r} is given twice")
            self.need("mark", "=", f"'=' after {name!r}")
            options[name] = self.value()
            if not self.take("mark", ","):
                self.need("mark", ")", "',' or ')'")
                break
        return options

    def value(self, depth: int = 0) -> Any:
        if depth > 20:
            raise self.error("lists are nested too deep")
        number = self.take("number")
        if number is not None:
            return int(number) if re.fullmatch(r"[-+]?\d{1,300}", number) else float(number)
        text = self.take("text")
        if text is not None:
            return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text[1:-1], flags=re.S)
        word = self.take("word")
        if word is not None:
            if self.take("mark", "("):
                return Spec(word, self.arguments())
            return _CONSTANTS.get(word.lower(), word)
        if self.take("mark", "["):
            values = []
            while not self.take("mark", "]"):
                values.append(self.value(depth + 1))
                if not self.take("mark", ","):
                    self.need("mark", "]", "',' or ']'")
                    break
            return values
        raise self.error("expected a value")


def read_arguments(text: str) -> dict[str, Any]:
    """The options in `name=value, ...` (without brackets), as workloads are given."""
    reader = _Reader(text + ")")
    options = reader.arguments()
    reader.need("end", None, "the end")
    return options


@dataclasses.dataclass(frozen=True)
class Plan:
    """An ordered list of methods that claim different seams; the empty plan is the baseline.

    Raises:
        PlanError: two methods claim one seam.
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.methods, key=lambda method: ORDER[method.family]))
        object.__setattr__(self, "methods", ordered)
        problems = list(self._conflicts())
        if problems:
            raise PlanError(problems, str(self))

    def _conflicts(self) -> Iterator[str]:
        holders: dict[str, Method] = {}
        for method in self.methods:
            for seam in method.card.seams:
                if seam in holders:
                    yield (
                        f"{holders[seam].name} and {method.name} both claim the seam {seam!r}: "
                        "a plan can hold only one of them, so leave one out"
                    )
                else:
                    holders[seam] = method

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """From text such as `prune/llm_drop(keep=0.75) + quant/gptq`; `baseline` and empty text give the empty plan.

        Raises:
            PlanError: every problem of the text at once.
        """
        if text.strip().lower() in ("", "baseline"):
            return cls()
        return cls.build(_Reader(text).plan())

    @classmethod
    def build(cls, specs: Iterable[Spec]) -> "Plan":
        methods, problems = [], []
        for spec in specs:
            try:
                methods.append(spec.build())
            except PlanError as error:
                problems += error.problems
            except UsageError as error:
                problems.append(str(error))
            except RecursionError:
                problems.append("the plan nests methods too deep")
        if problems:
            raise PlanError(problems)
        return cls(tuple(methods))

    @classmethod
    def of(cls, given: "Plan | Method | str | pathlib.Path | Iterable[Any]") -> "Plan":
        """From whatever a person hands over: a plan, a method, text, a YAML file's path, or a list of methods."""
        if isinstance(given, Plan):
            return given
        if isinstance(given, Method):
            return cls((given,))
        if isinstance(given, pathlib.Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml"))):
            path = pathlib.Path(given)
            try:
                return cls.from_yaml(path.read_text())
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the plan {path} can't be read: {error}") from None
        if isinstance(given, str):
            return cls.parse(given)
        return cls(tuple(method for one in given for method in cls.of(one).methods))

    @classmethod
    def from_yaml(cls, text: str) -> "Plan":
        """From YAML: a list (or a mapping with the key `plan`) of names and `name: {option: value}`.

        Raises:
            PlanError: no such list, or any problem of its methods.
        """
        import yaml

        try:
            tree = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise PlanError([f"the plan is no valid YAML: {' '.join(str(error).split())[:200]}"]) from None
        if isinstance(tree, dict) and set(tree) == {"plan"}:
            tree = tree["plan"]
        if isinstance(tree, str):
            return cls.parse(tree)
        if tree is None:
            return cls()
        if not isinstance(tree, list):
            raise PlanError(["a plan in YAML is a list, each entry a method's name or 'name: {option: value}'"])
        return cls.build(_spec_from_yaml(entry) for entry in tree)

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal plan."""
        import yaml

        return yaml.safe_dump({"plan": [_to_yaml(method) for method in self.methods]}, sort_keys=False)

    def check(self, *, have: Iterable[str] = (), host: str | None = None) -> None:
        """Checks what the methods need against what is there, before anything is loaded or changed.

        Args:
            have: of `core.cards.NEEDS`, what was handed over or is there.
            host: the kind of the model's host, where one is known.

        Raises:
            PlanError: all that is missing.
        """
        problems = []
        for method in self.methods:
            for need in method.card.needs:
                if need not in set(have):
                    problems.append(f"{method.name} needs {_HOW_TO_GIVE[need]}")
            kinds = method.card.hosts
            if host and kinds and host not in kinds and not (host != "module" and "module" in kinds):
                problems.append(f"{method.name} works on {' and '.join(kinds)} models; this one is a {host}")
        if problems:
            raise PlanError(problems, str(self))

    def of_families(self, *families: str) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if method.family in families)

    def __str__(self) -> str:
        return " + ".join(str(method) for method in self.methods) or "baseline"

    def __len__(self) -> int:
        return len(self.methods)


_HOW_TO_GIVE = {
    "calibration": "calibration data: pass calibration=[...] (model inputs or texts)",
    "draft": "a draft model: pass draft=MODEL",
    "teacher": "a teacher model: pass teacher=MODEL",
    "cuda": "an NVIDIA GPU, and this machine shows none",
    "steps": "the number of training steps: pass steps=N",
    "losses": "the loss of each example: pass losses=FUNCTION, (model, batch) -> [batch]",
    "proxy": "a small model to train for the selection: pass proxy=MODEL",
    "downstream": "data of the task that comes after: pass downstream=BATCHES",
}


def _spec_from_yaml(entry: Any) -> Spec:
    if isinstance(entry, str):
        specs = _Reader(entry).plan()
        if len(specs) == 1:
            return specs[0]
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(name, str) and (options is None or isinstance(options, dict)):
            return Spec(name, {str(k): _value_from_yaml(v) for k, v in (options or {}).items()})
    raise PlanError([f"{str(entry)[:80]!r} is no entry of a plan: write a method's name or 'name: {{option: value}}'"])


def _value_from_yaml(value: Any) -> Any:
    if isinstance(value, dict):
        return _spec_from_yaml(value)
    return value


def _to_yaml(method: Method) -> Any:
    options = {}
    for name, value in method.changed().items():
        if isinstance(value, Method):
            value = _to_yaml(value)
        options[name] = list(value) if isinstance(value, tuple) else value
    return {method.name: options} if options else method.name
