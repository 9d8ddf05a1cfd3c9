"""Narrowing a decoder's residual stream: each sublayer reads and writes the stream in an orthogonal basis of its own.

The stream x [tokens, D] that enters a sublayer is held as x_c Q [tokens, d], with Q [D, d] of orthonormal columns (x_c:
x, less its mean where the norms are LayerNorms). Norms keep their scale outside, in the matrices after them. Blocks
themselves stay as they are: what a sublayer adds to the stream is `out + x (S - 1)`, with S [d, d] from its basis to
the next one's.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.anatomy import first_tensor, output_tensor
from hasten.hosts.base import Host
from hasten.hosts.feeding import Affine, affine_of
from hasten.hosts.streaming import StopError, evaluating, returning, uncached
from hasten.hosts.structure import is_projection
from hasten.hosts.weights import Weight, linear_of


class PlainNorm(nn.Module):
    """`x / sqrt(sum(x^2) / width + eps)`: a norm without weights over what is left of `width` channels.

    It keeps its input for the layer that turns the residual stream.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.entered: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.entered = hidden_states
        x = hidden_states.float()
        scale = torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)
        return (x * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


class Turning(nn.Module):
    """The last product of a sublayer, which also turns the stream: `inner(z) + turn(x)`, x being what the norm saw.

    Args:
        turn: [d, d], S - 1 transposed, as a linear layer's weight.
    """

    def __init__(self, inner: nn.Module, turn: nn.Linear, norm: PlainNorm) -> None:
        super().__init__()
        self.inner, self.turn = inner, turn
        turn.exact = True  # type: ignore[assignment] # the stream itself passes through: not to be compressed
        self._norm = [norm]  # not a submodule: the block holds it

    def forward(self, input: Tensor) -> Tensor:
        out, norm = self.inner(input), self._norm[0]
        assert norm.entered is not None
        x, norm.entered = norm.entered, None
        return out + self.turn(x).reshape(out.shape)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One sublayer, or both of a parallel block: paths of its norms, of what reads them and of what adds to the stream.

    Attributes:
        enters: the module whose input is the stream.
    """

    block: int
    enters: str
    norms: tuple[str, ...]
    reads: dict[str, str]
    writes: tuple[str, ...]


class Wiring:
    """Where a decoder's sublayers read and write the stream, found by running it once.

    Raises:
        UsageError: the model is wired in a way that can't be narrowed; nothing is changed.
    """

    def __init__(self, host: Any) -> None:
        self.host: Any = host
        anatomy, name = host.anatomy, type(host.model).__name__
        if not anatomy.additive or anatomy.attention.after or anatomy.mlp.after:
            raise UsageError(f"{name} does not simply add its sublayers to a residual stream: it can't be narrowed")
        if any(not host.has(i, part) for i in range(len(host.blocks)) for part in ("attention", "mlp")):
            raise UsageError("some sublayers were left out already: narrow the whole model")
        if not anatomy.attention.before or not anatomy.mlp.before:
            raise UsageError(f"the sublayers of {name} have no norm before them: it can't be narrowed")
        self.width = host.embedding.weight.shape[1]
        self.stages: list[Stage] = []
        for i in range(len(host.blocks)):
            base = f"{host.blocks_path}.{i}."
            parts = [anatomy.attention, anatomy.mlp]
            found = [self._stage(i, base, part) for part in parts]
            if anatomy.parallel:
                first, second = found
                reads = first.reads | second.reads
                norms = tuple(dict.fromkeys(first.norms + second.norms))
                self.stages.append(Stage(i, base[:-1], norms, reads, first.writes + second.writes))
            else:
                self.stages += found
        if host.final_norm is None or not isinstance(host.lm_head, nn.Linear):
            raise UsageError(f"{name} has no last norm before a linear head: it can't be narrowed")
        inside = {id(one) for one in host.blocks.modules()}
        self.embeddings = [
            path
            for path, part in host.model.named_modules()
            if isinstance(part, nn.Embedding) and id(part) not in inside
        ]
        self.final = next(path for path, part in host.model.named_modules() if part is host.final_norm)
        self.head = next(path for path, part in host.model.named_modules() if part is host.lm_head)
        for path in self.embeddings:
            if host.model.get_submodule(path).weight.shape[1] != self.width:
                raise UsageError(f"{path} is not as wide as the residual stream: the model can't be narrowed")
        self.scales = {path: scale_of(self._part(path), self.width)
                       for path in (*(norm for stage in self.stages for norm in stage.norms), self.final)}  # fmt: skip
        self.centred = self.scales[self.final].centred
        if any(scale.centred != self.centred for scale in self.scales.values()):
            raise UsageError(f"{name} mixes LayerNorm and RMSNorm: it can't be narrowed")

    def _part(self, path: str) -> nn.Module:
        return self.host.model.get_submodule(path)  # type: ignore[no-any-return]

    def _stage(self, index: int, base: str, part: Any) -> Stage:
        """Follows the tensors of one sublayer: which linear layers read a norm's output, which one's output leaves."""
        norm = base + part.before[0]
        linears = {
            path: layer
            for module in part.modules
            for path, layer in self._part(base + module).named_modules(prefix=base + module)
            if is_projection(layer)
        }
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        outs: dict[str, Tensor] = {}

        def watch(path: str, into: Callable[[Any, Any], None]) -> Any:
            return self._part(path).register_forward_hook(lambda _, given, kwargs, out: into((given, kwargs), out),
                                                          with_kwargs=True)  # fmt: skip

        def entry(path: str) -> Callable[[Any, Any], None]:
            return lambda given, out: seen.__setitem__(path, (first_tensor(*given), output_tensor(out)))  # type: ignore[arg-type,func-returns-value,assignment]

        hooks = [watch(path, entry(path)) for path in (*linears, norm)]
        hooks.append(watch(base + part.modules[-1], lambda _, out: outs.__setitem__("", output_tensor(out))))
        try:
            with torch.no_grad(), evaluating(self.host.model):
                tokens = torch.arange(3, device=self.host.device)[None] % self.host.embedding.weight.shape[0]
                self.host._run({"input_ids": tokens})
        finally:
            for hook in hooks:
                hook.remove()
        normed, out = seen[norm][1], outs[""]
        same = lambda one, two: one.data_ptr() == two.data_ptr() and one.numel() == two.numel()  # noqa: E731
        reads = {path: norm for path in linears if path in seen and same(seen[path][0], normed)}
        writes = tuple(path for path in linears if path in seen and same(seen[path][1], out))
        others = [path for path in linears if path not in reads and path not in writes]
        loose = {id(p) for layer in linears.values() for p in layer.parameters()}
        wide = [
            n
            for m in part.modules
            for n, p in self._part(base + m).named_parameters()
            if id(p) not in loose and p.ndim > 1
        ]
        if not reads or len(writes) != 1 or others or wide:
            raise UsageError(
                f"the sublayer {base}{part.modules[0]} is not made of linear layers that read the norm and one that "
                "writes the stream (a mixture of experts, or a shared product): the model can't be narrowed"
            )
        return Stage(index, norm, (norm,), reads, writes)

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def narrowed(self, bases: list[Tensor] | None, width: int) -> None:
        """Puts narrow modules in place, filled from the model's own and the bases.

        Args:
            bases: one [D, width] for each stage, and one for the head; None: empty modules, to be loaded.
        """
        model, dtype = self.host.model, self.host.embedding.weight.dtype
        original = self.width
        own = list(bases) if bases is not None else None

        def put(path: str, new: nn.Module) -> None:
            self.host.replace(path, new.train(model.get_submodule(path).training))

        def basis(index: int) -> Tensor:
            if own is None:
                return torch.zeros(original, width, dtype=torch.float64, device=self.host.device)
            return own[index].double()

        for path in self.embeddings:
            held = self._part(path)
            new = nn.Embedding(held.num_embeddings, width, held.padding_idx, device="meta")  # type: ignore[arg-type]
            new.weight = nn.Parameter((self.centre(held.weight.detach().double()) @ basis(0)).to(dtype))  # type: ignore[operator]
            put(path, _like(held, new))
        for place, stage in enumerate(self.stages):
            here, after = basis(place), basis(place + 1)
            norms = {path: PlainNorm(original, self.scales[path].eps) for path in stage.norms}
            for path, norm in stage.reads.items():
                put(path, self._reading(path, self.scales[norm], here).to(dtype))
            for number, path in enumerate(stage.writes):
                inner = self._writing(path, after).to(dtype)
                if number == 0:
                    turn = (here.T @ after).T - torch.eye(width, dtype=torch.float64, device=here.device)
                    put(path, Turning(inner, linear_of(turn.to(dtype), None), norms[stage.norms[0]]))
                else:
                    put(path, inner)
            for path, module in norms.items():
                put(path, module)
        put(self.head, self._reading(self.head, self.scales[self.final], basis(len(self.stages))).to(dtype))
        put(self.final, PlainNorm(original, self.scales[self.final].eps))
        for config in self.host._configs():
            if getattr(config, "tie_word_embeddings", False):
                self.host.changes.set(config, "tie_word_embeddings", False)

    def _reading(self, path: str, scale: Affine, basis: Tensor) -> nn.Linear:
        """W diag(alpha) Q, and W beta in the bias."""
        weight = Weight(path, self._part(path))
        matrix, bias = weight.matrix.double(), weight.bias
        if scale.shift is not None:
            more = matrix @ scale.shift.double()
            bias = more if bias is None else bias.detach().double() + more
        return linear_of((matrix * scale.gain.double()) @ basis, bias)

    def _writing(self, path: str, basis: Tensor) -> nn.Linear:
        """Q^T W and Q^T b, less their mean over the stream where norms subtract it."""
        weight = Weight(path, self._part(path))
        matrix = self.centre(weight.matrix.double().T) @ basis
        bias = None if weight.bias is None else self.centre(weight.bias.detach().double()) @ basis
        return linear_of(matrix.T.contiguous(), bias)

    def signals(self, batches: list[dict[str, Any]], see: Callable[[int, Iterator[Tensor]], Tensor]) -> list[Tensor]:
        """The basis of each stage and of the head, found one after another on the model that is narrow so far.

        Args:
            see: `see(stage, streams)` of centred streams fp32 [tokens, D], real tokens only, returns a basis [D, d].
        """
        bases: list[Tensor] = []
        entering: list[Any] = [None] * len(batches)
        blocks = list(self.host.blocks)
        with contextlib.ExitStack() as undo, torch.no_grad(), evaluating(self.host.model):
            for index in range(len(blocks)):
                for place, stage in enumerate(self.stages):
                    if stage.block != index:
                        continue
                    first = (
                        stage.enters
                        == self.stages[min(p for p, s in enumerate(self.stages) if s.block == index)].enters
                    )
                    where = blocks[index] if first else self._part(stage.enters)
                    streams = (
                        self._real(x, batch)
                        for batch, before in zip(batches, entering, strict=True)
                        for x in self._entering(where, blocks[: index + 1], batch, before)
                    )
                    bases.append(see(place, streams))
                    self._project(undo, where, None if first else self._part(stage.writes[0]), bases[-1])
                for number, batch in enumerate(batches):
                    entering[number] = _leaving(self.host, blocks[: index + 1], batch, entering[number])
            streams = (self._real(output_tensor(out), batch) for out, batch in zip(entering, batches, strict=True))
            bases.append(see(len(self.stages), streams))
        return bases

    def _real(self, x: Tensor, batch: dict[str, Any]) -> Tensor:
        rows, mask = x.reshape(-1, self.width), batch.get("attention_mask")
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.flatten().to(rows.device).bool()]
        return self.centre(rows.float())

    def _entering(self, where: nn.Module, chain: list[nn.Module], batch: dict[str, Any], before: Any) -> list[Tensor]:
        found: list[Tensor] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(first_tensor(args, kwargs))  # type: ignore[arg-type]
            raise StopError

        _run_block(self.host, chain, batch, before, lambda: where.register_forward_pre_hook(stop, with_kwargs=True))
        return found

    def _project(self, undo: contextlib.ExitStack, where: nn.Module, writer: nn.Module | None, basis: Tensor) -> None:
        """From now on the stream passes through Q Q^T where it enters; between sublayers the writer makes up for it."""
        missing: list[Tensor] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            x = first_tensor(args, kwargs)
            assert x is not None
            new = ((self.centre(x.float()) @ basis.float()) @ basis.float().T).to(x.dtype)
            if writer is not None:
                missing.append(new - x)
            if args and args[0] is x:
                return (new, *args[1:]), kwargs
            return args, {name: new if value is x else value for name, value in kwargs.items()}

        undo.callback(where.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if writer is not None:
            added = writer.register_forward_hook(lambda _, given, out: out + missing.pop().reshape(out.shape))
            undo.callback(added.remove)


def _run_block(
    host: Host, chain: list[nn.Module], batch: dict[str, Any], before: Any, hook: Callable[[], Any]
) -> None:  # fmt: skip
    with contextlib.ExitStack() as undo:
        for block in chain[:-1]:
            undo.enter_context(returning(block, before))
        undo.callback(hook().remove)
        with contextlib.suppress(StopError):
            host.forward(uncached(host, batch))


def _leaving(host: Host, chain: list[nn.Module], batch: dict[str, Any], before: Any) -> Any:
    """What the last block of a chain returns."""
    found: list[Any] = []

    def stop(_: nn.Module, given: Any, out: Any) -> None:
        found.append(out)
        raise StopError

    _run_block(host, chain, batch, before, lambda: chain[-1].register_forward_hook(stop))
    return found[0]


def _like(old: nn.Module, new: nn.Embedding) -> nn.Module:
    """An embedding of the old one's class, where that has a forward of its own (OPT's positions, Gemma's scale)."""
    if type(old) is nn.Embedding:
        return new
    made = type(old).__new__(type(old))
    made.__dict__ = {**old.__dict__, "_parameters": dict(old._parameters), "_buffers": dict(old._buffers)}
    made._parameters["weight"] = new.weight  # type: ignore[assignment]
    made.embedding_dim = new.embedding_dim  # type: ignore[assignment]
    return made


@torch.no_grad()
def scale_of(norm: nn.Module, width: int) -> Affine:
    """The scale and shift of a norm, measured.

    Raises:
        UsageError: it is neither a LayerNorm nor an RMSNorm.
    """
    like = next(norm.parameters(), torch.zeros(()))
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) + 1  # a mean that a LayerNorm is told by
    found = affine_of(norm, x.to(like), norm(x.to(like)))
    if found is None:
        raise UsageError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm: the model can't be narrowed")
    return found
