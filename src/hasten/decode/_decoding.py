"""What every decode method is: something that can be put on a host, and put on it again from its record."""

from typing import Any

from hasten.core.options import Method
from hasten.hosts.context import Context


class Decoding(Method):
    """Base of the family's methods. `Drafting` and `Denoising` give both verbs; a method without a loop has its own."""

    def install(self, host: Any, context: Context) -> dict[str, Any]:
        """Changes the host through `host.changes`; returns what `restore` needs, JSON-able.

        Raises:
            UsageError: the method can't work on this host; nothing is changed then.
        """
        raise NotImplementedError

    def restore(self, host: Any, record: dict[str, Any]) -> None:
        """The same from `install`'s record, with weights that are still to be loaded."""
        raise NotImplementedError
