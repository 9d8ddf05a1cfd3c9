"""A router of tokens: a residual network on the small model's state at its choice, how it is fitted, its threshold."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

NEVER = 2.0
"""A threshold that no probability reaches."""


class Block(nn.Module):
    """Norm, two linear layers with GELU between them, and a residual around them."""

    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width * expansion), nn.Linear(width * expansion, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x))))))


class Router(nn.Module):
    """From the small model's last hidden state, its largest scores and its token's embedding to one logit.

    Attributes:
        top: how many of the largest scores are read.
        threshold: from which probability on the large model is asked; saved with the weights.
    """

    threshold: Tensor

    def __init__(
        self, hidden: int, embedding: int, top: int, *, width: int, blocks: int, expansion: int, dropout: float
    ) -> None:
        super().__init__()
        self.top = top
        self.scores = nn.Linear(top, hidden)
        self.join = nn.Linear(2 * hidden + embedding, width)
        self.blocks = nn.ModuleList(Block(width, expansion, dropout) for _ in range(blocks))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 1)
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(self, hidden: Tensor, top: Tensor, embedded: Tensor) -> Tensor:
        """The logit [...] of hidden [..., D], the largest scores in descending order [..., K], embedding [..., E]."""
        kind = self.join.weight.dtype
        x = self.join(torch.cat([hidden.to(kind), embedded.to(kind), self.scores(top.to(kind))], -1))
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))[..., 0]


@torch.enable_grad()
def fit(
    router: Router,
    features: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    held: Tensor,
    *,
    lr: float,
    decay: float,
    batch: int,
    epochs: int,
    patience: int,
    seed: int,
) -> dict[str, Any]:
    """Fits with binary cross-entropy in which both classes weigh the same, and keeps the epoch that is best held out.

    Args:
        features: what the router reads, each [N, ...]; `labels`: [N], 1 where the large model is to be asked.
        held: [N] bool, the examples that validate.
        patience: epochs without a better held-out loss after which fitting ends.

    Returns:
        the best held-out loss and the epochs it took.
    """
    device = labels.device
    own = (~held).nonzero()[:, 0]
    asked = labels[own].sum()
    weight = (len(own) - asked) / asked if asked else torch.ones((), device=device)
    loss_of = nn.BCEWithLogitsLoss(pos_weight=weight)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=decay)
    best, kept, since, passes = float("inf"), copy.deepcopy(router.state_dict()), 0, 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout draws from the global generator
        while passes < epochs and since < patience:
            passes += 1
            router.train()
            for chosen in own[torch.randperm(len(own)).to(device)].split(batch):
                optimizer.zero_grad()
                loss_of(router(*(part[chosen] for part in features)), labels[chosen]).backward()
                optimizer.step()
            router.eval()
            with torch.no_grad():
                now = loss_of(router(*(part[held] for part in features)), labels[held]).item()
            since += 1
            if now < best:
                best, kept, since = now, copy.deepcopy(router.state_dict()), 0
    router.load_state_dict(kept)
    router.eval().requires_grad_(False)
    return {"loss": best, "epochs": passes}


def threshold(chances: Tensor, labels: Tensor, rate: float | None, recall: float) -> float:
    """The probability from which on the large model is asked.

    Args:
        chances, labels: of the examples that validate, [N].
        rate: the share of them to be asked about, where given; 0 is never, 1 always.
        recall: else the share of the labelled ones that must be among them, with as few others as possible.
    """
    if rate is None:
        labelled = chances[labels > 0.5].sort(descending=True).values
        needed = -(-int(1e6 * recall) * len(labelled) // 1_000_000)
        return labelled[needed - 1].item() if needed else NEVER
    count = round(rate * len(chances))
    if rate == 1:
        return 0.0
    return chances.sort(descending=True).values[count - 1].item() if count else NEVER
