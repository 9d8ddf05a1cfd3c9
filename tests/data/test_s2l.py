import pytest
import torch

from conformance.selection import begin, examples_of, losses, outcome, run_of, same_when_resumed
from hasten.core.errors import PlanError, UsageError
from hasten.data import _proxies
from hasten.data.s2l import S2L, s2l
from hasten.workloads.redundant import Redundant, redundant_digits

SMALL = "data/s2l(fraction=0.2, clusters=10, passes=0.5, checkpoints=3, lr=0.01, iterations=5)"


def cases():
    generator = torch.Generator().manual_seed(0)
    for n, checkpoints, count, clusters, iterations, dtype in (
        (40, 3, 13, 5, 4, torch.float32),
        (23, 1, 22, 8, 2, torch.float64),
        (17, 2, 5, 17, 0, torch.float32),
        (60, 4, 60, 3, 20, torch.bfloat16),
    ):
        trajectories = torch.rand(n, checkpoints, generator=generator).to(dtype)
        keys = torch.rand(n, generator=generator, dtype=torch.float64)
        for draws in (None, torch.rand(clusters, generator=generator, dtype=torch.float64)):
            yield {"args": (trajectories, keys, draws, count, clusters, iterations), "kwargs": {}, "tolerance": 0.0}


def subject(method_class):
    return {
        "train": lambda method, seed: outcome(run_of(method, seed)),
        "options": {"fraction": 0.2, "clusters": 10, "passes": 0.5, "checkpoints": 2, "iterations": 5},
    }


def test_small_clusters_are_taken_whole_and_leave_their_share_to_the_large():
    sizes, at = (3, 7, 50), (0.0, 10.0, 20.0)
    trajectories = torch.cat([torch.full((size, 2), place) for size, place in zip(sizes, at, strict=True)])
    keys = torch.rand(60, generator=torch.Generator().manual_seed(0))
    keys[torch.tensor([0, 3, 10])] = torch.tensor([-3.0, -2.0, -1.0])  # k-means begins with one example of each
    chosen = s2l(trajectories, keys, None, 30, 3, 5)
    counts = [int(((chosen >= low) & (chosen < high)).sum()) for low, high in ((0, 3), (3, 10), (10, 60))]
    assert counts == [3, 7, 20]  # shares 30 // 3 = 10, then 27 // 2 = 13, then what is left
    assert [int(((c := s2l(trajectories, keys, None, 12, 3, 5)) < 3).sum()), int(((c >= 3) & (c < 10)).sum())] == [3, 4]


def test_clusters_of_one_or_two_examples_come_last():
    trajectories = torch.cat([torch.zeros(20, 1), torch.tensor([[50.0], [50.0]])])
    keys = torch.arange(22.0).flip(0)
    assert s2l(trajectories, keys, None, 10, 2, 5).max() < 20
    assert s2l(trajectories, keys, None, 21, 2, 5).tolist() == [*range(20), 21]


def test_a_proxy_finds_the_rare_among_copies():
    workload = Redundant()
    run = run_of("", loader=workload.batches(0), proxy=workload.proxy(0))
    examples = examples_of(run)
    chosen = S2L(fraction=0.4, clusters=30, passes=3.0, checkpoints=4, lr=0.01, start="spread").choose(examples, run)
    source = redundant_digits(workload.spacing, workload.copies)[2]
    copied = torch.bincount(source)[source] > 1
    assert float(copied[chosen].float().mean()) < 0.6 * float(copied.float().mean())
    assert len(chosen) == round(0.4 * len(source)) and len(chosen.unique()) == len(chosen)


def test_the_persons_proxy_and_random_state_stay_as_they_are():
    run = run_of("")
    proxy = run.context.proxy
    before, state = [p.clone() for p in proxy.parameters()], torch.get_rng_state()
    S2L(fraction=0.5, passes=0.2).choose(examples_of(run), run)
    assert all(torch.equal(p, q) for p, q in zip(proxy.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_resumed_in_the_middle_is_the_same_bit_for_bit(tmp_path):
    same_when_resumed(SMALL, tmp_path)


def test_what_is_missing_is_said_before_anything_is_trained():
    with pytest.raises(PlanError, match="proxy=MODEL"):
        run_of(SMALL, proxy=None)
    with pytest.raises(PlanError, match="losses=FUNCTION"):
        run_of(SMALL, losses=None)
    with pytest.raises(UsageError, match="is none: raise fraction"):
        begin("data/s2l(fraction=0.001)")
    with pytest.raises(UsageError, match="lower its lr"):
        begin("data/s2l(fraction=0.5)", losses=lambda model, batch: losses(model, batch) / 0)


def test_labels_come_from_pairs_or_are_missed():
    run = run_of("")
    examples = examples_of(run)
    assert torch.equal(_proxies.labels_of(examples, "x"), run.loader.dataset.tensors[1])
    alone = torch.utils.data.DataLoader(torch.rand(10, 3), batch_size=2)
    with pytest.raises(UsageError, match="class of each example"):
        _proxies.labels_of(examples_of(run_of("", loader=alone)), "x")
