"""Keys and values of heads that keep different numbers of tokens, in memory that holds these tokens only.

A layer has one flat store; each head of each row owns a run of its slots, and behind every run there is equal room for
new tokens, so that all heads take the next ones without a copy.
"""

from collections.abc import Callable

import torch


class Ragged:
    """One layer's runs; B rows, Hk kv heads, S slots.

    Attributes:
        keys: [S, d]; values: [S, e].
        starts, lengths: int64 [B, Hk], the runs.
        spare: free slots behind each run; longest: tokens in the longest run.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, index: torch.Tensor,
        lengths: torch.Tensor, spare: int,
    ) -> None:  # fmt: skip
        """Lays out runs of the given lengths from flat stores.

        Args:
            keys: [any, d]; values: [any, e]; columns: int64 [any], the places in the text.
            index: which of them, run by run, int64 [sum of lengths].
            lengths: int64 [B, Hk].
            spare: free slots behind each run.
        """
        self._lay(keys, values, columns, index, lengths, spare)
        self.new = 0  # tokens at the end of every run whose columns are the text's last ones, not stored

    def _lay(
        self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, index: torch.Tensor,
        lengths: torch.Tensor, spare: int,
    ) -> None:  # fmt: skip
        self.spare, self.lengths = spare, lengths
        run = (lengths + spare).flatten()
        self.starts = (run.cumsum(0) - run).view_as(lengths)
        self._ends = (self.starts + lengths).flatten()
        self.longest = int(lengths.max())
        if spare:
            shift = torch.arange(lengths.numel(), device=index.device) * spare
            places = torch.arange(len(index), device=index.device) + shift.repeat_interleave(lengths.flatten())
            index = index.new_zeros(int(run.sum())).index_copy_(
                0, places, index
            )  # free slots: whatever is in the first
        self.keys, self.values, self.columns = (store.index_select(0, index) for store in (keys, values, columns))

    @property
    def nbytes(self) -> int:
        """Bytes of the stores of keys and values, free slots included."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def append(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Adds [B, Hk, n, d] and [B, Hk, n, e] behind the runs; where they don't fit, with `room` free slots more."""
        new = keys.shape[2]
        if new > self.spare:
            self._again(torch.arange(len(self.lengths), device=self.keys.device), new + room)
        at = self._ends
        if new > 1:
            at = (at[:, None] + torch.arange(new, device=at.device)).flatten()
        self.keys.index_copy_(0, at, keys.reshape(-1, keys.shape[-1]))
        self.values.index_copy_(0, at, values.reshape(-1, values.shape[-1]))
        self._count(new)
        self.new += new

    def _count(self, new: int) -> None:
        self._ends, self.lengths = self._ends + new, self.lengths + new
        self.spare -= new
        self.longest += new

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens of every run, which has as many."""
        self._count(-count)
        self.new = max(self.new - count, 0)

    def places(self) -> torch.Tensor:
        """The slot of each token, int64 [B, Hk, longest]: runs end at the right, short ones have others' in front."""
        last = torch.arange(-self.longest, 0, device=self.keys.device)
        return (self._ends.view_as(self.lengths)[:, :, None] + last).clamp_(min=0)

    def padded(self, store: torch.Tensor) -> torch.Tensor:
        """A store as [B, Hk, longest, ...], runs ending at the right: a copy, for what can't follow runs."""
        return store[self.places()]

    def text(self, seen: int) -> torch.Tensor:
        """The columns of `padded`, int64 [B, Hk, longest], when so many columns were seen."""
        columns = self.padded(self.columns)
        if self.new:
            columns[..., -self.new :] = torch.arange(seen - self.new, seen, device=columns.device)
        return columns

    def select(self, slots: torch.Tensor, lengths: torch.Tensor, seen: int, spare: int) -> "Ragged":
        """Runs of chosen tokens; `seen` as in `text`, the rest as in `packed`, of `padded`'s places."""
        columns = self.columns
        if self.new:
            last = torch.arange(-self.new, 0, device=columns.device)
            at = (self._ends[:, None] + last).flatten()
            columns = columns.index_copy(0, at, (seen + last).repeat(self.lengths.numel()))
        index = chosen(self.places().gather(2, slots), lengths)
        return Ragged(self.keys, self.values, columns, index, lengths, spare)

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keeps, repeats or reorders rows, as `pick` does it with a tensor whose first dimension they are."""
        self._again(pick(torch.arange(len(self.lengths), device=self.keys.device)), self.spare)

    def _again(self, rows: torch.Tensor, spare: int) -> None:
        starts, lengths = self.starts[rows].flatten(), self.lengths[rows].flatten()
        shift = starts - (lengths.cumsum(0) - lengths)
        index = torch.arange(int(lengths.sum()), device=starts.device) + shift.repeat_interleave(lengths)
        self._lay(self.keys, self.values, self.columns, index, self.lengths[rows], spare)


def packed(
    keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor,
    spare: int,
) -> Ragged:  # fmt: skip
    """Runs from storage in which all heads have equal room.

    Args:
        keys: [B, Hk, room, d]; values: [B, Hk, room, e]; both contiguous.
        columns: int64 [B, Hk, used].
        slots: int64 [B, Hk, n], ascending; of each head the last `lengths` [B, Hk] are meant.
        spare: free slots behind each run.
    """
    batch, heads, room = keys.shape[:3]
    first = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * room
    text = columns.new_zeros(batch, heads, room)
    text[..., : columns.shape[2]] = columns
    index = chosen(slots + first, lengths)
    return Ragged(keys.flatten(0, 2), values.flatten(0, 2), text.flatten(), index, lengths, spare)


def chosen(index: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The last `lengths` [B, Hk] of `index` [B, Hk, n], run by run in one dimension."""
    places = torch.arange(index.shape[2], device=index.device)
    return index[places >= index.shape[2] - lengths[:, :, None]]
