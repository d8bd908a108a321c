"""The one exception users see: what was asked, found and allowed, and what to do.

A server raises it as early as it can know: when its configuration is made, in a worker before the
model is built, or while it is. What only loaded weights show is refused behind them, before the
first request: where they went, how large experts are, which kernel computes them, whether a host
store finds memory. While serving it answers what is asked for then (reloaded weights, sleep, a
recording or a replay that cannot be), and says that a fetch failed. Commands raise it for their
arguments and files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RAISED = "Value error, "
"""What pydantic puts before the words of an error that a validator of ours raises."""


class BalancerError(ValueError):
    """What vllm-balance refuses."""


def unknown(what: str, found: str, allowed: Iterable[str]) -> str:
    """What to say of a name that does not exist: the nearest one, and all that do."""
    allowed = list(allowed)
    near = difflib.get_close_matches(found.lower(), allowed, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {found!r}.{hint} Allowed: {', '.join(allowed)}."
