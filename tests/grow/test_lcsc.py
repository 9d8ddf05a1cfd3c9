import pytest
import torch

from conformance.optim import finish, language_loss, llama, run_of
from hasten.core.errors import PlanError, UsageError
from hasten.grow import _search
from hasten.grow.lcsc import LCSC
from hasten.train.run import Run

SMALL = LCSC(checkpoints=3, every=0.1, start=0.2, search_every=0.25, population=3, children=2)


def cases():
    generator = torch.Generator().manual_seed(0)
    for count, size, dtype in (
        (2, 5, torch.float32),
        (4, 3, torch.float64),
        (3, 7, torch.bfloat16),
        (1, 2, torch.half),
    ):
        points = [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]
        coefficients = torch.randn(count, generator=generator)
        coefficients[-1] = 1 - coefficients[:-1].sum()  # some are negative
        yield {"args": (points, coefficients), "tolerance": 1e-5}


def losses_of(model, batch):
    logits = model(input_ids=batch[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)


def lcsc_run(plan=SMALL, seed=0, **more):
    return run_of(plan, seed, losses=losses_of, **more)


def subject(method_class):
    def train(method, seed):
        run = lcsc_run(method, seed) if method else run_of(None, seed)
        losses = finish(run)
        run.finish()
        return [torch.tensor(losses), *(p.detach() for p in run.model.parameters())]

    options = {"checkpoints": 3, "every": 0.1, "search_every": 0.25, "population": 3, "children": 2}
    return {"train": train, "options": options}


def test_moving_averages_by_age():
    found = _search.averages(3, (0.5, 1.0))
    torch.testing.assert_close(found, torch.tensor([[1 / 7, 2 / 7, 4 / 7], [1 / 3] * 3]).double())
    torch.testing.assert_close(_search.aged(found, 4)[0], torch.tensor([0, 1 / 7, 2 / 7, 4 / 7]).double())
    torch.testing.assert_close(_search.aged(found, 2)[0], torch.tensor([2 / 7, 5 / 7]).double())


def test_the_search_finds_coefficients_that_no_average_has():
    wanted = torch.tensor([-0.4, 0.1, 0.5, 0.8]).double()  # a sum of 1 with a negative share
    generator = torch.Generator().manual_seed(2)
    tried = []

    def fitness(coefficients):
        tried.append(coefficients.clone())
        return float((coefficients - wanted).square().sum())

    start = _search.averages(4, (0.3, 0.6, 0.9))
    first = min(fitness(one) for one in start)
    best, scores = _search.evolve(fitness, start.clone(), 300, 0.1, generator)
    assert scores[0] < 0.05 * first and torch.equal(scores, scores.sort().values)
    assert all(float(one.sum()) == pytest.approx(1) for one in tried)


def test_training_goes_on_from_its_own_weights():
    run, plain = lcsc_run(steps=10), run_of("", steps=10)
    next_batches = plain.more(1)  # what the method took out to judge by
    assert len(next_batches) == 1
    assert finish(run) == finish(plain)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_the_combination_is_evaluated_and_handed_over():
    run = lcsc_run(steps=10)
    run.slice(language_loss, steps=9)
    state, own = run.state[SMALL.name], [p.detach().clone() for p in run.model.parameters()]
    assert len(state["kept"]) == 3 and run.model.training
    best = state["population"][0]
    assert float(best.sum()) == pytest.approx(1)
    wanted = sum(share * point for share, point in zip(best.float(), state["kept"], strict=True))
    with run.evaluation() as model:
        found = torch.cat([p.flatten() for p in model.parameters()])
        torch.testing.assert_close(found, wanted)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), own, strict=True))
    run.finish()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in run.model.parameters()]), wanted)


def test_a_search_is_never_worse_on_its_batches_than_the_newest_checkpoint():
    run = lcsc_run(LCSC(every=0.05, start=0.1, search_every=0.2, children=4, batches=2), steps=20)
    seen = []
    inner = _search.evolve

    def evolve(fitness, population, *more):
        newest = torch.zeros(population.shape[1]).double()
        newest[-1] = 1
        before = fitness(newest)
        found = inner(fitness, population, *more)
        seen.append((before, float(found[1][0])))
        return found

    _search.evolve = evolve
    try:
        finish(run)
    finally:
        _search.evolve = inner
    assert len(seen) >= 3 and all(best <= newest for newest, best in seen)
    assert any(best < newest for newest, best in seen)


@pytest.mark.parametrize("store", ["fp32", "bf16"])
def test_resume_is_the_same_bit_for_bit(tmp_path, store):
    plan = f"grow/lcsc(checkpoints=3, every=0.1, start=0.2, search_every=0.2, population=3, children=2, store={store})"
    run = lcsc_run(plan, steps=10)
    losses = finish(run)
    half = lcsc_run(plan, steps=10)
    half.slice(language_loss, steps=6)
    half.save(tmp_path)
    resumed = lcsc_run(plan, steps=10, model=llama(7), resume=tmp_path)
    assert finish(resumed) == losses[6:]
    for one in (run, resumed):
        one.finish()
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_after_growth_checkpoints_of_the_old_shape_are_gone():
    plan = "grow/g_stack(factor=2, at=0.5) + grow/lcsc(every=0.1, start=0.1, search_every=0.2, children=0)"
    run = lcsc_run(plan, steps=10)
    finish(run)
    run.finish()
    assert len(run.model.model.layers) == 4


def test_too_few_batches_and_no_losses():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="losses=FUNCTION"):
        Run(model, optimizer, [torch.ones(1, 4).long()], "grow/lcsc", steps=4)
    with pytest.raises(UsageError, match="number of training steps|steps=N"):
        Run(model, optimizer, [torch.ones(1, 4).long()], "grow/lcsc", losses=losses_of)
