"""Constraints: what Python's own matcher and json reader say of whole texts, and no dead end on the way to one."""

import itertools
import json
import random
import re

import pytest

from hasten.core.errors import UsageError
from hasten.decode._constraints import TOP, Regex, utf8
from hasten.decode._json_schema import Schema, read_schema

PATTERNS = [
    r"a(b|c)*d{2,3}", r"[^ab]x?|y+z", r"^(ab|ac)$|d", r"(a|b)*?c{0,2}", r"[é-ü]+\w", r"", r"\d{1,3}(\.\d+)?", r"(?s).b",
    r"[^\s\S]|a", r"^a|^b1", r"(?:a{2}){1,}", r"\D\S\W?",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_mean_what_they_mean_in_python(pattern):
    whole, part, theirs = Regex(pattern), Regex(pattern, search=True), re.compile(pattern, re.ASCII)
    for length in range(5):
        for letters in itertools.product("abcd.1é\n", repeat=length):
            text = "".join(letters)
            assert whole.fits(text.encode()) == bool(theirs.fullmatch(text))
            if not ("$" in pattern and text.endswith("\n")):  # Python's $ also fits before a last newline
                assert part.fits(text.encode()) == bool(theirs.search(text))


@pytest.mark.parametrize(("low", "high"), [(0, TOP), (0x70, 0x900), (0xFFF, 0x11FFF), (0xD000, 0xE001), (5, 5)])
def test_characters_as_bytes(low, high):
    sequences = list(utf8([(low, high)]))
    rng = random.Random(0)
    for character in [rng.randint(0, TOP) for _ in range(2000)] + [low, high, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF]:
        if not 0xD800 <= character <= 0xDFFF:
            data = chr(character).encode()
            fitting = [
                one for one in sequences
                if len(one) == len(data) and all(a <= x <= b for x, (a, b) in zip(data, one, strict=True))
            ]  # fmt: skip
            assert len(fitting) == (low <= character <= high)


def test_an_expression_that_nothing_fits_has_no_start():
    assert Regex(r"[^\s\S]").start() is None and Regex(r"a[^\s\S]|b").fits(b"b")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"a(?=b)", "assert"), (r"(a)\1", "groupref"), (r"a^b", "an anchor inside"), (r"(?i)a", "flags"),
        ("(", "can't be read"), (r"\bx", "an anchor inside"), (r"(a{900}){900}", "too large"), ("a++", "possessive"),
    ],
)  # fmt: skip
def test_expressions_that_are_refused(pattern, problem):
    with pytest.raises(UsageError, match=problem):
        Regex(pattern)


def test_the_end_is_known():
    regex = Regex(r"ab?")
    state = regex.advance(regex.start(), b"a")
    assert regex.finished(state) and not regex.closed(state)
    state = regex.advance(state, b"b")
    assert regex.finished(state) and regex.closed(state) and regex.advance(state, b"b") is None


PERSON = {
    "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}},
                       "additionalProperties": False}},
    "type": "object",
    "title": "a note that says nothing",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 5},
        "kind": {"enum": ["def", "class", 1, 12, None]},
        "tags": {"type": "array", "items": {"type": ["integer", "boolean"]}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[a-c]{2}-\\d+$", "maxLength": 6},
        "any": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "x", "maxLength": 3}, {"const": "off"}]},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMAS = [
    PERSON,
    {},
    {"type": "object", "properties": {"ä\n\"": {"type": "null"}, "b": {}}, "required": ["ä\n\""],
     "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "array", "items": {"type": "string", "pattern": "(ab)*"}, "minItems": 2},
    {"type": "string", "pattern": "^(aa)*$", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^é\"\\n", "minLength": 6},
    {"enum": ["a", "ab", "a\"b", True, 0.5]},
    {"type": "array", "items": False},
    {"minLength": 1, "items": {"type": "integer"}},
]  # fmt: skip


def valid(schema, value):
    """A validator of whole values, for what `Schema` understands."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return valid(PERSON["$defs"][schema["$ref"].rpartition("/")[2]], value)
    if "anyOf" in schema:
        return any(valid(one, value) for one in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    types = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean"}
    name = types.get(type(value), "null")
    wanted = schema.get("type", ["object", "array", "string", "number", "boolean", "null"])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if "minLength" in schema and "items" in schema:
        wanted = ["string", "array"]
    if name not in wanted and not (name == "integer" and "number" in wanted):
        return False
    if name == "string":
        longest = schema.get("maxLength", 10**9)
        return schema.get("minLength", 0) <= len(value) <= longest and bool(re.search(schema.get("pattern", ""), value))
    if name == "array":
        items = schema.get("items", True)
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        return fits and all(valid(items, one) for one in value)
    if name == "object":
        names, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        fits = all(one in value for one in schema.get("required", []))
        return fits and all(valid(names.get(key, more), one) for key, one in value.items())
    return True


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("spaces", [0, 2])
def test_every_walk_can_end_and_ends_in_a_valid_value(schema, spaces):
    """No state is a dead end; whatever is written, the json module reads it, and it is valid."""
    checker, rng, ended = Schema(schema, spaces), random.Random(1), set()
    likely = list(b'"{}[]:,\\ \nabcu019-.eDd8x') + [0xC3, 0xA9]
    for _ in range(25):
        state, text = checker.start(), b""
        while not checker.closed(state):
            options = [byte for byte in range(256) if checker.step(state, byte) is not None]
            assert options or checker.finished(state), text
            if checker.finished(state) and (not options or rng.random() < 0.3):
                break
            common = [byte for byte in options if byte in likely]
            if len(text) > 40:
                common = [byte for byte in options if byte in b"}]"] or [b for b in options if b == 34] or common
            byte = rng.choice(common or options)
            state, text = checker.step(state, byte), text + bytes([byte])
            if len(text) > 200:
                break
        else:
            assert not any(checker.step(state, byte) for byte in range(256))
        if checker.finished(state):
            ended.add(text)
            assert valid(schema, json.loads(text)), text
            assert checker.fits(text) and not text[:1].isspace()
    single = schema.get("items") is False or schema.get("pattern") == "^(aa)*$"
    assert len(ended) >= (1 if single else 3)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (PERSON, ['{"name": "ab", "kind": 12}', '{"kind":1,"name":"a\\u00e9\\ud83d\\ude00"}',
                  '{"name":"xx","kind":null,"tags":[1, true],"code":"ab-12","any":-1.5e+3,"tree":{"left":{}}}'],
         ['{"name": "a", "kind": 1}', '{"name": "abcdef", "kind": 1}', '{"name": "ab"}', '{"name":"ab","kind":2}',
          '{"name":"ab","kind":1,"x":1}', '{"name":"ab","name":"ab","kind":1}', '{"name":"ab","kind":1,}',
          '{"name":"ab","kind":1,"tags":[]}', '{"name":"ab","kind":1,"tags":[1,2,3,4]}', ' {"name":"ab","kind":1}',
          '{"name":"ab","kind":1,"code":"ab-1234"}', '{"name":"\\udc00x","kind":1}', '{"name":"ab","kind":1} ']),
        ({}, ['{"a": [1, {"b": null}], "": "\\u00E9"}', "-0.5E2", "0", '"ü"', "[]", "true"],
         ["01", "1.", "-", "[1,]", "{,}", '"\n"', "tru", '"\\ud800"', '{"a":1,"a":2}', "nul", "+1", ".5", '"\\x"']),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, ['{"ab": 1, "a": null}', '{"b": 2}'],
         ['{"a": 1}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "required": ["n"]}, ['{"a":1,"n": 2}'],
         ["{}", '{"a":1}', '{"n":"x"}']),
        ({"type": "integer"}, ["0", "-12"], ["1.0", "1e3", "00"]),
    ],
)  # fmt: skip
def test_texts_by_hand(schema, good, bad):
    checker = Schema(schema)
    assert [text for text in good if not checker.fits(text.encode())] == []
    assert [text for text in bad if checker.fits(text.encode())] == []


def test_bytes_that_are_no_text_are_refused():
    checker = Schema({"type": "string"})
    for data in (b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xc3"', b'"\xf5\x80\x80\x80"'):
        assert not checker.fits(data)
    assert checker.fits('"é€😀"'.encode())


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^(aa)*$", "minLength": 3, "maxLength": 3},
        {"type": "array", "minItems": 1, "items": {"anyOf": [False]}},
        {"$defs": {"a": {"type": "object", "required": ["b"], "properties": {"b": {"$ref": "#/$defs/a"}}}},
         "$ref": "#/$defs/a"},
    ],
)  # fmt: skip
def test_schemas_that_nothing_fits_have_no_start(schema):
    assert Schema(schema).start() is None


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "number", "minimum": 3}, "minimum, which can't be checked"),
        ({"type": "object", "properties": {"a": {"oneOf": []}}}, "the schema, a has oneOf"),
        ({"type": "text"}, "the type 'text'"),
        ({"type": "string", "minItems": 1}, "minItems, which belongs to array"),
        ({"$ref": "other.json"}, "only places of the same schema"),
        ({"$ref": "#/$defs/gone"}, "which is not there"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "leads back to itself"),
        ({"anyOf": [], "type": "null"}, "anyOf beside type"),
        ({"type": "string", "maxLength": -1}, "maxLength must be a whole number"),
        ({"const": {"a": 1}}, "no plain value"),
        ({"type": "string", "pattern": "(a)\\1"}, "groupref"),
        ([], "must be an object"),
    ],
)
def test_schemas_that_are_refused(schema, problem):
    with pytest.raises(UsageError, match=problem):
        Schema(schema)


def test_schemas_come_from_texts_and_files(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "null"}')
    assert read_schema(str(file)) == read_schema(' {"type": "null"}') == {"type": "null"}
    for text, problem in (("gone.json", "neither JSON nor a file"), ("{", "no JSON")):
        with pytest.raises(UsageError, match=problem):
            read_schema(text)
