"""Medusa: heads on the model's last hidden state guess tokens after the next one; one pass checks a tree of guesses.

Head k of K guesses the token k + 1 places after the one at which h was read (the model's own output layer: one place):

    p_k = softmax(W2_k (h + SiLU(W1_k h + b_k)))      W2_k starts as the output layer, W1_k and b_k as 0 (section 2.1.1)
    loss = sum_k 0.8^k CE(p_k, y_(t+k+1))             the model stays as it is: Medusa-1 (equation 1)

A node (i_1, .., i_d) of the tree is the guess of rank i_d of head d, after its parent. Nodes are added one by one, the
neighbour with the largest product of the heads' accuracies at their ranks on calibration text first (section 2.3.3).

Shapes: hidden [B, D], W1 [K, D, D], W2 [K, V, D]; logits [B, K, V], candidates [B, N].

acceptance=exact keeps the output's law: the model chooses at every node, greedily or by a draw, and what agrees stays.
acceptance=typical does NOT: in sampled generation a candidate x stays where p(x) > min(eps, delta exp(-H(p))), the
longest such path wins, of several the likeliest, and the model's likeliest token follows (section 2.3.1).

Departures: the heads are fitted to hidden states that were computed once, with more epochs over less text; a tenth of
it is kept for the tree. The official code gives all layers of a head one weight, and b_k a random start. Medusa-2,
which fits the model too, is left out: it isn't lossless. Attention that takes no tree's mask gets the first path.
"""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.cards import Card
from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._loop import Run
from hasten.decode._medusa_tree import Choices, guesses, planted, sparse_tree, typical
from hasten.decode._proposals import Proposal, Proposer, Verdict
from hasten.decode._rows import Rows, Tree
from hasten.decode._sampling import draw
from hasten.decode._stops import Scores
from hasten.decode.base import Drafting
from hasten.hosts.context import Context

CARD = Card(
    title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
    paper="2401.10774",
    seams=("decode.draft",),
    effects=("time",),
    lossless=True,
    claim="Medusa-1: 2.18x for Vicuna-7B and 2.33x for Vicuna-13B on MT-Bench, batch 1; Medusa-2: 2.83x",
    claimed=2.18,
    identity="none: a checked pass has another shape than a single step, so logits may differ in the last bits; "
    "the tokens are held to be the same",
    experiment=(
        "stdlib-lm(task=generate, calibrate=96)",
        "decode/medusa(nodes=12, tokens=128, temperature=0, lr=0.01)",
    ),
    when="Small batches, no small model with the same vocabulary at hand, and text to calibrate on that is like what "
    "will be generated.",
    when_not="Large batches, where a pass over a tree costs in proportion to its nodes; large vocabularies on a CPU, "
    "as each head has an output layer of its own.",
    needs=("calibration",),
    hosts=("decoder",),
)

IGNORED = -100


def naive_medusa(
    hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: Tensor, choices: Choices
) -> tuple[Tensor, Tensor]:
    """The heads and the candidates of a round, row by row and head by head, in float32.

    Args:
        hidden: what the output layer read at the last accepted token, [B, D].
        blocks: weight [K, D, D] and bias [K, D] of each residual layer.
        last: W2, [K, V, D].
        choices: of each node the ranks on its path, parents before children.

    Returns:
        logits [B, K, V] and candidates [B, N].
    """
    logits = torch.zeros(len(hidden), *last.shape[:2])
    tokens = torch.zeros(len(hidden), len(choices), dtype=torch.long)
    for b in range(len(hidden)):
        for k in range(len(last)):
            x = hidden[b].float()
            for weight, bias in blocks:
                z = weight[k].float() @ x + bias[k].float()
                x = x + z / (1 + torch.exp(-z))
            logits[b, k] = last[k].float() @ x
        for n, path in enumerate(choices):
            tokens[b, n] = logits[b, len(path) - 1].argsort(descending=True)[path[-1]]
    return logits, tokens


def medusa(
    hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: Tensor, choices: Choices
) -> tuple[Tensor, Tensor]:
    """As `naive_medusa`, all rows, heads and nodes at once, in the weights' dtype."""
    logits_KBV = look_ahead(hidden, blocks, last)
    _, places, ranks = planted(choices, hidden.device)
    return logits_KBV.transpose(0, 1), guesses(logits_KBV, places, ranks)


def look_ahead(hidden_ND: Tensor, blocks: list[tuple[Tensor, Tensor]], last_KVD: Tensor) -> Tensor:
    """The heads' logits [K, N, V]."""
    x_KND = hidden_ND.to(last_KVD.dtype).expand(len(last_KVD), -1, -1)
    for weight, bias in blocks:
        x_KND = x_KND + nn.functional.silu(torch.baddbmm(bias[:, None], x_KND, weight.transpose(1, 2)))
    return torch.bmm(x_KND, last_KVD.transpose(1, 2))


class Heads(nn.Module):
    """K heads and the tree that their accuracies called for; `mark` is a part of the output layer that they fit."""

    tree: Tensor
    mark: Tensor

    def __init__(self, heads: int, layers: int, nodes: int, output: Tensor) -> None:
        super().__init__()
        words, width = output.shape
        self.weights = nn.Parameter(output.new_zeros(layers, heads, width, width))
        self.biases = nn.Parameter(output.new_zeros(layers, heads, width))
        self.last = nn.Parameter(output.detach().expand(heads, words, width).clone())
        self.register_buffer("tree", torch.full((nodes, heads), -1, device=output.device))  # ranks, then -1
        self.register_buffer("mark", _mark(output))

    def forward(self, hidden_ND: Tensor, heads: int | None = None) -> Tensor:
        """Logits of the first heads, [K, N, V]."""
        blocks = [(weight[:heads], bias[:heads]) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return look_ahead(hidden_ND, blocks, self.last[:heads])

    def choices(self) -> Choices:
        paths = [tuple(rank for rank in path if rank >= 0) for path in self.tree.tolist()]
        return tuple(path for path in paths if path)

    def plant(self, choices: Choices) -> None:
        self.tree.fill_(-1)
        for node, path in enumerate(choices):
            self.tree[node, : len(path)] = torch.tensor(path, device=self.tree.device)


class HeadProposer(Proposer):
    """Drafts a tree from the hidden state at the last accepted token; the first pass has none to go by."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.heads: Heads = run.spec.drafter.learnt  # type: ignore[assignment]
        self.branches = run.target.takes_4d
        self.choices = tuple(path for path in self.heads.choices() if self.branches or not any(path))
        self.hidden: Tensor | None = None

    def propose(self, most: int) -> Proposal:
        choices = tuple(path for path in self.choices if len(path) <= most)
        if self.hidden is None or not choices:
            return self.none()
        tree, places, ranks = planted(choices, self.hidden.device)
        logits_KBV = self.heads(self.hidden, len(tree.levels))
        return Proposal(guesses(logits_KBV, places, ranks), tree if self.branches else None)

    def settle(self, proposal: Proposal, verdict: Verdict) -> None:
        at = verdict.accepted
        if verdict.path is not None:
            deepest = verdict.path.gather(1, (at - 1).clamp(min=0)[:, None])[:, 0]
            at = torch.where(at > 0, deepest + 1, 0)
        self.hidden = self.run.target.hiddens[torch.arange(len(at), device=at.device), at]

    def select(self, going: Tensor) -> None:
        assert self.hidden is not None, "rows leave after a pass"
        self.hidden = self.hidden[going]


@dataclasses.dataclass(frozen=True)
class Medusa(Drafting):
    heads: int = option(5, "K, heads, of which each looks one token further ahead", least=1, most=16)
    layers: int = option(1, "residual layers of a head", least=0, most=8)
    nodes: int = option(64, "nodes of the tree, the last token among them; on a CPU 8 to 24 pay", least=2, most=512)
    ranks: int = option(10, "most candidates that follow one node", least=1)
    decay: float = option(0.8, "lambda, weight of a head's loss relative to that of the head before", above=0, most=1)
    tokens: int = option(
        0, "tokens that the model writes after each calibration input, to fit on; 0 fits on the input", least=0
    )
    temperature: float = option(0.3, "temperature of that text (official code: 0.3); 0 is greedy", least=0)
    epochs: int = option(8, "passes over the examples (the paper: 2, over far more of them)", least=1)
    batch: int = option(256, "examples, that is positions of the text, in a step", least=1)
    lr: float = option(2e-3, "peak learning rate, AdamW, warm-up over a tenth of the steps, then a cosine", above=0)
    acceptance: str = option("exact", "typical is faster when sampling, and not lossless", choices=("exact", "typical"))
    epsilon: float = option(0.09, "eps of typical acceptance: likelier candidates always stay", above=0, below=1)
    delta: float = option(0.3, "delta of typical acceptance (the paper: the root of eps)", above=0, most=1)

    watches_target = True

    @property
    def card(self) -> Card:
        return CARD if self.acceptance == "exact" else dataclasses.replace(CARD, lossless=False)

    @property
    def longest(self) -> int:
        return self.heads

    @property
    def widest(self) -> int:
        return self.nodes - 1

    def proposer(self, run: Run) -> HeadProposer:
        proposer = HeadProposer(run)
        marks = proposer.heads.mark.float(), _mark(self._output(run.request.model)).float()
        if torch.cosine_similarity(*marks, 0) < 0.5:
            raise UsageError(f"{self.name}: these heads were fitted to another model: apply the method to this one")
        return proposer

    def accept(self, scores: Tensor, proposal: Proposal, how: Scores) -> Verdict:
        if self.acceptance == "exact" or not how.sampled:
            return super().accept(scores, proposal, how)
        if not proposal.size:
            return Verdict(scores.argmax(-1), torch.zeros_like(proposal.tokens.sum(1)))
        tree = proposal.tree or Tree(torch.arange(-1, proposal.size - 1, device=scores.device))
        return typical(scores, proposal.tokens, tree, self.epsilon, self.delta)

    def _output(self, model: Any) -> Tensor:
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if weight is None or not weight.is_floating_point():
            kind = type(model).__name__
            raise UsageError(f"{self.name} starts from the output layer's weight, and {kind} has no plain one")
        return weight

    def draft_of(self, host: Any, context: Context) -> tuple[None, dict[str, Any]]:
        return None, {"output": list(self._output(host.model).shape)}

    def rebuild(self, host: Any, record: dict[str, Any]) -> None:
        here = list(self._output(host.model).shape)
        if here != record["output"]:
            raise UsageError(
                f"{self.name}: the heads were fitted to a model of {record['output'][0]} tokens and width "
                f"{record['output'][1]}, and this one has {here[0]} and {here[1]}: give the model they belong to"
            )

    def blank(self, host: Any, draft: Any) -> Heads:
        return Heads(self.heads, self.layers, self.nodes - 1, self._output(host.model)).requires_grad_(False)

    def learn(self, host: Any, draft: Any, context: Context) -> Heads:
        """Fits the heads on nine tenths of the examples, and measures for the tree on the rest.

        Raises:
            UsageError: the calibration inputs are too short to look ahead in, or too long to be continued.
        """
        started = time.perf_counter()
        longest = max(batch["input_ids"].shape[1] for batch in context.calibration or [])
        room = getattr(host.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest + self.tokens > room:
            raise UsageError(
                f"{self.name}: calibration inputs of {longest} tokens and tokens={self.tokens} go beyond the model's "
                f"context of {room}: give shorter ones, or fewer tokens"
            )
        generator = torch.Generator(host.device).manual_seed(context.seed)
        parts = [self.examples(host, batch, generator) for batch in context.calibration or []]
        hidden_ND, wanted_NK = (torch.cat(part) for part in zip(*parts, strict=True))
        if not len(hidden_ND):
            raise UsageError(f"{self.name}: calibration inputs need three tokens or more, or set tokens=64")
        heads, cut = self.blank(host, draft), len(hidden_ND) // 10
        dtype = heads.last.dtype
        heads.to(torch.promote_types(dtype, torch.float32))
        self.fit(heads, hidden_ND[cut:], wanted_NK[cut:], generator)
        heads.to(dtype)
        cut = cut or len(hidden_ND)
        losses, accuracy = self.measure(heads, hidden_ND[:cut], wanted_NK[:cut])
        choices = sparse_tree(accuracy, self.nodes - 1)
        heads.plant(choices)
        context.note(
            self.name,
            examples=len(hidden_ND),
            losses=losses,
            top1=[row[0] for row in accuracy],
            top5=[sum(row[:5]) for row in accuracy],
            tree=[list(path) for path in choices],
            seconds=time.perf_counter() - started,
        )
        return heads

    @torch.no_grad()
    def examples(self, host: Any, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hidden states of the model [N, D] and the tokens that the heads should guess there [N, K], -100 for none."""
        ids = batch["input_ids"].to(host.device)
        mask = batch.get("attention_mask")
        real = None if mask is None else mask.to(host.device).bool()
        known = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        reader = Rows(host.model, host.new_cache(), limit=ids.shape[1] + self.tokens, width=1, watch=True)
        labels = [torch.where(known & (not self.tokens), ids, IGNORED)]
        seen: list[Any] = []
        ends = torch.tensor(_ends(host.model), device=host.device, dtype=torch.long)
        going = torch.ones(len(ids), 1, dtype=torch.bool, device=host.device)
        try:
            logits = reader.step(ids, real, logits=ids.shape[1])
            seen.append(reader.hiddens)
            for _ in range(self.tokens):
                token = self._choose(logits[:, -1:], generator)
                labels.append(torch.where(going, token, IGNORED))
                going = going & ~torch.isin(token, ends)
                logits = reader.step(token)
                seen.append(reader.hiddens)
        finally:
            reader.close()
        wanted = nn.functional.pad(torch.cat(labels, 1), (0, self.heads + 1), value=IGNORED)
        wanted_BSK = wanted[:, 2:].unfold(1, self.heads, 1)
        use = (wanted_BSK != IGNORED).any(-1) & nn.functional.pad(known, (0, self.tokens), value=True)
        return torch.cat(seen, 1)[use], wanted_BSK[use]

    def _choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        return draw((logits.float() / self.temperature).softmax(-1), generator)

    @torch.enable_grad()
    def fit(self, heads: Heads, hidden_ND: Tensor, wanted_NK: Tensor, generator: torch.Generator) -> None:
        """Minimises the heads' losses, each weighted with `decay` to the power of its number."""
        heads.requires_grad_(True)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=self.lr, weight_decay=0.0)
        steps = self.epochs * -(-len(hidden_ND) // self.batch)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        weight = self.decay ** torch.arange(1, self.heads + 1, device=hidden_ND.device)
        for _ in range(self.epochs):
            order = torch.randperm(len(hidden_ND), generator=generator, device=hidden_ND.device)
            for chosen in order.split(self.batch):
                loss = (weight * _losses(heads(hidden_ND[chosen]), wanted_NK[chosen])).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        heads.requires_grad_(False)

    @torch.no_grad()
    def measure(self, heads: Heads, hidden_ND: Tensor, wanted_NK: Tensor) -> tuple[list[float], list[list[float]]]:
        """Each head's loss, and how often its guess of each rank is right, [K][ranks]."""
        losses = torch.zeros(self.heads, device=hidden_ND.device)
        hits = losses.new_zeros(self.heads, min(self.ranks, heads.last.shape[1]))
        count = (wanted_NK != IGNORED).sum(0).clamp(min=1)
        for hidden, wanted in zip(hidden_ND.split(self.batch), wanted_NK.split(self.batch), strict=True):
            logits_KNV = heads(hidden)
            losses += _losses(logits_KNV, wanted) * (wanted != IGNORED).sum(0)
            hits += (logits_KNV.topk(hits.shape[1], -1).indices == wanted.T[..., None]).sum(1)
        return (losses / count).tolist(), (hits / count[:, None]).tolist()


def _losses(logits_KNV: Tensor, wanted_NK: Tensor) -> Tensor:
    """Each head's mean cross-entropy, [K]; 0 where it has nothing to guess."""
    loss = nn.functional.cross_entropy(
        logits_KNV.flatten(0, 1).float(), wanted_NK.T.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss.view(logits_KNV.shape[:2]).sum(1) / (wanted_NK != IGNORED).sum(0).clamp(min=1)


def _mark(output: Tensor) -> Tensor:
    """A few thousand of the output layer's weights, by which it is known again."""
    return output.detach().flatten()[:: max(1, output.numel() // 4096)].clone()


def _ends(model: Any) -> list[int]:
    """The tokens at which generation ends."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


METHOD = Medusa
