import copy

import pytest
import torch

from hasten.core.errors import UsageError
from hasten.hosts import experts, recognise

IDS = torch.arange(22).view(2, 11) * 7 % 50


def dense(kind="llama", seed=0, **more):
    import transformers

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "pad_token_id": 0,
    }
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    extra = {"head_dim": 6} if kind == "qwen3" else {}
    if kind == "llama" and more.pop("biased", False):
        extra = {"attention_bias": True}
    config = getattr(transformers, f"{name}Config")(**(shape | extra | more))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms too
    return model


def router(count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def test_mix_top_is_the_sum_over_each_tokens_best_experts():
    torch.manual_seed(0)
    x, gates = torch.randn(9, 5), torch.rand(9, 4)
    gates[:, 2] = 0  # an expert that no token visits
    made = [torch.nn.Linear(5, 5) for _ in range(4)]
    for top in (1, 2, 3):
        found = experts.mix_top(x, gates, made, top)
        for token in range(9):
            best = gates[token].argsort(descending=True)[:top]
            wanted = sum(gates[token, i] * made[i](x[token]) for i in best)
            torch.testing.assert_close(found[token], wanted)


def test_router_losses():
    even = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert experts.router_losses(even, 1)[0] == pytest.approx(1)
    one = torch.tensor([[30.0, 0.0], [30.0, 0.0]])
    assert experts.router_losses(one, 1)[0] == pytest.approx(2)
    assert experts.router_losses(one, 2)[0] == pytest.approx(1)
    assert experts.router_losses(one, 1)[1] == pytest.approx(900)


@pytest.mark.parametrize("kind", ["llama", "biased", "qwen2", "qwen3"])
@pytest.mark.parametrize("share_kv", [False, True])
def test_a_mixture_of_equal_models_computes_what_they_compute(kind, share_kv):
    model = dense("llama", biased=True) if kind == "biased" else dense(kind)
    with torch.no_grad():
        wanted = model(IDS).logits
    host = recognise(model)
    equal = [host, recognise(copy.deepcopy(model)), recognise(copy.deepcopy(model))]
    sources = experts.upcycle(host, equal, router, top=3, share_kv=share_kv)
    names = {id(p) for p in model.parameters()}
    assert all(id(new) in names for new in sources)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        first = model(IDS[:, :7], use_cache=True)
        rest = model(IDS[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, wanted[:, 7:], rtol=1e-4, atol=1e-4)
    heads = first.past_key_values.layers[0].keys.shape[1]
    assert heads == (2 if share_kv else 6)


@pytest.mark.parametrize("share_kv", [False, True])
def test_attention_experts_are_the_dense_attentions(share_kv):
    one, two = dense(seed=1), dense(seed=2)
    if share_kv:  # so that the dense ones have the shared keys
        for a, b in zip(one.model.layers, two.model.layers, strict=True):
            for name in ("k_proj", "v_proj"):
                getattr(b.self_attn, name).load_state_dict(getattr(a.self_attn, name).state_dict())
    parts = [copy.deepcopy(model.model.layers[1].self_attn) for model in (one, two)]
    host = recognise(one)
    x, states = torch.randn(2, 5, 24), torch.arange(5)[None]
    experts.upcycle(host, [host, recognise(two)], router, share_kv=share_kv)
    position = one.model.rotary_emb(x, states)
    made = one.model.layers[1].self_attn
    assert isinstance(made, experts.ExpertAttention)
    gates = (x @ made.router.T).softmax(-1)
    with torch.no_grad():
        wanted = sum(
            gates[..., i, None] * part(x, position_embeddings=position, attention_mask=None)[0]
            for i, part in enumerate(parts)
        )
        found = made(hidden_states=x, position_embeddings=position, attention_mask=None)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_expert_is_the_mean():
    one, two = dense(seed=1), dense(seed=2)
    wanted = (one.model.embed_tokens.weight + two.model.embed_tokens.weight).detach() / 2
    keys = (one.model.layers[0].self_attn.k_proj.weight + two.model.layers[0].self_attn.k_proj.weight).detach() / 2
    kept = two.model.layers[0].mlp.up_proj.weight.detach().clone()
    host = recognise(one)
    experts.upcycle(host, [host, recognise(two)], router, attention=False)
    torch.testing.assert_close(one.model.embed_tokens.weight.detach(), wanted)
    torch.testing.assert_close(one.model.layers[0].self_attn.k_proj.weight.detach(), keys)
    assert torch.equal(one.model.layers[0].mlp.experts[1].up_proj.weight, kept)
    assert one.model.layers[0].mlp.experts[1].up_proj is not two.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("share_kv", [False, True])
def test_undo_is_bit_for_bit(share_kv):
    model = dense()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(path, id(part)) for path, part in model.named_modules()]
    host = recognise(model)
    experts.run_parallel(host)
    experts.upcycle(host, [host, recognise(dense(seed=1))], router, share_kv=share_kv)
    host.changes.undo()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [(path, id(part)) for path, part in model.named_modules()] == modules
    assert "forward" not in vars(model.model.layers[0])


def test_parallel_blocks():
    model = dense()
    block = model.model.layers[0]
    seen = {}
    block.register_forward_hook(lambda _, args, kwargs, out: seen.update(x=args[0], out=out), with_kwargs=True)
    experts.run_parallel(recognise(model))
    with torch.no_grad():
        model(IDS)
        x = seen["x"]
        position = model.model.rotary_emb(x, torch.arange(11)[None])
        attended = block.self_attn(block.input_layernorm(x), position_embeddings=position, attention_mask=None)[0]
        wanted = x + attended + block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(seen["out"], wanted)


def test_models_that_do_not_fit():
    model = dense()
    host = recognise(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"architecture: model.embed_tokens.weight is \(50, 24\).*\(51, 24\)"):
        experts.upcycle(host, [host, recognise(dense(vocab_size=51))], router)
    with pytest.raises(UsageError, match="shares weights"):
        other = dense()
        other.model.embed_tokens.weight = model.model.embed_tokens.weight
        experts.upcycle(host, [host, recognise(other)], router)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    experts.upcycle(host, [host, recognise(dense(seed=1))], router)
    with pytest.raises(UsageError, match="already"):
        experts.check_alike(host, [host])


def test_attention_of_another_kind_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    made = [recognise(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))) for _ in range(2)]
    with pytest.raises(UsageError, match="attention=false"):
        experts.upcycle(made[0], made, router)
    experts.upcycle(made[0], made, router, attention=False, top=2)
    assert made[0].model(IDS % 20).logits.shape == (2, 11, 20)
