"""ABQ-LLM: what prepares each block for codes of few bits is learned from the block's output and its attention maps.

Learned for each block: a balance s of the inputs, y = (x / s) (s W)^T; a clipping of each group's range; and for some
down projections a compensation a b^T that is added to W. The codes of a group G of s (W + a b^T) are

    q(w) = clamp(round(w / d) + z, 0, n),    d = (h - l) / n,    z = round(-l / d),    n = 2^bits - 1
    h = sigmoid(u) max(G),    l = sigmoid(v) min(G);    at 2 bits n = 4: five levels, as many below zero as above

("bit balance", the paper's W2*). With block outputs d_q (quantized), d_fp (not), d*_fp (not, from inputs that the
quantized blocks before give), MSE, and attention maps A, the loss is

    - log cos(d_q, d_fp) - log cos(d_q, d*_fp) + MSE(d_q, d_fp) + MSE(d_q, d*_fp) + KL(A_q, A_fp) + KL(A_fp, A_q)

Shapes: weight [out, in], balance [in], upper (u) and lower (v) [out, groups], codes [out, in], scales, zeros [out,
groups].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import Method, option
from hasten.hosts import Context, Host
from hasten.hosts.blockwise import BlockCall, attention_maps, entering, feeding, running
from hasten.hosts.streaming import GATHERED_BYTES, evaluating
from hasten.hosts.weights import Weight, is_held
from hasten.kernels.lowbit import round_activations
from hasten.math.shapes import Float
from hasten.quant._balanced import BalancedLinear
from hasten.quant._grids import Triple
from hasten.quant.base import FULL_BITS, Codes, choose, group_problems, note, restore_layers, swap, whole_group

CARD = Card(
    title="ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models",
    paper="2408.08554",
    seams=("linear.weight",),
    effects=("time", "memory", "quality"),
    lossless=False,
    claim="LLaMA-7B: 1.6x over SmoothQuant; at W2*A8 perplexity 7.59 on WikiText2 against AffineQuant's 9.76",
    claimed=1.6,
    identity={"bits": 16},
    needs=("calibration",),
    hosts=("decoder", "diffusion_lm", "vit"),
    experiment=("stdlib-lm(task=generate)", "quant/abq(bits=4)"),
    when="Few bits where inputs have large channels, and many epochs of set-up may be spent on each model.",
    when_not="With the default two epochs quant/gptq keeps more at equal bits; five levels are stored in 3 bits.",
)

CLIP, LEAST = 4.0, 1e-5  # sigmoid(CLIP) is where clipping starts; the least scale
ALPHA, FIRST, LAST = 0.5, 3, 4  # of the code: first and last blocks whose down projections are compensated
QUERIES = 64  # whose attention maps are compared, of each sequence
JUDGED = 3  # batches on which what was learned is compared with rounding


def levels(bits: int, balanced: bool = True) -> int:
    """The greatest code."""
    return 2**bits - (0 if bits == 2 and balanced else 1)


def naive_abq(
    weight: Float[Tensor, "rows columns"], balance: Float[Tensor, "columns"], upper: Float[Tensor, "rows groups"],
    lower: Float[Tensor, "rows groups"], *, bits: int = 4, group: int = 128, bit_balance: bool = True,
) -> Triple:  # fmt: skip
    """The codes of s W, weight by weight."""
    rows, columns = weight.shape
    most = levels(bits, bit_balance)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.zeros(upper.shape), torch.zeros(upper.shape)
    for n in range(rows):
        for g in range(upper.shape[1]):
            span = slice(g * group, min((g + 1) * group, columns))
            part = weight[n, span].float() * balance[span].float()
            high = part.max() / (1 + torch.exp(-upper[n, g]))
            low = part.min() / (1 + torch.exp(-lower[n, g]))
            scales[n, g] = max(float((high - low) / most), LEAST)
            zeros[n, g] = torch.round(-low / scales[n, g])
            for k, w in enumerate(part):
                code = torch.round(w / scales[n, g]) + zeros[n, g]
                codes[n, span.start + k] = int(torch.clamp(code, 0, most))
    return codes, scales, zeros


def abq(
    weight: Float[Tensor, "rows columns"], balance: Float[Tensor, "columns"], upper: Float[Tensor, "rows groups"],
    lower: Float[Tensor, "rows groups"], *, bits: int = 4, group: int = 128, bit_balance: bool = True,
) -> Triple:  # fmt: skip
    """As `naive_abq`, for all groups at once."""
    codes, scales, zeros = _coded(weight.float() * balance.float(), upper, lower, levels(bits, bit_balance), group)
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8).contiguous(), scales, zeros


def _coded(w: Tensor, upper: Tensor, lower: Tensor, most: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, groups, group], scales and zeros; differentiable, rounding being passed straight through."""
    rest = -w.shape[1] % group
    parts = torch.cat([w, w[:, -1:].expand(-1, rest)], dim=1).unflatten(1, (-1, group))
    high, low = parts.amax(2) * upper.sigmoid(), parts.amin(2) * lower.sigmoid()
    scales = ((high - low) / most).clamp(min=LEAST)
    zeros = (-low / scales).round().detach()
    x = parts / scales[..., None]
    codes = (x + (x.round() - x).detach() + zeros[..., None]).clamp(0, most)
    return codes, scales, zeros


class _Group:
    """Layers that read one tensor, and what is learned of them."""

    def __init__(self, weights: dict[str, Weight], norm: nn.Module | None, largest: Tensor, compensated: set[str],
                 method: "ABQ") -> None:  # fmt: skip
        self.weights, self.norm, self.method = weights, norm, method
        self.matrices = {path: weight.matrix.float() for path, weight in weights.items()}
        each = torch.stack([matrix.abs().amax(0) for matrix in self.matrices.values()]).amax(0).clamp(min=LEAST)
        self.start = (largest.clamp(min=LEAST) ** ALPHA / each ** (1 - ALPHA)).clamp(min=LEAST).log()
        self.size = whole_group(method.group, next(iter(self.matrices.values())))
        self.compensated = compensated & set(weights)
        self.reset(self.start)

    def reset(self, balance: Tensor) -> None:
        """Back to where learning starts: this balance, no compensation; ranges hardly clipped."""
        self.balance = balance.clone().requires_grad_()
        self.clips, self.pairs = {}, {}
        for path, matrix in self.matrices.items():
            groups = -(-matrix.shape[1] // self.size)
            full = matrix.new_full((2, len(matrix), groups), CLIP)
            self.clips[path] = full.requires_grad_()
            if path in self.compensated:
                left, right = matrix.new_zeros(len(matrix), 1), matrix.new_ones(1, matrix.shape[1])
                self.pairs[path] = left.requires_grad_(), right.requires_grad_()

    def plain(self) -> None:
        """No balance and no clipping."""
        self.reset(torch.zeros_like(self.start))
        for path, clip in self.clips.items():
            self.clips[path] = torch.full_like(clip, 20.0)  # a sigmoid of 1

    def weight(self, path: str) -> Tensor:
        """W + a b^T, with a b^T in units of W's root mean square."""
        matrix, pair = self.matrices[path], self.pairs.get(path)
        return matrix if pair is None else matrix + matrix.square().mean().sqrt() * (pair[0] @ pair[1])

    def forward(self, path: str, x: Tensor) -> Tensor:
        """The layer's output with what is learned so far; gradients go straight through all rounding."""
        balance = self.balance.exp()
        matrix = self.weight(path) * balance
        upper, lower = self.clips[path]
        codes, scales, zeros = _coded(matrix, upper, lower, self.method.most, self.size)
        found = (scales[..., None] * (codes - zeros[..., None])).flatten(1)[:, : matrix.shape[1]]
        given = x.float() / balance
        if self.method.activations == 8:
            given = given + (round_activations(given) - given).detach()
        bias = self.weights[path].bias
        return F.linear(given, found, None if bias is None else bias.float()).to(x.dtype)

    def codes(self, path: str) -> Codes:
        method = self.method
        upper, lower = self.clips[path].detach()
        triple = abq(self.weight(path).detach(), self.balance.detach().exp(), upper, lower, bits=method.bits,
                     group=self.size, bit_balance=method.bit_balance)  # fmt: skip
        return Codes(*triple, self.size, method.stored_bits, activations=method.activations)


@dataclasses.dataclass(frozen=True)
class ABQ(Method):
    """Quantizes the blocks of a model one after another, each learning from its own output.

    Departures from the paper and its code: groups of 128 weights share a scale by default (the paper: a row,
    group=0). Five levels need a code of 3 bits here, as the product has no code of 2.3. Inputs are rounded to 8
    bits, 64 at a time with one scale (the paper: a token with scale and zero point); codes of 5 and 7 bits, inputs
    of other widths, and quantized keys and values are left out. Balance is learned as a logarithm, so that it stays
    positive, and starts from SmoothQuant's rule (alpha = 0.5), as in the code; queries and keys need none, as their
    rows have scales of their own. Where a norm feeds the layers, its weight takes 1 / s; other layers divide their
    inputs. Biases of norms take it too; learned shifts are left out. KL is a mean over at most 64 queries of each
    sequence; the code takes the softmax of maps that are softmaxes already. Two passes over the calibration data
    are the default (the code: 20, and 40 at 2 bits), and a block keeps what was learned only where its loss is
    below that of plain rounding with the same codes.
    """

    bits: int = option(4, "bits of a weight; 16 leaves the model as it is", choices=(2, 3, 4, 6, 8, FULL_BITS))
    group: int = option(128, "columns that share a scale, a power of two from 16 up; 0: the whole row", least=0)
    bit_balance: bool = option(True, "at 2 bits, five levels around zero rather than four; they are stored in 3 bits")
    epochs: int = option(2, "passes over the calibration data in which each block learns", least=0)
    rate: float = option(5e-3, "learning rate of the balance and of the compensation", above=0)
    clip_rate: float = option(0.3, "learning rate of the clipping (the paper's code: 0.01, for 20 epochs)", above=0)
    compensate: bool = option(True, "correct the down projections of the first 3 and the last 4 blocks")
    activations: int = option(8, "8: products round their inputs to 8 bits, 64 at a time; 32: not", choices=(8, 32))
    ignore: tuple[str, ...] = option((), "paths of layers that stay as they are; * stands for anything")

    def problems(self) -> list[str]:
        return group_problems(self.group)

    @property
    def most(self) -> int:
        return levels(self.bits, self.bit_balance)

    @property
    def stored_bits(self) -> int:
        return 3 if self.bits == 2 and self.bit_balance else self.bits

    def install(self, host: Host, context: Context) -> dict[str, Any]:
        """Quantizes the blocks one after another, each with inputs from those before it as they are by then.

        Raises:
            UsageError: nothing to quantize, or a loss that is not finite.
        """
        if self.bits >= FULL_BITS:
            return {"layers": {}}
        chosen = choose(self, host)
        usable = {path: weight for path, weight in chosen.items() if weight.plain and not is_held(weight.part)}
        before = sum(weight.bytes() for weight in chosen.values())
        batches = context.calibration or []
        if not batches:
            raise UsageError(f"{self.name} learns from calibration data: hand over at least one batch")
        layers: dict[str, Any] = {}
        facts: dict[str, Any] = {"left_dense": [], "learned_blocks": 0, "attention_loss": False}
        exact: list[Any] = []
        coarse: list[Any] = []
        mark = len(host.changes)
        try:
            with evaluating(host.model):
                for layer in host.layers:
                    calls, given = (
                        entering(host, layer.index, batches, exact),
                        entering(host, layer.index, batches, coarse),
                    )
                    with torch.no_grad():
                        exact = [call.run() for call in calls]
                    inside = {p: weight for p, weight in usable.items() if p.startswith(layer.path + ".")}
                    if inside:
                        groups = self._groups(host, layer.index, given, inside)
                        if groups:
                            self._learn(host, layer.index, calls, given, exact, groups, facts)
                        for one in groups:
                            layers |= self._swap(host, one, given[0])
                    with torch.no_grad():
                        coarse = [call.run() for call in given]
            if not layers:
                raise UsageError(f"calibration reached none of the linear layers of {type(host.model).__name__}")
        except BaseException:
            host.changes.undo(mark)
            raise
        facts["left_dense"] = [path for path in chosen if path not in layers]
        if self.stored_bits != self.bits:
            facts["stored_bits"] = self.stored_bits
        note(self.name, host, context, layers, before, sum(chosen[p].bytes() for p in facts["left_dense"]), facts)
        return {"layers": layers}

    def restore(self, host: Host, record: dict[str, Any]) -> None:
        restore_layers(host, record["layers"])

    def _groups(self, host: Host, index: int, calls: list[BlockCall], inside: dict[str, Weight]) -> list[_Group]:
        width = calls[0].rows(calls[0].run()).shape[1]
        attention = host.layers[index].attention_path
        near = index < FIRST or index >= len(host.layers) - LAST
        down = {
            path for path, weight in inside.items()
            if near and self.compensate and weight.shape[0] == width
            and not (attention and path.startswith(f"{host.layers[index].path}.{attention}."))
        }  # fmt: skip
        return [
            _Group({path: inside[path] for path in paths}, norm, largest, down, self)
            for paths, norm, largest in feeding(calls, inside)
        ]

    def _learn(
        self, host: Host, index: int, calls: list[BlockCall], given: list[BlockCall], exact: list[Any],
        groups: list[_Group], facts: dict[str, Any],
    ) -> None:  # fmt: skip
        """Learns what the groups of a block hold; they keep it where it is worth it."""
        owners = {path: one for one in groups for path in one.weights}
        weights = {path: one.weights[path] for path, one in owners.items()}
        forward: Callable[[str, Tensor], Tensor] = lambda path, x: owners[path].forward(path, x)  # noqa: E731
        with torch.no_grad():
            own = [call.rows(call.run()) for call in given]

        kept: dict[int, list[Tensor]] = {}  # of the block as it was, as long as they fit

        def wanted(number: int, maps: list[Tensor]) -> list[Tensor]:
            if number in kept:
                return kept[number]
            maps.clear()
            with torch.no_grad():
                calls[number].run()
            found = list(maps)
            if sum(one.nbytes for one in found) * len(calls) <= GATHERED_BYTES:
                kept[number] = found
            return found

        def loss(number: int, maps: list[Tensor]) -> Tensor:
            whole = wanted(number, maps)
            maps.clear()
            with running(weights, forward):
                found = given[number].rows(given[number].run())
            total = found.new_zeros(())
            for target in (given[number].rows(exact[number]), own[number]):
                total = total + F.mse_loss(found, target) - F.cosine_similarity(found, target).mean().abs().log()
            for one, other in zip(maps, whole, strict=True):  # both divergences at once
                total = total + ((one.exp() - other.exp()) * (one - other)).sum(-1).mean()
            facts["attention_loss"] |= bool(whole)
            return total

        with attention_maps(host, index, QUERIES) as maps:

            def measured() -> float:
                with torch.no_grad():
                    value = sum(float(loss(number, maps)) for number in range(len(given))[:JUDGED])
                if value != value or abs(value) == float("inf"):
                    raise UsageError(f"the loss of {host.layers[index].path} is not finite: check the calibration data")
                return value

            for one in groups:
                one.plain()
            plain = measured()
            for one in groups:
                one.reset(one.start)
            slow = [part for one in groups for part in (one.balance, *sum(one.pairs.values(), ()))]
            clips = [part for one in groups for part in one.clips.values()]
            rates = [{"params": slow, "lr": self.rate}, {"params": clips, "lr": self.clip_rate}]
            optimizer, parameters = torch.optim.AdamW(rates, weight_decay=0), [*slow, *clips]
            for number in [*range(len(given))] * self.epochs:
                with torch.enable_grad():
                    found = torch.autograd.grad(loss(number, maps), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient
                optimizer.step()
            if measured() < plain:
                facts["learned_blocks"] += 1
            else:
                for one in groups:
                    one.plain()

    def _swap(self, host: Host, group: _Group, call: BlockCall) -> dict[str, Any]:
        """Puts the quantized layers of a group in place; the norm that feeds them takes the balance, if one can."""
        factors = (-group.balance.detach()).exp()
        codes = {path: group.codes(path) for path in group.weights}
        records = {}
        folded = _fold(host, group, call, factors)
        for path, weight in group.weights.items():
            if folded or bool((factors == 1).all()):
                layer: nn.Module = codes[path].layer(weight.bias, weight.dtype)
            else:
                layer = BalancedLinear.of(codes[path], factors, weight.bias, weight.dtype)
            records[path] = swap(host, weight, layer)
        return records


@torch.no_grad()
def _fold(host: Host, group: _Group, call: BlockCall, factors: Tensor) -> bool:
    """Multiplies a norm by the factors, if the block, with layers that undo them, then gives what it gave."""
    norm, held = group.norm, getattr(group.norm, "weight", None)
    if norm is None or not isinstance(held, nn.Parameter) or held.shape != factors.shape:
        return False
    wanted = call.rows(call.run())
    mark = len(host.changes)
    for name in ("weight", "bias"):
        one = getattr(norm, name, None)
        if isinstance(one, nn.Parameter):
            changed = nn.Parameter((one.float() * factors).to(one.dtype), requires_grad=one.requires_grad)
            host.changes.set(norm, name, changed)

    def undone(path: str, x: Tensor) -> Tensor:
        bias = group.weights[path].bias
        y = F.linear(x.float() / factors, group.matrices[path], None if bias is None else bias.float())
        return y.to(x.dtype)

    with running(group.weights, undone):
        found = call.rows(call.run())
    near = 0.02 if held.dtype != torch.float32 else 1e-3
    if float((found - wanted).norm()) <= near * float(wanted.norm()):
        return True
    host.changes.undo(mark)
    return False


METHOD = ABQ
