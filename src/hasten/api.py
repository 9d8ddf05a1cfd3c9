"""The public verbs: apply, load_pretrained, training, generate. Families do the work; this composes them."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hasten.core.errors import PlanError, UsageError
from hasten.core.options import Method
from hasten.core.plans import Plan
from hasten.hosts import Context, Host, recognise
from hasten.hosts.records import rebuild, record_of
from hasten.train.attach import family as base_of

RECORD = "hasten.json"
WEIGHTS = "model.safetensors"
FORMAT = 2


class Handle:
    """A model with a plan applied. The model is the person's own object, changed in place, and stays plain PyTorch.

    Attributes:
        model: the changed module.
        plan: what was applied.
        host: where the model keeps its parts.
        report: facts that the methods noted, by method name.
    """

    def __init__(
        self, host: Host, plan: Plan, context: Context, records: list[dict[str, Any]], original: dict[str, Any]
    ) -> None:
        self.host, self.plan, self.context = host, plan, context
        self._records, self._original = records, original
        self._baked = False

    @property
    def model(self) -> nn.Module:
        return self.host.model

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        return self.context.report

    @property
    def simulated(self) -> str | None:
        """Why the plan gives no real speed here, or None when it does."""
        return next((str(facts["simulated"]) for facts in self.report.values() if facts.get("simulated")), None)

    def undo(self) -> nn.Module:
        """Restores the model bit for bit and returns it.

        Raises:
            UsageError: `bake` made the changes permanent.
        """
        if self._baked:
            raise UsageError("bake() made this plan permanent and freed what it replaced: load the model anew instead")
        self.host.changes.undo()
        return self.model

    def bake(self) -> nn.Module:
        """Makes the plan permanent, frees what it replaced, and returns the model."""
        self.host.changes.forget()
        self._baked = True
        return self.model

    def generate(self, *args: Any, **options: Any) -> Any:
        """`model.generate` with the plan's cache and decoding; same arguments as transformers'.

        A masked-diffusion language model fills in masks instead: `hasten.decode._denoising.denoise` has the arguments.
        """
        if self.host.kind == "diffusion_lm":
            from hasten.decode._denoising import denoise

            return denoise(self.host, *args, **options)[0]
        return self.model.generate(*args, **options)  # type: ignore[operator]

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes the weights (safetensors) and the plan with all that it decided (JSON) into a folder.

        Raises:
            UsageError: the path is a file.
        """
        from safetensors.torch import save_file

        folder = pathlib.Path(path)
        if folder.is_file():
            raise UsageError(f"{folder} is a file: give a folder to save into")
        folder.mkdir(parents=True, exist_ok=True)
        state, shared = _unshared(self.model.state_dict())
        record = {
            "format": FORMAT,
            "plan": str(self.plan),
            "records": self._records,
            "shared": shared,
            "model": self._original,
        }
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        return folder

    def export(self, path: str | pathlib.Path, format: str = "compressed-tensors") -> pathlib.Path:
        """Writes a quantized transformers model for other libraries: `format` is compressed-tensors or gptq.

        Raises:
            UsageError: the format has no place for a layer of this plan (`save` keeps everything).
        """
        from hasten.quant._exchange import export

        return export(self.host, path, format)

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, {str(self.plan)!r})"


def apply(
    model: nn.Module,
    plan: "Plan | Method | str | Iterable[Any]",
    *,
    calibration: Iterable[Any] | None = None,
    draft: nn.Module | None = None,
    teacher: nn.Module | None = None,
    tokenizer: Callable[..., Any] | None = None,
    host: Host | None = None,
    seed: int = 0,
) -> Handle:
    """Applies the model-changing methods of a plan, in the plan's order.

    Args:
        model: a transformers, diffusers or timm model, or any `nn.Module`; changed in place.
        plan: text, a `Plan`, a YAML file's path, or a list of methods.
        calibration: model inputs: dicts of tensors, tensors (a decoder's token ids, a ViT's pixels), or texts
            (then `tokenizer` is needed).
        draft, teacher: further models, for methods that need them.
        host: a description made with `hasten.describe` for a model that is not recognised.

    Raises:
        PlanError: everything that is wrong with the plan, before the model is touched.
        UsageError: the model can't be recognised, or a method can't work on it.
    """
    parsed = Plan.of(plan)
    found = host if host is not None else recognise(model)
    context = Context(_inputs(calibration, found, tokenizer), draft, teacher, seed)
    problems = []
    for method in parsed.methods:
        if not hasattr(base_of(method), "install") or getattr(method, "training_only", False):
            problems.append(f"{method.name} acts on training: use hasten.training(...) or 'hasten train'")
    _raise(problems, parsed)
    parsed.check(have=context.have(), host=found.kind)
    original = record_of(found.model)
    mark, records = len(found.changes), []
    try:
        for method in parsed.methods:
            records.append(base_of(method).install(method, found, context) or {})
    except BaseException:
        found.changes.undo(mark)
        raise
    return Handle(found, parsed, context, records, original)


def load_pretrained(path: str | pathlib.Path, model: nn.Module | None = None) -> Handle:
    """Loads what `Handle.save` wrote, or a transformers model that is quantized with compressed-tensors or GPTQ.

    Args:
        path: the folder.
        model: the original architecture, for a model that is no transformers, diffusers or timm class; its weights
            are replaced.

    Raises:
        UsageError: no such folder, a newer format, or a model that can't be rebuilt.
    """
    from safetensors.torch import load_file

    folder = pathlib.Path(path)
    if model is None and not (folder / RECORD).exists():
        from hasten.quant import _exchange

        if _exchange.is_exchanged(folder):
            found, text, decided, original = _exchange.load(folder)
            return Handle(found, Plan.parse(text), Context(), [decided], original)
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} holds no readable {RECORD}: give a folder that Handle.save(...) wrote") from None
    if record.get("format") != FORMAT:
        raise UsageError(f"{folder} was written in format {record.get('format')}; this version reads {FORMAT}")
    built = model if model is not None else rebuild(record["model"])
    plan = Plan.parse(record["plan"])
    host = recognise(built)
    for method, decided in zip(plan.methods, record["records"], strict=True):
        base_of(method).restore(method, host, decided)
    state = load_file(folder / WEIGHTS)
    state.update({name: state[source] for name, source in record["shared"].items()})
    host.model.load_state_dict(state, assign=False)
    handle = Handle(host, plan, Context(), record["records"], record["model"])
    handle.model.eval()
    return handle


def training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    plan: "Plan | Method | str | Iterable[Any]" = "",
    **options: Any,
) -> Any:
    """One training run with a plan: iterate it for batches and call `run.backward(loss)` on each.

    Args:
        model, optimizer, loader: the person's own.
        plan: as for `apply`; methods that change the model are applied first.
        options: `steps`, `accumulate`, `clip`, `precision`, `schedule`, `seed`, `teacher`, `resume`: see `hasten.Run`.
    """
    from hasten.train.run import Run

    return Run(model, optimizer, loader, Plan.of(plan), **options)


def generate(
    model: nn.Module,
    inputs: Any,
    plan: "Plan | Method | str | Iterable[Any]" = "",
    *,
    draft: nn.Module | None = None,
    teacher: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Any:
    """Generates with a plan applied for this one call; the model is restored afterwards.

    Args:
        inputs: token ids [batch, tokens], or a dict with `input_ids` and `attention_mask`.
        options: those of transformers' `generate`, or of `hasten.decode._denoising.denoise` for a masked-diffusion
            language model.

    Returns:
        `hasten.decode.base.Generated`: `tokens` [batch, tokens] and `counters`.
    """
    from hasten.decode._denoising import denoise
    from hasten.decode.base import Generated, generated

    handle = apply(model, plan, draft=draft, teacher=teacher, calibration=calibration)
    try:
        if handle.host.kind == "diffusion_lm":
            return Generated(*denoise(handle.host, inputs, **options))
        return generated(handle.host, inputs, **options)
    finally:
        handle.undo()


def _raise(problems: list[str], plan: Plan) -> None:
    if problems:
        raise PlanError(problems, str(plan))


def _inputs(
    given: Iterable[Any] | None, host: Host, tokenizer: Callable[..., Any] | None
) -> list[dict[str, Any]] | None:
    """Calibration in whatever form to a list of dicts of tensors."""
    if given is None:
        return None
    word = "input_ids" if host.kind in ("decoder", "diffusion_lm") else None
    made: list[dict[str, Any]] = []
    for one in given:
        if isinstance(one, Mapping):
            made.append(dict(one))
        elif isinstance(one, str):
            if tokenizer is None:
                raise UsageError("calibration holds texts: pass tokenizer=... too, or tokenised inputs")
            made.append(dict(tokenizer(one, return_tensors="pt")))
        elif isinstance(one, torch.Tensor):
            made.append({word or host.first_input(): one})
        else:
            raise UsageError(f"calibration holds a {type(one).__name__}: give dicts of tensors, tensors or texts")
    if not made:
        raise UsageError("calibration is empty: give at least one input")
    return made


def _unshared(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict with each storage once, and name to first name for tensors that share one (tied weights)."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor.detach().contiguous()
    return kept, shared
