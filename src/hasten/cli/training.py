"""`hasten train`: one workload, one plan, checkpoints, curves; alone or under torchrun."""

import contextlib
import dataclasses
import gc
import inspect
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
from rich.console import Console

from hasten.bench.compare import RESULT
from hasten.core.errors import MissingDependencyError, UsageError
from hasten.core.plans import Plan
from hasten.workloads.base import Workload
from hasten.workloads.find import workload as find_workload


@dataclasses.dataclass
class Job:
    """What the command line asks for; `run` does it.

    Attributes:
        out: folder with `checkpoint`, `curve.jsonl`, `model` and `result.json`; None keeps nothing.
        every: optimizer steps between checkpoints.
        spread: ddp or fsdp, under torchrun; `rows` of the workload is then the batch of each process.
    """

    name: str
    plan: Plan
    steps: int | None
    seed: int
    out: pathlib.Path | None
    every: int
    accumulate: int
    precision: str
    tensorboard: pathlib.Path | None
    spread: str = "ddp"

    def run(self) -> int:
        workload = self._workload()
        writer = _writer(self.tensorboard)
        with _processes() as rank:
            run = self._run(workload)
            console = Console(stderr=True, quiet=rank != 0)
            began, best = time.monotonic(), None
            if run.step:
                console.print(f"resumed at step {run.step}", highlight=False)
            while True:
                done = run.slice(workload.loss, steps=workload.evaluate_every).done
                with run.evaluation() as model:
                    quality = float(workload.metric.aggregate(np.asarray(workload.evaluate(model), dtype=float)))
                best = {"step": run.step, "loss": run.loss(), "quality": quality, "seconds": time.monotonic() - began}
                console.print(
                    f"step {run.step}/{run.steps}  loss {run.loss():.4f}  {workload.metric.name} {quality:.4g}",
                    highlight=False,
                )
                if rank == 0:
                    self._note(best, writer)
                if self.out and (done or run.step // self.every > (run.step - workload.evaluate_every) // self.every):
                    run.save(self.out / "checkpoint")
                if done:
                    break
            run.finish()
            state = _whole_state(run.model)
            if self.out and rank == 0:
                _save_model(run.model, state, self.out / "model")
                result = {
                    "workload": str(workload),
                    "plan": str(self.plan),
                    "seed": self.seed,
                    **best,
                    "target": workload.target,
                }
                (self.out / RESULT).write_text(json.dumps(result, indent=1) + "\n")
            run = model = None  # DDP's reducers are freed while the process group is still there
            gc.collect()
        if writer:
            writer.close()
        return 0

    def _workload(self) -> Workload:
        found = find_workload(self.name)
        if "train" not in found.tasks():
            raise UsageError(f"{found} has no training task; it has: {', '.join(found.tasks())}")
        return dataclasses.replace(found, task="train")  # type: ignore[call-arg]

    def _run(self, workload: Workload) -> Any:
        from hasten.api import training
        from hasten.train.distributed import prepare, processes, shard

        model, loader = workload.build(self.seed), workload.batches(self.seed)
        if processes() > 1:
            model, loader = prepare(model, self.spread), shard(loader, self.seed)  # type: ignore[arg-type]
        steps = self.steps or workload.steps
        checkpoint = self.out / "checkpoint" if self.out else None
        return training(
            model,
            workload.optimizer(model),
            loader,
            self.plan,
            steps=steps,
            accumulate=self.accumulate,
            clip=workload.clip,
            precision=self.precision,
            schedule=lambda step, total: workload.schedule(step, total or steps),
            seed=self.seed,
            resume=checkpoint if checkpoint and checkpoint.exists() else None,
            **workload.lent(self.plan.methods, self.seed),
        )

    def _note(self, point: dict[str, Any], writer: Any) -> None:
        if writer:
            for key in ("loss", "quality"):
                writer.add_scalar(key, point[key], point["step"])
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "curve.jsonl").open("a") as file:
                file.write(json.dumps(point) + "\n")


def _writer(folder: pathlib.Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError("tensorboard", "track") from None
    return SummaryWriter(str(folder))


@contextlib.contextmanager
def _processes() -> Any:
    """Joins the process group that torchrun names, if any; yields the rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    from hasten.train import distributed

    distributed.join()
    try:
        yield distributed.rank()
    finally:
        distributed.leave()


def _whole_state(model: Any) -> dict[str, Any]:
    """The weights, gathered from all processes; every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from hasten.train.distributed import processes

    if processes() == 1:
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _save_model(model: Any, state: dict[str, Any], folder: pathlib.Path) -> None:
    from hasten.train.distributed import unwrap

    plain = unwrap(model)
    if hasattr(plain, "save_pretrained"):
        takes_state = "state_dict" in inspect.signature(plain.save_pretrained).parameters
        plain.save_pretrained(folder, **({"state_dict": state} if takes_state else {}))
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
