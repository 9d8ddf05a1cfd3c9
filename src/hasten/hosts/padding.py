"""What a model's mask hides beside later tokens, read once per forward and not once per layer."""

import weakref

import torch

from hasten.core.errors import UsageError
from hasten.hosts.attention import is_causal


class Padding:
    """Remembers what it read off the latest mask."""

    def __init__(self) -> None:
        self._mask: weakref.ref[torch.Tensor] | None = None
        self._seen = 0
        self._lead: torch.Tensor | None = None
        self._holes = False

    def _read(self, mask: torch.Tensor, seen: int) -> None:
        if self._mask is not None and self._mask() is mask and self._seen == seen:
            return
        last = mask[:, 0, -1]  # [batch, columns]
        sees = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        lead = (~sees).long().cumprod(dim=-1).sum(dim=-1).cpu()
        self._lead = lead if bool(lead.any()) else None
        self._holes = bool((sees[:, :-1] & ~sees[:, 1:]).any())
        self._mask, self._seen = weakref.ref(mask), seen

    def plain(self, mask: torch.Tensor | None, seen: int) -> bool:
        """Whether a mask, [batch, 1, queries, seen] or None, hides nothing but later columns and rows' first ones."""
        if mask is None:
            return True
        if not is_causal(mask):
            return False
        self._read(mask, seen)
        return not self._holes

    def lead(self, mask: torch.Tensor | None, seen: int, batch: int) -> torch.Tensor | None:
        """Hidden columns in front of each row, int64 [batch] on the CPU, as the last query sees it; None for none.

        Raises:
            UsageError: the last query does not see all columns behind the first one that it sees.
        """
        if mask is None:
            return None
        self._read(mask, seen)
        if self._holes:
            raise UsageError(
                "a cache that drops tokens needs padding on the left, not at a row's end or inside, and no mask that "
                "hides tokens from the last one"
            )
        return None if self._lead is None else self._lead.expand(batch)
