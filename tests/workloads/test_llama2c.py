"""llama2c: tiny files of the same formats made on the spot; the published ones where HASTEN_DATA is set."""

import gzip
import os
import struct

import numpy as np
import pytest
import torch

import hasten
from hasten.core.errors import PlanError, UsageError
from hasten.workloads import llama2c, llama2c_files

WIDTH, HIDDEN, LAYERS, HEADS, KV, CONTEXT, GROUP = 32, 64, 2, 4, 2, 48, 16
STORIES = [f"Once upon a time there was a cat.\nIt had {n} hats and a dog." for n in range(40)]


def pieces():
    """Special ones, bytes, characters and a few pairs, as (text, score)."""
    words = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)] + [(f"<0x{n:02X}>", 0.0) for n in range(256)]
    merged = ["th", " t", "at", " a", "re", "the", " th", "cat", " the", "ca"]
    found = sorted({letter for story in STORIES for letter in story} - {"\n", "z"})
    return words + [(w, -float(n)) for n, w in enumerate(merged)] + [(c, -1e9) for c in found]


def naive_encode(known, text):
    """llama2.c's encoder: characters, then always the pair whose union has the highest score."""
    place = {word: n for n, (word, _) in enumerate(known)}
    ids = [1, place[" "]]
    for letter in text:
        ids += [place[letter]] if letter in place else [byte + 3 for byte in letter.encode()]
    while True:
        joined = [place.get(known[a][0] + known[b][0]) for a, b in zip(ids[:-1], ids[1:], strict=True)]
        ranked = [(known[union][1], -at, union) for at, union in enumerate(joined) if union is not None]
        if not ranked:
            return ids
        _, at, union = max(ranked)
        ids[-at : -at + 2] = [union]


def sizes(words):
    kv = WIDTH // HEADS * KV
    matrices = [(WIDTH, WIDTH), (kv, WIDTH), (kv, WIDTH), (WIDTH, WIDTH)]
    return (words, WIDTH), matrices, [(HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]


def version0(file, words, rng, tied=True):
    """Writes a checkpoint and returns its arrays in the file's order."""
    embedding, attention, mlp = sizes(words)
    shapes = [embedding, (LAYERS, WIDTH), *((LAYERS, *one) for one in attention), (LAYERS, WIDTH)]
    shapes += [*((LAYERS, *one) for one in mlp), (WIDTH,), (CONTEXT, 4), (CONTEXT, 4)]
    arrays = [(rng.standard_normal(shape) / 4).astype("<f4") for shape in shapes + ([] if tied else [embedding])]
    head = struct.pack("<7i", WIDTH, HIDDEN, LAYERS, HEADS, KV, words if tied else -words, CONTEXT)
    file.write_bytes(head + b"".join(array.tobytes() for array in arrays))
    return arrays


def version2(file, words, rng):
    embedding, attention, mlp = sizes(words)
    head = struct.pack("<Ii7iBi", 0x616B3432, 2, WIDTH, HIDDEN, LAYERS, HEADS, KV, words, CONTEXT, 1, GROUP)
    norms = [np.full(2 * LAYERS * WIDTH + WIDTH, 1.5, "<f4").tobytes()]
    codes = []
    for shape in [embedding, *(one for one in attention + mlp for _ in range(LAYERS))]:
        count = int(np.prod(shape))
        code, scale = rng.integers(-127, 128, count).astype(np.int8), rng.random(count // GROUP).astype("<f4") / 200
        codes.append((code, scale))
    body = b"".join(code.tobytes() + scale.tobytes() for code, scale in codes)
    file.write_bytes(head.ljust(256, b"\0") + b"".join(norms) + body)
    return codes


@pytest.fixture
def home(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    known = pieces()
    raw = struct.pack("<I", 8)
    for word, score in known:
        raw += struct.pack("<fi", score, len(word.encode())) + word.encode()
    characters = "<unk>\t0\n<s>\t0\n</s>\t0\n\u2581\t-0\n" + "".join(
        f"{letter}\t-{n}\n" for n, letter in enumerate("etaohisndrlucw.0123456789IOpm")
    )
    contents = {
        "lm_stories260K/tok512.bin": raw,
        "lm_relu_sparse_q8/tok1024.bin": raw,
        "lm_babyllama_char/tok105.vocab": characters.encode(),
        llama2c.TEXT: gzip.compress("\n<|endoftext|>\n".join(STORIES).encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    version0(tmp_path / llama2c.MODELS["stories260k"].weights, len(known), rng)
    letters = len(characters.splitlines())
    version0(tmp_path / llama2c.MODELS["tok105"].weights, letters, rng)
    version0(tmp_path / llama2c.MODELS["tok361"].weights, letters + 256, rng)
    version2(tmp_path / llama2c.MODELS["relu_sparse"].weights, len(known), rng)
    monkeypatch.setenv("HASTEN_DATA", str(tmp_path))
    return tmp_path


def rotated(x, context):
    """llama2.c's rotary positions of [tokens, heads, size]: entries 2i and 2i+1 turn together."""
    size = x.shape[-1]
    angle = torch.arange(context)[:, None] * 10000 ** (-torch.arange(0, size, 2) / size)
    turned = (
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def norm(x, gain):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain


def naive_forward(arrays, ids, sparse=False):
    """The model as run.c computes it, from the file's arrays: scores [tokens, words]."""
    embedding, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, last = map(torch.from_numpy, arrays[:11])
    before = (lambda x: torch.relu(x - 1)) if sparse else (lambda x: x)
    act = (lambda x: torch.relu(x - 0.25)) if sparse else torch.nn.functional.silu
    x, count, size = embedding[ids], len(ids), WIDTH // HEADS
    for i in range(LAYERS):
        h = before(norm(x, norm1[i]))
        q = rotated((h @ wq[i].T).view(count, HEADS, size), count)
        k = rotated((h @ wk[i].T).view(count, KV, size), count).repeat_interleave(HEADS // KV, 1)
        v = (h @ wv[i].T).view(count, KV, size).repeat_interleave(HEADS // KV, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        seen = torch.ones(count, count).tril().bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, v).reshape(count, WIDTH) @ wo[i].T
        h = before(norm(x, norm2[i]))
        x = x + (act(h @ w1[i].T) * (h @ w3[i].T)) @ w2[i].T
    return norm(x, last) @ (embedding if len(arrays) < 14 else torch.from_numpy(arrays[13])).T


@pytest.mark.parametrize("tied", [True, False])
def test_version_0_computes_what_run_c_does(tmp_path, tied):
    arrays = version0(tmp_path / "model.bin", 97, np.random.default_rng(1), tied)
    shape, state = llama2c_files.read_weights(tmp_path / "model.bin")
    model = llama2c_files.llama(shape).eval()
    model.load_state_dict(state)
    ids = torch.randint(0, 97, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids).logits[0]
    torch.testing.assert_close(found, naive_forward(arrays, ids[0]), atol=1e-4, rtol=1e-4)


def test_version_2_computes_with_shifted_relus(home):
    words = len(pieces())
    codes = version2(home / llama2c.MODELS["relu_sparse"].weights, words, np.random.default_rng(2))
    whole = [(code.reshape(-1, GROUP) * scale[:, None]).astype(np.float32) for code, scale in codes]
    embedding, attention, mlp = sizes(words)
    parts = [np.stack(whole[1 + LAYERS * n : 1 + LAYERS * (n + 1)]) for n in range(7)]
    wq, wk, wv, wo, w1, w2, w3 = (
        part.reshape(LAYERS, *shape) for part, shape in zip(parts, attention + mlp, strict=True)
    )
    gain = np.full((LAYERS, WIDTH), 1.5, np.float32)
    arrays = [whole[0].reshape(embedding), gain, wq, wk, wv, wo, gain, w1, w2, w3, gain[0]]
    model = hasten.workload("llama2c(model=relu_sparse, prompt=20, new=8)").trained()
    ids = torch.randint(0, words, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids).logits[0]
    torch.testing.assert_close(found, naive_forward(arrays, ids[0], sparse=True), atol=1e-4, rtol=1e-4)


def test_the_tokenizer_merges_as_llama2_c_does(home):
    words = hasten.workload("llama2c(prompt=20, new=8)").tokenizer()
    for text in (*STORIES[:3], "a zebra\u00e9 the cat"):
        ids = words(text)["input_ids"]
        assert ids == naive_encode(pieces(), text) and words.decode(ids, skip_special_tokens=True).strip() == text


def test_characters_have_the_same_ids_but_for_the_bytes(home):
    one, other = (
        hasten.workload(f"llama2c(model={name}, prompt=20, new=8)").tokenizer() for name in ("tok105", "tok361")
    )
    text = "the cat had 3 hats"
    assert [n + 256 if n > 2 else n for n in one(text)["input_ids"]] == other(text)["input_ids"]
    assert one("\u00e9")["input_ids"] == [1, 3, 0] and other("\n")["input_ids"][-1] == 3 + 10


@pytest.mark.parametrize("model", sorted(llama2c.MODELS))
def test_every_model_serves(home, model):
    workload = hasten.workload(f"llama2c(model={model}, prompt=20, new=8, examples=8, batch=2)")
    assert hasten.workload(str(workload)) == workload
    handle = hasten.apply(workload.trained(), "")
    assert handle.host.kind == "decoder" and workload.quality(handle).shape == (8,)
    assert workload.serve(handle, workload.requests(0)[0]).shape == (2, 8)
    assert len(workload.tokens(False)) > 5 * len(workload.tokens(True))


def test_a_sparse_model_is_quantized_saved_and_loaded(home, tmp_path):
    workload = hasten.workload("llama2c(model=relu_sparse, prompt=20, new=8, task=perplexity)")
    model = workload.trained()
    handle = hasten.apply(model, "quant/round_to_nearest(bits=8, activations=32)")
    ids = workload.requests(0)[0]
    with torch.no_grad():
        wanted = handle.model(input_ids=ids).logits
    handle.save(tmp_path / "saved")
    again = hasten.load_pretrained(tmp_path / "saved", model=workload.build(0).eval())
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, wanted)
    with pytest.raises(UsageError, match="model=MODEL"):
        hasten.load_pretrained(tmp_path / "saved")


def test_training_starts_anew(home):
    with pytest.raises(PlanError, match="needs target="):
        hasten.workload("llama2c(task=train, length=32)")
    workload = hasten.workload("llama2c(task=train, length=32, rows=2, target=3.0)")
    batch = next(iter(workload.batches(0)))
    loss = workload.loss(workload.build(0), batch)
    assert loss.item() == pytest.approx(np.log(len(pieces())), rel=0.1)


def test_what_is_missing_is_named(home, monkeypatch, tmp_path):
    with pytest.raises(PlanError, match="at most 48 tokens"):
        hasten.workload("llama2c(prompt=48)")
    (home / llama2c.MODELS["tok105"].weights).unlink()
    with pytest.raises(UsageError, match="which has no lm_babyllama_char/tok105_model5000.bin"):
        hasten.workload("llama2c(model=tok105)").trained()
    monkeypatch.delenv("HASTEN_DATA")
    with pytest.raises(UsageError, match="set HASTEN_DATA to the folder that holds lm_stories260K/stories260K.bin"):
        hasten.workload("llama2c").trained()


def test_files_that_are_not_what_they_should_be(home):
    file = home / llama2c.MODELS["stories260k"].weights
    whole = file.read_bytes()
    for content, why in (
        (whole[:-4], "cut off"), (whole + b"\0" * 4, "another format"), (whole[:20], "no header"),
        (b"PK\x03\x04" + whole[4:], "another format"), (b"\xff" * len(whole), "no llama2.c checkpoint"),
        (struct.pack("<Ii", 0x616B3432, 1) + whole, "of version 1"),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UsageError, match=why):
            hasten.workload("llama2c(prompt=20, new=8)").trained()
    file.write_bytes(whole)
    words = home / llama2c.MODELS["stories260k"].tokens
    for content, why in ((words.read_bytes()[:-1], "cut off"), (b"", "0 tokens")):
        words.write_bytes(content)
        with pytest.raises(UsageError, match=why):
            llama2c_files.read_pieces(words)
    sparse = home / llama2c.MODELS["relu_sparse"].weights
    sparse.write_bytes(sparse.read_bytes()[:-1])
    with pytest.raises(UsageError, match="cut off"):
        hasten.workload("llama2c(model=relu_sparse, prompt=20, new=8)").trained()


published = pytest.mark.skipif(not os.environ.get("HASTEN_DATA"), reason="HASTEN_DATA is not set")


@published
@pytest.mark.parametrize("model, length, loss", [("stories260k", 512, 1.25), ("relu_sparse", 64, 1.65)])
def test_published_models_have_their_published_loss(model, length, loss):
    """Nats per token of the first 20 stories, each from its beginning."""
    workload = hasten.workload(f"llama2c(model={model})")
    trained, words = workload.trained(), workload.tokenizer()
    text = gzip.decompress(llama2c.data_file(llama2c.TEXT).read_bytes()).decode()
    losses = []
    for story in text.split(llama2c.SEPARATOR)[:20]:
        ids = torch.tensor([words(story.strip())["input_ids"][:length]])
        with torch.no_grad():
            scores = trained(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none"))
    assert torch.cat(losses).mean().item() == pytest.approx(loss, abs=0.04)


@published
def test_activations_of_the_sparse_model_are_sparse():
    workload = hasten.workload("llama2c(model=relu_sparse)")
    model, shares = workload.trained(), {"input_layernorm": [], "post_attention_layernorm": [], "act_fn": []}
    for name, part in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in shares:
            part.register_forward_hook(
                lambda _, __, out, kept=shares[kind]: kept.append((out != 0).double().mean().item())
            )
    with torch.no_grad():
        model(input_ids=torch.cat(workload.requests(0)))
    found = [float(np.mean(one)) for one in shares.values()]
    assert found == pytest.approx([0.27, 0.32, 0.23], abs=0.05)
