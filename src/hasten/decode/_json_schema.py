"""JSON that follows a schema, checked byte by byte as it is written.

What is understood, of the JSON schema standard: `type`, `enum`, `const`, `anyOf`, `$ref` into the same document,
`properties`, `required`, `additionalProperties`, `items`, `minItems`, `maxItems`, `pattern`, `minLength`, `maxLength`,
true and false; anything else that is no mere annotation is refused. A schema without `type` gets the types that its
keywords belong to.

Narrower than the standard, so that a text has to end: at most `spaces` whitespace bytes in a row and none around the
value; no key twice; keys that the schema does not name are written without escapes; integers without a fraction; values
of `enum` and `const` as `json.dumps` writes them; in a string with a pattern only the escapes of two characters.
"""

import json
import pathlib
from typing import Any

from hasten.core.errors import UsageError
from hasten.decode._constraints import Constraint
from hasten.decode._json_nodes import WAIT, AnyOf, Array, Literals, Node, Number, Object, String, move

KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength"),
    "number": (), "integer": (), "boolean": (), "null": (),
}  # fmt: skip
NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
         "$comment", "$defs", "definitions"}  # fmt: skip


class Schema(Constraint):
    """The JSON texts of a schema."""

    def __init__(self, schema: Any, spaces: int = 1) -> None:
        """schema: parsed JSON; spaces: most whitespace bytes in a row.

        Raises:
            UsageError: a schema that is wrong, or that uses what is not understood.
        """
        self.root = _Compiler(schema, spaces).root

    def start(self) -> Any:
        return frozenset([((WAIT, self.root, 0), ())]) if self.root.alive else None

    def step(self, state: Any, byte: int) -> Any:
        after = [one for stack in state for one in move(stack, byte)]
        return frozenset(after) if after else None

    def finished(self, state: Any) -> bool:
        return any(not stack or (not stack[1] and stack[0][0].ends(stack[0])) for stack in state)

    def closed(self, state: Any) -> bool:
        return state == {()}


def is_inline(text: str) -> bool:
    """Whether a text is a schema, not the name of a file."""
    return text.lstrip().startswith(("{", "true", "false"))


def read_schema(text: str) -> Any:
    """The schema in a text, or in the file that the text names.

    Raises:
        UsageError: no such file, or no JSON.
    """
    try:
        return json.loads(text if is_inline(text) else pathlib.Path(text).read_text())
    except OSError:
        raise UsageError(f"the schema {text[:80]!r} is neither JSON nor a file: give one of them") from None
    except ValueError as error:
        raise UsageError(f"the schema {text[:80]!r} is no JSON: {error}") from None


class _Compiler:
    """Makes the nodes of a schema and finds out which of them any value fits."""

    def __init__(self, schema: Any, spaces: int) -> None:
        self.document, self.spaces = schema, spaces
        self.nodes: list[Node] = []
        self.refs: dict[str, AnyOf] = {}
        self.anything: AnyOf | None = None
        self.root = self.build(schema, "the schema")
        changed = True
        while changed:
            changed = False
            for node in self.nodes:
                if not node.alive and node.lives():
                    node.alive = changed = True
        for node in self.nodes:
            self._circle(node, [])

    def _circle(self, node: Node, above: list[Node]) -> None:
        if node in above:
            raise UsageError("the schema has an anyOf or $ref that leads back to itself without a value between")
        for one in node.same():
            self._circle(one, [*above, node])

    def keep(self, node: Any) -> Any:
        self.nodes.append(node)
        return node

    def build(self, schema: Any, where: str) -> Node:
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            return self.keep(Literals([]))
        if not isinstance(schema, dict):
            raise UsageError(f"{where} must be an object, true or false, not {json.dumps(schema)[:60]}")
        given = {key: value for key, value in schema.items() if key not in NOTES}
        for key in ("$ref", "anyOf"):
            if key in given and len(given) > 1:
                raise UsageError(f"{where} has {key} beside {', '.join(set(given) - {key})}: put them into {key}")
        if "$ref" in given:
            return self._reference(given["$ref"], where)
        if "anyOf" in given:
            options = self._list(given["anyOf"], f"{where}, anyOf")
            return self.keep(AnyOf([self.build(one, f"{where}, anyOf {n}") for n, one in enumerate(options)]))
        return self._typed(given, where)

    def _typed(self, given: dict[str, Any], where: str) -> Node:
        kinds = given.pop("type", None)
        values = self._list(given.pop("enum"), f"{where}, enum") if "enum" in given else None
        if "const" in given:
            values = [given.pop("const")]
        of = {key: kind for kind, keys in KEYWORDS.items() for key in keys}
        unknown = [key for key in given if key not in of]
        if unknown:
            raise UsageError(
                f"{where} has {', '.join(unknown)}, which can't be checked here: leave it out; understood are type, "
                f"enum, const, anyOf, $ref, {', '.join(of)}"
            )
        names = [kinds] if isinstance(kinds, str) else kinds
        if names is None:
            names = sorted({of[key] for key in given}) if given else [] if values is not None else list(KEYWORDS)
        wrong = [one for one in self._list(names, f"{where}, type") if one not in KEYWORDS]
        lost = [key for key in given if of[key] not in names]
        if wrong or lost:
            says = f"the type {wrong[0]!r}" if wrong else f"{lost[0]}, which belongs to {of[lost[0]]}, not to its type"
            raise UsageError(f"{where} has {says}; types are {', '.join(KEYWORDS)}")
        if values is not None:
            if given:
                raise UsageError(f"{where} has enum or const beside {', '.join(given)}: leave that out")
            return self._values(values, kinds and names, where)
        made = [self._one(name, given, where) for name in names]
        return made[0] if len(made) == 1 else self.keep(AnyOf(made))

    def _one(self, name: str, given: dict[str, Any], where: str) -> Node:
        if name == "object":
            return self._object(given, where)
        if name == "array":
            items = self.build(given.get("items", True), f"{where}, items")
            least, most = self._bounds(given, "minItems", "maxItems", where)
            return self.keep(Array(items, least, most, self.spaces))
        if name == "string":
            least, most = self._bounds(given, "minLength", "maxLength", where)
            return self.keep(String(least, most, given.get("pattern")))
        if name in ("boolean", "null"):
            return self.keep(Literals([b"true", b"false"] if name == "boolean" else [b"null"]))
        return self.keep(Number(name == "integer"))

    def _object(self, given: dict[str, Any], where: str) -> Node:
        properties, needed = given.get("properties", {}), given.get("required", [])
        if not isinstance(properties, dict):
            raise UsageError(f"{where}, properties must be an object")
        extra = given.get("additionalProperties", True)
        more = None if extra is False else self.build(extra, f"{where}, additionalProperties")
        nodes = {name.encode(): self.build(one, f"{where}, {name}") for name, one in properties.items()}
        for name in self._list(needed, f"{where}, required"):
            nodes.setdefault(str(name).encode(), more or self.build(False, where))
        return self.keep(Object(nodes, frozenset(str(name).encode() for name in needed), more, self.spaces))

    def _values(self, values: list[Any], names: Any, where: str) -> Node:
        types = {"string": str, "number": int | float, "integer": int, "boolean": bool, "null": type(None)}
        texts = []
        for value in values:
            if isinstance(value, list | dict):
                raise UsageError(
                    f"{where} has an enum or const that is no plain value: give texts, numbers, true, null"
                )
            kinds = [kind for kind, one in types.items() if isinstance(value, one)]
            kinds = ["boolean"] if isinstance(value, bool) else kinds
            if not names or set(names) & set(kinds):
                texts.append(json.dumps(value, ensure_ascii=False).encode())
        return self.keep(Literals(texts))

    def _reference(self, pointer: Any, where: str) -> Node:
        if pointer not in self.refs:
            at = self.document
            if not isinstance(pointer, str) or not pointer.startswith("#"):
                raise UsageError(
                    f"{where} refers to {pointer!r}: only places of the same schema (#/...) can be reached"
                )
            for part in pointer[1:].split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(at, dict) or part not in at:
                    raise UsageError(f"{where} refers to {pointer}, which is not there")
                at = at[part]
            self.refs[pointer] = self.keep(AnyOf([]))
            self.refs[pointer].options = [self.build(at, pointer)]
        return self.refs[pointer]

    def _anything(self) -> Node:
        if self.anything is None:
            self.anything = self.keep(AnyOf([]))
            self.anything.options = [
                self.keep(Object({}, frozenset(), self.anything, self.spaces)),
                self.keep(Array(self.anything, 0, None, self.spaces)),
                self.keep(String(0, None, None)),
                self.keep(Number(False)),
                self.keep(Literals([b"true", b"false", b"null"])),
            ]
        return self.anything

    def _bounds(self, given: dict[str, Any], low: str, high: str, where: str) -> tuple[int, int | None]:
        for key in (low, high):
            if key in given and (type(given[key]) is not int or given[key] < 0):
                raise UsageError(f"{where}, {key} must be a whole number of at least 0, not {given[key]!r}")
        return given.get(low, 0), given.get(high)

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list, not {json.dumps(value)[:60]}")
        return value
