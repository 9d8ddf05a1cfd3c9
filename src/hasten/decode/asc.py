"""ASC: a constant added to the residual stream after one block makes a model's thoughts concise.

h is the stream after the block at the last token of a thought, of one problem thought about in both ways. v is added to
the stream of the prompt's last token and of every generated one, with a strength that bounds how far the next token's
distribution moves (z logits, p their softmax, u = dz/dg their slope along v, t positions inside thoughts):

    v = mean over pairs of h(concise) - h(verbose),    h' = h + g v
    KL(p || p_g) = g^2/2 Var_p(u) + O(g^3) <= kl,  so  g = sqrt(2 kl / mean_t Var_p(u))

Shapes: h [pairs, D] of each kind, z and u [positions, V].

Read were the official code, the abstract and accounts of the paper (version 2), not its theorem, of which the parts are
known (a KL bound, a Jacobian, a Hessian, a small calibration set). So `kl` and its default are ours, found on sums-lm;
the official code has a fixed strength a model (0.27, 0.46, 0.5): `gamma`. Departures: stream and shift have one place
(the code reads what enters the block after which it adds, and subtracts what it extracts as concise - verbose); all
candidates of a drafting pass are shifted, where the code shifts a pass's last position; `read=mean` takes the mean over
the thought's tokens.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode.base import Decoding
from hasten.hosts.context import Context

CARD = Card(
    title="Activation Steering for Chain-of-Thought Compression",
    paper="2507.04742",
    seams=("residual",),
    effects=("time", "quality"),
    lossless=False,
    claim="2.73x end to end on MATH500, 8B model; thoughts up to 67.43% shorter (MATH500, GSM8K) at equal accuracy",
    claimed=2.73,
    identity={"gamma": 0.0},
    experiment=("sums-lm(examples=400)", "decode/asc"),
    when="A reasoning model whose thoughts are wordy by habit, and some 50 to 100 problems solved both at length and "
    "concisely.",
    when_not="Thoughts that are long because the problem is, or a model that knows no concise way to think.",
    needs=("calibration",),
    hosts=("decoder",),
)


def naive_asc(concise: Tensor, verbose: Tensor, logits: Tensor, slopes: Tensor, kl: float) -> tuple[Tensor, float]:
    """The steering vector pair by pair, and its strength position by position, in float32.

    Args:
        concise, verbose: the stream at the end of the thoughts, [pairs, D].
        logits, slopes: z and u at positions inside thoughts, [positions, V].
        kl: the mean divergence in nats that the shift may cause.

    Returns:
        v [D] and g.
    """
    vector = torch.zeros(concise.shape[1])
    for brief, wordy in zip(concise, verbose, strict=True):
        vector = vector + (brief.float() - wordy.float()) / len(concise)
    total = 0.0
    for z, u in zip(logits.float(), slopes.float(), strict=True):
        p = torch.exp(z - torch.logsumexp(z, 0))
        hessian = torch.diag(p) - torch.outer(p, p)
        total += (u @ hessian @ u).item()
    return vector, (2 * kl / (total / len(logits))) ** 0.5


def asc(concise: Tensor, verbose: Tensor, logits: Tensor, slopes: Tensor, kl: float) -> tuple[Tensor, float]:
    """As `naive_asc`, all pairs and positions at once."""
    return steering_vector(concise, verbose), strength(spread(logits, slopes).mean().item(), kl)


def steering_vector(concise: Tensor, verbose: Tensor) -> Tensor:
    return concise.float().mean(0) - verbose.float().mean(0)


def spread(logits: Tensor, slopes: Tensor) -> Tensor:
    """Var_p(u) at each position, [positions]."""
    p, u = logits.float().softmax(-1), slopes.float()
    return (p * (u - (p * u).sum(-1, keepdim=True)).square()).sum(-1)


def strength(variance: float, kl: float) -> float:
    return (2 * kl / variance) ** 0.5


class Steering(nn.Module):
    """What is added after one block, and where: a submodule of the model, so that it moves and saves with it."""

    shift: Tensor

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.lengths: Tensor | None = None  # real tokens of each prompt [B], while generate runs
        self.reading = False  # whether the prompt is still being read
        self.where: Tensor | None = None  # bool [B or 1, T], None for all positions of the pass

    def look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Says where to add, before a pass of the model."""
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        assert ids is not None
        rows, width = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if self.lengths is None:
            self.where = torch.arange(width, device=ids.device)[None] == width - 1
        elif self.reading or not past:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(past, past + width, device=ids.device)[None]
            last = self.lengths.repeat_interleave(rows // len(self.lengths))[:, None] - 1
            self.where = positions >= last
            self.reading = bool((positions.amax(1, keepdim=True) < last).any())
        else:
            self.where = None

    def add(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Adds to what the block returns."""
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + (self.shift if self.where is None else self.where[..., None] * self.shift)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclasses.dataclass(frozen=True)
class ASC(Decoding):
    layer: int | None = option(
        None, "block after which the stream is read and shifted, from 0; None: three quarters of the depth", least=0
    )
    gamma: float | None = option(None, "strength of the shift; None takes it from kl", least=0)
    kl: float = option(5e-4, "mean divergence of the next token's distribution that the shift may cause, nats", above=0)
    read: str = option("last", "the stream at a thought's last token, or its mean", choices=("last", "mean"))
    positions: int = option(64, "positions of each wordy thought at which the divergence is measured", least=1)

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Finds the vector and its strength from the calibration set, and adds it from then on.

        A calibration batch holds, beside `input_ids` [B, T] and `attention_mask`, `concise`, bool [B], which rows think
        concisely, and perhaps `thought`, bool [B, T], which tokens are thought (by default all real ones). The same
        problems should be there in both ways.

        Raises:
            UsageError: a calibration batch without `concise`, not as many concise as wordy rows, a row without a
                thought, thoughts that don't differ, an unknown layer, or a model that is steered already.
        """
        depth = len(host.layers)
        layer = round(0.75 * (depth - 1)) if self.layer is None else self.layer
        if layer >= depth:
            raise UsageError(f"{self.name}: there is no block {layer}; the model has {depth}, counted from 0")
        if hasattr(host.model, "steering"):
            raise UsageError(f"{self.name}: this model is steered already: undo that first")
        if self.gamma == 0:
            return {"layer": None}
        batches = [_checked(self.name, batch, host.device) for batch in context.calibration or []]
        concise, verbose = self._ends(host, layer, batches)
        if len(concise) != len(verbose) or not len(concise):
            raise UsageError(
                f"{self.name}: the calibration set has {len(concise)} concise thoughts and {len(verbose)} at length: "
                "give the same problems thought about in both ways"
            )
        vector = steering_vector(concise, verbose)
        if not vector.any():
            raise UsageError(f"{self.name}: concise and wordy thoughts are the same after block {layer}")
        gamma = self.gamma if self.gamma is not None else self._strength(host, layer, batches, vector)
        context.note(self.name, layer=layer, pairs=len(concise), gamma=gamma, norm=vector.norm().item())
        self._put(host, layer, gamma * vector)
        return {"layer": layer, "width": len(vector)}

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        if record["layer"] is not None:
            self._put(host, record["layer"], torch.zeros(record["width"]))

    def _put(self, host: Any, layer: int, shift: Tensor) -> None:
        block = host.layers[layer].block
        like = next(block.parameters())
        steering = Steering(shift.to(like.device, like.dtype))
        steering.train(host.model.training)
        host.wrap_generate(functools.partial(_generate, host.model, steering))
        host.changes.set(host.model, "steering", steering)
        host.changes.hook(host.model.register_forward_pre_hook(steering.look, with_kwargs=True))
        host.changes.hook(block.register_forward_hook(steering.add))

    def _ends(self, host: Any, layer: int, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """The stream after the block at each thought's end (or its mean): concise and wordy ones, [pairs, D]."""
        found: list[Tensor] = []

        def see(index: int, before: Tensor, after: Tensor) -> None:
            if index != layer:
                return
            thought = batches[len(found)]["thought"]
            if self.read == "mean":
                weight = thought / thought.sum(1, keepdim=True)
                found.append((after.float() * weight[..., None]).sum(1))
            else:
                found.append(after[torch.arange(len(after)), _last(thought)].float())

        host.observe_layers([_inputs(batch) for batch in batches], see)
        rows, brief = torch.cat(found), torch.cat([batch["concise"] for batch in batches])
        return rows[brief], rows[~brief]

    @torch.no_grad()
    def _strength(self, host: Any, layer: int, batches: list[dict[str, Tensor]], vector: Tensor) -> float:
        """g from the mean variance of the slopes, by central differences, over positions in the wordy thoughts."""
        block = host.layers[layer].block
        dtype = next(block.parameters()).dtype
        step = 0.01 if dtype.itemsize >= 4 else 0.25  # the logits' rounding, over 2 steps, is to be far below the slope
        variances = []
        training = host.model.training
        host.model.eval()
        steering = Steering(torch.zeros_like(vector, dtype=dtype))
        handle = block.register_forward_hook(steering.add)
        try:
            for ids, first, places in self._wordy(batches):
                steering.where = (torch.arange(ids.shape[1], device=ids.device) >= first)[None]
                either = []
                for sign in (1, -1):
                    steering.shift = (sign * step * vector).to(dtype)
                    either.append(_logits(host, ids, places).float())
                variances.append(spread((either[0] + either[1]) / 2, (either[0] - either[1]) / (2 * step)))
        finally:
            handle.remove()
            host.model.train(training)
        return strength(torch.cat(variances).mean().item(), self.kl)

    def _wordy(self, batches: list[dict[str, Tensor]]) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Of each wordy row its tokens [1, T], the place of the prompt's last token, and places inside the thought."""
        for batch in batches:
            for row in (~batch["concise"]).nonzero()[:, 0].tolist():
                real = batch["attention_mask"][row].bool()
                thought = batch["thought"][row][real].nonzero()[:, 0]
                first, last = max(0, int(thought[0]) - 1), max(0, int(thought[-1]) - 1)
                count = min(self.positions, last - first + 1)
                places = torch.linspace(first, last, count, device=real.device).round().long()
                yield batch["input_ids"][row][real][None], first, places


def _checked(who: str, batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    if "concise" not in batch:
        raise UsageError(
            f"{who} needs to know which calibration thoughts are concise: give dicts with `concise`, bool [batch], "
            "beside `input_ids` (and `thought`, bool [batch, tokens], which tokens are thought)"
        )
    ids = batch["input_ids"].to(device)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.to(device)
    thought = mask.bool() & batch.get("thought", mask).to(device).bool()
    if not bool(thought.any(1).all()):
        raise UsageError(f"{who}: a calibration row has no thought in it: mark its tokens in `thought`")
    concise = torch.as_tensor(batch["concise"], device=device).bool()
    if concise.shape != ids.shape[:1]:
        raise UsageError(f"{who}: `concise` is {list(concise.shape)} for {len(ids)} rows: give a truth value for each")
    return {"input_ids": ids, "attention_mask": mask, "thought": thought, "concise": concise}


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _last(marks: Tensor) -> Tensor:
    """The place of each row's last mark, [B]."""
    return (marks * torch.arange(1, marks.shape[1] + 1, device=marks.device)).argmax(1)


def _logits(host: Any, ids: Tensor, places: Tensor) -> Tensor:
    """[places, V], without making those of other positions where the model allows that."""
    if "logits_to_keep" in inspect.signature(host.model.forward).parameters:
        return host.model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
    return host.forward({"input_ids": ids}).logits[0, places]


def _generate(model: Any, steering: Steering, inner: Any, *args: Any, **options: Any) -> Any:
    names = list(inspect.signature(type(model).generate).parameters)[1:]
    options = dict(zip(names, args, strict=False)) | options
    steering.lengths, steering.reading = _lengths(model, options), True
    try:
        return inner(**options)
    finally:
        steering.lengths, steering.where, steering.reading = None, None, False


def _lengths(model: Any, options: dict[str, Any]) -> Tensor:
    """Real tokens of each prompt, [B]. Without a mask transformers leaves out padding tokens, unless they are ends."""
    ids, mask = options.get("input_ids", options.get("inputs")), options.get("attention_mask")
    if mask is not None:
        return mask.sum(1)
    if ids is None:
        embeds = options["inputs_embeds"]
        return torch.full(embeds.shape[:1], embeds.shape[1], device=embeds.device)
    config = options.get("generation_config") or model.generation_config
    pad, ends = options.get("pad_token_id", config.pad_token_id), options.get("eos_token_id", config.eos_token_id)
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return torch.full(ids.shape[:1], ids.shape[1], device=ids.device)
    return (ids != pad).sum(1)


METHOD = ASC
