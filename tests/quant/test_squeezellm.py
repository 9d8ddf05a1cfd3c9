"""SqueezeLLM: values where the loss is sensitive, a few weights exactly, and the model classes that people use."""

import pytest
import torch

import hasten
from conformance import quant as common
from hasten.core.errors import PlanError, UsageError
from hasten.quant._linear import QuantLinear
from hasten.quant.base import form_values
from hasten.quant.round_to_nearest import RoundToNearest
from hasten.quant.squeezellm import SqueezeLLM, squeezellm


def problem(rows, columns, seed=0, samples=60):
    """A weight with heavy tails; the mean squared gradient of a loss over samples, and the inputs' second moment."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=make) / columns**0.5
    x = torch.randn(samples, columns, generator=make) @ (mix @ mix + 0.1 * torch.eye(columns))
    x *= torch.randn(columns, generator=make).exp()
    weight = torch.randn(rows, columns, generator=make) / columns**0.5
    weight *= torch.randn(rows, columns, generator=make).mul(0.5).exp()
    back = torch.randn(samples, rows, generator=make)  # the gradient of the loss at the outputs
    return weight, (back.square().t() @ x.square()) / samples, x.t() @ x / samples


def cases():
    for seed, (rows, columns, options) in enumerate(
        [
            (3, 40, {}),
            (5, 37, {"bits": 4, "outliers": 0.02, "sensitive": 0.01}),
            (2, 64, {"bits": 2, "outliers": 0.0, "sensitive": 0.0}),
            (1, 3, {"bits": 3}),
            (4, 50, {"bits": 3, "outliers": 0.1, "sensitive": 0.1}),
        ]
    ):
        yield {"args": problem(rows, columns, seed)[:2], "kwargs": options}
    weight, fisher, _ = problem(3, 40, 9)
    fisher[1] = 0  # nothing of this row is ever used
    fisher[0, ::2] = 0
    yield {"args": (weight, fisher), "kwargs": {"outliers": 0.03}}
    yield {"args": (weight.bfloat16(), fisher.bfloat16()), "kwargs": {"sensitive": 0.02}}


def weighted(weight, fisher, found):
    return float((fisher * (weight - found).square()).sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_error_is_below_that_of_rounding_in_groups_and_of_plain_clusters(bits):
    weight, fisher, moment = problem(48, 512)
    found = form_values(SqueezeLLM(bits=bits).quantize(weight, fisher), 512)
    plain = form_values(SqueezeLLM(bits=bits).quantize(weight, torch.ones_like(fisher)), 512)
    rounded = form_values(RoundToNearest(bits=bits, group=128).quantize(weight, None), 512)
    assert weighted(weight, fisher, found) < 0.5 * weighted(weight, fisher, rounded)
    assert weighted(weight, fisher, found) < 0.8 * weighted(weight, fisher, plain)

    def output(w):
        return float(torch.trace((weight - w) @ moment @ (weight - w).t()))

    assert output(found) < 0.6 * output(rounded) and output(found) < output(plain)


def test_held_weights_are_exact_and_as_many_as_asked_for():
    weight, fisher, _ = problem(20, 300, 1)
    weight[3, 7], weight[11, 200] = 40.0, -35.0
    fisher[5, 9] = 100 * fisher.max()
    form = SqueezeLLM(outliers=0.01, sensitive=0.002).quantize(weight, fisher)
    assert len(form.outliers.values) == 60 + 12
    found = form_values(form, 300)
    for place in ((3, 7), (11, 200), (5, 9)):
        assert float(found[place]) == pytest.approx(float(weight[place]), rel=1e-6)
    assert float(form.tables.abs().max()) < 10  # the outliers did not pull a centroid to them


def test_held_weights_lower_the_error():
    weight, fisher, _ = problem(20, 400, 2)
    with_, without = (SqueezeLLM(outliers=share, sensitive=share / 9).quantize(weight, fisher) for share in (0.0045, 0))
    assert without.outliers is None
    assert weighted(weight, fisher, form_values(with_, 400)) < 0.9 * weighted(weight, fisher, form_values(without, 400))


def test_nothing_but_the_codes_weighs_much():
    weight, fisher, _ = problem(64, 4096, 3, samples=4)
    layer = SqueezeLLM(bits=3).quantize(weight, fisher).layer(None, torch.float32)
    assert layer.bytes() * 8 / weight.numel() < 3 + 8 * 32 / 4096 + 0.005 * 64 + 0.05


def test_product_is_that_of_the_dense_weight():
    weight, fisher, _ = problem(24, 200, 4)
    layer = SqueezeLLM(bits=4).quantize(weight, fisher).layer(torch.randn(24), torch.float32)
    x = torch.randn(5, 200)
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-5)


def test_gpt2_whose_weights_lie_the_other_way():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=61, n_positions=64, bos_token_id=1,
                                     eos_token_id=None, pad_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(ids).logits
        handle = hasten.apply(model, "quant/squeezellm(bits=4)", calibration=common.calibration())
        assert sum(isinstance(part, QuantLinear) for part in model.modules()) == 8
        assert (model(ids).logits - before).norm() < 0.1 * before.norm()
        assert torch.equal(handle.undo()(ids).logits, before)


def test_options_and_what_has_no_sensitivity():
    with pytest.raises(PlanError, match="2, 3, 4, 16"):
        SqueezeLLM(bits=8)
    with pytest.raises(PlanError, match="calibration"):
        hasten.apply(common.build(), "quant/squeezellm")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x):
            return {"sample": self.inner(x)}

    model = Model()
    weight = model.inner.weight
    with pytest.raises(UsageError, match="no logits"):
        hasten.apply(model, "quant/squeezellm", calibration=[torch.randn(2, 8)])
    assert model.inner.weight is weight and weight.requires_grad


def test_rows_do_not_depend_on_each_other_once_no_weight_is_held():
    weight, fisher, _ = problem(12, 96, 5)
    whole = squeezellm(weight, fisher, outliers=0, sensitive=0)
    first = squeezellm(weight[:5], fisher[:5], outliers=0, sensitive=0)
    assert all(torch.equal(one[:5], other) for one, other in zip(whole, first, strict=True))
