import pytest
import torch

from conformance.selection import begin, examples_of, outcome, run_of, same_when_resumed, small_model
from hasten.core.errors import PlanError, UsageError
from hasten.data.dp4tl import DP4TL, dp4tl, nearness
from hasten.workloads.digits import digits
from hasten.workloads.transfer import CLASSES, Transfer, glyphs

SMALL = {"keep": 0.3, "passes": 0.5, "lr": 0.01, "rows": 8}


def downstream(kinds=(0, 1), rows=8):
    """Batches of the digits that a task is about."""
    images, labels = digits(True)
    mine = torch.isin(labels, torch.tensor(kinds))
    return list(zip(images[mine].split(rows), labels[mine].split(rows), strict=True))


def cases():
    generator = torch.Generator().manual_seed(0)
    for m, classes, keep, dtype in ((7, 5, 2, torch.float32), (1, 3, 3, torch.float64), (40, 11, 6, torch.bfloat16)):
        scores = torch.randn(m, classes, generator=generator).to(dtype)
        yield {"args": (scores, keep), "kwargs": {}, "tolerance": 0.0}
    points = torch.randn(12, 3, generator=generator), torch.randn(30, 3, generator=generator)
    yield {"args": (nearness(*points, torch.arange(30) % 6, 8), 4), "kwargs": {}, "tolerance": 0.0}


def with_task(plan, seed=0, **more):
    return run_of(plan, seed, **{"downstream": downstream(), **more})


def subject(method_class):
    return {"train": lambda method, seed: outcome(with_task(method, seed)), "options": SMALL}


def test_the_classes_that_the_task_falls_into_are_kept():
    scores = torch.full((6, 5), -9.0)
    for example, kind in enumerate((3, 3, 1, 3, 1, 4)):
        scores[example, kind] = 0.0
    assert dp4tl(scores, 2).tolist() == [1, 3] and dp4tl(scores, 3).tolist() == [1, 3, 4]
    scores[:, 2] = -8.0  # nothing falls into 0 and 2: the one that is nearer comes first
    assert dp4tl(scores, 4).tolist() == [1, 2, 3, 4]


def test_nearness_is_that_of_the_nearest_example_of_a_cluster():
    generator = torch.Generator().manual_seed(1)
    target, source = torch.randn(5, 3, generator=generator), torch.randn(20, 3, generator=generator)
    clusters = torch.arange(20) % 4
    found = nearness(target, source, clusters, 5)
    for j in range(5):
        for k in range(4):
            least = min(float((target[j] - z).norm()) for z, mine in zip(source, clusters, strict=True) if mine == k)
            assert float(found[j, k]) == pytest.approx(-least, rel=1e-4)
        assert int(clusters[(source - target[j]).norm(dim=1).argmin()]) == int(found[j].argmax())
    assert bool((found[:, 4] < -1e30).all())


@pytest.mark.parametrize("mapping", ["label", "feature"])
def test_a_short_trained_surrogate_finds_what_is_upright(mapping):
    workload = Transfer()
    every_third = torch.utils.data.TensorDataset(*(part[::3] for part in glyphs()))
    loader = torch.utils.data.DataLoader(every_third, batch_size=64)
    run = run_of(
        "", loader=loader, losses=workload.losses, proxy=workload.proxy(0), downstream=workload.downstream()
    )  # fmt: skip
    method = DP4TL(keep=0.25, passes=3.0, lr=0.01, mapping=mapping, clusters=60, iterations=3)
    chosen = method.choose(examples_of(run), run)
    labels = run.loader.dataset.tensors[1]
    related = labels[chosen] < CLASSES
    assert float(related.float().mean()) > 0.2  # of all examples an eighth are
    if mapping == "label":
        kept = run.context.report["data/dp4tl"]["classes"]
        assert len(kept) == 20 and torch.equal(torch.isin(labels, torch.tensor(kept)).nonzero()[:, 0], chosen)
        assert len(set(kept) & set(range(CLASSES))) >= 8


def test_a_surrogate_that_knows_the_classes_is_taken_as_it_is():
    class Knows(torch.nn.Module):
        def forward(self, pixel_values):
            return torch.eye(10)[[7] * (len(pixel_values) - 1) + [2]]

    run = with_task("", proxy=Knows())
    chosen = DP4TL(keep=0.2, passes=0).choose(examples_of(run), run)
    assert sorted(set(run.loader.dataset.tensors[1][chosen].tolist())) == [2, 7]


def test_resumed_in_the_middle_is_the_same_bit_for_bit(tmp_path):
    same_when_resumed(DP4TL(**SMALL), tmp_path, downstream=downstream())


def test_what_is_missing_is_named():
    with pytest.raises(PlanError, match="downstream=BATCHES"):
        run_of("data/dp4tl")
    with pytest.raises(PlanError, match="proxy=MODEL"):
        with_task("data/dp4tl", proxy=None)
    with pytest.raises(UsageError, match="no batches"):
        begin("data/dp4tl(passes=0.1)", downstream=[])
    plain = torch.utils.data.DataLoader(torch.rand(20, 1, 8, 8), batch_size=4)
    with pytest.raises(UsageError, match="class of each example"):
        begin("data/dp4tl", downstream=downstream(), loader=plain)
    with pytest.raises(UsageError, match="knows 4 classes"):
        narrow = small_model()
        narrow.head = torch.nn.Linear(8, 4)
        begin("data/dp4tl(passes=0)", downstream=downstream(), proxy=narrow)
