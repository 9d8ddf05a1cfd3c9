"""Plans from text and YAML and back; every problem at once, each with what to do."""

import dataclasses

import pytest

from hasten.core import names
from hasten.core.errors import PlanError, UsageError
from hasten.core.options import Method, Options, option
from hasten.core.plans import Plan, read_arguments

TEXT = "kv/cake(keep=0.3) + prune/llm_drop(keep=0.5)"


def test_text_round_trip_and_order():
    plan = Plan.parse(TEXT)
    assert str(plan) == "prune/llm_drop(keep=0.5) + kv/cake(keep=0.3)"
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.of([TEXT]) == plan


@pytest.mark.parametrize("text", ["", "  ", "baseline"])
def test_empty_plan_is_the_baseline(text):
    assert str(Plan.parse(text)) == "baseline" and not Plan.parse(text).methods


def test_short_names():
    assert str(Plan.parse("cake")) == "kv/cake"
    assert names.resolve("SinkGD") == "optim/sinkgd"


def test_yaml_forms():
    plan = Plan.from_yaml("plan:\n- quant/gptq: {bits: 8}\n- llm_drop\n- kv/cake(keep=0.5)\n")
    assert str(plan) == "prune/llm_drop + quant/gptq(bits=8) + kv/cake(keep=0.5)"


def test_yaml_file(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(Plan.parse(TEXT).to_yaml())
    assert Plan.of(str(file)) == Plan.parse(TEXT)
    with pytest.raises(UsageError, match="can't be read"):
        Plan.of(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv/cack", "there is no method 'kv/cack'; did you mean 'kv/cake'?"),
        ("cacke", "did you mean 'cake'?"),
        ("kv/cake(kep=0.5)", "kv/cake has no option 'kep'; did you mean 'keep'?"),
        ("kv/cake(keep=2)", "keep must be above 0, at most 1, not 2"),
        ("kv/cake(keep='half')", "keep must be a number"),
        ("quant/gptq(bits=4.5)", "bits must be"),
        ("quant/gptq(bits=5)", "must be one of"),
        ("kv/cake(keep=0.5", "expected ',' or ')'"),
        ("kv/cake +", "expected a method's name"),
        ("kv/cake kv/cake", "expected '+' or the end"),
        ("kv/cake(keep=0.5, keep=0.6)", "given twice"),
        ("kv/cake(keep=!)", "unexpected '!'"),
        ("diffusion/easycache + diffusion/zeus", "both claim the seam 'denoiser.call'"),
    ],
)
def test_messages(text, message):
    with pytest.raises(PlanError) as found:
        Plan.parse(text)
    assert message in str(found.value)


def test_all_problems_at_once():
    with pytest.raises(PlanError) as found:
        Plan.parse("kv/cack + quant/gptq(bits=5, dump=1) + kv/cake(keep=0)")
    assert len(found.value.problems) == 4
    assert str(found.value).startswith("4 problems")


def test_needs_and_hosts():
    plan = Plan.parse("quant/gptq + decode/speculative")
    with pytest.raises(PlanError) as found:
        plan.check(have=(), host="vit")
    assert any("quant/gptq needs calibration" in problem for problem in found.value.problems)
    assert any("decode/speculative needs a draft model" in problem for problem in found.value.problems)
    assert any("works on decoder" in problem and "vit" in problem for problem in found.value.problems)
    plan.check(have=("calibration", "draft"), host="decoder")


def test_one_method_twice_is_a_conflict():
    with pytest.raises(PlanError, match="both claim the seam"):
        Plan.parse("kv/cake + kv/cake(keep=0.5)")


@dataclasses.dataclass(frozen=True)
class Sample(Options):
    share: float = option(0.5, "a share", above=0, most=1)
    word: str = option("one", "a word", choices=("one", "two"))
    sizes: tuple[int, ...] = option((1, 2), "sizes", least=1)
    limit: int | None = option(None, "a limit", least=0)
    flag: bool = option(False, "a flag")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"share": True}, "share must be a number"),
        ({"share": float("nan")}, "finite"),
        ({"word": "three"}, "one of one, two"),
        ({"sizes": [1, 0]}, "at least 1"),
        ({"sizes": "ab"}, "must be a list"),
        ({"limit": -1}, "at least 0"),
        ({"flag": 1}, "true or false"),
    ],
)
def test_option_types_and_ranges(given, problem):
    with pytest.raises(PlanError, match=problem):
        Sample(**given)


def test_options_convert_losslessly_and_print():
    made = Sample(share=1, sizes=[3, 4], limit=7)
    assert made.share == 1.0 and isinstance(made.share, float) and made.sizes == (3, 4)
    assert str(made) == "Sample(share=1.0, sizes=[3, 4], limit=7)"
    assert read_arguments("share=1.0, sizes=[3, 4], limit=7, word='two', flag=true") == {
        "share": 1.0,
        "sizes": [3, 4],
        "limit": 7,
        "word": "two",
        "flag": True,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.share = 0.1


def test_a_method_can_take_a_method():
    @dataclasses.dataclass(frozen=True)
    class Wrapper(Method):
        inner: Method | None = option(None, "another method")

    nested = names.load("kv/cake")(keep=0.5)
    assert Wrapper(inner=nested).inner == nested
    assert Wrapper(inner="kv/cake(keep=0.5)").inner == nested
    with pytest.raises(PlanError):
        Wrapper(inner=3)


def test_a_name_cut_short_is_completed_in_the_hint():
    with pytest.raises(UsageError, match="did you mean 'attention/pbs_attn'"):
        Plan.parse("attention/pbs").check()
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        Plan.parse("gpt").check()
