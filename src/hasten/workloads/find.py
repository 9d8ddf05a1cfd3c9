"""Workloads by name: bundled ones, `hf:NAME_OR_PATH(...)`, and a person's own `file.py:factory(...)`."""

import importlib
import importlib.util
import pathlib
import sys
from typing import Any

from hasten.core.errors import PlanError, UsageError, nearest
from hasten.core.plans import read_arguments
from hasten.workloads.base import Workload

_ELSEWHERE = {
    "stdlib-upscale": "hasten.workloads.upscale",
    "stdlib-recover": "hasten.workloads.recover",
    "stdlib-written": "hasten.workloads.written",
    "constrained-lm": "hasten.workloads.constrained",
    "sums-lm": "hasten.workloads.reasoning",
}
_HERE = pathlib.Path(__file__).parent
# A file of this folder that ends by naming its WORKLOAD is bundled under its own name, with dashes.
BUNDLED = _ELSEWHERE | {
    file.stem.replace("_", "-"): f"hasten.workloads.{file.stem}"
    for file in sorted(_HERE.glob("*.py"))
    if f"hasten.workloads.{file.stem}" not in _ELSEWHERE.values() and "\nWORKLOAD = " in file.read_text("utf-8")
}


def workload(given: "str | Workload", **options: Any) -> Workload:
    """A workload from text, or the object itself.

    Args:
        given: `stdlib-lm`, `digits-vit(task=train)`, `hf:PATH(text=FILE)`, `my.py:factory(size=3)`.
        options: further options, as if written in the brackets.

    Raises:
        UsageError: unknown name or option, wrong value, or a file or model that can't be reached.
    """
    if isinstance(given, Workload):
        return given
    if not isinstance(given, str):
        raise UsageError(f"a workload is text or a hasten.Workload, not a {type(given).__name__}")
    name, opening, rest = given.strip().partition("(")
    if opening and not rest.endswith(")"):
        raise UsageError(f"the workload {given!r} has no closing bracket")
    try:
        options = {**(read_arguments(rest[:-1]) if opening else {}), **options}
    except PlanError as error:
        raise UsageError(f"the workload's options can't be read: {error}") from None
    name = name.strip()
    if name in BUNDLED:
        return importlib.import_module(BUNDLED[name]).WORKLOAD.from_options(options)
    if name.startswith("hf:"):
        from hasten.workloads.hub import from_hub

        return from_hub(name[3:], options)
    if ".py:" in name or name.endswith(".py"):
        return _from_file(name, options)
    hint = nearest(name, BUNDLED)
    raise UsageError(
        f"there is no workload {name!r}{hint} there are {', '.join(BUNDLED)}, hf:NAME_OR_PATH and file.py:factory"
    )


def _from_file(name: str, options: dict[str, Any]) -> Workload:
    file_name, _, factory_name = name.rpartition(":") if ".py:" in name else (name, ":", "workload")
    file = pathlib.Path(file_name)
    if not file.is_file():
        raise UsageError(f"the workload's file {file} does not exist")
    spec = importlib.util.spec_from_file_location(f"hasten_workload_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{file} can't be run: {type(error).__name__}: {error}") from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        names = [word for word in vars(module) if not word.startswith("_")]
        raise UsageError(f"{file} has no {factory_name!r}{nearest(factory_name, names)}")
    made = factory.from_options(options) if isinstance(factory, type) and issubclass(factory, Workload) else None
    if made is None:
        try:
            made = factory(**options)
        except TypeError as error:
            raise UsageError(f"{file_name}:{factory_name} can't be called with {options}: {error}") from None
    if not isinstance(made, Workload):
        raise UsageError(f"{file_name}:{factory_name} returned a {type(made).__name__}, not a hasten.Workload")
    return made
