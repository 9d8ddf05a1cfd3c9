"""One model's passes over a batch whose rows are at different places: the cache, its real slots, the positions.

Slots are the cache's entries along its length; every pass appends its tokens as slots in all rows. A row that rejects
tokens, or had nothing to say in a pass, leaves holes there. The tail that no row keeps is cropped, holes are masked,
and once they are too many the cache is gathered into a left-padded one without holes.

Letters: B rows, Q tokens of a pass, S slots, V vocabulary, D hidden size.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.attention import NAME

HOLES = 0.25
"""The share of slots that may be holes in the fullest row before the cache is gathered (why: see `Rows.keep`)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """Which candidate follows which; the same in all rows.

    Attributes:
        parents: [N], the place of each candidate's parent, before its own; -1 where it follows the last token.
    """

    parents: Tensor

    @functools.cached_property
    def paths(self) -> list[tuple[int, ...]]:
        """The candidates from the root to each, itself the last."""
        made: list[tuple[int, ...]] = []
        for place, parent in enumerate(self.parents.tolist()):
            assert parent < place, "a candidate comes after its parent"
            made.append((*(made[parent] if parent >= 0 else ()), place))
        return made

    @functools.cached_property
    def depth_list(self) -> list[int]:
        """How many candidates stand before each, 0 for those that follow the last token."""
        return [len(path) - 1 for path in self.paths]

    @functools.cached_property
    def depths(self) -> Tensor:
        """[N], the same as a tensor."""
        return self.parents.new_tensor(self.depth_list)

    @functools.cached_property
    def levels(self) -> list[Tensor]:
        """The places of the candidates of each depth."""
        return [(self.depths == depth).nonzero()[:, 0] for depth in range(max(self.depth_list, default=-1) + 1)]

    @functools.cached_property
    def seen(self) -> Tensor:
        """[N, N] bool: each candidate sees those on its path."""
        seen = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for place, path in enumerate(self.paths):
            seen[place, list(path)] = True
        return seen.to(self.parents.device)


class Rows:
    """A model, its cache and the rows' places in it.

    Attributes:
        hiddens: [B, n, D], what the output layer read in the latest pass, if `watch` is on.
        hidden: [B, D], of it what was read at the last position.
        passes: forward passes so far.
    """

    def __init__(self, model: nn.Module, cache: Any, *, limit: int, width: int, watch: bool = False) -> None:
        """limit: slots that may ever be needed; width: the widest pass on a cache that is not empty, in tokens."""
        self.model, self.cache, self.passes = model, cache, 0
        self.hiddens: Tensor | None = None
        self.slots = cache.get_seq_length()
        self.real: Tensor | None = None  # [B, S] bool, None while every slot of every row is real
        self.count: Tensor | None = None  # [B] real slots of each row, None with `real`
        device = next(model.parameters()).device
        self.last = limit - 1  # the highest position that a token of the output can have
        self.order = torch.arange(limit + width + 1, device=device)
        kind = getattr(model.config, "_attn_implementation", None)
        self.watched = kind == NAME  # an observing cache knows plain causal masks by who made them
        self.takes_4d = kind in ("sdpa", NAME)
        self.strip = _strip(width, limit + width + 1, device)
        self.handle = model.get_output_embeddings().register_forward_pre_hook(self._see) if watch else None

    def _see(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.hiddens = given[0]

    @property
    def hidden(self) -> Tensor:
        assert self.hiddens is not None, "the model is watched and has run"
        return self.hiddens[:, -1]

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def step(self, ids_BQ: Tensor, real_BQ: Tensor | None = None, logits: int = 1, tree: Tree | None = None) -> Tensor:
        """One forward pass; its tokens become slots. `real_BQ` marks tokens that are no filling, all by default.

        The last tokens may be a tree's candidates: each is at the position that its depth gives it, and sees of them
        those on its path.

        Returns:
            [B, logits, V], the last `logits` positions.

        Raises:
            UsageError: a tree, and an attention that takes no mask of its own.
        """
        rows, width = ids_BQ.shape
        before, total = self.slots, self.slots + width
        if real_BQ is not None and self.real is None:
            self.real = ids_BQ.new_ones(rows, before, dtype=torch.bool)
            self.count = ids_BQ.new_full((rows,), before)
        if self.real is None:
            positions = self.order[before:total][None]
        else:
            new = self.real.new_ones(rows, width) if real_BQ is None else real_BQ
            self.real = torch.cat([self.real, new], 1)
            if real_BQ is None:
                positions = (self.count[:, None] + self.order[:width]).clamp_(max=self.last)
                self.count = self.count + width
            else:
                positions = (self.count[:, None] + new.cumsum(1) - 1).clamp_(min=0)
                self.count = self.count + new.sum(1)
        mask = self._mask(before, total)
        if tree is not None and len(tree.paths):
            positions, mask = self._branch(tree, positions, before, total)
        out = self.model(
            input_ids=ids_BQ,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits,
        )
        self.slots, self.passes = total, self.passes + 1
        return out.logits[:, -logits:]

    def _mask(self, before: int, total: int) -> Tensor | None:
        """What the model is given as mask: nothing where causal is enough, 4-D where the model takes it as it is."""
        width = total - before
        if before == 0 or not self.takes_4d or width > self.strip.shape[2] or (self.watched and self.real is None):
            return None if self.real is None else self.real.long()
        if total > self.strip.shape[3]:  # holes take more slots than there are tokens
            self.strip = _strip(self.strip.shape[2], 2 * total, self.strip.device)
        if self.real is None:
            return None if width == 1 else self.strip[:, :, -width:, -total:]
        seen = self.real[:, None, None] if width == 1 else self.strip[:, :, -width:, -total:] & self.real[:, None, None]
        return seen

    def _branch(self, tree: Tree, positions: Tensor, before: int, total: int) -> tuple[Tensor, Tensor]:
        """Positions [B, Q] and mask [B, 1, Q, S] of a pass whose last tokens are a tree."""
        if not self.takes_4d:
            raise UsageError(
                "drafting a tree needs attention that takes a mask of its own: build the model with "
                "attn_implementation='sdpa'"
            )
        size, width = len(tree.paths), total - before
        stem = positions[:, : width - size]
        positions = torch.cat([stem, (stem[:, -1:] + 1 + tree.depths).clamp_(max=self.last)], 1)
        seen = torch.ones(width, total, dtype=torch.bool, device=tree.parents.device).tril_(before)
        seen[-size:, -size:] = tree.seen
        mask = seen[None, None]
        return positions, mask if self.real is None else mask & self.real[:, None, None]

    def keep_path(self, path_BD: Tensor, accepted_B: Tensor, accepted: list[int], size: int) -> None:
        """Of the latest pass's last `size` slots, a tree's, keeps each row's path.

        Args:
            path_BD: the candidates on it, of which the first `accepted_B` count; `accepted`: the same as a list.
        """
        from transformers import DynamicCache

        most, ragged = max(accepted), max(accepted) != min(accepted)
        kept = self.order[:size] < accepted_B[:, None]
        if type(self.cache) is DynamicCache:
            start = self.slots - size
            for part in self.cache.layers if most else []:
                if part.keys is not None and part.keys.numel():
                    for entries in (part.keys, part.values):
                        index = path_BD[:, None, :most, None].expand(-1, entries.shape[1], -1, entries.shape[3])
                        entries[:, :, start : start + most] = entries[:, :, start:].gather(2, index)
            self.keep(kept if ragged else None, size - most)
            return
        stays = torch.zeros(len(path_BD), size + 1, dtype=torch.bool, device=path_BD.device)
        stays.scatter_(1, torch.where(kept[:, :most], path_BD[:, :most], size), True)  # another cache keeps its order
        stays = stays[:, :size]
        width = int(stays.any(0).nonzero().max()) + 1 if most else 0
        self.keep(stays if width else None, size - width)

    def keep(self, kept_BQ: Tensor | None, drop: int) -> None:
        """Takes back part of the latest passes.

        Args:
            kept_BQ: which of the last Q slots stay, [B, Q] bool; None where all that are not dropped do.
            drop: how many of the last slots no row keeps (they are cropped).
        """
        if drop:
            self.cache.crop(-drop)
            self.slots -= drop
        if kept_BQ is not None:
            if self.real is None:
                self.real = kept_BQ.new_ones(len(kept_BQ), self.slots + drop)
            self.real[:, -kept_BQ.shape[1] :] &= kept_BQ
        if self.real is None or (kept_BQ is None and not drop):
            return
        self.real = self.real[:, : self.slots]
        self.count = self.real.sum(1)
        # Gathering copies the cache, a hole is read by every later pass. For batches of 4 and 16 with 320 to 1120 slots
        # on a CPU, any share from 0.1 to 1 (never) took the same time within 4%, gathering at once up to 8% more: a
        # quarter is free and bounds the memory. A model that makes its own masks may count slots (the local attention
        # of GPT-Neo does), so it gets none inside a row.
        filled = int(self.count.max())
        if self.slots - filled > HOLES * self.slots or (kept_BQ is not None and not self.takes_4d):
            self._gather(filled)

    def _gather(self, filled: int) -> None:
        """Moves each row's real slots to the right end, in order, and forgets the rest."""
        from transformers import DynamicCache

        if type(self.cache) is not DynamicCache:  # another cache keeps books of its own: its holes stay
            return
        layers = self.cache.layers
        order_BS = self.real.to(torch.int8).argsort(dim=1, stable=True)[:, -filled:]
        for part in layers:
            if part.keys is not None and part.keys.numel():
                index = order_BS[:, None, :, None]
                part.keys = part.keys.gather(2, index.expand(-1, part.keys.shape[1], -1, part.keys.shape[3]))
                part.values = part.values.gather(2, index.expand(-1, part.values.shape[1], -1, part.values.shape[3]))
        self.real = self.real.gather(1, order_BS)
        self.slots = filled

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch only."""
        self.cache.batch_select_indices(rows)
        if self.real is not None:
            self.real, self.count = self.real[rows], self.count[rows]


def _strip(width: int, total: int, device: torch.device) -> Tensor:
    """Causal masks of all lengths in one tensor, [1, 1, width, total] bool.

    Its last q rows and n columns are the mask of q queries at the end of n keys: a view, no work in a pass. Only
    scaled-dot-product attention takes such a mask; for other implementations the model makes one from two dimensions.
    """
    query, key = torch.arange(width, device=device), torch.arange(total, device=device)
    return (key[None] <= total - width + query[:, None])[None, None]
