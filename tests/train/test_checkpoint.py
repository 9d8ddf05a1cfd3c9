"""A resumed run goes on bit for bit, whatever it holds; a kill while saving leaves a whole checkpoint."""

import collections
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from hasten.core.errors import UsageError
from hasten.train import NotFiniteError, Run, checkpoint
from hasten.train.tree import Packer, unpack
from train import tiny


def train(run, until, seen=None):
    """Trains to a step; notes each batch and a draw from each random state."""
    seen = [] if seen is None else seen
    if run.step == until:
        return seen
    for batch in run:
        run.backward(tiny.loss(run.model, batch))
        seen.append(torch.cat([batch[0].flatten(), torch.rand(2), torch.tensor([random.random(), np.random.rand()])]))
        if run.step == until:
            break
    return seen


def rest(run, until=12):
    """Everything that a resume must give again."""
    seen = train(run, until)
    state = Packer()
    state.pack({"o": run.optimizer.state_dict(), "m": run.model.state_dict(), "s": run.state}, "x")
    return [*seen, *state.tensors.values(), torch.get_rng_state()], (run.rates.used, run.scaler.state_dict())


def assert_same(one, other):
    assert len(one[0]) == len(other[0]) and one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def check_resume(tmp_path, make, stop=7, until=12, **options):
    """Trains, saves at `stop` and goes on; then fresh objects resume under other random states and must do the same."""
    seed_everything(1)
    run = Run(*make(), **options)
    train(run, stop)
    run.save(tmp_path / "ck")
    want = rest(run, until)
    seed_everything(99)
    fresh = make()
    seed_everything(98)
    assert_same(want, rest(Run.load(tmp_path / "ck", *fresh, **options), until))


def objects(optimizer=tiny.adamw, **data):
    model = tiny.model(seed=random.randrange(1000))
    return model, optimizer(model), tiny.loader(**data), ()


LOADERS = {
    "shuffled": {},
    "in order": {"shuffle": False},
    "ragged": {"examples": 18},
    "one batch": {"examples": 4},
    "last dropped": {"examples": 18, "drop_last": True},
}


@pytest.mark.parametrize("data", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resume_is_exact_across_passes(tmp_path, data, stop):
    check_resume(tmp_path, lambda: objects(**data), stop=stop, steps=12)


def test_resume_is_exact_with_accumulation_clip_and_schedule(tmp_path):
    check_resume(tmp_path, objects, steps=12, accumulate=2, clip=0.1, schedule=lambda step, steps: 1 - step / steps)


def test_resume_is_exact_in_the_middle_of_a_group(tmp_path):
    seed_everything(1)
    run = Run(*objects(), steps=12, accumulate=3)
    for batch in run:
        run.backward(tiny.loss(run.model, batch))
        if run.step == 4 and run.accumulated == 2:
            break
    run.save(tmp_path)
    want = rest(run)
    assert_same(want, rest(Run(*objects(), steps=12, accumulate=3, resume=tmp_path)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_is_exact_in_half_precision(tmp_path, precision):
    check_resume(tmp_path, objects, steps=12, precision=precision)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adafactor(model):
    return torch.optim.Adafactor(model.parameters(), lr=0.01)


def groups(model):
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1]}
    return torch.optim.NAdam([decayed, {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 1e-3}], lr=0.01)


class Nested(torch.optim.SGD):
    """Keeps a history in nested containers, and fp32 tensors beside half-precision weights."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                kept.setdefault("history", [torch.zeros(2)]).append(p.detach().float().sum())
                kept["inner"] = {"mean": (p.detach().float().mean(), 3), "shape": tuple(p.shape)}


@pytest.mark.parametrize("optimizer", [sgd, adafactor, groups, lambda model: Nested(model.parameters(), lr=0.1)])
def test_resume_is_exact_for_any_optimizer(tmp_path, optimizer):
    check_resume(tmp_path, lambda: objects(optimizer), steps=12)


def test_states_keep_their_number_format_beside_half_precision_weights(tmp_path):
    def make():
        model = tiny.model().bfloat16()
        optimizer = Nested(model.parameters(), lr=0.1)
        return model, optimizer, [[x.bfloat16(), y.bfloat16()] for x, y in tiny.loader()], ()

    run = Run(*make(), steps=4)
    train(run, 2)
    run.save(tmp_path)
    resumed = Run(*make(), steps=4, resume=tmp_path)
    for one, other in zip(run.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert one["inner"]["mean"][0].dtype is torch.float32
        assert torch.equal(one["inner"]["mean"][0], other["inner"]["mean"][0])
        assert [t.dtype for t in one["history"]] == [t.dtype for t in other["history"]]


def test_resume_is_exact_with_a_torch_scheduler(tmp_path):
    made = []

    def make():
        model, optimizer, loader, plan = objects(sgd)
        made.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20, cycle_momentum=False))
        return model, optimizer, loader, plan

    seed_everything(1)
    first = make()
    run = Run(*first, steps=12, schedule=made[0])
    train(run, 7)
    run.save(tmp_path)
    want = rest(run)
    again = make()
    assert_same(want, rest(Run(*again, steps=12, schedule=made[1], resume=tmp_path)))


def with_generator():
    model, optimizer, _, plan = objects()
    return model, optimizer, tiny.loader(shuffle=True, generator=torch.Generator().manual_seed(4)), plan


def with_replacement():
    sampler = RandomSampler(tiny.data(), replacement=True, num_samples=17, generator=torch.Generator().manual_seed(4))
    return *objects()[:2], DataLoader(tiny.data(), batch_size=3, sampler=sampler), ()


def of_list():
    return *objects()[:2], list(tiny.loader(shuffle=False)), ()


class Noisy(torch.utils.data.Dataset):
    """Augments with the global random state."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        inputs, targets = tiny.data()[index]
        return inputs + 0.1 * torch.randn(6), targets


def augmented():
    return *objects()[:2], DataLoader(Noisy(), batch_size=4, shuffle=True), ()


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        order = torch.randperm(20).tolist()
        return (tiny.data()[index] for index in order)


def streamed():
    return *objects()[:2], DataLoader(Streamed(), batch_size=4), ()


class Position:
    """A sampler with a state of its own, which draws as it goes."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 20:
            self.at += 1
            yield (self.at * 7) % 20
        self.at = 0

    def __len__(self):
        return 20

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def stateful_sampler():
    return *objects()[:2], DataLoader(tiny.data(), batch_size=4, sampler=Position()), ()


class StatefulLoader:
    """A loader that draws from the global state in every batch and keeps its own position."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            index = torch.randint(0, 20, (4,))
            yield [part[index] for part in tiny.data().tensors]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def stateful_loader():
    return *objects()[:2], StatefulLoader(), ()


@pytest.mark.parametrize(
    "make", [with_generator, with_replacement, of_list, augmented, streamed, stateful_sampler, stateful_loader]
)
def test_the_order_of_the_data_goes_on(tmp_path, make):
    check_resume(tmp_path, make, steps=12)


def test_the_order_goes_on_with_workers(tmp_path):
    check_resume(tmp_path, lambda: objects(num_workers=1), steps=7, stop=3, until=7)


def test_set_epoch_is_called_with_the_pass(tmp_path):
    class Epochs(RandomSampler):
        def set_epoch(self, epoch):
            self.seen = [*getattr(self, "seen", []), epoch]

    def make():
        return *objects()[:2], DataLoader(tiny.data(), batch_size=4, sampler=Epochs(tiny.data())), ()

    run = Run(*make(), steps=12)
    train(run, 12)
    assert run.loader.sampler.seen == [0, 1, 2]
    run.save(tmp_path)
    resumed = Run(*make(), steps=13, resume=tmp_path)
    train(resumed, 13)
    assert resumed.loader.sampler.seen == [2]


def test_the_own_random_state_goes_on(tmp_path):
    run = Run(*objects(), steps=9, seed=5)
    run.slice(tiny.loss, steps=4)
    run.save(tmp_path)
    run.slice(tiny.loss, steps=5)
    resumed = Run(*objects(), steps=9, seed=5, resume=tmp_path)
    torch.rand(7)
    resumed.slice(tiny.loss, steps=5)
    assert torch.equal(tiny.weights(run.model), tiny.weights(resumed.model))


def attach_state(method, run):
    run.state[method.name].update(mean=torch.zeros(3), counts={1: [2, None]})
    generator = run.generator(method.name)

    def step(run):
        kept = run.state[method.name]
        kept["mean"] = kept["mean"] * 0.9 + torch.rand(3, generator=generator)
        kept["counts"][1].append(run.step)

    run.on("step", step)
    run.on("checkpoint", lambda run, state: state.update({method.name: {"at": run.step}}))
    run.on("restore", lambda run, state: run.state[method.name].update(restored=state[method.name]["at"]))


def test_the_methods_state_and_generators_go_on(tmp_path, monkeypatch):
    tiny.family(monkeypatch, attach=attach_state)

    def make():
        return *objects()[:3], [tiny.Stub()]

    run = Run(*make(), steps=9)
    train(run, 5)
    run.save(tmp_path)
    train(run, 9)
    resumed = Run(*make(), steps=9, resume=tmp_path)
    train(resumed, 9)
    one, other = run.state["memory/stub"], resumed.state["memory/stub"]
    assert torch.equal(one["mean"], other["mean"]) and one["counts"] == other["counts"]
    assert other["restored"] == 5 and other["counts"][1][2:] == list(range(1, 10))


def test_a_resized_model_is_rebuilt_before_its_weights_are_loaded(tmp_path, monkeypatch):
    def widen(run):
        old = run.model[3]
        run.host.changes.module(run.model, "3", torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3)))
        return {run.model[3][1].bias: old.bias}

    def attach(method, run):
        run.on("step", lambda run: run.step == 4 and run.resize(widen))
        run.on("restore", lambda run, state: run.step >= 4 and run.resize(widen))

    tiny.family(monkeypatch, attach=attach)
    check_resume(tmp_path, lambda: (*objects()[:3], [tiny.Stub()]), steps=12)


def test_tied_weights_are_written_once(tmp_path):
    def make():
        model = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False))
        model[1].weight = model[0].weight
        return model, tiny.adamw(model), tiny.loader(), ()

    run = Run(*make(), steps=3)
    for batch in run:
        run.backward(run.model(batch[0]).square().mean())
    run.save(tmp_path)
    resumed = Run(*make(), steps=3, resume=tmp_path)
    assert torch.equal(resumed.model[1].weight, run.model[1].weight)
    assert resumed.model[1].weight is resumed.model[0].weight
    names = [*(tmp_path / checkpoint._current(tmp_path)).glob("common.safetensors")]
    from safetensors import safe_open

    with safe_open(names[0], "pt") as file:
        assert sum("model" in key for key in file.keys()) == 1  # noqa: SIM118


def test_errors_say_what_does_not_fit(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        Run(*objects(), resume=tmp_path / "none")
    run = Run(*objects(), steps=3)
    for batch in run:
        with pytest.raises(UsageError, match=r"after run\.backward"):
            run.save(tmp_path)
        run.backward(tiny.loss(run.model, batch))
    run.save(tmp_path)
    with pytest.raises(UsageError, match="accumulate 1, here 2"):
        Run(*objects(), accumulate=2, resume=tmp_path)
    bigger = torch.nn.Linear(6, 3)
    with pytest.raises(UsageError, match="does not fit this model"):
        Run(bigger, tiny.adamw(bigger), tiny.loader(), resume=tmp_path)
    with pytest.raises(UsageError, match="does not fit this model or optimizer"):
        Run(*objects(groups), resume=tmp_path)
    run.state["x"] = {"hook": print}
    with pytest.raises(UsageError, match=r"rank\.state\.x\.hook is a builtin"):
        run.save(tmp_path)


def test_a_run_whose_loss_is_lost_is_not_saved(tmp_path):
    run = Run(*objects(), steps=9)
    train(run, 2)
    run.save(tmp_path)
    wanted = f"the loss is inf at step 3: .*; the checkpoint of step 2 is in {tmp_path}"
    with pytest.raises(NotFiniteError, match=wanted):
        for batch in run:
            run.backward(tiny.loss(run.model, batch) * float("inf"))
    assert Run(*objects(), steps=9, resume=tmp_path).step == 2


def test_a_failure_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    run = Run(*objects(), steps=30)
    train(run, 1)
    run.save(tmp_path)
    calls = [(checkpoint, "save_file"), (checkpoint, "_write_synced"), (checkpoint, "_sync"), (os, "replace")]
    calls += [(pathlib.Path, "rename"), (checkpoint.shutil, "rmtree")]
    failures = 0
    for owner, name in calls:
        for allowed in range(8):
            step = run.step + 1
            train(run, step)
            left = [allowed]
            real = getattr(owner, name)

            def dying(*args, real=real, left=left, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying)
                try:
                    run.save(tmp_path)
                except KeyboardInterrupt:
                    failures += 1
                else:
                    assert allowed > 0
                    break
            found = Run(*objects(), steps=99, resume=tmp_path)
            assert found.step in (step - 1, step)
            if found.step == step:
                break
            run.step = step - 1  # so that each round offers the checkpoint one new step
    assert failures >= 8
    run.save(tmp_path)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == ["CURRENT", "generation"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    code = (
        "from train import tiny; from hasten.train import Run\n"
        "model = tiny.model(); run = Run(model, tiny.adamw(model), tiny.loader(), (), steps=10**9)\n"
        "for batch in run:\n"
        "    run.backward(tiny.loss(run.model, batch)); run.save('ck'); print(run.step, flush=True)\n"
    )
    here = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{here / 'src'}:{here / 'tests'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        said = [process.stdout.readline() for _ in range(5)]
        process.kill()
        said += process.stdout.readlines()
    saved = int([line for line in said if line.strip()][-1])
    assert Run(*objects(), resume=tmp_path / "ck").step in (saved, saved + 1)


def test_values_of_all_kinds_come_back():
    value = {
        "a": (1, 2.5, None, True, "text", b"\x00\xff"),
        3: [float("inf"), float("-inf"), -0.0, 1e-320, 2**80],
        "~odd": collections.deque([1, 2]),
        (1, "k"): {"set": {3, 1}, "frozen": frozenset([2])},
        "dtype": [torch.bfloat16, torch.device("cpu")],
        "arrays": [np.arange(6, dtype=np.uint32).reshape(2, 3), np.float32(1.5), np.zeros(())],
        "tensors": [torch.tensor(7), torch.empty(0, 3), torch.ones(2, 3).T, torch.ones(3, dtype=torch.bool)],
    }
    packer = Packer()
    tree = packer.pack(value, "v")
    import json

    back = unpack(json.loads(json.dumps(tree, allow_nan=False)), packer.tensors, torch.device("cpu"))
    for key in ("a", 3, "~odd", (1, "k"), "dtype"):
        assert back[key] == value[key] and type(back[key]) is type(value[key])
    assert str(back[3][2]) == "-0.0"
    for one, other in zip(back["tensors"], value["tensors"], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert np.array_equal(back["arrays"][0], value["arrays"][0]) and back["arrays"][0].dtype == np.uint32
    assert back["arrays"][1] == 1.5 and back["arrays"][2].shape == ()
    nan = unpack(Packer().pack([float("nan")], "v"), {}, torch.device("cpu"))
    assert np.isnan(nan[0])
