"""The errors that a person sees: each says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class HastenError(Exception):
    """Anything that Hasten itself reports; the command line prints its text without a traceback."""


class UsageError(HastenError, ValueError):
    """What was asked for cannot be: a wrong name, option, value or combination. Exit code 2."""


class MissingDependencyError(HastenError, ImportError):
    """A package outside the core dependencies is needed and not installed."""

    def __init__(self, package: str, extra: str | None = None) -> None:
        install = f'pip install "hasten[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{package} is needed for this and is not installed: {install}")


class PlanError(UsageError):
    """All problems of one plan at once.

    Attributes:
        problems: one sentence each, in the order of the plan.
    """

    def __init__(self, problems: Iterable[str], plan: str = "") -> None:
        self.problems = list(problems)
        of = f" of the plan {plan!r}" if plan else ""
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            listed = "\n".join(f"  {n}. {problem}" for n, problem in enumerate(self.problems, 1))
            text = f"{len(self.problems)} problems{of}:\n{listed}"
        super().__init__(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that begins so, else the one that is nearest, or an empty string."""
    words = list(known)
    begun = sorted((one for one in words if len(word) > 1 and one.startswith(word)), key=len)
    found = begun or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
