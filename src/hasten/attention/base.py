"""Which keys a query sees: the family's protocol and its executor.

A method for prompts and training (`SparseAttention`) has one verb that matters:

    select(call, kept) -> Blocks     which key blocks each query block sees (`math.blocks`)

and a few that most methods leave alone: `layers` (which layers are changed), `mix` (more than one attention),
`modules` (weights of its own), `calibrate` (decisions from data), `prepare` (a cache of its own). The executor takes
the place of softmax attention in the chosen layers, asks the method, computes the chosen blocks and nothing else
(`kernels.block_attention`), and reports the share of the dense pairs that was computed.

A method for decoding that leaves the cache whole (`Reading`, `attention._reading`) chooses which tokens a step reads.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.core.options import Method
from hasten.hosts.attention import Call
from hasten.hosts.base import Host
from hasten.hosts.context import Context
from hasten.kernels import block_attention
from hasten.math.blocks import Blocks

EXTRA = "hasten_attention"  # the name under which a method's own weights stand in the attention module


@dataclasses.dataclass
class Kept:
    """What the executor keeps for one layer.

    Attributes:
        index: of the layer; depth: layers of the model.
        record: what `calibrate` decided.
        module: the method's own weights in this layer, or None.
        memo: for patterns that depend on shapes alone; the method chooses keys.
    """

    index: int
    depth: int
    record: dict[str, Any]
    module: nn.Module | None = None
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def once(self, key: Any, make: Any) -> Any:
        """`make()`, remembered under a key; the latest few only."""
        if key not in self.memo:
            while len(self.memo) >= 8:
                del self.memo[next(iter(self.memo))]
            self.memo[key] = make()
        return self.memo[key]


@dataclasses.dataclass(frozen=True)
class SparseAttention(Method):
    """Base of methods that choose key blocks for prompts and in training."""

    decodes = False  # whether `select` is asked for single queries too; else they see the whole cache
    from_first = False  # whether a whole prompt's rows come without the padding in front, put behind them instead

    @property
    def idle(self) -> bool:
        """Whether nothing is to change."""
        return False

    def layers(self, depth: int) -> list[int]:
        """The layers whose attention is sparse."""
        return list(range(depth))

    def select(self, call: Call, kept: Kept) -> Blocks | None:
        """The blocks that each query block sees; None computes this call densely, which the report counts.

        `call.range()` has the padding, which the executor applies; `kept.once` remembers what depends on shapes alone.
        """
        raise NotImplementedError

    def mix(self, call: Call, blocks: Blocks, kept: Kept) -> torch.Tensor:
        """The attention's output [B, H, Nq, e] from the chosen blocks."""
        begin, end = call.range()
        return block_attention.attention(
            call.query, call.key, call.value, blocks, scaling=call.scaling, causal=call.causal, begin=begin, end=end
        )

    def modules(self, attention: nn.Module, layer: int, host: Host) -> nn.Module | None:
        """Weights of the method's own for one layer, freshly initialised; they are saved and trained with the model."""
        return None

    def calibrate(self, host: Host, context: Context) -> dict[str, Any]:
        """Decisions from calibration data, JSON-able; given back as `kept.record`."""
        return {}

    def facts(self, call: Call, kept: Kept) -> dict[str, Any]:
        """What the report says beside the counts, JSON-able; asked at each sparse call, so it must cost nothing."""
        return {}

    def prepare(self, host: Host, record: dict[str, Any]) -> None:
        """Further changes to the model, through `host.changes` (a cache of the method's own)."""


@dataclasses.dataclass
class Tally:
    """Counts over the calls of one model, for the report."""

    calls: int = 0
    dense: int = 0
    density: float = 0.0

    def add(self, density: float | None) -> dict[str, Any]:
        self.calls += 1
        if density is None:
            self.dense += 1
        else:
            self.density += density
        sparse = self.calls - self.dense
        mean = round(self.density / sparse, 4) if sparse else 1.0
        return {"sparse_calls": sparse, "dense_calls": self.dense, "density": mean}


def install(method: Any, host: Host, context: Context) -> dict[str, Any]:
    """Makes the attention of the chosen layers sparse.

    The report has the calls computed sparsely and densely, and the mean density of the former: pairs computed over the
    pairs of dense attention.

    Raises:
        UsageError: a model whose attention can't be taken over, or of the wrong kind; an encoder-decoder; layers that
            see only a part of the text (sliding or chunked windows); a layer that is not there.
    """
    if not isinstance(method, SparseAttention):
        from hasten.attention import _reading

        return _reading.install(method, host, context)
    _check(method, host)
    record = {} if method.idle else method.calibrate(host, context)
    _change(method, host, record, lambda facts: context.note(method.name, **facts))
    return record


def restore(method: Any, host: Host, record: dict[str, Any]) -> None:
    """The same change from the record."""
    if not isinstance(method, SparseAttention):
        from hasten.attention import _reading

        _reading.restore(method, host, record)
        return
    _check(method, host)
    _change(method, host, record, lambda facts: None)


def _check(method: SparseAttention, host: Host) -> None:
    name = type(host.model).__name__
    if not hasattr(host, "attend_with"):
        raise UsageError(f"{method.name} needs a model whose attention can be taken over; {name} is a {host.kind}")
    config = getattr(host.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{method.name} works on decoders and encoders, and {name} is an encoder-decoder")
    if host.kind != "decoder" or not hasattr(config, "get_text_config"):
        return
    text = config.get_text_config(decoder=True)
    partial = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if partial or window or getattr(text, "attention_chunk_size", None):
        kind = ", ".join(sorted(partial)) or "sliding windows"
        raise UsageError(f"{method.name} needs layers that see the whole text; {name} has others ({kind})")


def _change(method: SparseAttention, host: Any, record: dict[str, Any], note: Any) -> None:
    if method.idle:
        return
    layers = host.layers
    chosen, tally = method.layers(len(layers)), Tally()
    wrong = [i for i in chosen if not 0 <= i < len(layers)]
    if wrong:
        raise UsageError(f"{method.name} names layer {wrong[0]}; this model has the layers 0 to {len(layers) - 1}")
    method.prepare(host, record)
    for i in chosen:
        part = layers[i].attention
        if part is None:  # dropped by an earlier method of the plan
            continue
        extra = method.modules(part, i, host)
        if extra is not None:
            weight = next(part.parameters(), None)
            if weight is not None:
                extra = extra.to(weight.device, weight.dtype)
            extra.train(part.training)
            host.changes.set(part, EXTRA, extra)
        host.attend_with(i, _Attention(method, Kept(i, len(layers), record, extra), tally, note))


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What stands for softmax attention in one layer."""

    method: SparseAttention
    kept: Kept
    tally: Tally
    note: Any

    def __call__(self, call: Call) -> torch.Tensor:
        method, kept = self.method, self.kept
        if call.query.shape[2] == 1 and call.causal and not method.decodes:
            return call.dense()
        if call.dropout:
            raise UsageError(
                f"{method.name} has no dropout of attention weights: set attention_dropout to 0 in the model's config"
            )
        if kept.module is not None:  # a copy of the model has weights of its own
            kept = dataclasses.replace(kept, module=getattr(call.module, EXTRA))
        call = trimmed(call)
        begin = call.range()[0] if method.from_first and not call.past else None
        moved = call if begin is None or not bool(begin.any()) else to_the_left(call)
        blocks = method.select(moved, kept)
        if blocks is None:
            self.note(self.tally.add(None))
            return call.dense()
        self.note(self.tally.add(_density(blocks, moved, kept)) | method.facts(moved, kept))
        output = method.mix(moved, blocks, kept)
        return output if moved is call else turned(output, -begin)


def to_the_left(call: Call) -> Call:
    """A whole prompt with each row's padding put behind its tokens, so that blocks count from the first token."""
    begin, end = call.range()
    assert begin is not None and end is not None
    query, key, value = (turned(x, begin) for x in (call.query, call.key, call.value))
    return dataclasses.replace(call, query=query, key=key, value=value, ends=(torch.zeros_like(begin), end - begin))


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Rows [B, H, N, d], each turned to the left by so many places, int64 [B]."""
    place = (torch.arange(x.shape[2], device=x.device) + by.to(x.device)[:, None]) % x.shape[2]
    return x.gather(2, place[:, None, :, None].expand_as(x))


def _density(blocks: Blocks, call: Call, kept: Kept) -> float:
    """A number that costs little: noted with the blocks where the pattern is remembered."""
    if any(value is blocks for value in kept.memo.values()):
        if "_density" not in vars(blocks):
            vars(blocks)["_density"] = blocks.density(call.query.shape[2], call.key.shape[2], call.causal)
        return vars(blocks)["_density"]
    pairs = blocks.counts.sum(dtype=torch.float64) * blocks.block_q * blocks.block_k
    lists = blocks.counts.shape[0] * blocks.counts.shape[1]
    queries, keys = call.query.shape[2], call.key.shape[2]
    dense = queries * keys - (queries * (queries - 1) / 2 if call.causal else 0)
    return min(1.0, float(pairs / lists / dense))


def trimmed(call: Call) -> Call:
    """Without the empty end of a cache of fixed size, where the model's mask shows that it is empty."""
    if call.mask is None or not call.causal or not call.past:
        return call
    _, end = call.range()
    if end is None or int(end.max()) == call.key.shape[2]:
        return call
    last = int(end.max())
    mask = call.mask[..., :last]
    for name, value in vars(call.mask).items():
        setattr(mask, name, value)
    return dataclasses.replace(call, key=call.key[:, :, :last], value=call.value[:, :, :last], mask=mask)
