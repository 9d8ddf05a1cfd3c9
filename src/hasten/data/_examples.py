"""A loader's data set as methods see it that choose among its examples, and loaders like the person's over a choice."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, default_collate

from hasten.core.errors import UsageError
from hasten.data._batches import on_device, tensors


class Examples:
    """The examples behind a loader, by index.

    Args:
        name: the method's, for messages.
        loader: a `DataLoader` over a data set with a length.
        device: that batches are put on.

    Raises:
        UsageError: no such loader.
    """

    def __init__(self, name: str, loader: Any, device: torch.device) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise UsageError(f"{name} chooses examples by index: give a DataLoader over a data set with a length")
        if loader.batch_size is None:
            raise UsageError(f"{name} makes its own batches: give a DataLoader with batch_size=, not a batch sampler")
        self.loader, self.device = loader, device

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        return int(self.loader.batch_size or 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def batches(self, size: int | None = None, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """Batches of the examples in order (or of those named), collated as the person's loader does, on the device."""
        wanted = list(range(len(self)) if indices is None else (int(i) for i in indices))
        size = size or self.batch_size
        collate = self.loader.collate_fn
        columns = isinstance(self.dataset, TensorDataset) and collate is default_collate
        for at in range(0, len(wanted), size):
            rows = wanted[at : at + size]
            made = [column[rows] for column in self.dataset.tensors] if columns else collate([self[i] for i in rows])
            yield on_device(made, self.device)

    def lengths(self) -> Tensor:
        """[N, d] int64: the data set's attribute `lengths`, else the first dimension of each example's tensors.

        Raises:
            UsageError: the examples hold no tensor with a length, or not equally many.
        """
        own = getattr(self.dataset, "lengths", None)
        if own is not None:
            found = torch.as_tensor(own, dtype=torch.int64)
        else:
            rows = [[len(part) for part in tensors(self.dataset[i]) if part.dim()] for i in range(len(self))]
            if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
                raise UsageError("batches by length need examples of tensors, or a data set with an attribute lengths")
            found = torch.tensor(rows)
        return found[:, None] if found.dim() == 1 else found

    def loader_over(self, sampler: Sampler[Any], batches: bool = False) -> DataLoader:
        """A loader like the person's whose order, or with `batches` whose batches, a sampler gives."""
        old = self.loader
        given: dict[str, Any] = {"batch_sampler": sampler} if batches else {
            "sampler": sampler, "batch_size": old.batch_size, "drop_last": old.drop_last,
        }  # fmt: skip
        if old.num_workers:
            given |= {"prefetch_factor": old.prefetch_factor, "persistent_workers": old.persistent_workers}
        return DataLoader(
            self.dataset,
            **given,
            num_workers=old.num_workers,
            collate_fn=old.collate_fn,
            pin_memory=old.pin_memory,
            timeout=old.timeout,
            worker_init_fn=old.worker_init_fn,
            multiprocessing_context=old.multiprocessing_context,
            generator=old.generator,
        )
