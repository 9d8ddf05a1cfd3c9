"""Membership: every method, by existing, passes these. Families give a subject, methods give cases."""

import dataclasses
import functools
import importlib
import pathlib

import pytest
import torch

from hasten.api import apply, load_pretrained
from hasten.core import names
from hasten.core.cards import HEAD_BYTES
from hasten.core.families import FAMILIES
from hasten.core.options import check_range
from hasten.core.plans import Plan
from hasten.workloads.find import workload

HERE = pathlib.Path(__file__).parent
METHODS = list(names.method_files())
every = pytest.mark.parametrize("method", METHODS)


def subject_of(method):
    """The family's subject, or that of the method's own test file where it has one."""
    module = importlib.import_module(f"conformance.{method.split('/')[0]}")
    family, name = method.split("/")
    file = HERE / family / f"test_{name}.py"
    own = file.is_file() and "\ndef subject(method_class" in file.read_text("utf-8")
    return (module_of(method) if own else module).subject(names.load(method))


@functools.cache
def module_of(method):
    family, name = method.split("/")
    path = HERE / family / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"cases_{family}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(method, **more):
    """The method with its subject's small options."""
    given = subject_of(method)
    return names.load(method)(**{**given.get("options", {}), **more})


def equal(one, other):
    """Bit for bit, NaN included, for tensors and nests of them."""
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every
def test_card(method):
    card, cls = names.card(method), names.load(method)
    module = importlib.import_module("hasten." + method.replace("/", "."))
    assert card == module.CARD, "the card is read from the file's head exactly as Python reads it"
    assert module.__doc__ and len(module.__doc__) > 80
    assert card.title and card.claim and card.when and card.when_not and card.effects and card.seams
    assert len(names.method_files()[method].read_bytes()[:HEAD_BYTES]) > 500
    assert isinstance(card.identity, str) or cls(**card.identity)
    options = {field.name: field.metadata for field in dataclasses.fields(cls)}
    for name, ends in card.tune.items():
        for end in ends:
            check_range(round(end) if isinstance(getattr(cls(), name), int) else end, options[name])
    text, plan = card.experiment
    workload(text)
    assert method in [one.name for one in Plan.parse(plan).methods]


@every
def test_options_are_frozen_documented_and_validated(method):
    cls = names.load(method)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls.title() == method
    for name, _, _, meaning in cls.documented():
        assert meaning, f"{method}: the option {name} says nothing"
    assert Plan.parse(str(cls())).methods == (cls(),)
    made(method)


@every
def test_method_file(method):
    module = importlib.import_module("hasten." + method.replace("/", "."))
    name = method.split("/")[1]
    assert callable(getattr(module, f"naive_{name}")) and callable(getattr(module, name))
    assert module.METHOD.__module__ == module.__name__


@every
def test_fast_agrees_with_naive(method):
    module = importlib.import_module("hasten." + method.replace("/", "."))
    name = method.split("/")[1]
    naive, fast = getattr(module, f"naive_{name}"), getattr(module, name)
    compared = 0
    for case in module_of(method).cases():
        arguments, more, tolerance = case["args"], case.get("kwargs", {}), case.get("tolerance", 1e-5)
        wanted, found = naive(*arguments, **more), fast(*arguments, **more)
        check_close(wanted, found, tolerance)
        if case.get("grad"):
            check_gradients(naive, fast, arguments, more, tolerance)
        compared += 1
    assert compared >= 3, "a method gives at least three cases"


def check_close(wanted, found, tolerance):
    if isinstance(wanted, list | tuple):
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found, strict=True):
            check_close(one, other, tolerance)
    elif isinstance(wanted, dict):
        assert wanted.keys() == found.keys()
        for key in wanted:
            check_close(wanted[key], found[key], tolerance)
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    elif isinstance(wanted, float):
        assert abs(wanted - found) <= tolerance * max(1, abs(wanted))
    else:
        assert wanted == found


def check_gradients(naive, fast, arguments, more, tolerance):
    both = []
    for function in (naive, fast):
        leaves = [
            a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        out = function(*leaves, **more)
        outs = out if isinstance(out, list | tuple) else [out]
        sum(o.double().square().sum() for o in outs if isinstance(o, torch.Tensor) and o.requires_grad).backward()
        both.append([leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad])
    check_close(both[0], both[1], tolerance * 10)


def is_serving(method):
    try:
        return "run" in subject_of(method)
    except (
        Exception
    ):  # a family without a subject, or a broken one, fails its own methods' tests, not everybody's collection
        return True


serving = pytest.mark.parametrize("method", [m for m in METHODS if is_serving(m)])
training = pytest.mark.parametrize("method", [m for m in METHODS if not is_serving(m)])


@serving
def test_undo_restores_bit_for_bit(method):
    subject = subject_of(method)
    model = subject["model"]()
    plain = apply(model, "")
    before, wanted = state(model), subject["run"](plain)
    modules = [(path, id(part)) for path, part in model.named_modules()]
    config = repr(getattr(model, "config", None))
    handle = apply(model, made(method), **subject["context"])
    subject["run"](handle)
    handle.undo()
    assert equal(state(model), before) and list(state(model)) == list(before)
    assert [(path, id(part)) for path, part in model.named_modules()] == modules
    assert repr(getattr(model, "config", None)) == config
    assert equal(subject["run"](apply(model, "")), wanted)


@serving
def test_identity_changes_nothing(method):
    identity, subject = names.card(method).identity, subject_of(method)
    if isinstance(identity, str):
        assert len(identity) > 10
        return
    wanted = subject["run"](apply(subject["model"](), ""))
    handle = apply(subject["model"](), made(method, **identity), **subject["context"])
    assert equal(subject["run"](handle), wanted)


@serving
def test_it_does_something_and_the_same_again(method):
    subject = subject_of(method)
    outs = [subject["run"](apply(subject["model"](), made(method), **subject["context"])) for _ in range(2)]
    assert equal(*outs)
    if not names.card(method).lossless:
        assert not equal(outs[0], subject["run"](apply(subject["model"](), ""))), "small options must change something"


@serving
def test_save_and_load(method, tmp_path):
    subject = subject_of(method)
    if not subject.get("saves", True):
        pytest.skip("the family keeps nothing in a model")
    handle = apply(subject["model"](), made(method), **subject["context"])
    wanted = subject["run"](handle)
    loaded = load_pretrained(handle.save(tmp_path / "saved"), **subject.get("load", {}))
    assert str(loaded.plan) == str(handle.plan)
    assert equal(subject["run"](loaded), wanted)


@serving
def test_two_models_share_no_state(method):
    subject = subject_of(method)
    option = made(method)
    first = apply(subject["model"](), option, **subject["context"])
    wanted = subject["run"](first)
    second = apply(subject["model"](), option, **subject["context"])
    subject["run"](second)
    assert equal(subject["run"](first), wanted)


@training
def test_training_identity_changes_nothing(method):
    identity, subject = names.card(method).identity, subject_of(method)
    if isinstance(identity, str):
        assert len(identity) > 10
        return
    assert equal(subject["train"](made(method, **identity), 0), subject["train"](None, 0))


@training
def test_training_does_something_and_the_same_again(method):
    subject = subject_of(method)
    first, again, plain = (subject["train"](one, 1) for one in (made(method), made(method), None))
    assert equal(first, again)
    assert not equal(first, plain)


def test_every_family_folder_is_declared():
    package = pathlib.Path(names.PACKAGE)
    for folder in package.iterdir():
        if (folder / "base.py").exists() and folder.name not in ("hosts", "workloads"):
            assert folder.name in FAMILIES
