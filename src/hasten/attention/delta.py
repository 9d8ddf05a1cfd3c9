"""DELTA: a few layers find the tokens that matter, those after them read only these (arXiv 2510.09883, section 3).

The first layers read everything. A Delta layer reads everything too, and rates pages of the text by its attention a of
the step's query; the layers up to the next one read the best pages and the last ones. The cache stays whole.

    a[k] = max_h softmax(q_h K_h^T)[k],   s_P = sum_{k in P} a[k],   P* = TopK(s, budget) with the last L pages

Departures: pages are counted from a row's first token, so that padding changes nothing, and read token by token.
"""

import dataclasses

import torch
from torch import Tensor

from hasten.attention._reading import Chosen, Look, Reading
from hasten.core.cards import Card
from hasten.core.options import option
from hasten.kernels.top_rows import top_rows

CARD = Card(
    title="DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning",
    paper="2510.09883",
    seams=("cache.read", "cache.keep"),
    effects=("time", "quality"),
    lossless=False,
    claim="1.54x faster decoding end to end, 4.25x fewer attended tokens at full accuracy (AIME, GPQA-Diamond)",
    claimed=1.54,
    identity={"budget": None},
    experiment=("stdlib-lm(prompt=3584, new=256, examples=32)", "attention/delta(budget=512, choose=[4, 8])"),
    when="Long generations of deep models, where each new token reads a cache of many thousand tokens.",
    when_not="Contexts of a few budgets or shallow models: the layers that read everything are most of the time then.",
    hosts=("decoder",),
)

TIE = 1e-7  # per page, as in the authors' code: of equal pages the earlier one


def naive_delta(
    weights: Tensor, begin: Tensor, budget: int = 1024, recent: int = 128, page: int = 16
) -> tuple[Tensor, Tensor]:
    """The tokens of the chosen pages.

    Args:
        weights: [batch, heads, tokens], attention of one query; 0 at padding.
        begin: int64 [batch], tokens of padding in front of each row.
        budget: tokens to read, `recent` of them the last ones; both in whole pages of `page` tokens.

    Returns:
        rows int32 [batch, 1, M] in ascending order, the row's last token behind the valid ones, and counts int32
        [batch, 1].
    """
    batch, heads, tokens = weights.shape
    chosen = []
    for b in range(batch):
        first = int(begin[b])
        pages = [list(range(p, min(p + page, tokens))) for p in range(first, tokens, page)]
        scores = []
        for place, members in enumerate(pages):
            score = sum(max(float(weights[b, h, k]) for h in range(heads)) for k in members)
            last = place >= len(pages) - recent // page
            scores.append(float("inf") if last else score - TIE * place)
        best = sorted(range(len(pages)), key=lambda place: -scores[place])[: budget // page]
        chosen.append([k for place in sorted(best) for k in pages[place]])
    most = min(budget // page, -(-(tokens - int(begin.min())) // page)) * page
    rows = torch.tensor([one + [tokens - 1] * (most - len(one)) for one in chosen], dtype=torch.int32)
    return rows[:, None], torch.tensor([[len(one)] for one in chosen], dtype=torch.int32)


def delta(
    weights: Tensor, begin: Tensor | None, budget: int = 1024, recent: int = 128, page: int = 16
) -> tuple[Tensor, Tensor]:
    """`naive_delta` without loops; `begin` may be None where nothing is padded."""
    batch, _, tokens = weights.shape
    device = weights.device
    best = weights.amax(dim=1)  # [batch, tokens]
    longest = tokens
    if begin is not None:
        longest = tokens - int(begin.min())
        place = begin[:, None] + torch.arange(longest, device=device)
        best = best.gather(1, place.clamp(max=tokens - 1)).masked_fill(place >= tokens, 0)
    pages = -(-longest // page)
    scores = torch.nn.functional.pad(best, (0, pages * page - longest)).view(batch, pages, page).sum(-1)
    order = torch.arange(pages, device=device)
    scores = scores - TIE * order
    if begin is None:
        scores[:, max(0, pages - recent // page) :] = torch.inf
    else:
        number = (tokens - begin + page - 1) // page
        scores.masked_fill_(order >= (number - recent // page)[:, None], torch.inf)
        scores.masked_fill_(order >= number[:, None], -torch.inf)
    most = min(budget // page, pages)
    found = top_rows(scores, most)
    rows = (found[..., None] * page + torch.arange(page, device=device)).view(batch, 1, most * page)
    if begin is None:
        counts = torch.full((batch, 1), most * page - (pages * page - longest), dtype=torch.int32, device=device)
        return rows.clamp_(max=tokens - 1).int(), counts
    rows = (rows + begin[:, None, None]).clamp_(max=tokens - 1).int()
    counts = number.clamp(max=most) * page - (number * page - (tokens - begin))
    return rows, counts.int()[:, None]


@dataclasses.dataclass(frozen=True)
class DELTA(Reading):
    budget: int | None = option(1024, "tokens that a sparse layer reads; none reads everything", least=16)
    recent: int = option(128, "of these, the last tokens of the text", least=1)
    page: int = option(16, "tokens of a page, which is read as a whole", least=1)
    full: int = option(2, "first layers, which read everything", least=0)
    choose: tuple[int, ...] | None = option(
        None, "Delta layers, counted from 0; none takes those of the paper's 28 (2, 14, 22) in proportion", least=0
    )

    def problems(self) -> list[str]:
        found = []
        if self.budget is not None and self.budget // self.page <= self.recent // self.page:
            found.append(f"a budget of {self.budget} has no page left beside the {self.recent} recent tokens")
        if self.recent < self.page:
            found.append("recent must be a page at least, so that the text's end is read")
        return found

    @property
    def idle(self) -> bool:
        return self.budget is None

    def places(self, depth: int) -> tuple[int, ...]:
        """The Delta layers of a model with `depth` layers."""
        if self.choose is not None:
            return self.choose
        return tuple(sorted({max(self.full, round(depth * place / 28)) for place in (2, 14, 22)}))

    def select(self, look: Look) -> Chosen | None:
        assert self.budget is not None
        if look.index < self.full or look.columns <= self.budget:
            return None
        if look.index not in self.places(look.depth):
            rows = look.shared.get("rows")
            return None if rows is None else Chosen(*rows)
        weights = look.weights()
        look.shared["rows"] = delta(weights, look.begin, self.budget, self.recent, self.page)
        return Chosen(weights=weights)


METHOD = DELTA
