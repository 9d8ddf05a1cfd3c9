"""Switching dropout off in a model that trains, however its modules spell it."""

from torch import nn

from hasten.hosts.changes import Changes

# Attributes that torch's and transformers' modules read a probability of dropout from as they run.
_NAMES = ("p", "dropout", "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "resid_dropout",
          "embd_dropout", "dropout_prob", "dropout_p", "dropout_rate", "attn_drop_rate", "drop_rate", "drop_prob",
          "activation_dropout", "classifier_dropout", "layerdrop")  # fmt: skip


def dropout_off(model: nn.Module, changes: Changes) -> dict[str, float]:
    """Sets every probability of dropout in the model to 0; undone with `changes`.

    A probability is an attribute of a known name that is a number above 0 and at most 1; `p` counts on modules whose
    class is named after dropout (`Dropout2d`, `StochasticDepth`, ...) only.

    Returns:
        path of each attribute that was changed, and what it was.
    """
    found = {}
    for path, module in model.named_modules():
        kind = type(module).__name__.lower()
        for name in _NAMES:
            value = vars(module).get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                continue
            if name == "p" and not ("drop" in kind or "stochasticdepth" in kind):
                continue
            changes.set(module, name, 0.0)
            found[f"{path}.{name}".lstrip(".")] = float(value)
    return found
