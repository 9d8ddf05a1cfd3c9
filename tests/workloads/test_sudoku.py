"""sudoku: grids and puzzles are what they claim, parts do not overlap, and a seed is a run."""

import torch

import hasten
from hasten.workloads import sudoku


def test_grids_and_parts():
    grids = sudoku.grids()
    assert grids.shape == (288, 16) and len(grids.unique(dim=0)) == 288
    four = grids.view(-1, 4, 4)
    boxes = four.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for units in (four, four.mT, boxes):
        assert (units.sort(-1).values == torch.arange(1, 5)).all()
    train, held_out = sudoku.parts()
    assert len(held_out) == 48 and sorted([*train.tolist(), *held_out.tolist()]) == list(range(288))


def test_puzzles_have_one_solution_and_it_is_the_given_one():
    which = torch.arange(0, 288, 12)
    made = sudoku.puzzles(which, torch.Generator().manual_seed(1))
    fits = sudoku.solutions(made)
    assert torch.equal(fits.nonzero(), torch.stack([torch.arange(24), which], 1))
    givens = (made != 0).sum(1)
    assert (givens >= 6).all() and (givens <= 9).all()
    assert (made.eq(0) | made.eq(sudoku.grids()[which])).all()
    fewest = sudoku.puzzles(which, torch.Generator().manual_seed(1), least=1)
    assert int((fewest != 0).sum(1).min()) >= 4  # fewer than four givens never determine a 4x4 grid


def test_only_the_last_round_of_a_pass_has_gradients():
    workload = hasten.workload("sudoku(width=8, passes=2, updates=2, rounds=3, rows=2)")
    model = workload.build(0)
    graded = []
    model.net.register_forward_hook(lambda _, given, out: graded.append(out.requires_grad))
    batch = next(iter(workload.batches(0)))
    assert model(batch[0]).shape == (2, 2, 16, 4)
    assert graded == ([False] * 6 + [True] * 3) * 2  # three rounds of n + 1 calls, twice
    model.recursion = (1, 1)
    graded.clear()
    workload.loss(model, batch).backward()
    assert graded == [True, True] * 2
    assert all(p.grad is not None for p in model.parameters())


def test_quality_counts_empty_cells_of_the_last_pass():
    workload = hasten.workload("sudoku(width=8)")

    class Knows(torch.nn.Module):
        def forward(self, puzzles):
            solved = sudoku.grids()[sudoku.solutions(puzzles).float().argmax(1)]
            right = 30.0 * torch.nn.functional.one_hot(solved - 1, 4)
            wrong = puzzles != 0
            return torch.stack([-right, torch.where(wrong[..., None], -right, right)])

    assert workload.evaluate(Knows()).shape == (192,)
    assert workload.evaluate(Knows()).max() < 1e-6


def test_one_seed_is_one_run():
    workload = hasten.workload("sudoku(width=8, rows=4)")
    first = [workload.loss(workload.build(3), next(iter(workload.batches(3)))) for _ in range(2)]
    other = workload.loss(workload.build(4), next(iter(workload.batches(3))))
    assert torch.equal(*first) and not torch.equal(first[0], other)
