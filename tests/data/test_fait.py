import pytest
import torch

from conformance.optim import finish, llama, outcome, run_of
from hasten.core.errors import UsageError
from hasten.data.fait import Fait, differences, fait, fork
from hasten.workloads._pairs import Pair, Pairs
from hasten.workloads.stdlib_faults import StdlibFaults

WORDS = ("a < b", "x = y + 1", "return left and right", "if n == 0:\n    n = True")
WRONG = ("a <= b", "x = y + 2", "return left or right", "if n == 0:\n    n = False")


def cases():
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (3, 5))
    labels[1, 3:] = -100
    sensitive = torch.rand(3, 5) < 0.4
    lead = torch.randn(3)
    logits = torch.randn(3, 5, 11)
    yield {"args": (logits, labels, sensitive, lead, 2.0), "grad": True}
    yield {"args": (logits, labels, sensitive, 9 * lead, 0.0), "grad": True}
    yield {"args": (logits[:1, :1], labels[:1, :1], sensitive[:1, :1], lead[:1], 5.0), "grad": True}
    yield {"args": (logits, torch.full_like(labels, -100), sensitive, lead, 2.0)}  # nothing is trained on
    yield {"args": (logits.bfloat16(), labels, sensitive, lead.bfloat16(), 2.0), "tolerance": 1e-4}


def loader(seed=0, rows=4, length=40):
    pairs = [Pair([0, *a.encode()], [0, *b.encode()]) for a, b in zip(WORDS, WRONG, strict=True)] * 4
    return torch.utils.data.DataLoader(
        Pairs(pairs, length), batch_size=rows, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


LOSS = StdlibFaults().loss


def run(plan, seed=0, **options):
    return run_of(plan, seed, loader=loader(seed), model=options.pop("model", None) or llama(seed, depth=2), **options)


def subject(method_class):
    return {"train": lambda method, seed: outcome(run(method, seed), LOSS), "options": {}}


def marked(text, wrong, by="token"):
    masks = differences([*text.encode()], [*wrong.encode()], (10,), by)
    return [
        "".join(c if m else "." for c, m in zip(t, mask, strict=True))
        for t, mask in zip((text, wrong), masks, strict=True)
    ]


def test_tokens_and_lines_that_differ():
    assert marked("x = a\ny = b < c\n", "x = a\ny = b > c\n") == ["............<...", "............>..."]
    assert marked("x = a\ny = 1\nz", "x = a\ny = 2\nz", "line") == ["......y = 1\n.", "......y = 2\n."]
    assert marked("a < b", "a <= b") == ["... .", "...=.."]  # what follows the missing token
    assert marked("a <= b", "a < b")[0] == "...=.."
    assert marked("same\n", "same\n") == [".....", "....."]


def test_weights_follow_the_models_likelihood_of_both():
    logits = torch.zeros(1, 1, 4)
    labels, sensitive = torch.tensor([[2]]), torch.tensor([[True]])
    weights = [
        float(
            fait(logits, labels, sensitive, torch.tensor([lead]), 3.0)
            / fait(logits, labels, sensitive, torch.zeros(1), 0.0)
        )
        for lead in (-20.0, 0.0, 20.0)
    ]
    assert weights == pytest.approx([1.0, 2.5, 4.0], abs=1e-5)


def test_where_the_two_part_the_scores_are_of_the_same_text():
    model = llama(depth=2)
    batch = next(iter(loader()))
    ids, variant = batch["input_ids"], batch["variant_ids"]
    with torch.no_grad():
        lead = fork(model(input_ids=ids).logits, ids, variant)
        wrong = model(input_ids=variant).logits.log_softmax(-1)
        right = model(input_ids=ids).logits.log_softmax(-1)
    for b in range(len(ids)):
        place = int((ids[b] != variant[b]).int().argmax())
        wanted = wrong[b, place - 1, variant[b, place]] - right[b, place - 1, ids[b, place]]
        torch.testing.assert_close(lead[b], wanted, rtol=1e-4, atol=1e-5)
    assert fork(
        torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    ).tolist() == [0]


@pytest.mark.parametrize("compare", ["variant", "fork"])
def test_the_loss_is_the_weighted_one(compare):
    method = Fait(strength=4.0, compare=compare)
    trained = run(method, steps=1)
    loop = iter(trained)
    batch = next(loop)
    plain = LOSS(trained.model, batch)
    trained.backward(plain)
    ids, variant, labels = (batch[key] for key in ("input_ids", "variant_ids", "labels"))
    model = llama(0, depth=2)
    with torch.no_grad():
        logits, wrong = model(input_ids=ids).logits, model(input_ids=variant).logits
    sensitive, other = method.masks(ids, variant, labels)
    lead = []
    for b in range(len(ids)):
        logp = [logits[b].log_softmax(-1), wrong[b].log_softmax(-1)]
        right = [float(logp[0][j - 1, ids[b, j]]) for j in range(1, ids.shape[1]) if sensitive[b, j]]
        false = [float(logp[1][j - 1, variant[b, j]]) for j in range(1, ids.shape[1]) if other[b, j]]
        lead.append(sum(false) / len(false) - sum(right) / len(right))
    lead = fork(logits, ids, variant) if compare == "fork" else torch.tensor(lead)
    wanted = fait(logits[:, :-1], labels[:, 1:], sensitive[:, 1:], lead, 4.0)
    assert trained.loss() == pytest.approx(float(wanted), rel=1e-4) and trained.loss() > float(plain.detach()) * 1.01


def test_what_the_variants_get_wrong_is_learnt_sooner():
    def told_apart(plan):
        trained = run(plan, steps=40)
        finish(trained, LOSS)
        batch = next(iter(loader(rows=4)))
        with torch.no_grad():
            return float(
                fork(
                    trained.model(input_ids=batch["input_ids"]).logits, batch["input_ids"], batch["variant_ids"]
                ).mean()
            )

    assert told_apart("data/fait(strength=8)") < told_apart("") - 0.3


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    losses = finish(run("data/fait", steps=9), LOSS)
    half = run("data/fait", steps=9)
    half.slice(LOSS, steps=4)
    half.save(tmp_path / "half")
    assert finish(run("data/fait", steps=9, model=llama(3, depth=2), resume=tmp_path / "half"), LOSS) == losses[4:]


def test_batches_without_variants_are_an_error():
    with pytest.raises(UsageError, match="input_ids and variant_ids"):
        finish(run_of("data/fait", model=llama(depth=2)))
    trained = run("data/fait")
    with pytest.raises(UsageError, match="the whole of input_ids"):
        finish(trained, lambda model, batch: model(input_ids=batch["input_ids"][:, :-1]).logits.mean())
    with pytest.raises(UsageError, match="of one batch"):
        Fait().checked({"input_ids": torch.ones(2, 3), "variant_ids": torch.ones(1, 3)})
