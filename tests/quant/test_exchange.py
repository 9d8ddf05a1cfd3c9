"""Checkpoints for and of other libraries: what comes back multiplies the same, and damaged files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hasten
from hasten.core.errors import UsageError
from hasten.quant._exchange import from_words, to_words
from hosts.tiny import DECODERS, padded_batch


def small():
    """A Llama whose sizes are multiples of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def ids():
    return torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(3))


def naive_words(codes, bits):
    rows = []
    for row in codes.tolist():
        whole = sum(code << place * bits for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(whole >> 32 * i) % 2**32 for i in range(count)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_words_hold_codes_across_borders(bits):
    codes = torch.randint(0, 2**bits, (3, 45), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(to_words(codes, bits), naive_words(codes, bits))
    assert torch.equal(from_words(to_words(codes, bits), bits, 45), codes)


@pytest.mark.parametrize(
    "format, plan",
    [
        ("compressed-tensors", "quant/gptq(bits=4, group=32, symmetric=true, activations=32)"),
        ("compressed-tensors", "quant/gptq(bits=3, group=32, activations=32)"),
        ("compressed-tensors", "quant/round_to_nearest(bits=8, group=0, activations=32)"),
        ("gptq", "quant/gptq(bits=4, group=32, symmetric=true, activations=32)"),
        ("gptq", "quant/gptq(bits=3, group=32, activations=32)"),
        ("gptq", "quant/gptq(bits=2, group=0, activations=32)"),
    ],
)
def test_round_trip(format, plan, tmp_path):
    handle = hasten.apply(small(), plan, calibration=[{"input_ids": ids()}])
    with torch.no_grad():
        wanted = handle.model(ids()).logits
        loaded = hasten.load_pretrained(handle.export(tmp_path / "out", format))
        assert torch.allclose(loaded.model(ids()).logits, wanted, atol=2e-3 if format == "gptq" else 1e-5)
        again = hasten.load_pretrained(loaded.save(tmp_path / "again"))
        assert torch.equal(again.model(ids()).logits, loaded.model(ids()).logits)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format and config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("plan", ["bits=4, group=32", "bits=8, group=0", "bits=3, group=16"])
def test_transformers_reads_it(plan, tmp_path):
    """The ecosystem's own loader decompresses the same weights."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    handle = hasten.apply(small(), f"quant/round_to_nearest({plan}, symmetric=true, activations=32)")
    with torch.no_grad():
        wanted = handle.model(ids()).logits
        handle.export(tmp_path / "out")
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(other(ids()).logits.float(), wanted, atol=1e-4)


@pytest.mark.parametrize("plan", ["bits=4, group=32", "bits=3, group=32", "bits=6, group=0"])
def test_zero_points_are_packed_as_the_library_packs_them(plan, tmp_path):
    """Layer by layer: transformers 5.23 expects unpacked zero points of models that it builds without memory."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    handle = hasten.apply(small(), f"quant/round_to_nearest({plan}, activations=32)")
    folder = handle.export(tmp_path / "out")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    state = load_file(folder / "model.safetensors")
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        own = {key.removeprefix(path + "."): value for key, value in state.items() if key.startswith(path + ".")}
        found = PackedQuantizationCompressor.decompress(own, QuantizationScheme(**group))["weight"]
        assert torch.allclose(found.float(), handle.model.get_submodule(path).dense_weight(), atol=1e-5)


def test_columns_in_another_order_are_read(tmp_path):
    """A GPTQ checkpoint with `desc_act`: g_idx gives each input its group."""
    handle = hasten.apply(small(), "quant/round_to_nearest(bits=4, group=32, activations=32)")
    folder = handle.export(tmp_path / "out", "gptq")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    dense = handle.model.get_submodule(name).dense_weight()
    rows = from_words(state[f"{name}.qweight"].t(), 4, 64)
    state[f"{name}.qweight"] = to_words(rows[:, mixed], 4).t().contiguous()
    state[f"{name}.g_idx"] = state[f"{name}.g_idx"][mixed].contiguous()
    save_file(state, folder / "model.safetensors")
    found = hasten.load_pretrained(folder).model.get_submodule(name)
    assert found.order is not None and torch.allclose(found.dense_weight(), dense[:, mixed], atol=1e-3)
    x = torch.randn(3, 64)
    assert torch.allclose(found(x), x @ dense[:, mixed].T, atol=2e-3)


def test_what_a_format_has_no_place_for_is_said(tmp_path):
    with pytest.raises(UsageError, match="don't divide"):
        hasten.apply(small(), "quant/round_to_nearest(group=64)").export(tmp_path / "a")
    with pytest.raises(UsageError, match="multiples of 32"):
        hasten.apply(DECODERS["llama"](), "quant/round_to_nearest(group=16)").export(tmp_path / "b", "gptq")
    with pytest.raises(UsageError, match="stands for a Conv1D"):
        hasten.apply(DECODERS["gpt2"](), "quant/round_to_nearest(group=16)").export(tmp_path / "c")
    with pytest.raises(UsageError, match="no layer"):
        hasten.apply(small(), "").export(tmp_path / "d")
    with pytest.raises(UsageError, match="no format"):
        hasten.apply(small(), "quant/round_to_nearest(group=32)").export(tmp_path / "e", "gguf")
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    with pytest.raises(UsageError, match="no transformers class"):
        hasten.apply(plain, "quant/round_to_nearest(group=32)").export(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_refused(tmp_path):
    handle = hasten.apply(small(), "quant/round_to_nearest(bits=4, group=32)")
    folder = handle.export(tmp_path / "out")
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    whole, state = file.read_bytes(), load_file(file)
    name = "model.layers.1.mlp.down_proj"

    def refused(match, **changed):
        save_file({key: value for key, value in {**state, **changed}.items() if value is not None}, file)
        with pytest.raises(UsageError, match=match):
            hasten.load_pretrained(folder)

    refused("lacks", **{f"{name}.weight_scale": None})
    refused("is due", **{f"{name}.weight_packed": state[f"{name}.weight_packed"][:, :-1].contiguous()})
    refused("is due", **{f"{name}.weight_packed": state[f"{name}.weight_packed"].float()})
    refused("NaN", **{f"{name}.weight_scale": state[f"{name}.weight_scale"] * torch.nan})
    refused("does not fit", **{"model.norm.weight": None})
    refused("lacks or which is no", **{"model.layers.7.x.weight_packed": torch.zeros(1, 1, dtype=torch.int32)})
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cut off"):
        hasten.load_pretrained(folder)
    file.write_bytes(whole)
    for path, value, match in [
        (["quant_method"], "awq", "not read"),
        (["format"], "int-quantized", "pack-quantized"),
        (["config_groups", "group_0", "weights", "num_bits"], 5, "5 bits"),
        (["config_groups", "group_0", "weights", "group_size"], 40, "groups of 40"),
    ]:
        changed = json.loads(json.dumps(config))
        inner = changed["quantization_config"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=match):
            hasten.load_pretrained(folder)


def test_saved_plans_that_lie_are_refused(tmp_path):
    """What `Handle.save` wrote, then damaged: never a crash, never a wrong number."""
    handle = hasten.apply(small(), "quant/gptq(bits=4, group=32, act_order=true)", calibration=[{"input_ids": ids()}])
    folder = handle.save(tmp_path / "out")
    record = json.loads((folder / "hasten.json").read_text())

    def refused(change, match):
        changed = json.loads(json.dumps(record))
        change(changed["records"][0]["layers"])
        (folder / "hasten.json").write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=match):
            hasten.load_pretrained(folder)

    first = next(iter(record["records"][0]["layers"]))
    refused(lambda layers: layers[first]["shape"].update(rows=63), "same model")
    refused(lambda layers: layers[first]["shape"].update(bits=5), "5 bits")
    refused(lambda layers: layers[first]["shape"].update(dtype="int64"), "no dtype")
    refused(lambda layers: layers[first].update(layer="os:system"), "of the kind")
    refused(lambda layers: layers.update({"model.nothing": layers[first]}), "lacks")
    for key, value in (("module", "os"), ("library", "builtins"), ("arguments", {"act_layer": "os:abort"})):
        lying = json.loads(json.dumps(record))
        lying["model"][key] = value
        (folder / "hasten.json").write_text(json.dumps(lying))
        with pytest.raises(UsageError, match="only classes of"):
            hasten.load_pretrained(folder)


def test_batches_with_padding_agree_after_export(tmp_path):
    handle = hasten.apply(small(), "quant/round_to_nearest(bits=8, group=32)")
    loaded = hasten.load_pretrained(handle.export(tmp_path / "out"))
    batch = padded_batch()
    batch["input_ids"] %= 61
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(loaded.model(**batch).logits[mask], handle.model(**batch).logits[mask], atol=0.05)
