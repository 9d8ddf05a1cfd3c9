import pytest
import torch

from conformance.selection import begin, mean_loss, outcome, run_of, same_when_resumed
from hasten.core.errors import PlanError, UsageError
from hasten.data import _augment
from hasten.data.data_efficient_augmentation import (
    DataEfficientAugmentation,
    Doubled,
    data_efficient_augmentation,
    shares,
)
from hasten.workloads.augmented_digits import Warped

SMALL = {"fraction": 0.2, "every": 1, "augmentation": "crop"}


def cases():
    generator = torch.Generator().manual_seed(0)
    for n, d, classes, count, dtype in (
        (20, 3, 2, 7, torch.float32),
        (13, 4, 5, 13, torch.float64),
        (9, 1, 1, 4, torch.bfloat16),
        (16, 2, 3, 1, torch.float32),
    ):
        labels = torch.arange(n) % classes
        yield {"args": (torch.randn(n, d, generator=generator).to(dtype), labels, count), "tolerance": 0.0}
    copies = torch.randn(3, 2, generator=generator).repeat(4, 1)
    yield {"args": (copies, torch.zeros(12, dtype=torch.int64), 5), "tolerance": 0.0}


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": SMALL}


def test_the_subset_stands_for_all():
    at = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    generator = torch.Generator().manual_seed(0)
    gradients = at.repeat_interleave(torch.tensor([12, 5, 3]), 0) + 0.1 * torch.randn(20, 2, generator=generator)
    chosen, gamma = data_efficient_augmentation(gradients, torch.zeros(20, dtype=torch.int64), 3)
    places = torch.arange(3).repeat_interleave(torch.tensor([12, 5, 3]))
    assert places[chosen].tolist() == [0, 1, 2] and gamma.tolist() == [12, 5, 3]


def test_classes_share_the_subset_and_small_ones_are_whole():
    assert shares([2, 10, 10], 14) == [2, 6, 6] and shares([5, 5], 3) == [2, 1] and shares([0, 4], 4) == [0, 4]


def doubled(mode="full", **more):
    run = begin(DataEfficientAugmentation(mode=mode, **{**SMALL, **more}))
    return run, run.stream.loader


def test_a_pass_has_all_examples_and_the_augmented_ones_of_the_subset():
    run, loader = doubled()
    entries = run.state["data/data_efficient_augmentation"]["entries"]
    data = loader.dataset
    assert isinstance(data, Doubled) and len(data) == 400 and len(entries) == 240
    assert entries[:200].tolist() == list(range(200)) and len(loader) == 30
    labels = torch.tensor([int(data[int(i)][1]) for i in entries[200:]])
    assert torch.equal(labels, torch.tensor([int(data[int(i) - 200][1]) for i in entries[200:]]))
    assert len(labels.unique()) == 10
    changed = [not torch.equal(data[int(i)][0], data[int(i) - 200][0]) for i in entries[200:]]
    assert sum(changed) > 20  # some are moved by nothing


def test_the_coreset_alone_with_and_without_weights():
    for weights in (False, True):
        run, _ = doubled("coreset", weights=weights)
        entries = run.state["data/data_efficient_augmentation"]["entries"]
        assert len(entries) == 80 and torch.equal(entries[:40] + 200, entries[40:])
        assert (len(entries.unique()) < 80) == weights


def test_the_choice_follows_the_model_every_r_passes():
    run = run_of(DataEfficientAugmentation(**{**SMALL, "every": 2, "fraction": 0.1}), steps=84)  # 28 steps a pass
    found = []
    while not run.done:
        run.slice(mean_loss, steps=28)
        found.append(run.state["data/data_efficient_augmentation"]["entries"].clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_augmentation_differs_from_pass_to_pass_and_not_within_one():
    data = Doubled(Warped(2), Warped(2).augment, seed=3)
    first = data[400][0]
    assert torch.equal(first, data[400][0])
    assert not torch.equal(first, data.plain(40)[0]) and torch.equal(data[40][0], data.plain(40)[0])
    data.turn.fill_(1)
    assert not torch.equal(first, data[400][0])


def test_the_data_sets_own_augmentation():
    loader = torch.utils.data.DataLoader(Warped(2), batch_size=8, shuffle=True)
    run = begin(DataEfficientAugmentation(fraction=0.1), loader=loader)
    entries = run.state["data/data_efficient_augmentation"]["entries"]
    assert len(entries) == 360 + 36


@pytest.mark.parametrize("name", _augment.NAMES)
def test_named_augmentations_keep_the_shape_and_follow_the_generator(name):
    image = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    augment = _augment.find([(image, 1)], name, "x")
    made = [augment((image, 1), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == 1 and made[0][0].shape == image.shape
    assert any(not torch.equal(one[0], image) for one in made) and torch.equal(image, before)
    assert float(made[0][0].min()) >= 0 and float(made[0][0].max()) <= 1


def test_resumed_in_the_middle_is_the_same_bit_for_bit(tmp_path):
    same_when_resumed(DataEfficientAugmentation(**{**SMALL, "mode": "coreset"}), tmp_path, steps=24, at=13)


def test_what_is_missing_is_named_before_anything_changes():
    with pytest.raises(PlanError, match="losses=FUNCTION"):
        run_of(DataEfficientAugmentation(**SMALL), losses=None)
    with pytest.raises(PlanError, match="needs mode=coreset"):
        DataEfficientAugmentation(weights=True)
    with pytest.raises(UsageError, match="no augment"):
        run_of(DataEfficientAugmentation())
    plain = torch.utils.data.DataLoader(torch.rand(20, 1, 8, 8), batch_size=4)
    with pytest.raises(UsageError, match="class of each example"):
        run_of(DataEfficientAugmentation(**SMALL), loader=plain)
    flat = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(9, 4), torch.arange(9)), batch_size=3)
    with pytest.raises(UsageError, match="begin with an image"):
        run_of(DataEfficientAugmentation(**SMALL), loader=flat)
    with pytest.raises(UsageError, match="by index"):
        run_of(DataEfficientAugmentation(**SMALL), loader=[1, 2])
