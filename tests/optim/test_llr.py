import math

import pytest
import torch

from conformance.optim import adamw, finish, language_loss, lines, llama, outcome, pictures, run_of, vit
from hasten.core.errors import PlanError
from hasten.hosts.recognise import recognise
from hasten.optim.llr import LLR, llr, naive_llr

SMALL = "smallest=4"


def subject(method_class):
    return {"train": lambda method, seed: outcome(run_of(method, seed)), "options": {"smallest": 4, "every": 40}}


def heavy(rows, columns, power, seed=0):
    """A matrix whose squared singular values fall as a power of their rank: the smaller the power, the lighter."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    return left * torch.arange(1, rank + 1).float() ** (-power / 2) @ right.T


def cases():
    several = [heavy(12, 20, 0.3), heavy(20, 12, 1.0, 1), heavy(12, 20, 2.0, 2), heavy(9, 9, 0.7, 3), heavy(1, 5, 1.0)]
    yield {"args": (several, 1.0, 3.0), "tolerance": 1e-3}
    yield {"args": ([1e-4 * several[0], 1e3 * several[1], several[2].bfloat16()], 0.5, 5.0), "tolerance": 1e-3}
    yield {"args": (several[:1], 1.0, 3.0), "tolerance": 1e-6}  # no spread
    low = torch.zeros(8, 8)
    low[:2] = heavy(2, 8, 1.0)
    yield {"args": ([low, several[0], several[2]], 1.0, 3.0), "tolerance": 1e-3}  # a tail of zeros
    yield {"args": ([torch.zeros(3, 4), several[0], several[2]], 1.0, 3.0), "tolerance": 1e-3}


def test_golden_value():
    """Squared singular values 1, 2, 4, 8: the tail is 4, 8, so alpha = 1 + 2 / ln 2; of 1, 1, 1, e: 1 + 2 / 1."""
    pair = [torch.diag(torch.tensor(values).sqrt()) for values in ([1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.0, math.e])]
    between = torch.diag(torch.tensor([1.0, 1.0, 1.0, math.e**0.8]).sqrt())  # alpha = 1 + 2 / 0.8
    low, high = 1 + 2 / 1.0, 1 + 2 / math.log(2)
    wanted = torch.tensor([3.0, 1.0, 1 + 2 * (1 + 2 / 0.8 - low) / (high - low)]).double()
    torch.testing.assert_close(llr([*pair, between], 1.0, 3.0), wanted, rtol=1e-5, atol=1e-5)


def test_lighter_tails_get_larger_rates():
    weights = [heavy(60, 80, power) for power in (0.2, 0.5, 1.0, 2.0)]
    factors = llr(weights, 1.0, 3.0)
    assert factors.tolist() == sorted(factors.tolist(), reverse=True)
    assert factors[0] == 3 and factors[-1] == 1
    scaled = [w * s for w, s in zip(weights, (1e-8, 1e5, 3, 0.1), strict=True)]
    torch.testing.assert_close(llr(scaled, 1.0, 3.0), factors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(llr([w.T for w in weights], 1.0, 3.0), factors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(naive_llr(weights, 1.0, 3.0), factors, rtol=1e-3, atol=1e-3)


def test_small_matrices_keep_their_rate():
    weights = [heavy(60, 80, 0.2), heavy(49, 80, 0.2), heavy(50, 60, 2.0)]
    assert LLR().multipliers(weights).tolist() == [3.0, 1.0, 1.0]
    assert LLR(high=4.0).multipliers(weights[1:2]).tolist() == [1.0]


def rates(run):
    groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    used = dict(zip(map(id, run.optimizer.param_groups), run.rates.used, strict=True))
    return {name: used[id(groups[id(p)])] for name, p in run.model.named_parameters()}


def test_rates_of_a_run():
    """A straight line from the uniform rate to the factors, which the schedule multiplies; then they stay."""
    plan = "optim/llr(high=5, every=4, smooth=4, until=0.1, smallest=4)"
    run = run_of(plan, steps=16, schedule=lambda step, steps: 0.5)
    found = []
    for _ in range(6):
        run.slice(language_loss, steps=1)
        found.append(rates(run))
    table, norm = "model.embed_tokens.weight", "model.norm.weight"
    base = 0.5 * 3e-3
    assert [one[table] for one in found] == pytest.approx([base * f for f in (2, 3, 4, 5, 5, 5)])
    assert all(one[norm] == base for one in found)
    factors = LLR(high=5, smallest=4).multipliers([p for _, p in recognise(llama(0)).matrices()]).tolist()
    names = [name for name, _ in recognise(run.model).matrices()]
    for step, share in ((0, 0.25), (3, 1.0), (5, 1.0)):
        wanted = [base * (1 + share * (factor - 1)) for factor in factors]
        assert [found[step][name] for name in names] == pytest.approx(wanted)


def test_new_estimates_come_only_in_the_first_part():
    for until, wanted in ((0.2, [0, 3]), (1.0, [0, 3, 6, 9]), (0.0, [0])):
        run = run_of(f"optim/llr(every=3, smooth=3, until={until}, smallest=4)", steps=12)
        seen = []
        for _ in range(12):
            run.slice(language_loss, steps=1)
            seen.append(run.state["optim/llr"]["at"])
        assert sorted(set(seen)) == [step for step in wanted if step <= until * 12]


@pytest.mark.parametrize("more", ["", " + optim/sinkgd(lr=0.003, momentum=0.5)", " + optim/linear_decay"])
def test_resume_in_the_middle_of_a_line(more, tmp_path):
    plan = f"optim/llr(every=5, smooth=5, until=1, {SMALL})" + more
    run = run_of(plan, steps=12)
    losses = finish(run)
    half = run_of(plan, steps=12)
    half.slice(language_loss, steps=7)
    half.save(tmp_path / "half")
    resumed = run_of(plan, steps=12, model=llama(3), loader=lines(0), resume=tmp_path / "half")
    assert finish(resumed) == losses[7:]
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


def test_growth_in_the_middle():
    run = run_of(f"grow/g_stack(factor=2, at=0.5) + optim/llr({SMALL})", steps=8)
    finish(run)
    assert len(run.state["optim/llr"]["after"]) == 1 + 7 * 4  # the tied embedding and the matrices of four layers
    factors = [group["lr_factor"] for group in run.optimizer.param_groups if "lr_factor" in group]
    assert len(factors) == 1 + 7 * 4 and max(factors) == 3


def test_frozen_matrices_are_left_alone():
    model = llama()
    for _, weight in [*recognise(model).matrices()][:3]:
        weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run = run_of(f"optim/llr({SMALL})", model=model, optimizer=lambda model: optimizer, steps=2)
    finish(run)
    assert len(run.state["optim/llr"]["after"]) == 1 + 7 * 4 - 3
    assert len(optimizer.param_groups) == 1  # the person's own object stays as it was


def test_vit_on_digits():
    run = run_of(f"optim/llr({SMALL})", steps=3, model=vit(depth=1), loader=pictures(), optimizer=adamw)
    finish(run, lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]).logits, batch[1]))
    assert max(run.rates.used) == pytest.approx(3e-3 * (1 + 2 * 3 / 20))


@pytest.mark.parametrize("options", [{"low": 4.0}, {"smooth": 41}, {"until": 1.5}, {"high": 0.0}])
def test_bad_options(options):
    with pytest.raises(PlanError):
        LLR(**options)
    with pytest.raises(PlanError, match="steps=N"):
        run_of("optim/llr", steps=None)
