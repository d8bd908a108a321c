"""The one exception users see: what was asked, found and allowed, and what to do.

Raised before weights are loaded, with two exceptions: a rank's weights did not arrive where they
should, and a fetch that fails while serving.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BalancerError(ValueError):
    """What vllm-balance refuses."""


def unknown(what: str, found: str, allowed: Iterable[str]) -> str:
    """What to say of a name that does not exist: the nearest one, and all that do."""
    allowed = list(allowed)
    near = difflib.get_close_matches(found.lower(), allowed, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {found!r}.{hint} Allowed: {', '.join(allowed)}."
