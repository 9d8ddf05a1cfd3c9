"""Methods that draft: behind `model.generate` stands the loop, with the method's proposer and its rule of acceptance.

`install` puts the loop there. It also puts the draft, with what the method learnt, into the model as its submodule
`drafter`: both move, load and save together.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.decode._checks import check_cache
from hasten.decode._decoding import Decoding
from hasten.decode._loop import Drafter, Request, Run, Speculation
from hasten.decode._proposals import Proposal, Proposer, SmallModel, Verdict
from hasten.decode._sampling import accept, accept_greedy, accept_tree, draw, exponential
from hasten.decode._stops import Scores
from hasten.hosts.base import Host
from hasten.hosts.context import Context


class Drafting(Decoding):
    """Base of methods that propose and verify.

    By default a small model drafts a chain, and what is accepted leaves the output's law as it is: with drawn
    candidates by arXiv 2211.17192 (section 2 and appendix A.1), with chosen ones because the target's own choice is
    made at each place and compared.
    """

    watches = False
    """Whether `stop` is asked; it costs the draft's last hidden state at every token."""
    watches_target = False
    """Whether `run.target.hiddens` is kept: what the target's output layer reads at each position of a pass."""

    @property
    def longest(self) -> int:
        """The most tokens of one draft that follow each other; 0 where nothing is drafted."""
        raise NotImplementedError

    @property
    def widest(self) -> int:
        """The most candidates of one draft."""
        return self.longest

    def run(self, request: Request) -> Run:
        """The loop of one call of generate."""
        return Run(request)

    def proposer(self, run: Run) -> Proposer:
        """Who drafts in one call."""
        return SmallModel(run, run.spec.drafter.model)  # type: ignore[arg-type]

    def accept(self, scores: Tensor, proposal: Proposal, how: Scores) -> Verdict:
        """What is accepted of a round's candidates.

        Args:
            scores: the target's processed scores after the last token and after every candidate, [B, N + 1, V].
            how: whether it is sampled, and by which generator.
        """
        if how.sampled and proposal.q is not None and proposal.tree is None:
            p_BKV = scores.softmax(-1)
            u_BK = torch.rand(proposal.tokens.shape, device=p_BKV.device, generator=how.generator)
            return Verdict(*accept(p_BKV, proposal.q, proposal.tokens, u_BK, exponential(p_BKV[:, 0], how.generator)))
        choice = draw(scores.softmax(-1), how.generator) if how.sampled else scores.argmax(-1)
        if proposal.tree is not None:
            return Verdict(*accept_tree(choice, proposal.tokens, proposal.tree))
        return Verdict(*accept_greedy(choice, proposal.tokens))

    def stop(self, learnt: Any, hidden_BD: Tensor, survived_B: Tensor | None, step: int) -> tuple[Tensor, bool]:
        """Whether the draft ends with the token that the current pass gives.

        Args:
            learnt: what `learn` made.
            hidden_BD: the draft's last hidden state at the previous candidate.
            survived_B: what the call before this one returned, None at the first.
            step: candidates drafted, the one of this pass included; from 2, as the first pass reads no candidate.
        """
        raise NotImplementedError

    def learn(self, host: Any, draft: Any, context: Context) -> nn.Module | None:
        """Fits whatever the method needs to know about these models; its time is charged as set-up."""
        return None

    def blank(self, host: Any, draft: Any) -> nn.Module | None:
        """What `learn` returns, before learning: weights are loaded into it."""
        return None

    def draft_of(self, host: Any, context: Context) -> tuple[nn.Module | None, dict[str, Any]]:
        """The draft model, if any, and a record from which `rebuild` makes it."""
        from hasten.hosts.records import record_of

        if "draft" not in self.card.needs:
            return None, {}
        return context.draft, {"draft": record_of(context.draft)}  # type: ignore[arg-type]

    def rebuild(self, host: Any, record: dict[str, Any]) -> nn.Module | None:
        """The draft's architecture from `draft_of`'s record."""
        from hasten.hosts.records import rebuild

        return rebuild(record["draft"]) if "draft" in record else None

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Puts the loop behind `model.generate`.

        Raises:
            UsageError: there is no draft, or it doesn't fit the model; nothing is changed then.
        """
        check(self, host, context.draft)
        draft, record = self.draft_of(host, context)
        _put(self, host, Drafter(draft, self.learn(host, draft, context)))
        return record

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        draft = self.rebuild(host, record)
        _put(self, host, Drafter(draft, self.blank(host, draft)))


def _put(method: Drafting, host: Any, drafter: Drafter) -> None:
    changes, training = host.changes, [part for part in drafter.modules() if part.training]
    drafter.eval()
    changes.call(functools.partial(_train, training))
    changes.set(host.model, "drafter", drafter)
    spec = Speculation(method, drafter)
    changes.set(host, "speculation", spec)
    host.wrap_generate(functools.partial(_generate, spec, host))


def _train(parts: list[nn.Module]) -> None:
    for part in parts:
        part.training = True


def _generate(spec: Speculation, host: Any, inner: Any, *args: Any, **options: Any) -> Any:
    """`model.generate` with drafting; takes `seed` or `generator` beside transformers' own arguments."""
    if options.get("custom_generate") is not None:
        return inner(*args, **options)
    if options.get("assistant_model") is not None:
        raise UsageError("this model drafts already: leave out assistant_model, or undo the decode method")
    options = dict(zip(_names(type(host.model)), args, strict=False)) | options
    generator, seed = options.pop("generator", None), options.pop("seed", None)
    if generator is not None and seed is not None:
        raise UsageError("give a seed or a generator, not both")
    if seed is not None:
        generator = torch.Generator(host.device).manual_seed(seed)
    _take_stop_strings(host.model, options)
    bound = functools.partial(spec, streamer=options.get("streamer"), generator=generator)
    return inner(**options, custom_generate=bound)


@functools.cache
def _names(kind: type) -> list[str]:
    return list(inspect.signature(kind.generate).parameters)[1:]  # type: ignore[attr-defined]


def _take_stop_strings(model: Any, options: dict[str, Any]) -> None:
    """Makes stop strings a criterion here: transformers drops the tokenizer on its way to a custom loop."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    config = options.get("generation_config")
    strings = options.get("stop_strings") or getattr(config or model.generation_config, "stop_strings", None)
    tokenizer = options.pop("tokenizer", None)
    if not strings:
        return
    if tokenizer is None:
        raise UsageError("stop_strings need the tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)")
    if options.pop("stop_strings", None) is None:
        options["generation_config"] = config = copy.deepcopy(config or model.generation_config)
        config.stop_strings = None
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), criterion])


def check(method: Drafting, host: Host, draft: Any) -> None:
    """Raises UsageError where the pair of models can't draft and verify."""
    who = method.name
    if host.kind != "decoder":
        raise UsageError(f"{who} needs a decoder that generates text; this host is a {host.kind}")
    if hasattr(host.model, "drafter"):
        raise UsageError(f"{who}: a decode method is installed on this model already: undo it first")
    if "draft" not in method.card.needs:
        _check_model(f"{who}: the model {type(host.model).__name__}", host.model)
        return
    if draft is None:
        raise UsageError(f"{who} needs a draft: pass draft=, a small model with the same vocabulary")
    if draft is host.model:
        raise UsageError(f"{who}: the draft is the model itself: pass a smaller model")
    for name, model in (("model", host.model), ("draft", draft)):
        _check_model(f"{who}: the {name} {type(model).__name__}", model)
    sizes = [model.config.get_text_config().vocab_size for model in (host.model, draft)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{who}: the model has a vocabulary of {sizes[0]} tokens and the draft one of {sizes[1]}: give one with "
            "the same tokenizer; where only the padding after the same tokens differs, "
            f"draft.resize_token_embeddings({sizes[0]}) makes them equal"
        )
    ends = [model.config.get_text_config().eos_token_id for model in (host.model, draft)]
    if None not in ends and not set(_listed(ends[0])) & set(_listed(ends[1])):
        raise UsageError(
            f"{who}: the model ends a text with token {ends[0]} and the draft with {ends[1]}, so their tokenizers "
            "differ: give a draft with the same one (or set draft.config.eos_token_id, if it is only wrong)"
        )
    devices = [next(model.parameters()).device for model in (host.model, draft)]
    if devices[0] != devices[1]:
        raise UsageError(f"{who}: the model is on {devices[0]} and the draft on {devices[1]}: move the draft")


def _listed(tokens: Any) -> list[int]:
    return list(tokens) if isinstance(tokens, list | tuple) else [tokens]


def _check_model(who: str, model: Any) -> None:
    from transformers import DynamicCache

    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "generate"):
        raise UsageError(f"{who} is no transformers model that generates: drafting needs one")
    if config.is_encoder_decoder:
        raise UsageError(f"{who} is an encoder-decoder: drafting needs a decoder-only model")
    takes = inspect.signature(model.forward).parameters
    missing = [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in takes]
    if missing or getattr(model, "_is_stateful", False):
        lacks = " and no ".join(missing or ["rollback of its state"])
        raise UsageError(f"{who} takes no {lacks}: drafting needs a model with a plain key-value cache")
    check_cache(DynamicCache(config=config), who)
