"""constrained-lm: JSON records after prompts of the standard library, each text one that the schema takes.

A plan that constrains by itself (`decode/awrs`) writes under its own constraint. Any other arm, and so the baseline,
masks tokens: at every step every byte is checked, and those that are refused get no chance. `masks=kept` lets it keep
each state's mask for all later steps and requests, which is as good as masking gets where states come again.

Texts are sampled from the whole distribution, with a seed that each request names; with a batch of one, rejection and
masking then write the same text. Quality is the mean of the bits that the plain model gives each byte of a text, 8 for
one that is cut off or that the schema does not take: what is likelier to the model that was asked is better.
"""

import dataclasses
import json
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.core.options import option
from hasten.decode._constraints import Constraint
from hasten.decode._json_schema import Schema, read_schema
from hasten.workloads import language
from hasten.workloads.base import Metric, Workload
from hasten.workloads.stdlib_lm import StdlibLM

RECORD = (
    '{"properties": {"name": {"type": "string", "maxLength": 24}, "line": {"type": "integer"}, '
    '"kind": {"enum": ["function", "class"]}}, "required": ["name", "line", "kind"], "additionalProperties": false}'
)
CUE = b"\nrecord = "
WRONG = 8.0  # bits per byte of a text that is no answer, as of one that the model knows nothing about


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts [batch, tokens] and the seed of what is written after them."""

    prompts: Tensor
    seed: int


@dataclasses.dataclass(frozen=True)
class ConstrainedLM(Workload):
    task: str = option("write", "what is done", choices=("write",))
    schema: str = option(RECORD, "the JSON schema of an object, inline or a file")
    masks: str = option("made", "masks of arms that mask: made at each step, or kept", choices=("made", "kept"))
    prompt: int = option(192, "bytes of a prompt, the cue that ends it included", least=16)
    new: int = option(96, "most bytes of a text", least=2)
    batch: int = option(8, "prompts in one request", least=1, most=256)
    examples: int = option(48, "texts that quality is measured on", least=2, most=4096)

    @classmethod
    def title(cls) -> str:
        return "constrained-lm"

    @property
    def metric(self) -> Metric:
        return Metric("bits per byte of valid text", "lower", "bit")

    def problems(self) -> list[str]:
        if self.prompt + self.new > self._lm().context:
            return [f"prompt and new together are at most {self._lm().context} bytes, the model's context"]
        try:
            schema = read_schema(self.schema)
            Schema(schema)
        except UsageError as problem:
            return [str(problem)]
        if not isinstance(schema, dict) or "properties" not in schema:
            return ["the schema is one of an object, with properties: other values do not say where they end"]
        return []

    def tasks(self) -> tuple[str, ...]:
        return ("write",)

    def _lm(self) -> StdlibLM:
        return StdlibLM()

    def constraint(self) -> Schema:
        return Schema(read_schema(self.schema))

    def trained(self) -> nn.Module:
        return self._lm().trained()

    def draft(self) -> nn.Module | None:
        return self._lm().draft()

    def calibration(self) -> list[dict[str, Tensor]]:
        return self._lm().calibration()

    def requests(self, seed: int) -> list[Asked]:
        return self._asked(16, self.batch, 1000 + seed)

    def _asked(self, count: int, batch: int, seed: int) -> list[Asked]:
        cue = torch.tensor(list(CUE)).expand(count * batch, -1)
        rows = language.spread_windows(self._lm().tokens(True), count * batch, self.prompt - len(CUE), seed)
        prompts = torch.cat([rows, cue], 1).to(self.device()).split(batch)
        return [Asked(part, seed + n) for n, part in enumerate(prompts)]

    def serve(self, handle: Any, request: Asked) -> Tensor:
        """The texts [batch, longest], zeros after each end."""
        prompts = request.prompts
        options: dict[str, Any] = {"max_new_tokens": self.new, "do_sample": True, "top_k": 0}
        if not any(getattr(method, "constrains", False) for method in handle.plan.methods):
            options |= masking(self._masks(handle), prompts.shape[1])
        with torch.random.fork_rng(devices=[prompts.device] if prompts.is_cuda else []):
            torch.manual_seed(request.seed)
            out = handle.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return out[:, prompts.shape[1] :]

    def _masks(self, handle: Any) -> "Masks":
        kept = vars(handle).get("_masks")
        if kept is None or self.masks == "made":
            kept = Masks(self.constraint(), self.masks == "kept")
            vars(handle)["_masks"] = kept
        return kept

    def quality(self, handle: Any) -> np.ndarray:
        checker, judge, found = self.constraint(), self.trained(), []
        for asked in self._asked(self.examples, 1, 29):
            text = bytes(self.serve(handle, asked)[0].tolist()).rstrip(b"\0")
            if not (checker.fits(text) and is_json(text)):
                found.append(WRONG)
                continue
            new = torch.tensor([list(text)], device=asked.prompts.device)
            ids = torch.cat([asked.prompts, new[:, :-1]], 1)
            with torch.inference_mode():
                logits = judge(input_ids=ids, use_cache=False, logits_to_keep=len(text)).logits.float()
            bits = nn.functional.cross_entropy(logits[0], new[0]) * language.NATS_TO_BITS
            found.append(bits.item())
        return np.asarray(found)


class Masks:
    """Which bytes may follow a text, as a row of a mask; states of texts are remembered, masks only if `kept`."""

    def __init__(self, constraint: Constraint, kept: bool) -> None:
        self.constraint, self.kept = constraint, kept
        self.states: dict[bytes, Any] = {b"": constraint.start()}
        self.rows: dict[Hashable, Tensor] = {}
        self.checks = 0

    def state(self, text: bytes) -> Any:
        if text not in self.states:
            before = self.state(text[:-1])
            self.states[text] = None if before is None else self.constraint.step(before, text[-1])
        return self.states[text]

    def row(self, text: bytes) -> Tensor:
        """[256], True for bytes that are refused; none where the text is over."""
        state = self.state(text)
        if state is None or self.constraint.closed(state):
            return torch.zeros(256, dtype=torch.bool)
        if state in self.rows:
            return self.rows[state]
        self.checks += 256
        row = torch.tensor([self.constraint.step(state, byte) is None for byte in range(256)])
        if self.kept:
            self.rows[state] = row
        return row

    def over(self, text: bytes) -> bool:
        state = self.state(text)
        return state is None or self.constraint.closed(state)


def masking(masks: Masks, width: int) -> dict[str, Any]:
    """What makes transformers' `generate` mask: a logits processor, and a criterion that ends whole texts."""
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    class Mask(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            rows = torch.stack([masks.row(bytes(text)) for text in ids[:, width:].tolist()])
            return scores.masked_fill(rows.to(scores.device), -torch.inf)

    class Whole(StoppingCriteria):
        eos_token_id = torch.tensor([-1])  # transformers pads rows that are done where a criterion has this

        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Any:
            return torch.tensor([masks.over(bytes(text)) for text in ids[:, width:].tolist()], device=ids.device)

    return {
        "logits_processor": LogitsProcessorList([Mask()]),
        "stopping_criteria": StoppingCriteriaList([Whole()]),
        "pad_token_id": 0,
    }


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


WORKLOAD = ConstrainedLM
