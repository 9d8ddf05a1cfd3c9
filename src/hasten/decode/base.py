"""Decoding: which tokens are drafted, verified and accepted.

Every method is a `Decoding`, with the verbs `install` and `restore`. Most are one of three kinds:

- `Drafting` (`_drafting.py`): a drafter proposes, the target checks all candidates in one pass, a rule accepts. Its
  verbs say who proposes, and how, and what is accepted; the loop and the caches are the same for all (`_loop.py`,
  `_rows.py`). A method that decodes in another way, but a token after another, brings a loop of its own (`run`).
- `Denoising` (`_denoising.py`): masked- and block-diffusion language models, which fill in several tokens at once.
- others change the model or its scores, and the loop is whichever is there.

Any batch size; every row accepts its own number of tokens. A method whose card says `lossless` gives greedy generation
the target's own tokens, and sampled generation the target's own distribution.
"""

import dataclasses
from typing import Any

from torch import Tensor

from hasten.core.errors import UsageError
from hasten.decode._decoding import Decoding
from hasten.decode._drafting import Drafting
from hasten.decode._loop import Counters, Speculation
from hasten.hosts.context import Context

__all__ = [
    "Counters",
    "Decoding",
    "Drafting",
    "Generated",
    "Speculation",
    "generated",
    "install",
    "restore",
    "speculation",
]


@dataclasses.dataclass
class Generated:
    """What `hasten.generate` returns: tokens [batch, prompt + new] as transformers pads them, and counters."""

    tokens: Tensor
    counters: Counters


def install(method: Decoding, host: Any, context: Context) -> dict[str, Any]:
    """Puts a method on a host.

    Raises:
        UsageError: it can't work there; nothing is changed then.
    """
    return method.install(host, context)


def restore(method: Decoding, host: Any, record: dict[str, Any]) -> None:
    """The same from `install`'s record, with weights that are still to be loaded."""
    method.restore(host, record)


def generated(host: Any, inputs: Any, **options: Any) -> Generated:
    """Generates with whatever is installed.

    Args:
        inputs: token ids [batch, tokens], or a dict with `input_ids` and perhaps `attention_mask`.
        options: those of transformers' `generate`, and `seed` or `generator` where a decode method is installed.

    Raises:
        UsageError: the model has no `generate`, or can't serve the request.
    """
    if not hasattr(host.model, "generate"):
        name = type(host.model).__name__
        raise UsageError(f"{name} has no generate: use the class with a language-model head (a CausalLM)")
    given = dict(inputs) if not isinstance(inputs, Tensor) else {"input_ids": inputs}
    out = host.model.generate(**given, **options)
    tokens = out if isinstance(out, Tensor) else out.sequences
    spec = speculation(host)
    if spec is not None:
        return Generated(tokens, spec.counters)
    passes = tokens.shape[1] - given["input_ids"].shape[1]
    return Generated(tokens, Counters(tokens=passes * len(tokens), target_passes=passes))


def speculation(host: Any) -> Speculation | None:
    """The installed loop, with the counters of its latest call; also a callable for `generate(custom_generate=...)`."""
    return getattr(host, "speculation", None)
