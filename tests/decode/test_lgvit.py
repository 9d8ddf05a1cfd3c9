"""LGViT's heads and what they decide: held to loops, folded rightly, fitted from what a model says itself."""

import copy

import pytest
import torch
from torch import nn

import hasten
from conformance import tokens
from conformance.decode import ragged, target
from hasten.api import load_pretrained
from hasten.core.errors import PlanError, UsageError
from hasten.decode import _exits
from hasten.decode.lgvit import LGViT, default_exits, lgvit
from hasten.hosts import recognise
from hosts.test_vit import build, inputs_of

SMALL = {"exits": (1, 3), "epochs": 3, "threshold": 0.2, "rows": 4}


def images(seed=3, batch=6, labels=False):
    generator = torch.Generator().manual_seed(seed)
    made = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    return made | {"labels": torch.randint(0, 7, (batch,), generator=generator)} if labels else made


def subject():
    context = {"calibration": [images(), images(4, 5)]}
    return {"model": tokens.vit, "options": SMALL, "context": context, "run": tokens.run}


def heads(kinds, width, classes, ends, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * 0.4).to(dtype)

    for kind in kinds:
        head = {"classifiers": [(random(classes, width), random(classes)) for _ in range(ends)]}
        head["last"] = random(width, width), random(width)
        if kind == "local" or kind == "depthwise":
            head["first"] = random(width, width), random(width)
        if kind == "depthwise":
            head |= {"taps": (random(width, 1, 3, 3), random(width)), "affine": (random(width), random(width))}
        if isinstance(kind, int):
            head |= {"qkv": random(3 * width, width), "num_heads": 2, "stride": kind}
        yield head


def cases():
    for batch, grid, prefix, ends, kinds, threshold, dtype in (
        (3, (5, 3), 1, 1, ("depthwise", "local", 2, 3), 0.5, torch.float32),
        (1, (4, 4), 2, 2, ("depthwise", 3), 0.4, torch.float32),
        (5, (2, 7), 0, 1, (2, "local"), 0.6, torch.float32),
        (2, (1, 1), 4, 1, ("depthwise", "local", 2), 0.9, torch.float32),
        (4, (3, 5), 1, 1, ("depthwise", 2), 0.45, torch.bfloat16),
        (2, (3, 3), 1, 1, ("local",), 1.0, torch.float32),
    ):
        generator = torch.Generator().manual_seed(batch)
        shape = batch, prefix + grid[0] * grid[1], 8
        hidden = [(torch.randn(shape, generator=generator) * 2 + 1).to(dtype) for _ in kinds]
        final = torch.randn(batch, 5, generator=generator).to(dtype)
        yield {"args": (hidden, final, list(heads(kinds, 8, 5, ends, dtype)), grid, prefix, threshold)}


def test_exits_of_the_paper():
    assert default_exits(12) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert default_exits(8) == [2, 3, 4, 5, 6, 7] and default_exits(2) == [1]
    assert len(default_exits(24)) == 8 and default_exits(24)[0] == 8 and default_exits(24)[-1] == 23


def test_the_first_sure_head_answers_and_equal_certainty_is_not_enough():
    """A head without weights is as sure of each of two classes: 0.5, which is not more than 0.5."""
    width = 4
    flat = {
        "first": (torch.zeros(width, width), torch.zeros(width)),
        "last": (torch.zeros(width, width), torch.zeros(width)),
    }
    unsure = flat | {"classifiers": [(torch.zeros(2, width), torch.zeros(2))]}
    sure = flat | {"classifiers": [(torch.zeros(2, width), torch.tensor([3.0, 0.0]))]}
    hidden, final = [torch.randn(3, 5, width)] * 3, torch.full((3, 2), 7.0)
    logits, place = lgvit(hidden, final, [unsure, sure, sure], (2, 2), 1, 0.5)
    assert place.tolist() == [1, 1, 1] and torch.equal(logits, torch.tensor([[3.0, 0.0]] * 3))
    logits, place = lgvit(hidden, final, [unsure, sure, sure], (2, 2), 1, 0.96)
    assert place.tolist() == [3, 3, 3] and torch.equal(logits, final)


@pytest.mark.parametrize("depthwise", [False, True])
def test_folding_batch_norms_changes_nothing(depthwise):
    torch.manual_seed(0)
    head = _exits.ImageLocal(8, 3, 1, 1, 0.5, depthwise=depthwise)
    patches, grid = torch.randn(6, 15, 8) + 0.5, (5, 3)
    head.begin()
    for _ in range(30):
        head.features(patches, grid)
    for norm in head.norms:
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.uniform_(norm.bias)
    head.eval()
    wanted = head.features(patches, grid).mean(1)
    head.fold()
    torch.testing.assert_close(head.pooled(patches, grid), wanted)


def test_pooled_attention_is_the_mean_of_all_outputs():
    torch.manual_seed(0)
    head = _exits.ImageGlobal(16, 3, 1, 1, 0.5, stride=2)
    patches = torch.randn(2, 35, 16)
    assert head.num_heads == 8 and head.features(patches, (5, 7)).shape == (2, 12, 16)
    torch.testing.assert_close(head.pooled(patches, (5, 7)), head.features(patches, (5, 7)).mean(1))


def test_losses_of_the_paper():
    """Golden values, worked out by hand from section 4's terms."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4 * torch.log(torch.tensor(3.0)).item() / 2, 0.0]])
    ln2, ln3 = 0.6931472, 1.0986123
    soft = 0.75 * ln3 - 2 * ln2 + ln2  # KL((3/4, 1/4) || (1/2, 1/2))
    found = _exits.distilled(student, teacher, torch.tensor([1]), 0.3, 2.0)
    assert found.item() == pytest.approx(0.7 * ln2 + 0.3 * 4 * soft, abs=1e-5)
    one, last = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    assert _exits.homogeneous([one, one, last], gram=False).item() == pytest.approx(8)
    assert _exits.homogeneous([one, last], gram=True).item() == pytest.approx(16)  # 2 * 2, a mean over three tokens
    goal = torch.tensor([ln3, 0.0]).expand(2, 5, 2)
    assert _exits.heterogeneous(torch.zeros(2, 5, 2), goal).item() == pytest.approx(5 * soft, abs=1e-5)


def learnable():
    """A ViT whose answer is whether a picture is bright."""
    model = tokens.vit()
    with torch.no_grad():
        for block in model.vit.layers:
            for parameter in block.parameters():
                parameter.mul_(0.1)
    rows = []
    for seed in range(12):
        pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        bright = torch.arange(8) % 2
        rows.append({"pixel_values": pixels + (bright * 2 - 1)[:, None, None, None], "labels": bright})
    return model, rows


def test_heads_learn_the_labels_and_most_images_leave():
    model, rows = learnable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = hasten.apply(model, [LGViT(exits=(1, 3), epochs=15, alpha=0.0, threshold=0.9)], calibration=rows[:10])
    with torch.no_grad():
        out = torch.cat([model(pixel_values=one["pixel_values"]).logits for one in rows[10:]])
    wanted = torch.cat([one["labels"] for one in rows[10:]])
    left = fast.report["decode/lgvit"]["left_after"]
    assert (out.argmax(-1) == wanted).all() and left.get("1", 0) >= 12 and sum(left.values()) == 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_labels_the_final_head_teaches():
    model, _ = learnable()
    rows = [images(seed, 8) for seed in range(8)]
    with torch.no_grad():
        wanted = model(pixel_values=rows[0]["pixel_values"]).logits.argmax(-1)
    hasten.apply(model, [LGViT(exits=(2,), epochs=40, threshold=0.3)], calibration=rows)
    with torch.no_grad():
        found = model(pixel_values=rows[0]["pixel_values"]).logits.argmax(-1)
    assert (found == wanted).float().mean() >= 0.75


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_decoder_saves_loads_and_undoes(kind, tmp_path):
    model = target(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 4})
    write = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**ragged(), **write)
    fast = hasten.apply(
        model, [LGViT(exits=(1, 2, 3), epochs=3, threshold=0.1)], calibration=[ragged(3, 9), ragged(2, 7, 1)]
    )
    wanted = fast.generate(**ragged(), **write)
    left = fast.report["decode/lgvit"]["left_after"]
    assert not torch.equal(plain, wanted) and sum(left.values()) == 4 * 11 and "4" not in left
    loaded = load_pretrained(fast.save(tmp_path))
    assert torch.equal(loaded.generate(**ragged(), **write), wanted)
    fast.undo()
    assert torch.equal(model.generate(**ragged(), **write), plain)
    assert not any("exit" in name for name, _ in model.named_modules())


def test_a_decoder_that_is_never_sure_writes_the_same():
    model = target(num_hidden_layers=4)
    write = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**ragged(), **write)
    fast = hasten.apply(model, [LGViT(exits=(1, 3), epochs=1, threshold=0.9999)], calibration=[ragged(3, 9)])
    assert torch.equal(fast.generate(**ragged(), **write), plain)
    assert fast.report["decode/lgvit"]["left_after"] == {"4": 4 * 7}


def test_decoder_heads_come_closer_to_the_model():
    model, cal = target(num_hidden_layers=4), [ragged(4, 24, seed) for seed in range(6)]
    losses = []
    for epochs in (1, 25):
        method = LGViT(exits=(2, 3), epochs=epochs, alpha=1.0, temperature=1.0)
        losses.append(hasten.apply(target(num_hidden_layers=4), [method], calibration=cal).report[method.name]["loss"])
    assert losses[1] < 0.9 * losses[0]
    assert recognise(model).kind == "decoder"


def test_mistakes_are_said_before_anything_changes():
    with pytest.raises(PlanError, match="must rise"):
        LGViT(exits=(3, 2))
    with pytest.raises(PlanError, match="more than there are exits"):
        LGViT(exits=(1, 2), local=3)
    for method, calibration, message in (
        (LGViT(exits=(4,)), [images()], "exits after 1 to 3 blocks"),
        (LGViT(), [images(batch=1)], "more than one"),
    ):
        model = tokens.vit()
        with pytest.raises(UsageError, match=message):
            hasten.apply(model, [method], calibration=calibration)
        assert not any(hasattr(block, "exit") or "forward" in vars(block) for block in model.vit.layers)
    with pytest.raises(UsageError, match="at least two tokens"):
        hasten.apply(target(), [LGViT(exits=(1,))], calibration=[{"input_ids": torch.tensor([[3]])}])


def test_logits_that_are_more_than_norm_and_head_are_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=37, num_key_value_heads=2, logits_scaling=8.0)).eval()
    model.lm_head.weight.data.mul_(50)
    with pytest.raises(UsageError, match="more to its last states"):
        hasten.apply(model, [LGViT(exits=(1,))], calibration=[ragged(2)])


@pytest.mark.parametrize("name", ["hf_deit", "timm_scaled", "timm_distilled"])
def test_other_vision_transformers_save_and_load(name, tmp_path):
    inputs = inputs_of(name)
    model = build(name)
    fast = hasten.apply(model, [LGViT(exits=(1, 2), epochs=2, threshold=0.2)], calibration=[inputs])
    with torch.no_grad():
        first = model(**inputs)
        copied = copy.deepcopy(model)(**inputs)
        loaded = load_pretrained(fast.save(tmp_path), model=build(name)).model(**inputs)
    assert fast.report["decode/lgvit"]["left_after"] != {"3": 2}
    wanted, found, again = (getattr(out, "logits", out) for out in (first, loaded, copied))
    assert torch.equal(wanted, found) and torch.equal(wanted, again)
    if name == "hf_deit":
        torch.testing.assert_close((first.cls_logits + first.distillation_logits) / 2, first.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tokens.vit().to(dtype)
    hasten.apply(model, [LGViT(**SMALL)], calibration=[{"pixel_values": images()["pixel_values"].to(dtype)}])
    out = model(pixel_values=images()["pixel_values"].to(dtype)).logits
    assert out.dtype == dtype and out.isfinite().all() and next(model.vit.layers[0].exit.parameters()).dtype == dtype
    text = target(num_hidden_layers=4).to(dtype)
    fast = hasten.apply(text, [LGViT(exits=(1, 3), epochs=2, threshold=0.1)], calibration=[ragged(3, 9)])
    written = copy.deepcopy(text).generate(**ragged(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(fast.generate(**ragged(), max_new_tokens=6, do_sample=False, eos_token_id=None), written)
