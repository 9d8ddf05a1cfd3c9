import pytest
import torch

from conformance.optim import finish, language_loss, lines, llama, outcome, run_of
from hasten.core.errors import UsageError
from hasten.grow._inheritance import cut
from hasten.grow.weight_inheritance import WeightInheritance, affinity, weight_inheritance
from hasten.hosts import recognise
from hasten.train.run import Run
from hasten.workloads import digits_pairs
from hasten.workloads.find import workload

PAIRS = workload("digits-pairs(rows=8)")


def cases():
    for rows, mine, theirs in ((5, 4, 6), (1, 3, 3), (3, 7, 2)):
        make = torch.Generator().manual_seed(rows)
        unit = [torch.randn(rows, n, generator=make) for n in (mine, mine, theirs, theirs)]
        image, text, other, another = (one / one.norm(dim=1, keepdim=True) for one in unit)
        yield {"args": (image, text, 3.0, other, another, 5.0), "grad": True, "tolerance": 1e-5}
        half = [one.bfloat16() for one in (image, text, other, another)]
        yield {"args": (half[0], half[1], 3.0, half[2], half[3], 5.0), "tolerance": 1e-5}


def student(seed=0):
    return digits_pairs.digits_clip("student", seed)


def teacher():
    """An untrained one: what is inherited and mimicked does not depend on how good it is."""
    return digits_pairs.digits_clip("teacher", 9).eval()


def clip_run(method, seed=0, steps=4, **more):
    model = student(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Run(model, optimizer, PAIRS.batches(seed), method or "", steps=steps, seed=seed, teacher=teacher(), **more)


def subject(method_class):
    return {"train": lambda method, seed: outcome(clip_run(method, seed), PAIRS.loss), "options": {}}


def test_equal_affinities_cost_nothing_and_the_temperature_is_each_models_own():
    make = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 5, generator=make), dim=-1) for _ in range(2))
    assert float(weight_inheritance(image, text, 7.0, image, text, 7.0)) == pytest.approx(0, abs=1e-6)
    assert float(weight_inheritance(image, text, 7.0, image, text, 50.0)) > 0.1
    scores = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    uniform = torch.zeros(2, 2)
    assert float(affinity(uniform, scores)) == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)


def test_leading_channels_of_every_other_layer_are_inherited():
    large, model = teacher(), student()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1), [0], WeightInheritance(alpha=0.0), teacher=large)
    theirs, mine = dict(large.named_parameters()), dict(run.model.named_parameters())
    layer = "vision_model.encoder.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(mine[layer.format(1)], theirs[layer.format(2)][:32, :32])
    down = "text_model.encoder.layers.{}.mlp.fc2.weight"
    assert torch.equal(mine[down.format(0)], theirs[down.format(0)][:32, :64])
    assert torch.equal(mine["visual_projection.weight"], theirs["visual_projection.weight"][:, :32])
    assert torch.equal(mine["logit_scale"], theirs["logit_scale"])


def test_important_channels_are_those_of_the_largest_weights_everywhere():
    large, model = teacher(), student()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            if name == "vision_model.embeddings.patch_embedding.weight":
                parameter[5:37] += 1000.0
            if name == "vision_model.encoder.layers.0.mlp.fc1.weight":
                parameter[64:] += 1000.0
    found, theirs = cut("grow/weight_inheritance", model, large, "important"), dict(large.named_parameters())
    up = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(found[up], theirs[up][64:, 5:37])
    assert torch.equal(found["vision_model.post_layernorm.weight"], theirs["vision_model.post_layernorm.weight"][5:37])


def test_a_decoder_inherits_whole_groups_of_heads():
    from transformers import LlamaConfig, LlamaForCausalLM

    from hosts.tiny import GROUPED

    shape = GROUPED | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    large = LlamaForCausalLM(LlamaConfig(**GROUPED))
    found = cut("m", LlamaForCausalLM(LlamaConfig(**shape)), large, "leading")
    query = large.get_parameter("model.layers.2.self_attn.q_proj.weight")
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], torch.cat([query[:8, :16], query[16:24, :16]]))
    for name in ("gpt2", "hf_vit", "timm_vit"):
        whole, host = _model(name), recognise(_model(name))
        same = cut("m", host.model, whole, "leading")
        assert all(torch.equal(same[key], p) for key, p in whole.named_parameters())


def _model(name):
    from hosts.test_vit import build
    from hosts.tiny import DECODERS

    return DECODERS[name]() if name in DECODERS else build(name)


def test_weights_alone_on_a_language_model_and_what_lacks_scores_is_named():
    plan = "grow/weight_inheritance(alpha=0)"
    run = run_of(plan, model=llama(3), teacher=llama(0))
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), llama(0).parameters(), strict=True))
    assert len(finish(run)) == 8
    run = run_of("grow/weight_inheritance", model=llama(3), teacher=llama(0), loader=lines(0))
    with pytest.raises(UsageError, match="no logits_per_image: set alpha=0"):
        run.slice(language_loss, steps=1)


def test_the_loss_is_mixed_and_the_teacher_stays_as_it_was():
    runs = {alpha: clip_run(WeightInheritance(alpha=alpha)) for alpha in (0.0, 0.5, 1.0)}
    for run in runs.values():
        run.slice(PAIRS.loss, steps=1)
    assert runs[0.5].loss() == pytest.approx((runs[0.0].loss() + runs[1.0].loss()) / 2, rel=1e-4)
    large = runs[1.0].context.teacher
    assert all(p.grad is None for p in large.parameters())
    assert all(torch.equal(p, q) for p, q in zip(large.parameters(), teacher().parameters(), strict=True))


def test_mimicking_ends_where_it_is_told_to():
    run, plain = clip_run(WeightInheritance(until=0.5)), []
    run.hooks.of("loss").insert(0, lambda run, loss: plain.append(float(loss.detach())) or loss)
    losses = finish(run, PAIRS.loss)
    assert losses[2:] == pytest.approx(plain[2:], rel=1e-6) and losses[0] != pytest.approx(plain[0], rel=1e-3)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    run = clip_run(WeightInheritance(alpha=0.7))
    losses = finish(run, PAIRS.loss)
    half = clip_run(WeightInheritance(alpha=0.7))
    half.slice(PAIRS.loss, steps=2)
    half.save(tmp_path)
    resumed = clip_run(WeightInheritance(alpha=0.7), resume=tmp_path)
    assert finish(resumed, PAIRS.loss) == losses[2:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_teachers_that_do_not_fit_are_named_and_nothing_is_changed():
    model = student()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UsageError, match="needs a teacher of the model's class"):
        cut("m", model, llama(), "leading")
    with pytest.raises(UsageError, match="has fewer .*width"):
        cut("m", teacher(), model, "leading")
    with pytest.raises(UsageError, match="norms"):
        clip_plan = "grow/weight_inheritance + optim/linear_decay(norms='nowhere.json')"
        Run(model, torch.optim.SGD(model.parameters(), lr=0.1), [0], clip_plan, steps=3, teacher=teacher())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
