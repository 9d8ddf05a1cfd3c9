import pytest
import torch
from torch import nn

from conformance.optim import digits_loss, finish, language_loss, lines, llama, pictures, run_of, vit
from hasten.core.errors import UsageError
from hasten.optim.grokalign import GrokAlign, centroid_alignment, grokalign, naive_grokalign


def network(inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(inputs, 9, generator=generator), torch.randn(9, outputs, generator=generator)
    return lambda x: (x @ a).tanh() @ b


def unit(shape, seed=1):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=-1, keepdim=True)


def cases():
    generator = torch.Generator().manual_seed(0)
    for shape, outputs, projections, power in (((5, 3), 4, 1, 1), ((2, 7), 1, 3, 2), ((1, 4, 6), 5, 2, 1)):
        x = torch.randn(shape, generator=generator).requires_grad_()
        output = network(shape[-1], outputs)(x)
        yield {"args": (output, x, unit((projections, *output.shape)), power), "kwargs": {}, "grad": False}
    x = torch.randn(3, 4, 6, generator=generator).requires_grad_()
    output, real = network(6, 5)(x.cumsum(1)), torch.ones(3, 4, dtype=torch.bool)
    real[1, 2:], real[2] = False, False
    yield {"args": (output, x, unit((2, 3, 4, 5)), 2, real), "kwargs": {}, "grad": False}
    half = torch.randn(4, 6, generator=generator).bfloat16().requires_grad_()
    output = half @ torch.randn(6, 3, generator=generator).bfloat16()
    yield {"args": (output, half, unit((2, 4, 3)), 2), "kwargs": {}, "grad": False, "tolerance": 2e-2}


def test_all_projections_give_the_frobenius_norm():
    # With the C unit vectors of the axes as projections the estimate is exact: |W|_F for f(x) = W x.
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    x = torch.randn(4, 5).requires_grad_()
    axes = torch.eye(3)[:, None].expand(3, 4, 3)
    torch.testing.assert_close(grokalign(x @ w.T, x, axes, 1), w.norm())
    torch.testing.assert_close(grokalign(x @ w.T, x, axes, 2), w.square().sum())
    many = grokalign(x @ w.T, x, unit((4000, 4, 3)), 2)
    assert float((many / w.square().sum() - 1).abs()) < 0.05


def test_its_gradient_is_that_of_the_norm():
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    x = torch.randn(4, 5).requires_grad_()
    grokalign(x @ w.T, x, torch.eye(3)[:, None].expand(3, 4, 3), 2).backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_centroid_alignment():
    x = torch.tensor([[1.0, 2.0], [2.0, -1.0], [-3.0, -6.0]]).requires_grad_()
    w = torch.tensor([[3.0, 1.0], [-2.0, 1.0]])  # rows that sum to (1, 2)
    torch.testing.assert_close(centroid_alignment(x @ w.T, x), torch.tensor([1.0, 0.0, -1.0]))


class Perceptron(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, pixel_values):
        return self.layers(pixel_values)


def perceptron_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def norm_of(model):
    x = next(iter(pictures(9)))[0].requires_grad_()
    output = model(x)
    return float(naive_grokalign(output, x, torch.eye(10)[:, None].expand(10, len(x), 10), 1))


def test_the_jacobian_stays_smaller_and_the_loss_falls():
    norms = []
    for plan in ("", "optim/grokalign(jacobian=0.3)"):
        run = run_of(plan, steps=60, model=Perceptron(), loader=pictures())
        losses = finish(run, perceptron_loss)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        norms.append(norm_of(run.model))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("steps", [5, 6])
def test_a_resumed_run_ends_bit_for_bit_the_same(steps, tmp_path):
    plan = "optim/grokalign(jacobian=0.1, every=2)"
    run = run_of(plan, steps=10)
    losses = finish(run)
    half = run_of(plan, steps=10)
    half.slice(language_loss, steps=steps)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=10, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[steps:]
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_tokens_go_by_their_embeddings_and_padding_is_left_out():
    seen = []

    class Watched(GrokAlign):
        def _penalty(self, run, output, x, inputs):
            seen.append((tuple(output.shape), tuple(x.shape), tuple(inputs)))
            return super()._penalty(run, output, x, inputs)

    def loss(model, batch):
        mask = torch.ones_like(batch)
        mask[0, 5:] = 0
        return model(input_ids=batch, attention_mask=mask, labels=batch).loss

    run = run_of("", steps=2)
    Watched.__module__ = GrokAlign.__module__
    run.state["optim/grokalign"] = {}
    Watched(jacobian=0.1).attach(run)
    finish(run, loss)
    assert seen == [((8, 32, 256), (8, 32, 24), ("input_ids", "attention_mask", "labels"))] * 2


def test_vit_takes_its_pixels():
    run = run_of("optim/grokalign(jacobian=0.01)", steps=3, model=vit(depth=1), loader=pictures())
    plain = run_of("", steps=3, model=vit(depth=1), loader=pictures())
    one, other = finish(run, digits_loss), finish(plain, digits_loss)
    assert one[0] > other[0] and len(one) == 3


def test_what_makes_the_inputs_is_still_trained():
    before = nn.Linear(64, 64)
    model = nn.Sequential(Perceptron(), nn.Identity())

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(before(batch[0].flatten(1))), batch[1])

    run = run_of("optim/grokalign(jacobian=0.1)", steps=1, model=model, loader=pictures())
    seen = []
    run.on("gradients", lambda run: seen.append(before.weight.grad.norm().item()))
    finish(run, loss)
    assert seen[0] > 0


def test_every_second_batch():
    two = finish(run_of("optim/grokalign(jacobian=1.0, every=2)", steps=3))
    one, none = finish(run_of("optim/grokalign(jacobian=1.0)", steps=3)), finish(run_of("", steps=3))
    assert two[0] == one[0] > none[0] and two[1] < one[1] - 0.1


def test_finish_takes_its_hooks_away_and_evaluation_is_undisturbed():
    run = run_of("optim/grokalign(jacobian=0.1)", steps=2)
    finish(run)
    with run.evaluation() as model:
        assert not model(input_ids=next(iter(lines()))).logits.requires_grad
    run.finish()
    left = [module for module in run.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not left


def test_a_model_of_tokens_without_an_embedding_is_an_error():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(256, 8)

        def forward(self, ids):
            return self.table(ids)

    run = run_of("optim/grokalign", model=Counting())
    with pytest.raises(UsageError, match="get_input_embeddings"):
        run.slice(lambda model, batch: model(batch).square().mean(), steps=1)
    with pytest.raises(UsageError, match=r"run\.model"):
        run = run_of("optim/grokalign")
        run.slice(lambda model, batch: next(model.parameters()).sum(), steps=1)
