"""Rows and tokens that leave early: blocks are skipped for real, and nobody else notices."""

import copy

import pytest
import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.hosts import recognise
from hasten.hosts.exits import put_image_exits
from hasten.hosts.lagging import LaggingLayer, Skipped
from hasten.hosts.token_exits import put_token_exits, visible_to
from hosts import tiny
from hosts.test_vit import MODELS, build, inputs_of


class Picky(nn.Module):
    """Lets the rows leave whose first patch's first number is above a bound."""

    def __init__(self, bound, ends=1, classes=7):
        super().__init__()
        self.bound, self.ends, self.classes = bound, ends, classes

    def leave(self, x, grid):
        assert x.shape[1] > grid[0] * grid[1]
        logits = [torch.full((len(x), self.classes), float(i + 1), dtype=x.dtype) for i in range(self.ends)]
        return logits, x[:, -1, 0] > self.bound


def plain_logits(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", list(MODELS))
def test_rows_leave_and_the_others_stay_as_they_are(name):
    model, inputs = build(name), inputs_of(name)
    inputs = {key: torch.cat([value, value.flip(0) * 2, value * 0.3]) for key, value in inputs.items()}
    host, counts, runs = recognise(model), {}, []
    wanted = plain_logits(model, inputs)
    seen = []
    handle = host.blocks[0].register_forward_hook(lambda _, given, out: seen.append(out[:, -1, 0]))
    plain_logits(model, inputs)
    handle.remove()
    bound = seen[0].sort().values[2].item()  # of six rows three leave after the first block
    ends = 1 + host.has_distillation_token
    for index, block in enumerate(host.blocks):
        norm = next(part for part in block.modules() if isinstance(part, nn.LayerNorm))
        norm.register_forward_hook(lambda _, given, out, index=index: runs.append((index, len(out))))
    put_image_exits(host, {0: Picky(bound, ends), 1: Picky(float("inf"), ends)}, counts)
    found = plain_logits(model, inputs)
    left = seen[0] > bound
    assert left.sum() == 3 and counts == {"1": 3, "3": 3}
    assert dict(runs) == {0: 6, 1: 3, 2: 3}
    torch.testing.assert_close(found[~left], wanted[~left], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[left], torch.full((3, 7), (1 + ends) / 2))
    again = copy.deepcopy(model)
    assert torch.equal(plain_logits(again, inputs), found) and counts == {"1": 3, "3": 3}
    host.changes.undo()
    assert torch.equal(plain_logits(model, inputs), wanted)
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_batch_that_has_left_runs_no_further_block():
    model, inputs = build("hf_vit"), inputs_of("hf_vit")
    host, counts, runs = recognise(model), {}, []
    host.blocks[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    put_image_exits(host, {0: Picky(-1e9)}, counts)
    out = model(**inputs, labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert not runs and counts == {"1": 2} and (out.logits == 1).all()
    assert out.loss.item() == pytest.approx(torch.tensor(7.0).log().item(), abs=1e-5)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 17, 32)] * 4


def test_training_runs_whole():
    model, inputs = build("hf_vit"), inputs_of("hf_vit")
    host, counts = recognise(model), {}
    put_image_exits(host, {0: Picky(-1e9)}, counts)
    assert (plain_logits(model, inputs) == 1).all() and counts == {"1": 2}
    model.train()
    out = model(**inputs).logits
    out.sum().backward()
    assert counts == {"1": 2} and not (out == 1).all()
    assert host.blocks[2].mlp.fc1.weight.grad is not None or any(
        p.grad is not None for p in host.blocks[2].parameters()
    )


def test_tokens_that_merge_and_exits_do_not_go_together():
    import hasten

    model = build("hf_vit")
    handle = hasten.apply(model, "tokens/mctf(r=4)")
    with pytest.raises(UsageError, match="merge tokens"):
        put_image_exits(handle.host, {0: Picky(0)}, {})


class Head(nn.Module):
    """Hands on the stream, scaled; remembers every token if asked."""

    def __init__(self, scale, memory):
        super().__init__()
        self.scale, self.memory, self.seen = scale, memory, []

    def remember(self, x):
        return x[:, None], x[:, None, :, :1]

    def forward(self, x, memory, visible):
        if self.memory:
            past = memory[0][:, 0]
            self.seen.append(past.shape[1])
            weights = torch.ones(len(x), x.shape[1], past.shape[1], dtype=x.dtype)
            weights = weights if visible is None else weights * visible
            x = x + 0.1 * weights @ past / weights.sum(-1, keepdim=True).clamp(min=1)
        return x * self.scale


REFUSED = {"mistral", "gemma2", "gemma3"}


def with_exits(name):
    """A model in float64 with two exits, each at the median of how sure its head is."""
    model = tiny.DECODERS[name]().double()
    host, counts = recognise(model), {}
    put_token_exits(host, {0: Head(3.0, False), 2: Head(2.0, True)}, counts, 1.0)
    shared, sure, batch = vars(host.blocks[0])["forward"].shared, [], tiny.padded_batch(16)
    inner = shared.logits
    shared.logits = lambda states: sure.append(inner(states).softmax(-1).amax(-1)) or inner(states)
    cache, mask = host.new_cache(), batch["attention_mask"]
    with torch.no_grad():
        model(input_ids=batch["input_ids"][:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        model(input_ids=batch["input_ids"][:, 8:], attention_mask=mask, past_key_values=cache)
    del shared.logits
    for index, values in zip((0, 2), sure, strict=True):
        vars(host.blocks[index])["forward"].threshold = values.median().item()
    counts.clear()
    return model, host, counts


@pytest.mark.parametrize("name", sorted(set(tiny.DECODERS) - REFUSED - {"mixtral"}))  # experts have no float64
def test_steps_come_to_what_one_forward_of_them_all_does(name):
    model, host, counts = with_exits(name)
    batch = tiny.padded_batch(16)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = host.new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache, use_cache=True)
        stepped, steps = copy.deepcopy(cache), []
        assert not counts
        whole = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
        together = dict(counts)
        counts.clear()
        for i in range(8, 16):
            out = model(
                input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=stepped, use_cache=True
            )
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    assert counts == together and sum(counts.values()) == 16 and len(counts) > 1, counts
    assert {layer.get_seq_length() for layer in stepped.layers} == {16}


@pytest.mark.parametrize("name", sorted(set(tiny.DECODERS) - REFUSED))
def test_undo(name):
    model, batch = tiny.DECODERS[name](), tiny.padded_batch()
    wanted, keys = tiny.write(model, batch), list(model.state_dict())
    host = recognise(model)
    put_token_exits(host, {0: Head(3.0, True), 2: Head(2.0, False)}, {}, 0.05)
    assert not torch.equal(tiny.write(model, batch), wanted)
    host.changes.undo()
    assert torch.equal(tiny.write(model, batch), wanted) and list(model.state_dict()) == keys


def test_skipped_layers_do_not_run_until_they_are_needed():
    model = tiny.DECODERS["llama"]().double()
    host, counts, runs = recognise(model), {}, []
    head = Head(1.0, False)
    put_token_exits(host, {1: head}, counts, 0.0)  # every token is sure
    host.blocks[3].mlp.register_forward_hook(lambda *_: runs.append("mlp"))
    host.blocks[3].self_attn.k_proj.register_forward_hook(lambda _, given, out: runs.append(out.shape[1]))
    cache, ids = host.new_cache(), tiny.padded_batch(16)["input_ids"][:1]
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        assert runs == [8, "mlp"]
        for i in range(8, 12):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert runs == [8, "mlp"] and counts == {"2": 4}
        for block in host.blocks:
            vars(block)["forward"].threshold = 1.0
        model(input_ids=ids[:, 12:13], past_key_values=cache, use_cache=True)
    assert runs == [8, "mlp", 4, 1, "mlp"] and counts == {"2": 4, "4": 1}


def test_keys_of_skipped_layers_are_those_of_the_state_that_left():
    model = tiny.DECODERS["llama"]().double()
    host = recognise(model)
    put_token_exits(host, {0: Head(1.0, False)}, {}, 0.0)
    cache, ids, streams = host.new_cache(), tiny.padded_batch(9)["input_ids"][:1], []
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        host.blocks[1].register_forward_pre_hook(lambda _, given: streams.append(given[0]))
        model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True)
    for index in (1, 3):
        (waiting,) = cache.layers[index].waiting
        assert torch.equal(waiting.x, streams[0])


@pytest.mark.parametrize("memory", [False, True])
def test_rows_do_not_see_each_other(memory):
    model = tiny.DECODERS["llama"]().double()
    put_token_exits(recognise(model), {0: Head(3.0, memory), 1: Head(2.0, True)}, {}, 0.2)
    batch = tiny.padded_batch()
    both = tiny.write(model, batch)
    for row in range(2):
        alone = tiny.write(model, {name: value[row : row + 1] for name, value in batch.items()})
        assert torch.equal(alone[0], both[row])


def test_beams_and_sampling():
    model, _, counts = with_exits("llama")
    batch = tiny.padded_batch()
    beams = tiny.write(model, batch, num_beams=3)
    assert beams.shape == (2, 17) and torch.equal(beams, tiny.write(model, batch, num_beams=3))
    torch.manual_seed(0)
    first = model.generate(**batch, max_new_tokens=5, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(**batch, max_new_tokens=5, do_sample=True)) and len(counts) > 1


def test_without_a_cache_or_in_training_all_blocks_run():
    model = tiny.DECODERS["llama"]().double()
    batch = tiny.padded_batch()
    wanted = model(**batch, use_cache=False).logits
    counts = {}
    put_token_exits(recognise(model), {0: Head(3.0, False)}, counts, 0.0)
    assert torch.equal(model(**batch, use_cache=False).logits, wanted)
    model.train()
    assert torch.equal(model(**batch, use_cache=True).logits, wanted) and not counts


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_windows_are_refused(name):
    host = recognise(tiny.DECODERS[name]())
    with pytest.raises(UsageError, match="sliding windows"):
        put_token_exits(host, {0: Head(1.0, False)}, {}, 0.5)
    assert not len(host.changes)


def test_foreign_caches_are_refused():
    from transformers import DynamicCache, StaticCache

    model, host, _ = with_exits("llama")
    for block in host.blocks:
        vars(block)["forward"].threshold = 0.0
    ids = tiny.padded_batch()["input_ids"]
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(UsageError, match="plain DynamicCache"):
        model(input_ids=ids, past_key_values=static, use_cache=True)
    other = tiny.DECODERS["llama"]().double()
    filled = DynamicCache(config=other.config)
    other(input_ids=ids, past_key_values=filled, use_cache=True)
    with pytest.raises(UsageError, match="from its first token"):
        model(input_ids=ids[:, :1], past_key_values=filled, use_cache=True)
    cache = DynamicCache()  # layers are added as they are written to
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        host.changes.undo()
        with pytest.raises(UsageError, match="lag behind"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_exits_twice_are_refused():
    _, host, _ = with_exits("llama")
    with pytest.raises(UsageError, match="already"):
        put_token_exits(host, {0: Head(1.0, False)}, {}, 0.5)


def test_a_lagging_layer_counts_crops_and_reorders():
    layer = LaggingLayer()
    layer.update(torch.arange(6.0).view(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))
    for start in (10.0, 20.0):
        x = torch.stack([torch.full((2, 4), start), torch.full((2, 4), start + 1)])
        layer.waiting.append(Skipped(x, {"position_ids": torch.arange(2)[None], "pair": (x, x)}))
    assert layer.get_seq_length() == 7 and layer.get_mask_sizes(1) == (8, 0)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.waiting[0].x[:, 0, 0].tolist() == [11, 11] and layer.keys[0, 0, 0].item() == 3
    layer.crop(-1)
    assert layer.get_seq_length() == 6 and layer.waiting[1].where["position_ids"].tolist() == [[0]]
    assert layer.waiting[1].where["pair"][0].shape == (2, 1, 4)
    layer.crop(-4)
    assert layer.get_seq_length() == 2 and not layer.waiting
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == 4
    layer.waiting.append(Skipped(torch.zeros(4, 1, 4), {}))
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.waiting[0].x.shape[0] == 1
    with pytest.raises(UsageError, match="lag behind"):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    layer.reset()
    assert layer.get_seq_length() == 0


def test_what_tokens_see():
    assert visible_to(None, 1, 5, torch.device("cpu")) is None
    assert visible_to(None, 2, 4, torch.device("cpu"))[0].long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    padded = torch.tensor([[0, 1, 1]])
    assert visible_to(padded, 3, 3, torch.device("cpu"))[0].long().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    low = torch.finfo(torch.float32).min
    added = torch.tensor([[[[low, 0.0, low], [low, 0.0, 0.0]]]])
    assert visible_to(added, 2, 3, torch.device("cpu"))[0].long().tolist() == [[0, 1, 0], [0, 1, 1]]
