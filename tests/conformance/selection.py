"""What selections of data are tested on: a perceptron on digits, of which some are there several times."""

import torch

from conformance.optim import adamw
from hasten.data.base import Examples
from hasten.train.run import Run
from hasten.workloads.redundant import Perceptron, redundant_digits


def losses(model, batch):
    out = model(pixel_values=batch[0])
    return torch.nn.functional.cross_entropy(getattr(out, "logits", out), batch[1], reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


def loader(seed=0, count=200, rows=8):
    images, labels, _ = redundant_digits(6, 3)
    step = len(images) // count
    data = torch.utils.data.TensorDataset(images[: step * count : step], labels[: step * count : step])
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(data, batch_size=rows, shuffle=True, generator=generator)


def small_model(seed=0):
    torch.manual_seed(seed)
    return Perceptron(8)


def run_of(plan, seed=0, steps=8, **more):
    model = small_model(seed)
    given = {"proxy": small_model(seed + 1), "losses": losses, "loader": loader(seed), **more}
    return Run(model, adamw(model), given.pop("loader"), plan or "", steps=steps, seed=seed, **given)


def begin(plan, **more):
    """A run that has made its first step, and so its first selection."""
    run = run_of(plan, **more)
    run.slice(mean_loss, steps=1)
    return run


def examples_of(run):
    return Examples("data/test", run.loader, run.device)


def outcome(run):
    """The losses of the steps to the end of the run, and the trained weights."""
    found = []
    while not run.done:
        run.slice(mean_loss, steps=1)
        found.append(run.loss())
    return [torch.tensor(found), *(p.detach() for p in run.model.parameters())]


def same_when_resumed(plan, folder, steps=12, at=7, **more):
    """Asserts that a run that goes on from a checkpoint ends bit for bit as one that was not stopped."""
    whole = outcome(run_of(plan, steps=steps, **more))
    half = run_of(plan, steps=steps, **more)
    half.slice(mean_loss, steps=at)
    half.save(folder / "half")
    resumed = outcome(run_of(plan, steps=steps, resume=folder / "half", **more))
    assert torch.equal(resumed[0], whole[0][at:])
    assert all(torch.equal(a, b) for a, b in zip(resumed[1:], whole[1:], strict=True))
