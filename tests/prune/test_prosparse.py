"""ProSparse: layers are found by what they compute, inactive neurons are left out, and training makes more of them."""

import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import feed_forward
from hasten.kernels import native
from hasten.prune._feed_forward import SparseFeedForward, layers_of
from hasten.prune.prosparse import ProSparse, factor, measure
from hosts.tiny import llama, padded_batch

BATCH = padded_batch()


def cases():
    def case(count, width, hidden, out, dtype=torch.float32, gated=True, tolerance=1e-5, **options):
        make = torch.Generator().manual_seed(count * width)
        some = lambda *shape: (torch.randn(*shape, generator=make) / 4).to(dtype)  # noqa: E731
        args = (some(count, width), some(hidden, width), some(out, hidden), some(hidden, width) if gated else None)
        return {"args": args, "kwargs": options, "tolerance": tolerance, "grad": dtype is torch.float32}

    yield case(1, 17, 65, 5)
    yield case(3, 32, 130, 32, threshold=0.5)
    yield case(12, 9, 40, 7, gated=False)
    yield case(2, 1, 1, 1, gated=False, threshold=0.0)
    yield case(4, 24, 70, 16, dtype=torch.bfloat16, tolerance=2e-2)
    yield case(1, 24, 70, 16, dtype=torch.float16, tolerance=3e-3)


def relu_llama(activation="relu"):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
            hidden_act=activation, eos_token_id=None, bos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.15)
    return model.eval()


class Shifted(nn.Module):
    def forward(self, x):
        return torch.relu(x - 0.25)


class Plain(nn.Module):
    def __init__(self, activation, swap=False):
        super().__init__()
        self.b, self.act, self.a = nn.Linear(12, 30), activation, nn.Linear(30, 12)

    def forward(self, x):
        return self.a(self.act(self.b(x)))


def test_the_sine_between_stages():
    factors, ends = (0.1, 0.3, 0.7), (0.2, 0.6, 1.0)
    assert factor(0, factors, ends) == factor(0.19, factors, ends) == 0.1
    assert factor(0.2, factors, ends) == pytest.approx(0.1) and factor(0.4, factors, ends) == pytest.approx(0.2)
    assert factor(0.6, factors, ends) == pytest.approx(0.3) and factor(0.8, factors, ends) == pytest.approx(0.5)
    assert factor(1.0, factors, ends) == 0.7
    steps = [factor(i / 100, factors, ends) for i in range(101)]
    assert steps == sorted(steps) and max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 0.02


def test_forms_are_found_by_what_they_compute():
    mlp = llama().model.layers[0].mlp
    form = feed_forward.find(mlp)
    assert (form.gate, form.up, form.down) == ("gate_proj", "up_proj", "down_proj")
    assert feed_forward.find(Plain(nn.ReLU())).up is None
    assert feed_forward.find(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))).gate == "0"
    assert feed_forward.find(nn.Sequential(nn.Linear(4, 8), nn.ReLU())) is None
    assert feed_forward.find(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))) is None
    odd = Plain(nn.ReLU())
    odd.forward = lambda x: odd.a(odd.act(odd.b(x))) + x
    assert feed_forward.find(odd) is None
    like = torch.zeros(1)
    shifts = [
        feed_forward.relu_shift(act, like) for act in (nn.ReLU(), Shifted(), nn.SiLU(), nn.LeakyReLU(), nn.ReLU6())
    ]
    assert shifts == [0.0, 0.25, None, None, None]


@pytest.mark.parametrize("activation", [nn.ReLU(), Shifted()])
def test_relu_layers_give_the_same(activation):
    model = nn.Sequential(Plain(activation), Plain(activation)).eval()
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x)
        handle = hasten.apply(model, ProSparse(activation="keep", threshold=0.0))
        assert len(layers_of(model)) == 2
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-6)
        handle.undo()
        assert torch.equal(model(x), plain) and model[0].a.weight.is_contiguous()


def test_decoding_with_a_relu_model_writes_the_same():
    wanted = hasten.apply(relu_llama(), "").generate(BATCH["input_ids"][:1], max_new_tokens=12, do_sample=False)
    handle = hasten.apply(relu_llama(), ProSparse(threshold=0.0), calibration=[BATCH])
    found = handle.generate(BATCH["input_ids"][:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(found, wanted)
    report = handle.report["prune/prosparse"]
    assert report["layers"] == 2 and report["substituted"] == 0 and "simulated" not in report
    assert all(0.3 < share < 0.7 for share in report["inactive"].values())
    if native.compiler() is not None:
        assert report["kernel"] == "native"


def test_the_threshold_makes_more_neurons_inactive():
    shares = []
    for threshold in (0.0, 0.3):
        handle = hasten.apply(relu_llama(), ProSparse(threshold=threshold), calibration=[BATCH])
        shares.append(sum(handle.report["prune/prosparse"]["inactive"].values()))
    assert shares[1] > shares[0] + 0.1


def test_without_relu():
    handle = hasten.apply(llama(), ProSparse(activation="keep"))
    assert "no feed-forward layer has a ReLU" in handle.report["prune/prosparse"]["simulated"]
    handle = hasten.apply(llama(), ProSparse())
    assert handle.report["prune/prosparse"]["substituted"] == 4
    with pytest.raises(UsageError, match="no feed-forward layer"):
        hasten.apply(nn.Sequential(nn.Linear(4, 4)), ProSparse())


def test_quantized_afterwards():
    model = relu_llama()
    handle = hasten.apply(model, "prune/prosparse(threshold=0.0) + quant/round_to_nearest(bits=8)")
    with torch.no_grad():
        wanted = relu_llama()(**BATCH).logits
        found = handle.model(**BATCH).logits
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert any(isinstance(part, SparseFeedForward) for part in model.modules())


def test_training_makes_neurons_inactive():
    found = {}
    for factors in ((0.0,), (3.0,)):
        model = relu_llama("silu").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        make = torch.Generator().manual_seed(1)
        batches = [{"input_ids": torch.randint(1, 61, (4, 16), generator=make)} for _ in range(30)]
        run = hasten.training(model, optimizer, batches, ProSparse(factors=factors, ends=(1.0,)), steps=30)
        for batch in run:
            ids = batch["input_ids"]
            run.backward(run.model(input_ids=ids, labels=ids).loss)
        run.finish()
        layers = layers_of(model)
        assert len(layers) == 2 and not any(part.down_proj._forward_pre_hooks for part in layers.values())
        found[factors] = sum(measure(run.host, batches[:5]).values()) / 2
    assert found[(3.0,)] > found[(0.0,)] + 0.05


def test_what_can_not_be_says_why():
    with pytest.raises(PlanError, match="go together"):
        ProSparse(factors=(0.1, 0.2))
    with pytest.raises(PlanError, match="must rise"):
        ProSparse(factors=(0.1, 0.2), ends=(0.5, 0.5))
    model = relu_llama()
    with pytest.raises(UsageError, match="pass steps=N"):
        hasten.training(model, torch.optim.SGD(model.parameters(), lr=0.1), [BATCH], ProSparse())
