"""What transformers prepared, applied to rows at different places: stopping criteria and logits processors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError

# Processors that look at scores alone, by class name: they act on all positions of a pass at once.
POINTWISE = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "TopHLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor",
}  # fmt: skip


class Stops:
    """Each row's tokens, and where transformers' stopping criteria end it.

    With an end-of-sequence criterion a finished row is padded; without one transformers lets every row go on until all
    have met a criterion, and so does this. Criteria other than length and end of sequence see one row at a time.
    """

    def __init__(self, criteria: Any, prompt: Tensor) -> None:
        from transformers.generation import EosTokenCriteria, MaxLengthCriteria

        self.prompt, self.new = prompt, [[] for _ in prompt]  # new: list of token lists
        self.limit = min([one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)], default=0)
        if not self.limit:
            raise UsageError("generation has no length limit: give max_new_tokens")
        ends = [one for one in criteria if hasattr(one, "eos_token_id")]
        self.pads = bool(ends)
        self.ends = {int(token) for one in ends for token in one.eos_token_id}
        known = (EosTokenCriteria, MaxLengthCriteria)
        self.others = [one for one in criteria if type(one) not in known]
        self.met: list[int | None] = [None] * len(prompt)  # new tokens at which a row met a criterion
        self.streamed = 0

    def left(self, rows: list[int]) -> int:
        """Tokens that the row farthest behind may still get."""
        return self.limit - self.prompt.shape[1] - min(len(self.new[row]) for row in rows)

    def tell(self, row: int, tokens: list[int]) -> None:
        own = self.new[row]
        for token in tokens:
            if len(own) + self.prompt.shape[1] >= self.limit or (self.met[row] is not None and self.pads):
                break
            own.append(token)
            if self.met[row] is None and (
                token in self.ends
                or len(own) + self.prompt.shape[1] >= self.limit
                or (self.others and self._others(row))
            ):
                self.met[row] = len(own)

    def _others(self, row: int) -> bool:
        ids = self.history(row, self.prompt.device)[None]
        return any(bool(one(ids, None).all()) for one in self.others)

    def finished(self, row: int) -> bool:
        """Whether a row needs no further token."""
        if self.met[row] is None:
            return False
        if self.pads or len(self.new[row]) + self.prompt.shape[1] >= self.limit:
            return True
        return None not in self.met and len(self.new[row]) >= max(self.met)  # type: ignore[type-var]

    def history(self, row: int, device: torch.device) -> Tensor:
        return torch.cat([self.prompt[row].to(device), torch.tensor(self.new[row], dtype=torch.long, device=device)])

    def fresh(self, row: int) -> list[int]:
        """Tokens of a row since the last call."""
        tokens = self.new[row][self.streamed :]
        self.streamed = len(self.new[row])
        return tokens

    def lengths(self) -> list[int]:
        longest = max(met or 0 for met in self.met)
        return [len(row[: met if self.pads else longest]) for row, met in zip(self.new, self.met, strict=True)]

    def output(self, pad: Tensor | None) -> Tensor:
        """[B, prompt + longest row], as transformers returns it."""
        lengths = self.lengths()
        fill = int(pad) if pad is not None else 0
        rows = [row[:n] + [fill] * (max(lengths) - n) for row, n in zip(self.new, lengths, strict=True)]
        return torch.cat([self.prompt, torch.tensor(rows, dtype=self.prompt.dtype, device=self.prompt.device)], 1)


class Scores:
    """transformers' logits processors over several positions of rows at different places."""

    def __init__(self, processors: Any, sampled: bool, generator: torch.Generator | None) -> None:
        self.processors, self.sampled, self.generator = processors, sampled, generator
        self.pointwise = all(type(one).__name__ in POINTWISE for one in processors)

    def __call__(
        self,
        logits: Tensor,
        stops: Stops,
        rows: list[int],
        drafts: list[Tensor],
        every: bool = False,
        paths: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Scores in float32, as transformers makes them.

        Args:
            logits: [B, K, V].
            drafts: candidates so far, each [B]; position k follows the first k of them where `every`, else all.
            paths: the candidates that each position follows, where these are a tree.
        """
        logits = logits.to(torch.float32, copy=len(self.processors) > 0)
        if not self.processors:
            return logits
        if self.pointwise:
            flat = logits.reshape(-1, logits.shape[-1])
            return self.processors(flat.new_zeros(len(flat), 1, dtype=torch.long), flat).view(logits.shape)
        chain = torch.stack(drafts, 1) if drafts else None
        made, rows_all = torch.empty_like(logits), len(stops.new)
        for place, row in enumerate(rows):
            history = stops.history(row, logits.device)
            for k in range(logits.shape[1]):
                path = range(k if every else len(drafts)) if paths is None else paths[k]
                ids = history if chain is None else torch.cat([history, chain[place, list(path)]])
                # some processors know the batch: each row is asked about in a batch of itself, in its own place
                scores = logits[place, k].expand(rows_all, -1).clone()
                made[place, k] = self.processors(ids.expand(rows_all, -1), scores)[row]
        return made
