"""The draft-verify-accept loop, run by transformers' `generate` in the place of its own decoding loop.

In a round a proposer drafts N candidates for every row, a chain or a tree, and one pass of the target checks all of
them; each row keeps its own number. transformers prepares the inputs, the logits processors and the stopping criteria,
so that these mean what they mean there; its per-step machinery is left out.

Letters: B rows, N candidates, V vocabulary.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from hasten.decode._checks import check_cache, check_context, check_request
from hasten.decode._proposals import Proposal
from hasten.decode._rows import Rows
from hasten.decode._stops import Scores, Stops


@dataclasses.dataclass
class Counters:
    """What one call of generate did.

    Attributes:
        tokens: kept in the output, over all rows.
        drafted, accepted: candidates of rows that were still running.
        accepted_at: how many candidates at each place of a chain, or depth of a tree, were accepted; `drafted_at`: were
            drafted.
        rounds, target_passes, draft_passes: a pass serves all rows.
        seconds: wall time by part (draft, verify, accept); on a GPU the time to launch the work, not to do it.
    """

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    target_passes: int = 0
    draft_passes: int = 0
    drafted_at: list[int] = dataclasses.field(default_factory=list)
    accepted_at: list[int] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"draft": 0.0, "verify": 0.0, "accept": 0.0})

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)

    def add(self, places: list[int], accepted: list[int]) -> None:
        """One round: candidates at each place, over all running rows, and how many each row accepted."""
        self.rounds += 1
        self.drafted += sum(places)
        self.accepted += sum(accepted)
        while len(self.drafted_at) < len(places):
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for place, drafted in enumerate(places):
            self.drafted_at[place] += drafted
            self.accepted_at[place] += sum(count > place for count in accepted)


class Drafter(nn.Module):
    """The small model, if any, and whatever a method learnt; a submodule of the target: they travel together."""

    def __init__(self, model: nn.Module | None, learnt: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.learnt = learnt


@dataclasses.dataclass
class Request:
    """One call of generate, checked and prepared.

    Attributes:
        ids: the prompt [B, T], left-padded; `mask`: which tokens are real, as the caller gave it, or None.
        cache: transformers' cache of the target, perhaps with tokens of the prompt in it.
    """

    spec: "Speculation"
    model: Any
    ids: Tensor
    mask: Tensor | None
    cache: Any
    scores: Scores
    stops: Stops
    streamer: Any

    @property
    def counters(self) -> Counters:
        return self.spec.counters


class Speculation:
    """A method with its draft: what `generate(custom_generate=...)` calls. `counters` are those of the latest call."""

    def __init__(self, method: Any, drafter: Drafter) -> None:
        self.method, self.drafter, self.counters = method, drafter, Counters()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generates.

        Args:
            input_ids: [B, T], left-padded.
            streamer: for one row; transformers drops its own before it calls, so `generate` binds it here.
            generator: for every draw of a sampled generation.

        Raises:
            UsageError: the request is no greedy or sampled generation of a plain text model.
        """
        check_request(model, input_ids, generation_config, streamer, model_kwargs)
        cache = model_kwargs["past_key_values"]
        check_cache(cache, type(model).__name__)
        self.counters = Counters()
        stops = Stops(stopping_criteria, input_ids)
        check_context(model, stops.limit, "model")
        if self.drafter.model is not None:
            check_context(self.drafter.model, stops.limit, "draft")
        # a cache that outlives the call must not hold inference tensors
        foreign = generation_config.return_dict_in_generate or cache.get_seq_length() > 0
        with torch.no_grad() if foreign else torch.inference_mode():
            scores = Scores(logits_processor, generation_config.do_sample, generator)
            mask = model_kwargs.get("attention_mask")
            run = self.method.run(Request(self, model, input_ids, mask, cache, scores, stops, streamer))
            try:
                run.all()
            finally:
                run.close()
        out = stops.output(generation_config._pad_token_tensor)
        self.counters.tokens = sum(stops.lengths())
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return out
        from transformers.generation import GenerateDecoderOnlyOutput

        if len(input_ids) == 1 and run.target.slots > out.shape[1] - 1:
            cache.crop(out.shape[1] - 1 - run.target.slots)
        return GenerateDecoderOnlyOutput(sequences=out, past_key_values=cache if len(input_ids) == 1 else None)


class Run:
    """One call: where the target is in each row, what it has yet to read, and who proposes.

    Attributes:
        rows: the running rows' places in the person's batch.
        ids, real: the prompt [B, T] on the target's device and which of its tokens are real, None where all are.
        unread: tokens that the target has yet to read [B, w], and which of them are real.
        limit: tokens that a row may have in the end; `width`: the widest pass after the prompt.
    """

    def __init__(self, request: Request) -> None:
        from transformers import DynamicCache

        self.request, self.spec, self.scores, self.stops = request, request.spec, request.scores, request.stops
        self.method, self.counters, cache = request.spec.method, request.spec.counters, request.cache
        device = next(request.model.parameters()).device
        ids = request.ids.to(device)
        real = None if request.mask is None else request.mask.to(device).bool()
        plain = type(cache) is DynamicCache
        if real is not None and len(ids) == 1 and plain:
            ids, real = ids[:, real[0]], None  # one padded row is a shorter row
        self.ids, self.real, self.limit, self.width = ids, real, self.stops.limit, self.method.widest + 2
        past = cache.get_seq_length()
        self.target = Rows(request.model, cache, limit=self.limit, width=self.width, watch=self.method.watches_target)
        self.unread = (ids[:, past:], real)
        # a cache that chooses what it keeps should see the prompt alone, not the first candidates
        self.prefill = not plain and past == 0
        self.rows = list(range(len(ids)))
        self.proposer = self.method.proposer(self)

    def all(self) -> None:
        while self.rows:
            self.round()
        self.counters.target_passes, self.counters.draft_passes = self.target.passes, self.proposer.passes

    def round(self) -> None:
        most = 0 if self.prefill else min(self.method.longest, self.stops.left(self.rows) - 1)
        self.prefill = False
        started = time.perf_counter()
        proposal = self.proposer.propose(most)
        drafted = time.perf_counter()
        logits = self.verify(proposal)
        verified = time.perf_counter()
        self.settle(proposal, logits)
        spent = self.counters.seconds
        spent["draft"] += drafted - started
        spent["verify"] += verified - drafted
        spent["accept"] += time.perf_counter() - verified

    def verify(self, proposal: Proposal) -> Tensor:
        """The target's logits after the last token and after every candidate, [B, N + 1, V]."""
        ids, real = self.unread
        if real is not None and proposal.size:
            real = torch.cat([real, real.new_ones(proposal.tokens.shape)], 1)
        return self.target.step(torch.cat([ids, proposal.tokens], 1), real, proposal.size + 1, proposal.tree)

    def settle(self, proposal: Proposal, logits: Tensor) -> None:
        """Accepts, tells the rows their tokens, takes back what was refused, and lets finished rows go."""
        candidates = list(proposal.tokens.unbind(1))
        tree = proposal.tree
        paths = None if tree is None else [(), *tree.paths]
        scores = self.scores(logits, self.stops, self.rows, candidates, every=True, paths=paths)
        verdict = self.method.accept(scores, proposal, self.scores)
        told = torch.cat([verdict.accepted[:, None], verdict.tokens], 1).tolist()  # the round's one synchronisation
        accepted = verdict.told = [row[0] for row in told]
        lengths = proposal.lengths or [proposal.size] * len(accepted)
        self.counters.add(self._places(proposal), [min(pair) for pair in zip(accepted, lengths, strict=True)])
        for row, (count, *new) in zip(self.rows, told, strict=True):
            self.stops.tell(row, new[: count + 1])
        if self.request.streamer is not None:
            self.request.streamer.put(torch.tensor(self.stops.fresh(self.rows[0])))
        self.unread = (verdict.last, None)
        if tree is not None:
            self.target.keep_path(verdict.path, verdict.accepted, accepted, proposal.size)
        else:
            most, ragged = max(accepted), max(accepted) != min(accepted)
            kept = self.target.order[: proposal.size] < verdict.accepted[:, None] if ragged else None
            self.target.keep(kept, proposal.size - most)
        self.proposer.settle(proposal, verdict)
        going = [place for place, row in enumerate(self.rows) if not self.stops.finished(row)]
        if going and len(going) < len(self.rows):
            self.release(torch.tensor(going, device=verdict.tokens.device))
        self.rows = [self.rows[place] for place in going]

    def _places(self, proposal: Proposal) -> list[int]:
        rows = len(self.rows)
        if proposal.tree is not None:
            depths = proposal.tree.depth_list
            return [depths.count(depth) * rows for depth in range(max(depths, default=-1) + 1)]
        if proposal.lengths is None:
            return [rows] * proposal.size
        return [sum(length > place for length in proposal.lengths) for place in range(proposal.size)]

    def release(self, going: Tensor) -> None:
        """Takes finished rows out of the batch."""
        self.target.select(going)
        self.proposer.select(going)
        ids, real = self.unread
        self.unread = (ids[going], None if real is None else real[going])

    def close(self) -> None:
        self.target.close()
        self.proposer.close()
