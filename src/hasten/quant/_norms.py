"""A norm that hands int8 codes to the layers behind it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.hosts.feeding import Affine
from hasten.kernels import int8_norm

_EXACT = ("gain", "shift")


class Int8Norm(nn.Module):
    """What a norm computes, divided by a step for each input and rounded to int8 codes (`kernels.int8_norm`).

    The norm that it stands for is kept as `norm`, unused. Buffers, all of them in the state dict: `gain` and (if any)
    `shift` fp32 [in], both divided by the steps; `source` and `place` int64 [extra] where inputs have more columns than
    one.
    """

    kind = "int8_norm"
    gain: Tensor
    shift: Tensor | None
    source: Tensor | None
    place: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        gain: Tensor,
        shift: Tensor | None,
        source: Tensor | None = None,
        place: Tensor | None = None,
        *,
        eps: float,
        centred: bool,
        most: int,
    ) -> None:
        super().__init__()
        self.norm, self.eps, self.centred, self.most = norm, eps, centred, most
        for name, part in (("gain", gain), ("shift", shift), ("source", source), ("place", place)):
            self.register_buffer(name, None if part is None else part.clone())

    @classmethod
    def of(
        cls, norm: nn.Module, affine: Affine, steps: Tensor, source: Tensor, place: Tensor, most: int
    ) -> Self:  # fmt: skip
        """For the `steps` fp32 [in] that inputs are divided by."""
        shift = None if affine.shift is None else affine.shift / steps
        extra = (source, place) if len(source) else (None, None)
        return cls(norm, affine.gain / steps, shift, *extra, eps=affine.eps, centred=affine.centred, most=most)

    @classmethod
    def empty(
        cls, norm: nn.Module, *, columns: int, extra: int, shift: bool, eps: float, centred: bool, most: int,
        device: Any = None,
    ) -> Self:  # fmt: skip
        """For `norm`, to be filled by `load_state_dict`; takes what `shape` gives."""
        more = [torch.zeros(extra, dtype=torch.int64, device=device) for _ in range(2)] if extra else [None, None]
        ones = torch.ones(columns, device=device)
        return cls(norm, ones, ones if shift else None, *more, eps=eps, centred=centred, most=most)

    def shape(self) -> dict[str, Any]:
        """What `empty` takes; JSON-able."""
        return {"columns": len(self.gain), "extra": 0 if self.source is None else len(self.source),
                "shift": self.shift is not None, "eps": self.eps, "centred": self.centred,
                "most": self.most}  # fmt: skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        held = self._buffers
        return int8_norm.norm(hidden_states, held["gain"], held["shift"], held["source"], held["place"],  # type: ignore[arg-type]
                              eps=self.eps, centred=self.centred, most=self.most)  # fmt: skip

    def dense(self) -> nn.Module:
        """The norm that it stands for."""
        return self.norm

    def bytes(self) -> int:
        """Memory of what it adds to the norm."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def way(self) -> str:
        """What computes it; builds the kernel."""
        native = self.gain.device.type == "cpu" and int8_norm.kernel() is not None
        return "native" if native else "PyTorch"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.source is None or self.place is None or self.source.is_meta:
            return
        inside = 0 <= int(self.source.min()) <= int(self.source.max()) < len(self.gain)
        if not inside or not 0 < int(self.place.min()) <= int(self.place.max()) < int8_norm.PLACES:
            raise UsageError("an int8 norm names an input that it does not have: the file is damaged")

    def extra_repr(self) -> str:
        extra = "" if self.source is None else f", {len(self.source)} extra"
        return f"{len(self.gain)}{extra}, eps={self.eps}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: held for name in _EXACT if (held := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, held in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            away = held.is_meta or moved.is_meta
            self._buffers[name] = moved.to(held.dtype) if away else held.to(moved.device)
        return self
